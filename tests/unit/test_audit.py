"""The audit: a run that kept its rules passes, every way to break one is found and named; with records gone; from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.load import load_resolved
from neox_rl.engines import checkpoint_files
from neox_rl.errors import StalenessError
from neox_rl.queue.book import Book
from neox_rl.queue.history import History
from neox_rl.queue.journal import LEDGER, open_journal
from neox_rl.queue.records import Record, payload_of
from neox_rl.run.audit import CHECKS, Audit, Session
from neox_rl.run.audit_files import _is_undone, _rows, sft_steps
from neox_rl.run.live_audit import LiveAudit
from neox_rl.run.members import Member, State
from neox_rl.telemetry.events import EventLog, read_events
from tests.contracts.test_floors import tool
from tests.unit.audited_run import BATCHES, CURSORS, OLD, POSITIONS, RULE, Run, good, queue_after, second_trainer, state_after, written
from tests.unit.small_run import rollout_group, small_config, small_paths

main = tool("audit").main


def test_a_run_that_kept_its_rules_passes_and_every_check_has_looked() -> None:
    audit = good().audit()
    assert audit.violations == [] and not any(result.gaps for result in audit.results.values())
    assert {check for check in CHECKS if audit.results[check].checked == 0} == {"summary"}
    assert (audit.num_undone, audit.num_repeated, audit.last, audit.open_tickets()) == (2, 2, 4, [])


def put(record: dict[str, Any], **changes: Any) -> None:
    record |= changes


def take_again(run: Run) -> None:
    put(run.of("taken", 4), tickets=[3, 5])


BROKEN: dict[str, tuple[str, Callable[[Run], None], str]] = {
    "old tokens got gradient": ("bound", lambda r: put(r.rows[4], tokens_masked_stale=0, tokens_trained=25), "step 4: 4 of 25 tokens"),
    "one old token too many got gradient": ("bound", lambda r: put(r.rows[4], tokens_masked_stale=OLD - 1), "3 masked"),
    "the trainer says so itself": ("bound", lambda r: put(r.rows[2], staleness_max=3), "a token 3 steps old was trained, S = 2"),
    "strict: an old token": (
        "bound",
        lambda r: put(r.records[0], rule=replace(RULE, mode="strict").json()),
        "g000003, step 4: 4 tokens of v0 are 3 steps old",
    ),
    "a version before the admission": (
        "admission",
        lambda r: put(r.of("taken", 4), versions=[{"3": 15}, {"0": 10}]),
        "g000007, step 4: 10 tokens of v0",
    ),
    "a version that was not there yet": (
        "admission",
        lambda r: put(r.of("taken", 3), versions=[{"3": 10}, {"2": 10}]),
        "g000005, step 3: 10 tokens of v3",
    ),
    "trained twice": ("once", take_again, "g000005 was trained by step 3 and again by step 4"),
    "never trained": ("once", take_again, "never trained: g000007"),
    "of no run": ("once", lambda r: put(r.of("taken", 4), tickets=[3, 8]), "g000008 was trained by step 4: no ticket of this run"),
    "lost on the way": ("once", lambda r: r.of("taken", 3)["state"]["queue"]["open"].remove(7), "neither open nor trained: g000007"),
    "trained and open": ("once", lambda r: r.of("taken", 3)["state"]["queue"]["open"].append(5), "and trained already: g000005"),
    "a step without a record": ("steps", lambda r: r.drop(r.of("taken", 3)), "step 4 took its batch after step 2"),
    "a step twice": ("steps", lambda r: r.records.append(deepcopy(r.of("taken", 4))), "step 4 took its batch after step 4"),
    "an undone step is not done again": ("steps", lambda r: r.drop(r.of("taken", 4)), "3 of 4 steps took a batch"),
    "of an undone policy": (
        "policy",
        lambda r: put(r.of("taken", 4), made={"3": ["other"]}),
        "tokens of v3 by weights ['other'], published was d3",
    ),
    "of two policies of one number": ("policy", lambda r: put(r.of("taken", 4), made={"3": ["d3", "x"]}), "tokens of v3 by weights"),
    "of nobody's policy": ("policy", lambda r: put(r.of("taken", 2), made={"9": ["d9"]}), "tokens of v9, which nobody published"),
    "other weights on a server": (
        "digests",
        lambda r: r.served.append(("server-1", "s@1", 4, "bad")),
        "server-1 (s@1) serves v4 with digest bad",
    ),
    "live with other weights": ("digests", lambda r: put(r.of("live", 4), digest="bad"), "live is v4 with digest bad, published was d4"),
    "a version made twice": (
        "digests",
        lambda r: r.records.append(r.of("published", 4) | {"digest": "x"}),
        "v4 was published twice by one trainer",
    ),
    "a version before its step": (
        "digests",
        lambda r: r.records.append({"kind": "published", "version": 7, "digest": "x"}),
        "v7 was published after 4",
    ),
    "back within one life": ("versions", lambda r: r.served.append(("server-0", "server-0@b.1", 3, "d3")), "went back from v4 to v3"),
    "a checkpoint of another queue": (
        "checkpoints",
        lambda r: r.saved[2]["open"].remove(3),
        "step2 and the journal disagree on what was trained: g000003",
    ),
    "a checkpoint after the end": (
        "checkpoints",
        lambda r: r.saved.update({6: queue_after(4)}),
        "step6 and the journal",
    ),
    "the trainer saw other tokens": (
        "metrics",
        lambda r: put(r.rows[1], staleness_hist={"0": 19}),
        "step 1: the trainer saw tokens of ages {0: 19}",
    ),
    "a row without a step": (
        "metrics",
        lambda r: r.rows.update({5: r.rows[1]}),
        "step 5 has metrics, but took no batch",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_every_way_to_break_a_rule_is_found_and_named(how: str) -> None:
    check, break_it, words = BROKEN[how]
    run = good()
    break_it(run)
    found = run.audit().results[check].violations
    assert any(words in violation for violation in found), found


def test_a_figure_of_the_summary_that_is_not_the_journals_is_named() -> None:
    audit = good().audit()
    audit.expect("summary", "tokens_generated", 7, 8)
    assert audit.violations == ["summary: tokens_generated is 7, journal and metrics say 8"]


def test_a_row_that_does_not_say_how_old_its_tokens_were_is_not_called_right() -> None:
    run = good()
    del run.rows[3]["staleness_hist"]
    audit = run.audit()
    gap = "step 3: its row does not say how old its tokens were (staleness_hist)"
    assert audit.violations == [] and audit.results["metrics"].gaps == audit.results["bound"].gaps == [gap]


def test_where_records_were_lost_what_they_would_have_said_is_not_known_and_not_called_wrong() -> None:
    run = good()
    run.drop(run.of("taken", 3))
    audit = run.audit(damaged=True)
    assert audit.violations == []
    assert any("step 4 took its batch after step 2 (records are lost)" in gap for gap in audit.results["steps"].gaps)
    assert any("g000005, g000006" in gap for gap in audit.results["once"].gaps)


def test_without_the_records_of_a_time_its_state_says_what_was_trained_then() -> None:
    """The ledger is gone: what remains begins with a state after step 2."""
    run = good()
    state = {"kind": "state", "state": state_after(2), "steps": {"sft": 1, "rl": 2}, "digests": [[v, f"d{v}"] for v in range(3)]}
    state |= {"cursor": CURSORS[2], "positions": [[ticket, POSITIONS[ticket]] for ticket in queue_after(2)["open"]]}
    run.records[: second_trainer(run)] = [run.records[0], state]
    audit = run.audit()
    assert audit.violations == []
    assert "steps 1 to 2: what they took is in no record that is there" in audit.results["once"].gaps
    assert audit.results["checkpoints"].gaps == ["step0: what the steps before it took is in no record that is there"]
    take_again(run)
    assert any("g000005 was trained by step 3 and again" in violation for violation in run.audit().violations)


def test_each_server_event_is_judged_by_the_timeline_of_its_time() -> None:
    """v3 was other weights before the rollback than after it."""
    run = good()
    for record in run.records[: second_trainer(run)]:
        if record.get("version") == 3:
            record["digest"] = "early"
        if "3" in record.get("made", {}):
            record["made"]["3"] = ["early"]
    run.served = []
    audit = run.audit()
    audit.served("server-1", "a", 3, "early", t_ns=int(1.5e9))
    audit.served("server-1", "b", 3, "d3", t_ns=int(2.5e9))
    assert audit.violations == []
    audit.served("server-1", "c", 3, "early", t_ns=int(2.5e9))
    assert [v for v in audit.violations if "serves v3 with digest early" in v]


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_a_living_run_is_audited_as_the_config_says(tmp_path: Path, mode: str) -> None:
    config = small_config(tmp_path)
    config = replace(config, metarl=replace(config.metarl, audit=mode))
    paths = small_paths(config)
    events = EventLog(paths.event_log("orchestrator"), "orchestrator")
    book = Book.open(paths.journal, 0, 0.01, 1.0, RULE.json())
    live = LiveAudit(config, book, events)
    member = Member("server-0", "http://x", 1, 0.0, State.SERVING, version=0, digest="d0", incarnation="server-0@a.1")
    book.add("published", id=1, version=0, digest="d0")
    live.member(member)
    with (
        pytest.raises(StalenessError, match=r"violation: digests: server-0 .* serves v0 with digest bad")
        if mode == "stop"
        else nullcontext()
    ):
        live.member(replace(member, digest="bad"))
    book.close()
    events.close()
    told = [e.fields["message"] for e in read_events(paths.events) if e.name == "violation"]
    assert bool(told) is (mode != "off")


def test_tokens_that_come_before_the_trainers_word_are_known_by_what_the_server_attested(tmp_path: Path) -> None:
    book = Book.open(tmp_path / "journal", 0, 0.01, 1.0)
    book.session("s", 0, 0, 0, {})

    def made(ticket: int) -> object:
        book.add("issued", ticket=ticket, position=ticket, live=0)
        book.group(replace(rollout_group(1, 0), ticket=ticket))
        return book.history.groups[ticket].digests[0]

    assert made(0) is None
    book.attested(0, "d0")
    assert made(1) == "d0"
    book.attested(0, "other")
    assert made(2) is None, "two servers that differ: nobody knows whose tokens these are"
    book.session("s2", 1, 0, 0, {})
    book.attested(0, "again")
    book.add("published", id=2, version=0, digest="heard")
    assert made(3) == "heard"
    book.close()


def test_an_orchestrator_that_takes_over_audits_what_was_before_it(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = replace(config, metarl=replace(config.metarl, audit="stop"))
    events = EventLog(tmp_path / "events.jsonl", "orchestrator")
    journal, _ = open_journal(tmp_path / "journal", 0.01, 1.0)
    for row in (*good().records, good().of("taken", 4)):
        journal.append(payload_of(row["kind"], {key: value for key, value in row.items() if key != "kind"}))
    journal.close()
    book = Book.open(tmp_path / "journal", 0, 0.01, 1.0, RULE.json())
    with pytest.raises(StalenessError, match="step 4 took its batch after step 4"):
        LiveAudit(config, book, events)
    book.close()
    events.close()


def test_an_orchestrator_that_takes_over_takes_the_word_of_the_state_for_what_the_ledger_holds(tmp_path: Path) -> None:
    run, config = good(), small_config(tmp_path)
    config = replace(config, metarl=replace(config.metarl, audit="stop"))
    events = EventLog(tmp_path / "events.jsonl", "orchestrator")
    journal, _ = open_journal(tmp_path / "journal", 0.01, 1.0)
    history = History(steps={"sft": 1, "rl": 2}, fresh=8, open={3, 5, 6, 7}, digests={v: f"d{v}" for v in range(3)}, published=2)
    history.state, history.cursor = state_after(2), CURSORS[2]
    history.positions = {ticket: POSITIONS[ticket] for ticket in history.open}
    run.of("taken", 4)["tickets"] = [3, BATCHES[2][0]]
    for i, row in enumerate(run.records):
        if i == second_trainer(run) + 1:
            journal.rotate([payload_of(*record) for record in history.compact()])
        journal.append(payload_of(row["kind"], {key: value for key, value in row.items() if key != "kind"}))
    journal.close()
    book = Book.open(tmp_path / "journal", 0, 0.01, 1.0, RULE.json())
    with pytest.raises(StalenessError, match="g000002 was trained by step 2 or one before it and again by step 4"):
        LiveAudit(config, book, events)
    book.close()
    events.close()


def test_an_orchestrator_that_takes_over_before_the_first_step_knows_what_v0_is() -> None:
    heard: list[str] = []
    audit = Audit(RULE, on_violation=lambda check, what: heard.append(what), living=True)
    begin = {"state": state_after(0), "steps": {"sft": 1, "rl": 0}, "digests": [[0, "d0"]], "cursor": 4}
    audit.apply(Record(0, "state", begin | {"positions": [[ticket, POSITIONS[ticket]] for ticket in range(4)]}))
    audit.apply(Record(1, "live", {"version": 0, "digest": "d0"}))
    assert heard == []
    audit.apply(Record(2, "live", {"version": 0, "digest": "other"}))
    assert heard == ["live is v0 with digest other, published was d0"]


# --- from the command line


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return written(tmp_path)


def test_the_command_passes_a_good_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "2 steps were undone and 2 done again with the same groups" in said and "VIOLA" not in said


def test_the_command_names_a_violation_and_fails(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens_masked_stale": 4', '"tokens_masked_stale": 0'))
    assert main([str(run_dir)]) == 1
    assert "VIOLATION: bound: step 4: 4 of 25 tokens are beyond S = 2; 0 masked" in capsys.readouterr().out


@pytest.mark.parametrize(("latest", "status"), [("step000004", 0), ("step000006", 1)])
def test_a_checkpoint_of_a_timeline_that_the_user_undid_is_left_out(run_dir: Path, latest: str, status: int) -> None:
    """Step 6 took no batch that survives: a violation where the run stands there, none once the user went back before it."""
    later = run_dir / "checkpoints" / "step000006"
    later.mkdir()
    (later / "meta.json").write_text(json.dumps({"client_state": {"rl_step": 6, "feed": {"queue": queue_after(4)}}}))
    (later.parent / "latest").write_text(f"{latest}\n")
    assert main([str(run_dir)]) == status


@pytest.mark.parametrize("keep", [0, 2])
def test_a_checkpoint_that_the_user_undid_is_left_out_once_a_later_one_is_saved(run_dir: Path, keep: int) -> None:
    """As step 40, 47, back to 40, then 50: its step lies between two of this timeline, and its queue is of another."""
    checkpoints = run_dir / "checkpoints"
    for name, queue in (("step000006", queue_after(3)), ("step000007", queue_after(4))):
        (checkpoints / "latest").write_text("step000004\n")
        (checkpoints / f"{name}.tmp").mkdir()
        state = {"client_state": {"rl_step": 4, "feed": {"queue": queue}}}
        checkpoint_files.publish(checkpoints / f"{name}.tmp", checkpoints / name, state)
        checkpoint_files.prune(checkpoints / name, keep)
        assert main([str(run_dir)]) == (1 if name == "step000006" else 0)


def test_a_warm_start_that_a_checkpoint_took_the_place_of_has_no_rows(run_dir: Path) -> None:
    """The trainer's word is that its three steps are done; none was done here."""
    config = load_resolved(run_dir / "config.yml")
    for checkpoint, wrong in (("", ["metrics: the last sft step with a row is 0, journal and metrics say 3"]), ("elsewhere", [])):
        warmstart = replace(config.metarl.warmstart, steps=3, hf_checkpoint=checkpoint)
        audit = Audit(RULE)
        audit.sft_step = 3
        _rows(audit, [], sft_steps(replace(config, metarl=replace(config.metarl, warmstart=warmstart)), audit), finished=True)
        assert audit.violations == wrong


def test_damage_of_the_journal_is_told_and_leaves_open_what_it_may_explain(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = run_dir / "journal" / LEDGER
    data = bytearray(ledger.read_bytes())
    data[data.index(b'"step":3')] ^= 1
    ledger.write_bytes(data)
    assert main([str(run_dir)]) == 3, "neither right nor wrong"
    said = capsys.readouterr().out
    assert f"journal: {LEDGER}: damaged" in said and "not checked: steps: " in said and "UNDECIDED: " in said and "VIOLATION" not in said


def test_damage_that_explains_nothing_leaves_nothing_open(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the record said is known from others."""
    ledger = run_dir / "journal" / LEDGER
    data = bytearray(ledger.read_bytes())
    data[data.index(b'"phase":"sft"')] ^= 1
    ledger.write_bytes(data)
    assert main([str(run_dir)]) == 0
    assert f"journal: {LEDGER}: damaged" in capsys.readouterr().out


@pytest.mark.parametrize(("digest", "status"), [("d3", 0), ("other", 1)])
def test_what_a_server_reckons_itself_is_compared(run_dir: Path, capsys: pytest.CaptureFixture[str], digest: str, status: int) -> None:
    """What it serves is known by the digest of the trainer's offer, which is the trainer's own word."""
    events = EventLog(run_dir / "events" / "trainer-0.jsonl", "trainer-0")
    for version in (2, 3):
        events.instant("serving", incarnation="server-0@a.1", version=version, digest=f"d{version}")
    events.instant("acked", who="server-0@a.1/0", version=3, digest=digest)
    events.close()
    assert main([str(run_dir)]) == status
    wrong, said = "VIOLATION: digests: server-0@a.1/0 holds v3 with digest other, published was d3", capsys.readouterr().out
    assert (wrong in said) is (status == 1) and "1 versions were compared with a server's own digest" in said
    assert "not checked: digests: by the trainer's word alone, without an ack of the server's own digest: server-0@a.1 v2\n" in said


def test_an_ack_of_what_was_undone_meanwhile_is_no_violation() -> None:
    """A server that stood still holds v3 of the trainer before, whose own record of it may not have reached the disk."""
    early, late = Session(10, 0, {3: "early"}), Session(20, 2, {3: "late"})
    for digest, begun, undone in (("late", 15, False), ("early", 15, True), ("other", 15, False), ("early", 25, False), ("x", None, True)):
        assert _is_undone([Session(None, 0, {}), early, late], 1, 3, digest, begun, 30) is undone, (digest, begun)


@pytest.mark.parametrize(("early", "every", "unrecorded"), [(range(6), 1, 6), (range(0, 6, 2), 2, 6), ((), 1, 5)])
def test_a_trainer_that_died_has_published_one_version_at_most_that_no_record_tells_of(
    early: Sequence[int], every: int, unrecorded: int
) -> None:
    """Wrong bytes of a version that only the trainer of that time made are a violation, however long that server was there."""
    before, late = Session(10, 5, {version: f"d{version}" for version in early}), Session(20, 5, {v: f"d{v}" for v in range(101)})
    for version in (unrecorded, unrecorded + 1, 50):
        assert _is_undone([Session(None, 0, {}), before, late], every, version, "other", 15, 30) is (version == unrecorded), version


def test_servers_of_which_nothing_is_known_were_not_checked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "events")
    assert main([str(run_dir)]) == 0
    assert f"not checked: versions: no server says in {run_dir / 'events'} what it served" in capsys.readouterr().out


def test_what_is_no_run_is_one_line_and_status_2(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    (run_dir / "summary.json").write_text("[1, 2")
    assert main([str(run_dir)]) == 2
    said = capsys.readouterr()
    assert [line.startswith("error: ") for line in said.err.splitlines()] == [True, True] and said.out == ""
