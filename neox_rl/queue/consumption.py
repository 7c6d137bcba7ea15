"""That no ticket is trained twice, checked again where batches are consumed. How old a token may be is checked by ``neox_rl.ages``."""

from __future__ import annotations

from collections.abc import Iterable

from neox_rl.errors import StalenessError
from neox_rl.types import Group

KEPT_STEPS = 16


class Trained:
    """The tickets that were trained, in memory that does not grow with the run. ``step_of`` says by which step, until it is forgotten.

    Of those whose step is forgotten only what lies behind the first untrained ticket is kept one by one: as many as overtook it.
    """

    def __init__(self) -> None:
        self._step_of: dict[int, int] = {}
        self._floor = 0
        """All tickets below it are trained, by steps that are forgotten."""
        self._beyond: set[int] = set()

    def __contains__(self, ticket: object) -> bool:
        return isinstance(ticket, int) and (0 <= ticket < self._floor or ticket in self._beyond or ticket in self._step_of)

    def __len__(self) -> int:
        return self._floor + self.num_kept

    @property
    def num_kept(self) -> int:
        """Tickets that take memory."""
        return len(self._beyond) + len(self._step_of)

    def step_of(self, ticket: int) -> int | None:
        """None: not trained, or forgotten by whom."""
        return self._step_of.get(ticket)

    def add(self, ticket: int, step: int) -> None:
        """Of one that is trained again the last step counts."""
        if ticket not in self or ticket in self._step_of:
            self._step_of[ticket] = step

    def undo(self, tickets: Iterable[int]) -> None:
        """The steps that trained them, which are not forgotten, did not happen."""
        for ticket in tickets:
            self._step_of.pop(ticket, None)

    def until(self, step: int) -> set[int]:
        """Those that ``step`` and the steps before it trained."""
        return {*range(self._floor), *self._beyond, *(ticket for ticket, by in self._step_of.items() if by <= step)}

    def forget(self, step: int) -> None:
        """That ``step`` and those before it trained theirs is kept, which of them did is not."""
        forgotten = [ticket for ticket, by in self._step_of.items() if by <= step]
        for ticket in forgotten:
            del self._step_of[ticket]
        self._beyond.update(forgotten)
        while self._floor in self._beyond:
            self._beyond.remove(self._floor)
            self._floor += 1

    def reset(self, fresh: int, untrained: Iterable[int]) -> None:
        """Just those below ``fresh`` that are not ``untrained`` were trained, by steps that are forgotten."""
        left = {ticket for ticket in untrained if ticket < fresh}
        self._step_of, self._floor = {}, min(left, default=fresh)
        self._beyond = set(range(self._floor, fresh)) - left

    def missing(self, fresh: int, known: Iterable[int] = ()) -> set[int]:
        """Of the tickets below ``fresh``, those that were neither trained nor are ``known``."""
        return {ticket for ticket in range(self._floor, fresh) if ticket not in self}.difference(known)


class TrainedOnce:
    """Remembers the tickets that were trained, apart from the queue's own books. Raises StalenessError on a second time.

    One trainer process is one timeline: it begins with ``queue``, the queue's state in the checkpoint that it resumed from.
    """

    def __init__(self, queue: object = None) -> None:
        self._trained, self._begin = Trained(), 0
        match queue:
            case {"step": int() as step, "fresh": int() as fresh, "open": list() as tickets}:
                self._trained.reset(fresh, tickets)
                self._begin = step

    def add(self, groups: Iterable[Group], step: int) -> None:
        for group in groups:
            if group.ticket in self._trained:
                by = self._trained.step_of(group.ticket) or f"{max(self._begin, step - KEPT_STEPS)} or one before it"
                raise StalenessError(f"ticket g{group.ticket:06d} was trained by step {by} and comes again at step {step}")
            self._trained.add(group.ticket, step)
        self._trained.forget(step - KEPT_STEPS)
