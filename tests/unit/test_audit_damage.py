"""The audit of a run whose journal is damaged: what a lost record may explain is left open, and never called wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from neox_rl.queue.consumption import Trained
from neox_rl.queue.journal import LEDGER, open_journal, read_journal
from neox_rl.queue.records import Record, payload_of, scan
from neox_rl.run.audit import Audit
from tests.contracts.test_floors import tool
from tests.unit.audited_run import CURSORS, RULE, good, second_trainer, state_after, written

main = tool("audit").main


@pytest.mark.parametrize("length", [1, 2, 3])
def test_no_record_that_is_lost_makes_others_a_violation(length: int) -> None:
    """Whichever it is, also a trainer's hello, behind which all happens a second time; and those that lie beside it."""
    for first in range(1, len(good().records)):
        run = good()
        gone = run.records[first : first + length]
        del run.records[first : first + length]
        assert run.audit(damaged=True).violations == [], gone


def test_one_flipped_byte_never_makes_the_command_say_violation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 3 where the record is missed, 0 where others say the same."""
    root = written(tmp_path)
    ledger = root / "journal" / LEDGER
    whole, at, found = ledger.read_bytes(), 0, dict[str, set[int]]()
    for record in scan(LEDGER, whole):
        assert isinstance(record, Record)
        at = whole.index(f'"kind":"{record.kind}"'.encode(), at + 1)
        data = bytearray(whole)
        data[at] ^= 1
        ledger.write_bytes(data)
        status = main([str(root)])
        assert status in (0, 3), capsys.readouterr().out
        found.setdefault(record.kind, set()).add(status)
    assert all(3 in found[kind] for kind in ("taken", "session", "published")), found


@pytest.mark.parametrize("hit", [b'"phase":"rl","step":2', b'"session":"s","attempt":2', b'"version":3'])
def test_damage_of_a_segment_that_shrinks_to_its_entries_in_the_ledger_is_not_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hit: bytes
) -> None:
    root = written(tmp_path, hit)
    assert read_journal(root / "journal").has_holes
    assert main([str(root)]) == 3
    said = capsys.readouterr().out
    assert "journal: 1 records are missing" in said and "UNDECIDED: " in said and "VIOLATION" not in said


def test_a_segment_that_lost_its_beginning_and_shrinks_to_its_entries_does_not_look_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system that zeroes the first block: the hello and the publication of v0 are gone, and step 1 trained tokens of v0."""
    root = written(tmp_path, lost=b'"version":0')
    assert read_journal(root / "journal").has_holes
    assert main([str(root)]) == 3
    said = capsys.readouterr().out
    assert "journal: 4 records are missing" in said and "UNDECIDED: " in said and "VIOLATION" not in said


def test_a_run_whose_journal_was_moved_away_is_undecided_and_not_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``journal.check_format`` advises for that of another release: the trainer's hello is the first that the new one has."""
    root = written(tmp_path)
    shutil.rmtree(root / "journal")
    run = good()
    journal, _ = open_journal(root / "journal", 0.01, 1.0)
    for row in run.records[second_trainer(run) :]:
        meta = {key: value for key, value in row.items() if key != "kind"}
        journal.append(payload_of(row["kind"], meta | ({"state": state_after(2)} if row["kind"] == "session" else {})))
    journal.close()
    assert main([str(root)]) == 3
    said = capsys.readouterr().out
    assert "not checked: once: steps 1 to 2: what they took is in no record that is there" in said and "UNDECIDED: 1 finding" in said


@pytest.mark.parametrize(("known", "wrong"), [((0, 2), True), ((2,), False)])
def test_who_takes_over_knows_what_was_published_but_not_what_is_older_than_the_journal(known: tuple[int, ...], wrong: bool) -> None:
    """Tokens of v1: nobody published it between v0 and v2; a journal that was moved away begins with v2, and does not say."""
    heard: list[str] = []
    audit = Audit(RULE, on_violation=lambda check, what: heard.append(what) if check == "policy" else None, living=True)
    begin = {"state": state_after(2), "steps": {"sft": 1, "rl": 2}, "digests": [[v, f"d{v}"] for v in known], "cursor": CURSORS[2]}
    audit.apply(Record(0, "state", begin | {"positions": []}))
    audit.apply(Record(1, "taken", good().of("taken", 3) | {"versions": [{"1": 10}, {"1": 10}], "made": {"1": ["d1"]}}))
    assert heard == ["step 3 trained tokens of v1, which nobody published"] * wrong


def test_a_takeover_does_not_go_through_every_ticket_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trained, "add", None)
    audit, fresh = Audit(RULE, living=True), 10**6
    queue = {"step": 2, "fresh": fresh, "open": [fresh - 2, fresh - 1]}
    begin = {"state": {"queue": queue}, "steps": {"sft": 1, "rl": 2}, "digests": [[2, "d2"]], "cursor": 0, "positions": []}
    audit.apply(Record(0, "state", begin))
    assert len(audit.trained) == fresh - 2 and not audit.trained.num_kept


@pytest.mark.parametrize(("rl_step", "wrong"), [(RULE.num_steps, False), (RULE.num_steps + 1, True)])
def test_who_begins_after_a_step_that_the_run_does_not_have_is_no_proof_of_lost_records(rl_step: int, wrong: bool) -> None:
    audit = Audit(RULE)
    hello = {"session": "s", "attempt": 1, "sft_step": 1, "rl_step": rl_step, "time": 1.0, "state": {}}
    audit.apply(Record(0, "session", hello))
    assert audit.violations == [f"steps: a trainer begins after step {rl_step} of {RULE.num_steps}"] * wrong


@pytest.mark.parametrize("living", [True, False])
@pytest.mark.parametrize("twice", [True, False])
def test_who_goes_back_behind_where_the_records_begin_is_judged_by_the_checkpoint_there(living: bool, twice: bool) -> None:
    """What came between is trained again, and rightly; what that checkpoint has is not."""
    run, heard = good(), list[str]()
    hello = second_trainer(run)
    first = next(i for i, row in enumerate(run.records) if row["kind"] == "published" and row["version"] == 1)
    moved = [run.records[0], run.records[hello] | {"state": state_after(2)}, *run.records[hello + 1 :]]
    back = run.records[hello] | {"attempt": 3, "rl_step": 1, "anew": True, "state": state_after(1)}
    again = run.of("taken", 3) | {"tickets": [0, 6]} if twice else run.of("taken", 3)
    rows = [*moved, back, *run.records[first:hello]]
    rows[len(rows) - rows[::-1].index(run.of("taken", 3)) - 1] = again
    audit = Audit(RULE, living=living, on_violation=lambda check, what: heard.append(f"{check}: {what}"))
    for seq, row in enumerate(rows):
        audit.apply(Record(seq, row["kind"], row))
    assert not audit.damaged and audit.undecided == 1
    assert heard[:1] == ["once: g000000 was trained by step 1 or one before it and again by step 3"] * twice
