"""That no ticket is trained twice, checked again where batches are consumed. How old a token may be is checked by ``neox_rl.ages``."""

from __future__ import annotations

from collections.abc import Iterable

from neox_rl.errors import StalenessError
from neox_rl.types import Group


class TrainedOnce:
    """Remembers the tickets that were trained, apart from the queue's own books. Raises StalenessError on a second time."""

    def __init__(self) -> None:
        self._step_of: dict[int, int] = {}

    def add(self, groups: Iterable[Group], step: int) -> None:
        for group in groups:
            if group.ticket in self._step_of:
                first = self._step_of[group.ticket]
                raise StalenessError(f"ticket g{group.ticket:06d} was trained at step {first} and comes again at step {step}")
            self._step_of[group.ticket] = step
