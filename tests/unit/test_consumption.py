"""What was trained, in bounded memory: the same answers as books that keep everything."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.errors import StalenessError
from neox_rl.queue.book import Book
from neox_rl.queue.consumption import KEPT_STEPS, Trained, TrainedOnce
from neox_rl.queue.history import KEPT_VERSIONS
from neox_rl.queue.journal import segments
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.run.audit import Rule
from neox_rl.run.live_audit import LiveAudit
from neox_rl.telemetry.events import EventLog
from neox_rl.types import Json
from tests.unit.small_run import rollout_group, small_config

B, STEPS = 3, 400


@pytest.mark.parametrize("seed", range(20))
def test_it_answers_as_a_table_of_everything_does(seed: int) -> None:
    rng = random.Random(seed)
    trained, table, forgotten = Trained(), dict[int, int](), 0
    tickets = iter(sorted(range(120), key=lambda ticket: ticket + rng.uniform(0, 12)))
    step = 0
    for _ in range(60):
        match rng.choice(("add", "add", "add", "undo", "forget")):
            case "add":
                step += 1
                for ticket in [ticket for ticket, _ in zip(tickets, range(B), strict=False)]:
                    trained.add(ticket, step)
                    table[ticket] = step
            case "undo" if step > forgotten:
                trained.undo([ticket for ticket, by in table.items() if by == step])
                table = {ticket: by for ticket, by in table.items() if by != step}
            case "forget":
                forgotten = max(forgotten, step - rng.randint(0, 3))
                trained.forget(forgotten)
        assert len(trained) == len(table) and trained.until(step) == table.keys()
        assert trained.missing(50, known=(7,)) == set(range(50)) - table.keys() - {7}
        assert all((ticket in trained) == (ticket in table) for ticket in range(-1, 125))
        assert all(trained.step_of(ticket) == (by if by > forgotten else None) for ticket, by in table.items())


def test_a_guard_of_a_long_run_holds_few_tickets_and_knows_all() -> None:
    guard = TrainedOnce({"step": 2, "fresh": 8, "open": [6, 7]})
    waiting, fresh = [6, 7], 8
    for step in range(3, STEPS):
        waiting, fresh = [*waiting, *range(fresh, fresh + B)], fresh + B
        batch = [waiting.pop(-1 if step % 2 else 0) for _ in range(B)]
        guard.add([replace(rollout_group(1, 0), ticket=ticket) for ticket in batch], step)
    assert guard._trained.num_kept < 2 * B * KEPT_STEPS, "the rest is one number"
    with pytest.raises(StalenessError, match=rf"g000003 was trained by step {STEPS - KEPT_STEPS} or one before it and comes again"):
        guard.add([replace(rollout_group(1, 0), ticket=3)], STEPS)


def opened(tmp_path: Path, segment_bytes: int = 1 << 30) -> tuple[Book, LiveAudit]:
    config = small_config(tmp_path, train_iters=2 * STEPS, rollout={"groups_per_step": B})
    config = replace(config, metarl=replace(config.metarl, audit="stop"))
    book = Book.open(tmp_path / "journal", 0, 0.01, 5.0, Rule.of(config).json(), segment_bytes)
    return book, LiveAudit(config, book, EventLog(tmp_path / "events.jsonl", "orchestrator"))


def trained_run(tmp_path: Path, checkpoint_every: int) -> tuple[Book, LiveAudit]:
    """A run of ``STEPS`` steps, as its orchestrator writes it down."""
    # Without checkpoints a segment is full after some steps.
    book, live = opened(tmp_path, segment_bytes=4000 if not checkpoint_every else 1 << 30)
    queue = TicketQueue(B, 1, 1, Mode.TOKEN, 2 * STEPS)
    book.session("s", 0, 0, 0, {})
    for step in range(1, STEPS + 1):
        take(book, queue, step)
        live.reported(step, {})
        book.tidy()
        if checkpoint_every and step % checkpoint_every == 0:
            book.checkpoint(0, 0, step)
    return book, live


def take(book: Book, queue: TicketQueue, step: int) -> None:
    book.add("published", id=0, version=step - 1, digest=f"d{step - 1}")
    queue.set_live(step - 1)
    for ticket in iter(queue.next_ticket, None):
        book.add("issued", ticket=ticket, position=ticket, live=step - 1)
        group = replace(rollout_group(1, step - 1), ticket=ticket)
        book.group(group)
        queue.deliver(group)
    batch = queue.take(step)
    assert batch is not None
    state = queue.snapshot()
    problems: dict[str, Json] = {str(ticket): ticket for ticket in book.history.open.difference(group.ticket for group in batch)}
    positions = {group.ticket: group.ticket for group in batch}
    book.taken(0, step, batch, positions, {"queue": state, "cursor": {"position": state["fresh"]}, "problems": problems})
    book.history.release(group.ticket for group in batch)


@pytest.mark.parametrize("checkpoint_every", [5, 0])
def test_the_audit_of_a_run_that_goes_on_holds_few_steps_and_judges_by_all(tmp_path: Path, checkpoint_every: int) -> None:
    book, live = trained_run(tmp_path, checkpoint_every)
    audit = live._audit
    assert len(audit.trained) == B * STEPS and audit.last == STEPS
    assert len(audit.steps) < 60 and audit.trained.num_kept < 60 * B
    assert len(list(audit.spent._all)) < 60 and len(audit.spent._ends) < 60
    assert len(audit.sessions[-1].published) < KEPT_VERSIONS + 60
    batch = replace(rollout_group(1, STEPS), ticket=B)
    book.add("published", id=0, version=STEPS, digest="d")
    with pytest.raises(StalenessError, match=rf"g{B:06d} was trained by step \d+ or one before it and again by step {STEPS + 1}"):
        book.add(
            "taken", phase="rl", step=STEPS + 1, tickets=[batch.ticket], positions=[[0, 1]], versions=[{str(STEPS): 3}], made={}, state={}
        )
    book.close()


def test_a_trainer_that_goes_back_behind_what_is_forgotten_begins_at_its_checkpoint(tmp_path: Path) -> None:
    book, live = trained_run(tmp_path, 5)
    state: dict[str, Json] = {"queue": {"step": 2, "fresh": 9, "open": [2, 7, 8]}, "cursor": {"position": 10}, "problems": {"2": 2, "7": 8}}
    book.session("s2", 1, 0, 2, state)
    assert live._audit.trained.until(9) == {0, 1, 3, 4, 5, 6} and live._audit.last == 2
    assert list(live._audit.spent._all) == list(book.history.spent) == [(0, 2), (3, 8), (9, 10)]
    book.session("s3", 2, 0, 0, {})
    assert len(live._audit.trained) == len(live._audit.spent._all) == len(book.history.spent) == 0
    book.close()


def test_who_takes_over_knows_that_records_were_lost_also_once_their_segment_has_shrunk(tmp_path: Path) -> None:
    """One flipped byte costs the publication of v1, of which there are tokens: no later start of the orchestrator may call them wrong."""
    queue = TicketQueue(B, 1, 1, Mode.TOKEN, 2 * STEPS)
    book, _ = opened(tmp_path)
    book.session("s", 0, 0, 0, {})
    for step in (1, 2):
        take(book, queue, step)
    book.close()
    (segment,) = segments(tmp_path / "journal")
    data = bytearray(segment.read_bytes())
    data[data.index(b'"version":1,"digest":"d1"')] ^= 1
    segment.write_bytes(data)
    for step in (3, 4):
        book, _ = opened(tmp_path)
        assert book.has_holes
        book.checkpoint(0, 0, step - 1)
        take(book, queue, step)
        book.close()
