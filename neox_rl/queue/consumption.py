"""That no ticket is trained twice, checked again where batches are consumed. How old a token may be is checked by ``neox_rl.ages``."""

from __future__ import annotations

from collections.abc import Iterable

from neox_rl.errors import StalenessError
from neox_rl.types import Group


class TrainedOnce:
    """Remembers the tickets that were trained, apart from the queue's own books. Raises StalenessError on a second time.

    One trainer process is one timeline: it begins with ``queue``, the queue's state in the checkpoint that it resumed from.
    """

    def __init__(self, queue: object = None) -> None:
        self._step_of: dict[int, int] = {}
        match queue:
            case {"step": int() as step, "fresh": int() as fresh, "open": list() as tickets}:
                self._step_of = dict.fromkeys(set(range(fresh)).difference(tickets), step)

    def add(self, groups: Iterable[Group], step: int) -> None:
        for group in groups:
            if group.ticket in self._step_of:
                first = self._step_of[group.ticket]
                raise StalenessError(f"ticket g{group.ticket:06d} was trained by step {first} and comes again at step {step}")
            self._step_of[group.ticket] = step
