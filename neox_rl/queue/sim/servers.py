"""A server as a processor shared by its sequences: all running ones get one token a decode step, whose time depends on their number."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from neox_rl.queue.sim.scenario import Decoding
from neox_rl.types import NO_VERSION

_NEAR = 1e-6
Spans = list[tuple[int, int]]
"""(version, tokens) in order of sampling, versions never falling."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request: the rollouts of one ticket (of an evaluation: ticket -1) until all are finished."""

    ticket: int
    works: list[Work]
    open: int
    since: float = 0.0


@dataclass(slots=True, eq=False)
class Work:
    """One rollout on its way. ``spans``: tokens that are safe; those after them exist on ``server`` alone."""

    flight: Flight
    length: int
    spans: Spans = field(default_factory=list)
    server: Server | None = None
    start: float = 0.0
    first: int = 0

    @property
    def kept(self) -> int:
        return sum(tokens for _, tokens in self.spans)

    @property
    def finished(self) -> bool:
        return self.kept >= self.length


class Member(Enum):
    """Only a serving member gets requests."""

    SERVING = auto()
    CATCHING_UP = auto()
    """Suspended for a late switch, joining, or started again: holds an old version or none."""
    LEAVING = auto()
    GONE = auto()


class Server:
    """``advance`` brings it to a moment; whatever changes it is called after that. Iterations are decode steps since the start."""

    def __init__(self, name: str, decoding: Decoding, now: float) -> None:
        self.name, self.decoding = name, decoding
        self.state = Member.CATCHING_UP
        self.version = NO_VERSION
        self.epoch = 0
        self.life = 0
        self.paused = False
        self.assigned = 0
        self.busy_s = self.sequence_s = 0.0
        self._now = now
        self._iteration = 0.0
        self._blocked_s = 0.0  # of work that comes before the next decode step
        self._history: list[tuple[float, int]] = []
        self._running: list[tuple[float, int, Work]] = []
        self._waiting: deque[Work] = deque()
        self._serial = itertools.count()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def advance(self, now: float) -> None:
        passed, self._now = now - self._now, now
        self.busy_s += passed if self.assigned else 0.0
        if not self._running:
            return
        self.sequence_s += passed * len(self._running)
        if not self.paused:
            blocked = min(passed, self._blocked_s)
            self._blocked_s -= blocked
            self._iteration += (passed - blocked) / self.decoding.step_s(len(self._running))

    def submit(self, works: list[Work]) -> None:
        """One request."""
        for work in works:
            work.server = self
        self._waiting.extend(works)
        self._blocked_s += self.decoding.prefill_s
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.decoding.max_num_seqs:
            work = self._waiting.popleft()
            work.start, work.first = self._iteration, len(self._history) - 1
            heapq.heappush(self._running, (self._iteration + work.length - work.kept, next(self._serial), work))

    def next_end(self) -> float:
        """When the next sequence ends if nothing else happens; infinite while paused or idle."""
        if self.paused or not self._running:
            return math.inf
        left = max(0.0, self._running[0][0] - self._iteration)
        return self._now + self._blocked_s + left * self.decoding.step_s(len(self._running))

    def take_finished(self) -> list[Work]:
        """The sequences that have ended by now, their spans complete."""
        done: list[Work] = []
        while self._running and self._running[0][0] <= self._iteration + _NEAR:
            end, _, work = heapq.heappop(self._running)
            self._extend(work, end)
            done.append(work)
        self._fill()
        return done

    def switch(self, version: int) -> None:
        """From here on tokens are of ``version``."""
        self.version = version
        self._blocked_s += self.decoding.recompute_s * len(self._running)
        self._history.append((self._iteration, version))

    def take_all(self, chunk: int) -> tuple[list[Work], int]:
        """Every unfinished sequence leaves, with its tokens up to the last whole chunk (0: with none made here); and the tokens lost."""
        left = [*(work for _, _, work in self._running), *self._waiting]
        lost = 0
        for _, _, work in self._running:
            before = list(work.spans)
            self._extend(work, self._iteration)
            made = work.kept
            work.spans = _cut(work.spans, max(made // chunk * chunk, sum(n for _, n in before))) if chunk else before
            lost += made - work.kept
        self._blocked_s = 0.0
        self._running.clear()
        self._waiting.clear()
        for work in left:
            work.server = None
        self.assigned = 0
        return left, lost

    def _extend(self, work: Work, until: float) -> None:
        edges = [at for at, _ in self._history[work.first + 1 :]] + [until]
        left, made = work.length - work.kept, 0
        for (_, version), edge in zip(self._history[work.first :], edges, strict=True):
            upto = min(left, int(edge - work.start + _NEAR))
            if upto > made:
                work.spans.append((version, upto - made))
                made = upto


def _cut(spans: Spans, tokens: int) -> Spans:
    """The first ``tokens`` of them."""
    kept: Spans = []
    for version, count in spans:
        if tokens <= 0:
            break
        kept.append((version, min(count, tokens)))
        tokens -= count
    return kept
