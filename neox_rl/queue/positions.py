"""Positions of the problem cursor as journal and audit keep them: as ranges, since nearly all that lie side by side come to the same end.

A position counts the problems that were handed out, over all epochs, so no two mean the same handing out. A ticket has one at a time; it is
spent once a step trains it, or dynamic sampling refuses its group, and a step that is undone gives its positions back.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from neox_rl.types import Json

Range = tuple[int, int]
"""From the first on, without the second."""


class Ranges:
    """A set of whole numbers >= 0."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._stops[at]

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __iter__(self) -> Iterator[Range]:
        """The ranges, in order, no two touching."""
        return zip(self._starts, self._stops, strict=True)

    def add(self, start: int, stop: int) -> list[Range]:
        """Returns what of it was there already."""
        if start >= stop:
            return []
        first, end = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        met = list(zip(self._starts[first:end], self._stops[first:end], strict=True))
        starts, stops = [start, *(begin for begin, _ in met)], [stop, *(end for _, end in met)]
        self._starts[first:end], self._stops[first:end] = [min(starts)], [max(stops)]
        both = [(max(start, begin), min(stop, end)) for begin, end in met]
        return [(begin, end) for begin, end in both if begin < end]

    def discard(self, start: int, stop: int) -> None:
        first, end = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        if start >= stop or first >= end:
            return
        left = [(self._starts[first], start), (stop, self._stops[end - 1])]
        left = [(begin, end) for begin, end in left if begin < end]
        self._starts[first:end], self._stops[first:end] = [begin for begin, _ in left], [end for _, end in left]

    def gaps(self, stop: int, start: int = 0) -> list[Range]:
        """What of the numbers from ``start`` on and below ``stop`` is not there."""
        edges = [start, *(min(max(edge, start), stop) for held in self for edge in held), stop]
        return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]

    def json(self) -> list[Json]:
        return [[start, stop] for start, stop in self]


def ranges_of(numbers: Iterable[int]) -> list[Range]:
    """The numbers in their order, those that count up by one together."""
    found: list[Range] = []
    start = stop = -1
    for number in numbers:
        if number != stop:
            if start >= 0:
                found.append((start, stop))
            start = number
        stop = number + 1
    return [*found, (start, stop)] if start >= 0 else found


def spent_by(state: object) -> Ranges:
    """Positions that are spent in a state as the trainer's checkpoint holds it: all below its cursor that no open ticket has."""
    match state:
        case {"cursor": {"position": int() as cursor}, "problems": {**problems}}:
            spent = Ranges([(0, cursor)])
            for start, stop in ranges_of(sorted(position for position in problems.values() if isinstance(position, int))):
                spent.discard(start, stop)
            return spent
    return Ranges()


def packed(tickets: Sequence[int], positions: Mapping[int, int]) -> list[Json]:
    """``[position - ticket, how many tickets in a row]``, null where a position is not known: one pair where none was refused."""
    offsets = (positions[ticket] - ticket if ticket in positions else None for ticket in tickets)
    return [[offset, sum(1 for _ in row)] for offset, row in groupby(offsets)]


def unpacked(tickets: Sequence[int], runs: Iterable[Sequence[int | None]]) -> list[int | None]:
    """The position of each ticket."""
    offsets = [offset for offset, count in runs for _ in range(count or 0)]
    return [None if offset is None else ticket + offset for ticket, offset in zip(tickets, offsets, strict=True)]
