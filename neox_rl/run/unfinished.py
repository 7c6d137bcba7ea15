"""What servers answered for groups that are not finished: in the journal, and given again to who makes such a group anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush

from neox_rl.errors import ConfigError, DeadlineError, JournalError, ServerFailedError
from neox_rl.queue.answers import WHOLE, Answer, Asked, answer_of, asked_of, request_of
from neox_rl.queue.book import Book
from neox_rl.queue.history import Standing
from neox_rl.types import NO_VERSION, Completion, SamplingParams


@dataclass(slots=True)
class _Attempt:
    """At one ticket. ``answers``: what is there of requests that were not made yet, or are under way. ``free``: (rollout, request) -> the
    ordinals that the next equal requests get, the last of them never given. ``reached``: the newest version of each rollout's answers."""

    ticket: int
    answers: defaultdict[Asked, list[bytes | memoryview]]
    free: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    reached: dict[int, int] = field(default_factory=dict)


class Unfinished:
    """``rollout.chunks.Record`` over the journal. Of a ticket nothing is kept here beyond the attempt that makes its group."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._attempts: dict[int, _Attempt] = {}

    @contextmanager
    def attempt(self, ticket: int, anew: bool = False) -> Iterator[None]:
        """The group of ``ticket`` is made from its beginning, with what earlier attempts were answered, unless it is to be made ``anew``.

        After an error that another attempt would run into again, because of what was answered, nothing of it is kept.
        """
        self._attempts[ticket] = _Attempt(ticket, self._earlier(ticket, anew))
        try:
            yield
        except (ServerFailedError, DeadlineError, ConfigError, JournalError):
            raise  # of the servers, the user's or the disk's, whatever was answered
        except Exception:
            self._discard(ticket)
            raise
        finally:
            del self._attempts[ticket]

    @contextmanager
    def request(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> Iterator[_Request]:
        """See ``Record``. ``rollout_id`` as in ``g000017`` or ``g000017/r3``."""
        name, _, rollout = rollout_id.partition("/r")
        attempt, place = self._attempts[int(name[1:])], (int(rollout) if rollout else WHOLE, request_of(prompt_ids, params, n))
        free = attempt.free.setdefault(place, [0])
        ordinal = heappop(free)
        if not free:
            free.append(ordinal + 1)
        asked = Asked(*place, ordinal)
        try:
            yield _Request(self._book, attempt, asked)
        except BaseException:
            heappush(free, ordinal)
            raise
        attempt.answers.pop(asked, None)

    def _earlier(self, ticket: int, anew: bool) -> defaultdict[Asked, list[bytes | memoryview]]:
        """If the policies that made it are of this timeline."""
        history = self._book.history
        if anew or history.standing_of(ticket) is not Standing.USABLE:
            self._discard(ticket)
        found = defaultdict[Asked, list[bytes | memoryview]](list)
        for made in history.spans.get(ticket, ()):
            found[asked_of(made.body)].append(made.body)
        return found

    def _discard(self, ticket: int) -> None:
        if ticket in self._book.history.spans:
            self._book.add("discarded", tickets=[ticket], parted=False)


class _Request:
    """``rollout.chunks.Kept``."""

    def __init__(self, book: Book, attempt: _Attempt, asked: Asked) -> None:
        self._book, self._attempt, self._asked = book, attempt, asked
        self.whole = asked.rollout == WHOLE

    @property
    def reached(self) -> int:
        """See ``Kept``."""
        return self._attempt.reached.get(self._asked.rollout, NO_VERSION)

    def earlier(self) -> dict[int, list[Completion]]:
        """Each chunk follows on the one before it; what comes after one that was lost is of no use."""
        found: dict[int, list[Completion]] = {}
        for body in self._attempt.answers.get(self._asked, ()):
            answer = answer_of(body)
            for index, chunk in enumerate(answer.chunks, answer.first):
                chunks = found.setdefault(index, [])
                if sum(len(c.ids) for c in chunks) == answer.start:
                    chunks.append(chunk)
        self._reach(chunk for chunks in found.values() for chunk in chunks)
        return found

    def keep(self, index: int, start: int, chunks: Sequence[Completion]) -> None:
        body = self._book.answer(self._attempt.ticket, Answer(self._asked, index, start, tuple(chunks)))
        self._attempt.answers[self._asked].append(body)
        self._reach(chunks)

    def _reach(self, chunks: Iterable[Completion]) -> None:
        newest = max((span.version for chunk in chunks for span in chunk.spans), default=NO_VERSION)
        self._attempt.reached[self._asked.rollout] = max(self.reached, newest)
