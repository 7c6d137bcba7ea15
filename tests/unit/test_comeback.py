"""An unfinished group is gone on with when servers can: not before the newest of its answers' versions is live."""

from __future__ import annotations

from typing import cast

from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.answers import Answer, Asked
from neox_rl.queue.book import Book
from neox_rl.queue.state import TicketQueue
from neox_rl.run.comeback import Comeback
from neox_rl.run.pump import RolloutPump
from neox_rl.types import Completion, Finish, Group, Problem, VersionSpan
from tests.unit.test_unfinished import Memory


class Pump:
    """What it had for open tickets."""

    def restore_problems(self, positions: dict[int, int]) -> None: ...


def written() -> Book:
    """v1 was published, and a server answered for ticket 1 with it; step 1 had ticket 0."""
    book = Memory().book()
    book.session("s", 0, 0, 0, {"queue": {"fresh": 0, "open": []}})
    book.add("published", id=2, version=0, digest="d0")
    for ticket in (0, 1):
        book.add("issued", ticket=ticket, position=ticket, live=0)
    book.group(Group(0, "p0", ()))
    book.taken(3, 1, [Group(0, "p0", ())], {0: 0}, {"queue": {"fresh": 2, "open": [1], "counts": {}}})
    book.add("published", id=4, version=1, digest="d1")
    book.answer(1, Answer(Asked(0, 9, 0), 0, 0, (Completion((5,), (-0.5,), (VersionSpan(1, 0, 1),), Finish.LENGTH),)))
    return book


def taken_over(book: Book) -> tuple[Comeback, TicketQueue]:
    queue = TicketQueue(1, 2, 1, "token", 3)
    cursor = ProblemCursor([Problem(f"p{i}", "math", f"{i}", "1", f"{i}") for i in range(5)], 0)
    comeback = Comeback(book, queue, cursor, cast(RolloutPump, Pump()), lambda group: None)
    comeback.restore()
    return comeback, queue


def test_answers_of_a_version_that_not_every_server_serves_yet_wait_for_it() -> None:
    book = written()
    comeback, queue = taken_over(book)
    comeback.live(0)
    assert queue.held == {1} and queue.next_ticket() == 2, "others need not wait"
    comeback.live(1)
    assert not queue.held and queue.next_ticket() == 1 and book.history.spans[1] and queue.groups_dropped == 0


def test_answers_of_a_version_that_is_published_again_wait_until_it_is_live_again() -> None:
    book = written()
    book.session("again", 1, 0, 0, {"queue": {"fresh": 0, "open": []}})
    comeback, queue = taken_over(book)
    book.add("published", id=2, version=0, digest="d0")
    comeback.published()
    comeback.live(0)
    queue.take(1)
    book.add("published", id=4, version=1, digest="d1")
    comeback.published()
    assert queue.held == {1}, "servers still stage it"
    book.history.replay[2] = (7,)
    assert comeback.batch_of(2) == () and book.history.spans[1], "whatever else parts, these are of this timeline"
    comeback.live(1)
    assert not queue.held and queue.next_ticket() == 1 and queue.groups_dropped == 0


def test_a_version_that_was_superseded_before_it_was_live_is_waited_for_no_longer() -> None:
    book = written()
    comeback, queue = taken_over(book)
    queue._step = 2  # a step took another batch meanwhile
    comeback.live(2)
    assert not queue.held and queue.next_ticket() == 1
