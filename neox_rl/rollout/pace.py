"""Which server decodes so slowly that what it makes is better begun again elsewhere.

    slow:   waited > max(patience, SLOW * budget * pace of the quickest other server)

A request's length is not known before it ends. So a server is compared by what the others would have needed for the request's whole token
budget: no rollout is called slow for being long, and none is moved to where it would take as long again. A token that is scored takes far
less than one that is sampled, so a server has a pace of each; what is to be scored is its own budget, with its prompt. Time that a server
stands still for a switch of version is not counted: that has a deadline of its own.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

SLOW = 3.0
"""So many times slower than another: less is what the load of two servers alike may differ by."""
REMEMBERED, FEWEST = 32, 4
"""Answers of a server; with fewer than the latter its pace is not known."""


class SlowError(Exception):
    """Another server would have made it long ago: it is to."""


class Paces:
    """Seconds a token of every server's last answers, sampled or scored, latency and queueing included."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, bool], deque[float]] = {}
        # Of servers whose pace is known: every request in flight asks for those of all others.
        self._medians: dict[tuple[str, bool], float] = {}
        self._stood: dict[str, float] = {}
        self._stands: dict[str, float] = {}

    @contextmanager
    def standing(self, server: str) -> Iterator[None]:
        """Meanwhile it decodes nothing, and is not to."""
        self._stands[server] = began = time.monotonic()
        try:
            yield
        finally:
            self._stands.pop(server, None)
            self._stood[server] = self._stood.get(server, 0.0) + time.monotonic() - began

    async def watched(
        self, call: asyncio.Task[Any], server: str, others: Callable[[], Iterable[str]], budget: int, patience_s: float, scored: bool
    ) -> None:
        """Until ``call`` has ended. Raises SlowError where one of the ``others`` would long have made its ``budget`` of tokens."""
        began, waited, due_s = self._decoding_s(server), 0.0, patience_s
        while waited < due_s:
            look_s = min(due_s - waited, patience_s)  # meanwhile another may have shown its pace
            if (await asyncio.wait({call}, timeout=look_s if look_s < math.inf else None))[0]:
                return
            waited = self._decoding_s(server) - began
            due_s = self.due_s(server, others(), budget, patience_s, scored)
        raise SlowError(f"{server} had a request for {waited:.1f} s, {SLOW:g} times as long as another server takes for {budget} tokens")

    def _decoding_s(self, server: str) -> float:
        """A clock that stands while the server does."""
        return self._stands.get(server, time.monotonic()) - self._stood.get(server, 0.0)

    def answered(self, server: str, seconds: float, num_tokens: int, scored: bool = False) -> None:
        """``num_tokens`` of the longest completion in the answer, or of all that was read to score it."""
        if num_tokens > 0:
            answers = self._answers.setdefault((server, scored), deque(maxlen=REMEMBERED))
            answers.append(seconds / num_tokens)
            if len(answers) >= FEWEST:
                self._medians[server, scored] = statistics.median(answers)

    def forget(self, server: str) -> None:
        """What answers there next is another, or has begun anew."""
        for scored in (False, True):
            self._answers.pop((server, scored), None)
            self._medians.pop((server, scored), None)
        self._stood.pop(server, None)

    def due_s(self, server: str, others: Iterable[str], budget: int, patience_s: float, scored: bool = False) -> float:
        """Seconds after which a request for at most ``budget`` tokens is to leave ``server``; inf while no other's pace is known."""
        quickest = min((self._medians.get((other, scored), math.inf) for other in others if other != server), default=math.inf)
        return max(patience_s, SLOW * budget * quickest)
