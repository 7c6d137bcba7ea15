"""Brings queue, cursor and pump to where the journal and the trainer's checkpoint say that the run is, and what came back into use.

    at the start, or at a trainer's hello     every open ticket is judged by what the journal has for it:
        nothing                               it is generated again, from the problem it had
        all made by policies of this timeline a group is ready at once; an unfinished one goes on where it was, once the newest of them is
                                              live: servers that are behind could not go on with it
        some beyond the rule as it is now     it is generated again: the run goes on with smaller slacks, its timeline parts
        some by a version that was undone     held, until the trainer publishes that version again, or something else in its place
    v published again, same digest            what waited for v alone is in use
    another digest, or another batch          the timelines have parted, and do not meet again: all that is held is handed on

While nothing parts, a step that is done again takes the groups it took before, so that a deterministic trainer makes the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from neox_rl.codec import decode_group
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, WireError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.book import Book
from neox_rl.queue.history import History, Standing
from neox_rl.queue.journal import LOCK_S
from neox_rl.queue.state import TicketQueue, name
from neox_rl.run.audit import Rule
from neox_rl.run.pump import RolloutPump
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import NO_VERSION, Group, Json


def open_book(config: RunConfig, paths: RunPaths, attempt: int) -> Book:
    """An orchestrator of a run before this one may hold it for as long as a process gets to end."""
    queue, lock_s = config.metarl.queue, config.metarl.deadlines.shutdown_s + LOCK_S
    return Book.open(paths.journal, attempt, queue.flush_s, queue.disk_full_s, Rule.of(config).json(), queue.segment_mib << 20, lock_s)


def lost_batch(history: History) -> str:
    """In words, where the journal speaks of an RL step and has lost what it took; empty where nothing is missing.

    Whoever went on would not know which of the open tickets are trained, or wait for the steps in between.
    """
    first, last = history.steps["rl"] + 1, history.reported["rl"]
    which = f"step {last}" if first == last else f"steps {first} to {last}"
    return f"the journal lost what {which} took" if first <= last else ""


class Comeback:
    """``on_load`` sees each recovered group at the moment when a step takes it."""

    def __init__(self, book: Book, queue: TicketQueue, cursor: ProblemCursor, pump: RolloutPump, on_load: Callable[[Group], None]) -> None:
        self._book, self._queue, self._cursor, self._pump, self._on_load = book, queue, cursor, pump, on_load
        self._until: dict[int, int] = {}  # held ticket, whose answers are of use -> the version that must be live

    def restore(self) -> dict[str, Json]:
        """Before the first ticket. Returns what was found, for the events. Raises ConfigError for a checkpoint of another config."""
        history = self._book.history
        self._book.lost()
        self._queue.restore(history.queue_state(self._queue.groups_per_step), history.refusals)
        if isinstance(cursor := history.state.get("cursor"), dict):
            self._cursor.restore(cursor)
        self._cursor.position = history.cursor
        self._pump.restore_problems({ticket: history.positions[ticket] for ticket in history.open if ticket in history.positions})
        foreign: list[int] = []
        beyond = False
        for ticket in sorted(history.open):
            if ticket not in history.groups and ticket not in history.spans:
                continue
            if not self._queue.allows(ticket, self._versions(ticket)):
                foreign.append(ticket)
                beyond = True
                continue
            match history.standing_of(ticket):
                case Standing.FOREIGN:
                    foreign.append(ticket)
                case Standing.WAITING:
                    self._queue.hold(ticket)
                case Standing.USABLE:
                    self._use(ticket)
        self._discard(foreign, parted=beyond)
        return {"open": len(history.open), "ready": self._queue.num_ready, "held": len(self._queue.held), "discarded": len(foreign)}

    def published(self) -> None:
        """The trainer has published a version: who waited for it?"""
        judged = {ticket: self._book.history.standing_of(ticket) for ticket in sorted(self._doubtful)}
        if Standing.FOREIGN in judged.values():
            self._discard(judged, parted=True)
            return
        for ticket, standing in judged.items():
            if standing is Standing.USABLE:
                self._use(ticket)

    def live(self, version: int) -> None:
        """Every server serves ``version``: who can be gone on with now?"""
        self._queue.set_live(version)
        for ticket in [ticket for ticket, newest in self._until.items() if newest <= version]:
            del self._until[ticket]
            self._queue.release(ticket)  # what was answered for it is found when it is issued

    def batch_of(self, step: int) -> tuple[int, ...]:
        """The tickets that ``step`` took before it was undone, if it can take them again; else none, and the timelines have parted.

        Every version before ``step`` has been published again by now: what is still held for one of them waits in vain.
        """
        tickets = self._book.history.replay.get(step, ())
        if tickets and self._queue.are_ready(tickets):
            return tickets
        if tickets or any(version < step for ticket in self._doubtful for version in self._awaited(ticket)):
            self._discard(self._doubtful, parted=True)
        return ()

    @property
    def _doubtful(self) -> frozenset[int]:
        """Held because it is not known yet whether the policies that made what there is are of this timeline."""
        return self._queue.held - self._until.keys()

    def _awaited(self, ticket: int) -> set[int]:
        return self._versions(ticket) - self._book.history.digests.keys()

    def _versions(self, ticket: int) -> set[int]:
        """Of the policies that made what there is of the ticket."""
        history = self._book.history
        made = [history.groups[ticket]] if ticket in history.groups else history.spans.get(ticket, [])
        return {version for m in made for version in m.digests}

    def _use(self, ticket: int) -> None:
        history = self._book.history
        if ticket in history.groups:
            self._queue.preload(ticket, history.groups[ticket].digests, lambda: self._load(ticket))
            return
        newest = max(self._versions(ticket), default=NO_VERSION)
        if newest > self._queue.live_version:
            self._until[ticket] = newest
            if ticket not in self._queue.held:
                self._queue.hold(ticket)
        elif ticket in self._queue.held:
            self._queue.release(ticket)

    def _load(self, ticket: int) -> Group:
        try:
            group = decode_group(self._book.history.groups[ticket].body)
        except WireError as error:
            raise ConfigError(f"the journal's {name(ticket)} is whole, but is no group of this release: {error}") from error
        self._on_load(group)
        return group

    def _discard(self, tickets: Iterable[int], parted: bool) -> None:
        """Made by nobody of this timeline: the tickets are handed on."""
        gone = sorted(tickets)
        if not gone and not (parted and self._book.history.replay):
            return
        self._book.add("discarded", tickets=[*gone], parted=parted)
        for ticket in self._queue.held.intersection(gone):
            self._queue.release(ticket)
