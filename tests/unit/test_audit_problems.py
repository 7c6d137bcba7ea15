"""That every problem of the cursor is used once: the books of a run that kept to it, and each way not to."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.book import Book
from neox_rl.queue.positions import Ranges, packed, ranges_of, spent_by, unpacked
from neox_rl.queue.records import Record
from neox_rl.run.audit import Audit
from neox_rl.run.audit_problems import Spent
from neox_rl.types import Json, Problem
from tests.unit.audited_run import BATCHES, CURSORS, POSITIONS, REFUSED, RULE, Run, good, second_trainer, state_after
from tests.unit.small_run import rollout_group

NUMBERS = st.integers(0, 30)


@given(st.lists(st.tuples(st.booleans(), NUMBERS, NUMBERS), max_size=20), NUMBERS, NUMBERS)
def test_ranges_are_a_set_of_numbers(changes: list[tuple[bool, int, int]], start: int, stop: int) -> None:
    ranges, numbers = Ranges(), set[int]()
    for adds, begin, end in changes:
        these = set(range(begin, end))
        if adds:
            assert {n for met in ranges.add(begin, end) for n in range(*met)} == numbers & these
            numbers |= these
        else:
            ranges.discard(begin, end)
            numbers -= these
    assert len(ranges) == len(numbers) and all((n in ranges) == (n in numbers) for n in range(-1, 32)) and "0" not in ranges
    assert {n for gap in ranges.gaps(stop, start) for n in range(*gap)} == set(range(start, stop)) - numbers
    held = list(ranges)
    assert held == ranges_of(sorted(numbers)) and [*map(list, held)] == ranges.json() and list(Ranges(ranges.json())) == held


@given(st.lists(NUMBERS, unique=True), st.dictionaries(NUMBERS, st.integers(0, 1 << 40)))
def test_positions_of_tickets_come_back_as_they_were(tickets: list[int], positions: dict[int, int]) -> None:
    assert unpacked(tickets, packed(tickets, positions)) == [positions.get(ticket) for ticket in tickets]  # type: ignore[arg-type]


def test_positions_take_no_room_where_nothing_was_refused() -> None:
    assert packed(range(1000, 1512), {ticket: ticket + 7 for ticket in range(2000)}) == [[7, 512]]


def refusal(run: Run) -> dict[str, Any]:
    return next(record for record in run.records if record["kind"] == "refused")


def positions(run: Run, step: int, *packed: list[int]) -> None:
    run.of("taken", step)["positions"] = list(packed)


def of_state(run: Run, step: int, key: str, **changes: int) -> None:
    run.of("taken", step)["state"][key] |= changes


BROKEN: dict[str, tuple[Callable[[Run], None], str]] = {
    "passed over": (lambda r: positions(r, 3, [0, 1], [2, 1]), "problem 7 was handed out and came to no end"),
    "refused and passed over": (lambda r: r.drop(refusal(r)), "problem 4 was handed out and came to no end"),
    "trained twice": (lambda r: positions(r, 4, [0, 1], [0, 1]), "problem 7 was trained by step 3 and is trained by step 4 again"),
    "trained twice by a step": (lambda r: positions(r, 3, [0, 1], [-1, 1]), "problem 5 was used before and is trained by step 3 again"),
    "refused and trained": (lambda r: positions(r, 2, [0, 2]), "problem 4 was refused after step 1 and is trained by step 2 again"),
    "refused twice": (lambda r: r.records.append(refusal(r)), "problem 4 was refused after step 1 and is refused after step 4 again"),
    "trained and refused": (
        lambda r: r.records.append(refusal(r) | {"position": 1}),
        "problem 1 was trained by step 1 and is refused after step 4 again",
    ),
    "open with two": (lambda r: of_state(r, 3, "problems", **{"3": 8}), "problem 8 is open with two tickets"),
    "open and trained": (lambda r: of_state(r, 3, "problems", **{"9": 5}), "problem 5 is open, and was trained by step 3"),
    "not handed out yet": (
        lambda r: of_state(r, 4, "cursor", position=8),
        "problem 8 was used, and 8 is the first that was not handed out",
    ),
    "skipped": (lambda r: of_state(r, 4, "cursor", position=12), "problem 9 to 11 was handed out and came to no end"),
    "handed out again": (
        lambda r: r.records.append({"kind": "issued", "ticket": 7, "position": 0, "live": 4}),
        "problem 0 was trained by step 1 and is handed out again",
    ),
    "lost without damage": (
        lambda r: r.records.append({"kind": "lost", "positions": [[3, 12]], "holes": False}),
        "problem 9 to 11: no record says what became of it",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_problem_that_is_used_otherwise_than_once_is_found_and_named(how: str) -> None:
    break_it, words = BROKEN[how]
    run = good()
    break_it(run)
    found = run.audit().results["problems"].violations
    assert any(words in violation for violation in found), found
    damaged = run.audit(damaged=True)
    assert how == "lost without damage" or (damaged.undecided and not damaged.results["problems"].violations), (
        "a lost record may explain it"
    )


def test_what_came_to_no_end_is_told_once_and_not_after_every_step() -> None:
    run = good()
    run.drop(refusal(run))
    assert len(run.audit().results["problems"].violations) == 1


def test_what_damage_lost_is_told_by_name_and_is_no_violation() -> None:
    run = good()
    lost = refusal(run)
    run.records[run.records.index(lost)] = {"kind": "lost", "positions": [[REFUSED, REFUSED + 1]], "holes": True}
    audit = run.audit()
    assert audit.violations == [] and not audit.undecided
    assert audit.results["problems"].gaps == ["problem 4: no record says what became of it (records were lost)"]


def test_a_second_epoch_repeats_no_problem() -> None:
    """Positions count on, and so the same problem comes again under another."""
    cursor = ProblemCursor([Problem(f"p{i}", "math", f"{i}", "1", f"{i}") for i in range(3)], 1)
    handed = [cursor.next().id for _ in range(9)]
    assert len(set(handed[:3])) == 3 and set(handed) == set(handed[:3]) and good().audit().violations == []


def test_who_goes_back_to_what_the_journal_forgot_meets_its_refusals_again() -> None:
    """The whole journal tells it by the session's word, a living audit by the checkpoint of the trainer."""
    run = good()
    begin = second_trainer(run)
    run.records[begin:] = []
    session = {
        "kind": "session",
        "session": "t",
        "attempt": 2,
        "sft_step": 1,
        "rl_step": 1,
        "anew": True,
        "time": 2.0,
        "state": state_after(1),
    }
    again = [record for record in good().records[:begin] if record["kind"] == "refused" or record.get("phase") == "rl"][1:]
    for anew, wrong in ((True, False), (False, True)):
        run.records[begin:] = [session | {"anew": anew}, *again]
        found = run.audit().results["problems"].violations
        assert any("problem 4 was refused after step 1 and is refused after step 1 again" in what for what in found) is wrong, found
    heard: list[str] = []
    audit = Audit(RULE, on_violation=lambda check, what: heard.append(f"{check}: {what}"), living=True)
    state = {"kind": "state", "state": state_after(4), "steps": {"sft": 1, "rl": 4}, "digests": [[v, f"d{v}"] for v in range(5)]}
    state |= {"cursor": CURSORS[4], "positions": []}
    for seq, row in enumerate([*good().records[:begin], state, session, *again]):
        audit.apply(Record(seq, row["kind"], row))
    assert not [what for what in heard if what.startswith("problems")] and len(list(audit.spent._all)) == 1


def test_what_is_before_the_first_record_is_taken_from_the_trainers_word() -> None:
    """A journal that was moved away: it goes on from its checkpoint. Where the ledger has no more than that, what follows is open too."""
    for told in (True, False):
        run = good()
        begin = second_trainer(run)
        run.records[:begin] = run.records[:1]
        run.records[1] = {key: value for key, value in run.records[1].items() if key != "state"} | (
            {"state": state_after(2)} if told else {}
        )
        audit = run.audit()
        assert audit.violations == [] and audit.undecided
        positions(run, 4, [0, 1], [0, 1])
        again = run.audit()
        assert again.results["problems"].violations if told else again.undecided > audit.undecided


def history(root: Path, seed: int) -> list[Record]:
    """Books as an orchestrator keeps them, made at random: tickets refused and failed, trainers that go back, segments that end."""
    rng, heard = random.Random(seed), list[Record]()
    book = Book.open(root / str(seed), 0, 0.01, 5.0, replace(RULE, num_steps=1000).json())
    book.follow(lambda record: heard.append(replace(record, meta=deepcopy(record.meta))))
    open_: dict[int, int] = {}
    saved: dict[int, dict[str, Json]] = {0: {}}
    fresh = cursor = step = 0
    book.session("s0", 0, 0, 0, {})
    for at in range(120):
        match rng.choice(["issue", "issue", "refuse", "fail", "take", "take", "back", "save"]):
            case "issue" if len(open_) < 9:
                open_[fresh] = cursor
                book.add("issued", ticket=fresh, position=cursor, live=0)
                fresh, cursor = fresh + 1, cursor + 1
            case "refuse" if open_:
                ticket = rng.choice([*open_])
                book.refused(replace(rollout_group(1, 0), ticket=ticket), open_[ticket])
                open_[ticket] = cursor
                if rng.random() < 0.8:  # at once, as nearly always
                    book.add("issued", ticket=ticket, position=cursor, live=0)
                    cursor += 1
                else:
                    del open_[ticket]
            case "fail" if open_:
                ticket = rng.choice([*open_])
                book.add("failed", ticket=ticket)
                book.add("issued", ticket=ticket, position=open_[ticket], live=0)
            case "take" if len(open_) > 1:
                step += 1
                batch = sorted(rng.sample([*open_], 2))
                positions = {ticket: open_.pop(ticket) for ticket in batch}
                for ticket in batch:
                    book.group(replace(rollout_group(1, 0), ticket=ticket))
                opened = sorted(book.history.open.difference(batch))
                queue = {"groups_per_step": 2, "step": step, "fresh": fresh, "open": opened, "counts": {}}
                state: dict[str, Json] = {
                    "queue": {**queue},
                    "cursor": {"position": cursor},
                    "problems": {str(t): p for t, p in open_.items()},
                }
                saved[step] = state
                groups = [replace(rollout_group(1, 0), ticket=ticket) for ticket in batch]
                book.taken(at, step, groups, positions, state)
            case "save":
                book.checkpoint(at, 0, step)
            case "back":
                step = rng.choice([s for s in saved if step - 3 <= s <= step])
                saved = {s: state for s, state in saved.items() if s <= step}
                book.session(f"s{at}", at, 0, step, saved[step])
                fresh, cursor = book.history.fresh, book.history.cursor
                open_ = {t: p for t, p in book.history.positions.items() if t in book.history.open}
                assert book.history.lost() == []
    book.close()
    return heard


def violations(records: list[Record], living: bool = False) -> list[str]:
    heard: list[str] = []
    audit = Audit(RULE, on_violation=lambda check, what: heard.append(what) if check == "problems" else None, living=living)
    for record in records:
        audit.apply(record)
    return heard


def test_books_made_at_random_hold_and_one_changed_position_is_found(tmp_path: Path) -> None:
    found = 0
    for seed in range(25):
        records = history(tmp_path, seed)
        assert violations(records) == [] and violations(records, living=True) == []
        for at in last_of_each_step(records):
            first, *rest = records[at].meta["positions"]
            moved = [[first[0] + 1, 1], [first[0], first[1] - 1], *rest]
            changed = replace(records[at], meta={**records[at].meta, "positions": moved})
            assert violations([*records[:at], changed, *records[at + 1 :]]), f"seed {seed}, record {at}"
            found += 1
    assert found > 50


def last_of_each_step(records: list[Record]) -> list[int]:
    """Of the timeline that survives, where a later step compares it with the run's books."""
    taken: dict[int, int] = {}
    for at, record in enumerate(records):
        if record.kind == "session":
            taken = {step: where for step, where in taken.items() if step <= record.meta["rl_step"]}
        if record.kind == "taken":
            taken[record.meta["step"]] = at
    return sorted(taken.values())


def test_a_state_of_a_trainer_says_what_is_spent() -> None:
    assert list(spent_by(state_after(3))) == [(0, 3), (4, 8)] and list(spent_by({})) == []
    spent = Spent()
    spent.adopt(state_after(2))
    assert list(spent.compare(state_after(2))) == [] == spent.train(3, BATCHES[3], packed(BATCHES[3], POSITIONS))
    assert list(spent.compare(state_after(3))) == []
