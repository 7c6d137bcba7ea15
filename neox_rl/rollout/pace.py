"""Which server decodes so slowly that what it makes is better begun again elsewhere.

    slow:   waited > max(patience, SLOW * budget * pace of the quickest other server)

A request's length is not known before it ends. So a server is compared by what the others would have needed for the request's whole token
budget: no rollout is called slow for being long, and none is moved to where it would take as long again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

SLOW = 3.0
"""So many times slower than another: less is what the load of two servers alike may differ by."""
REMEMBERED, FEWEST = 32, 4
"""Answers of a server; with fewer than the latter its pace is not known."""


class Paces:
    """Seconds a token of every server's last answers, latency and queueing included."""

    def __init__(self) -> None:
        self._answers: dict[str, deque[float]] = {}

    def answered(self, server: str, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` of the longest completion in the answer."""
        if num_tokens > 0:
            self._answers.setdefault(server, deque(maxlen=REMEMBERED)).append(seconds / num_tokens)

    def forget(self, server: str) -> None:
        """What answers there next is another, or has begun anew."""
        self._answers.pop(server, None)

    def due_s(self, server: str, others: Iterable[str], budget: int, patience_s: float) -> float:
        """Seconds after which a request for at most ``budget`` tokens is to leave ``server``; inf while no other's pace is known."""
        known = [self._answers[other] for other in others if other != server and len(self._answers.get(other, ())) >= FEWEST]
        quickest = min(map(statistics.median, known), default=math.inf)
        return max(patience_s, SLOW * budget * quickest)
