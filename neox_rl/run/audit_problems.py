"""Which problems were used up, and by what, as an audit follows it: every position of the problem cursor comes to one end, none to two.

A position is trained by a step, refused or lost between two steps, or open with a ticket. Those that a step trained are given back with the
step; a refusal outlives a rollback, unless the journal had forgotten what it goes back to (``anew``). Positions grow without end: a second
epoch repeats no position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from neox_rl.queue.positions import Range, Ranges, ranges_of, spent_by, unpacked
from neox_rl.queue.records import Record

MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class _End:
    """``step`` trained these; or, with ``how``, this came upon them after that step."""

    step: int
    how: str
    ranges: Sequence[Range]

    def at(self) -> tuple[int, bool]:
        return self.step, bool(self.how)

    def __str__(self) -> str:
        return f"{self.how} after step {self.step}" if self.how else f"trained by step {self.step}"


class Spent:
    """What is wrong comes back in words."""

    def __init__(self) -> None:
        self._all = Ranges()
        self._ends: list[_End] = []
        """In the order of the steps, and so of what is undone."""
        self.known = True
        """False: problems that were used before the records begin are in none of them."""
        self._damaged = Ranges()

    def foresee(self, records: Iterable[Record]) -> None:
        """What a takeover names as lost to damage, the books before it miss too."""
        for record in records:
            if record.kind == "lost" and record.meta["holes"]:
                for start, stop in record.meta["positions"]:
                    self._damaged.add(start, stop)

    def train(self, step: int, tickets: Sequence[int], packed: Iterable[Sequence[int | None]]) -> list[str]:
        known = [position for position in unpacked(tickets, packed) if position is not None]
        return self._end(_End(step, "", ranges_of(known)))

    def refuse(self, position: int, after: int) -> list[str]:
        return self._end(_End(after, "refused", [(position, position + 1)]))

    def lose(self, ranges: Iterable[Sequence[int]], after: int) -> list[Range]:
        """Returns those of which no end was known: whoever lost sight of them may know less than the records say."""
        lost = [gap for start, stop in ranges for gap in self._all.gaps(stop, start)]
        self._end(_End(after, "lost", lost))
        return lost

    def issue(self, position: int) -> Iterator[str]:
        """It is handed out, or once more with the ticket that has it."""
        if position in self._all:
            yield f"{named([(position, position + 1)])} was {self._by(position)} and is handed out again"

    def undo(self, step: int, anew: bool) -> None:
        """A trainer begins after ``step``."""
        kept: list[_End] = []
        while self._ends and self._ends[-1].at() > (step, False):
            end = self._ends.pop()
            if end.how and not anew:
                kept.append(_End(step, end.how, end.ranges))
                continue
            for spent in end.ranges:
                self._all.discard(*spent)
        self._ends += reversed(kept)

    def compare(self, state: object) -> Iterator[str]:
        """With the run's own books: below its cursor all is spent, or of an open ticket. What came to no end is told once."""
        match state:
            case {"cursor": {"position": int() as cursor}, "problems": {**problems}}:
                had = sorted(position for position in problems.values() if isinstance(position, int))
            case _:
                return
        if not self.known:
            self.adopt(state)
        if twice := [position for position, after in pairwise(had) if position == after]:
            yield f"{named(ranges_of(twice))} is open with two tickets"
        ours = Ranges(self._all)
        if both := [part for start, stop in ranges_of(sorted(set(had))) for part in ours.add(start, stop)]:
            yield f"{named(both)} is open, and was {self._by(both[0][0])}"
        if beyond := [(max(start, cursor), stop) for start, stop in ours if stop > cursor]:
            yield f"{named(beyond)} was used, and {cursor} is the first that was not handed out"
        if gone := [gap for start, stop in ours.gaps(cursor) for gap in self._damaged.gaps(stop, start)]:
            yield f"{named(gone)} was handed out and came to no end"
            self.lose(gone, self._ends[-1].step if self._ends else 0)

    def adopt(self, state: object, instead: bool = False) -> None:
        """The run's own word, of a trainer's state, for what no record says; ``instead`` of what they say, too."""
        if instead:
            self._all = Ranges()
            self._ends.clear()
        for spent in spent_by(state):
            self._all.add(*spent)
        self.known = state is not None

    def forget(self) -> None:
        """Nothing of this is undone any more."""
        self._ends.clear()

    def _end(self, end: _End) -> list[str]:
        again = [part for start, stop in end.ranges for part in self._all.add(start, stop)]
        wrong = [f"{named([part])} was {self._by(part[0])} and is {end} again" for part in again]
        self._ends.append(end)
        return wrong

    def _by(self, position: int) -> str:
        found = (end for end in reversed(self._ends) if any(start <= position < stop for start, stop in end.ranges))
        return str(next(found, "used before"))


def named(ranges: Sequence[Sequence[int]]) -> str:
    """``problem 7``; ``problem 7, 9 to 12 and 3 more``."""
    words = [str(start) if stop - start == 1 else f"{start} to {stop - 1}" for start, stop in ranges[:MAX_NAMED]]
    more = sum(stop - start for start, stop in ranges[MAX_NAMED:])
    return f"problem {', '.join(words)}" + (f" and {more} more" if more else "")
