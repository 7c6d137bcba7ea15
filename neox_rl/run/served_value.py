"""The value that a server of the user's gives to searches: while that server is away nothing is wrong with the search, so it waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from neox_rl.errors import ConfigError, DeadlineError, ServerFailedError
from neox_rl.search.proposers import Position
from neox_rl.search.scorers import ScorerFailedError, TextsRefusedError
from neox_rl.search.values import Scores, Value

logger = logging.getLogger(__name__)
RETRY_S: Final = 1.0
FIRST_S: Final = 5.0
"""To ask at the start of a run whether the server is there: a trainer may wait for what starts."""


@dataclass
class LateValue:
    """What ``make`` makes, which needs an answer of its server: made once that is there, and tried anew when it is asked before."""

    make: Callable[[], Awaitable[Value]]
    _making: asyncio.Future[Value] | None = None

    async def made(self) -> Value:
        """Raises as ``make``. Who asks while others do waits with them for the one answer."""
        if self._making is None or (self._making.done() and (self._making.cancelled() or self._making.exception() is not None)):
            self._making = asyncio.ensure_future(self.make())
        return await asyncio.shield(self._making)

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        """See ``Value``. Raises as ``make`` and the value do."""
        return await (await self.made()).score(positions, max_tokens)


@dataclass(frozen=True)
class ServedValue:
    """``value``, asked again for ``deadline_s`` seconds while the server at ``address`` takes no connection, drops it, answers 5xx or
    not in its time, as where its machine drops what comes.

    As long as one of the run's own servers gets to start again; those have a keeper that looks after them, this one has not.
    """

    value: Value
    address: str
    deadline_s: float
    retry_s: float = RETRY_S

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        """See ``Value``. Raises ConfigError at the deadline: neither the search nor a ticket made again would wait any better."""
        begin, said = time.monotonic(), False
        while True:
            try:
                return await self.value.score(positions, max_tokens)
            except TextsRefusedError:
                raise
            except (DeadlineError, ServerFailedError, ScorerFailedError) as error:
                if said and time.monotonic() - begin >= self.deadline_s:  # one late answer may have taken as long as all may
                    raise ConfigError(
                        f"metarl.search.prm_server = {self.address}: no value for {self.deadline_s:g} s (servers.start_timeout_s), the last"
                        f" time so: {error}; start that server again, then the run with --resume"
                    ) from error
                if not said:
                    said = True
                    logger.warning("waits for the reward model at %s, for up to %g s: %s", self.address, self.deadline_s, error)
            await asyncio.sleep(self.retry_s)


async def served_value(make: Callable[[], Awaitable[Value]], address: str, deadline_s: float) -> ServedValue:
    """What ``make`` makes, whether its server is there already or not. Raises what a server of another kind raises."""
    value = LateValue(make)
    try:
        async with asyncio.timeout(FIRST_S):
            await value.made()
    except (TimeoutError, DeadlineError, ServerFailedError) as error:
        logger.warning("the reward model at %s does not answer yet, searches will wait for it: %s", address, str(error) or "no answer")
    return ServedValue(value, address, deadline_s)
