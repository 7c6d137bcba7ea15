"""How much of the prompts that a run's engines were given their prefix caches held, as the engines count it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from neox_rl.run.search_server import CacheCounters, cache_counters

LOOK_S = 5.0
"""Between two looks: an engine writes all its metrics for each, some milliseconds."""


class PrefixHits:
    """``addresses()``: the servers now. Servers that do not count, or not answer, are left out.

    What a server counted before its first look is of others: an earlier orchestrator, or whoever else asks it.
    """

    def __init__(self, addresses: Callable[[], Iterable[str]]) -> None:
        self._addresses = addresses
        self._last: dict[str, CacheCounters] = {}
        self._queries = self._hits = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens found over tokens looked up, of all prompts since this began; None before the first."""
        return self._hits / self._queries if self._queries else None

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        addresses = list(self._addresses())
        self._last = {address: last for address, last in self._last.items() if address in addresses}
        await asyncio.gather(*map(self._ask, addresses))

    async def _ask(self, address: str) -> None:
        now = await cache_counters(address)
        if now is None:
            return
        before, self._last[address] = self._last.get(address), now
        if before is None or now.queries < before.queries or now.hits < before.hits:  # the first look, or the server was started again
            return
        self._queries += now.queries - before.queries
        self._hits += now.hits - before.hits
