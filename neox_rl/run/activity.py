"""When each server had requests in flight, as coarse spans: sampled, so that thousands of requests make a few rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from neox_rl.telemetry.events import EventLog

SAMPLE_S = 0.25
LONGEST_S = 10.0
"""A span is written at least this often, so that a run that is killed shows what its servers did."""


@dataclass(slots=True)
class _Open:
    """A span that has begun: wall-clock and monotonic nanoseconds, and the most requests seen in it."""

    wall_ns: int
    start_ns: int
    most: int


class ServerActivity:
    """``in_flight()`` gives requests a server, by address; ``logs`` the event log that takes its ``generating`` spans. Both may change."""

    def __init__(self, in_flight: Callable[[], Mapping[str, int]], logs: Mapping[str, EventLog]) -> None:
        self._in_flight = in_flight
        self._logs = logs
        self._open: dict[str, _Open] = {}

    async def run(self) -> None:
        """Samples until cancelled."""
        try:
            while True:
                self.sample()
                await asyncio.sleep(SAMPLE_S)
        finally:
            for address in list(self._open):
                self._end(address)

    def sample(self) -> None:
        now = self._in_flight()
        for address in self._open.keys() - now.keys():
            self._end(address)
        for address, count in now.items():
            span = self._open.get(address)
            if span is not None and (count == 0 or time.monotonic_ns() - span.start_ns > LONGEST_S * 1e9):
                self._end(address)
                span = None
            if count and span is None:
                self._open[address] = _Open(time.time_ns(), time.monotonic_ns(), count)
            elif count and span is not None:
                span.most = max(span.most, count)

    def _end(self, address: str) -> None:
        span = self._open.pop(address)
        self._logs[address].add_span("generating", span.wall_ns, time.monotonic_ns() - span.start_ns, most_in_flight=span.most)
