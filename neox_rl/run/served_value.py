"""The value that a server of the user's gives to searches: while that server is away nothing is wrong with the search, so it waits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from neox_rl.errors import ConfigError
from neox_rl.rollout.vllm_client import ServerFailedError
from neox_rl.search.proposers import Position
from neox_rl.search.scorers import ScorerFailedError, TextsRefusedError
from neox_rl.search.values import Scores, Value

logger = logging.getLogger(__name__)
RETRY_S: Final = 1.0


@dataclass(frozen=True)
class ServedValue:
    """``value``, asked again for ``deadline_s`` seconds while the server at ``address`` takes no connection, drops it, or answers 5xx.

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
            except (ServerFailedError, ScorerFailedError) as error:
                if time.monotonic() - begin >= self.deadline_s:
                    raise ConfigError(
                        f"metarl.search.prm_server = {self.address}: no value for {self.deadline_s:g} s (servers.start_timeout_s), the last"
                        f" time so: {error}; start that server again, then the run with --resume"
                    ) from error
                if not said:
                    said = True
                    logger.warning("waits for the reward model at %s, for up to %g s: %s", self.address, self.deadline_s, error)
            await asyncio.sleep(self.retry_s)
