"""What makes a journal forget what was trained: groups and batches, and answers only where they would fill the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox_rl.queue.answers import Answer, Asked
from neox_rl.queue.book import ANSWERS_FACTOR, Book
from neox_rl.types import Completion, Finish, Group

LIMIT, TOKENS = 10_000, 250


def answered(book: Book, num_bytes: int) -> None:
    """A search of ticket 1 gets about so many bytes of answers, and is there."""
    written = Completion((5,) * TOKENS, (-0.5,) * TOKENS, (), Finish.STOP)
    for number in range(num_bytes // (TOKENS * 6)):
        book.answer(1, Answer(Asked(0, number, 0), 0, 0, (written,)))


@pytest.mark.parametrize("reopened", [False, True])
def test_answers_do_not_have_what_was_trained_forgotten_until_the_file_is_far_larger(tmp_path: Path, reopened: bool) -> None:
    book = Book.open(tmp_path, 0, 0.01, 5.0, segment_bytes=LIMIT)
    for ticket in (0, 1):
        book.add("issued", ticket=ticket, position=ticket, live=0)
    book.group(Group(0, "p0", ()))
    state = {"queue": {"fresh": 2, "open": [1], "counts": {}}}
    book.taken(3, 1, [Group(0, "p0", ())], {0: 0}, state)
    answered(book, 2 * LIMIT)
    if reopened:
        book.close()
        book = Book.open(tmp_path, 1, 0.01, 5.0, segment_bytes=LIMIT)
    book.tidy()
    assert book.history.forgotten == 0 and book.history.taken == {1: (0,)}, "ranks that are lost find the batch again"
    answered(book, ANSWERS_FACTOR * LIMIT)
    book.tidy()
    assert book.history.forgotten == 1 and not book.history.taken
    book.close()


def test_groups_and_batches_have_what_was_trained_forgotten(tmp_path: Path) -> None:
    book = Book.open(tmp_path, 0, 0.01, 5.0, segment_bytes=LIMIT)
    book.add("issued", ticket=0, position=0, live=0)
    book.group(Group(0, "p0", ()))
    book.taken(3, 1, [Group(0, "p0", ())], {0: 0}, {"queue": {"fresh": 1, "open": [], "counts": {}}})
    book.tidy()
    assert book.history.forgotten == 0
    book.add("group", bytes(LIMIT), ticket=1, digests={}, tokens=0, rollouts=0)
    book.tidy()
    assert book.history.forgotten == 1
    book.close()
