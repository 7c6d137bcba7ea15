"""A generator without a model: completions from a script, at the pace and with the version spans of a real one.

For debugging everything else. Log-probs are those of a coin that knew each token with probability 1/2: they are finite and mean nothing.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Sequence

from neox_rl.types import Completion, Finish, SamplingParams, VersionSpan

Script = Callable[[Sequence[int], random.Random], Sequence[int]]
"""(prompt ids, random source) -> completion ids."""
LOGPROB = math.log(0.5)


class ScriptedGenerator:
    """``ports.Generator`` that replays ``script``. A completion of n tokens takes n * ``token_s``.

    A version that goes live halfway shows in the completion's spans.
    """

    def __init__(self, script: Script, seed: int, token_s: float = 0.002) -> None:
        self._script, self._rng, self._token_s = script, random.Random(f"scripted/{seed}"), token_s
        self._version = 0

    def set_version(self, version: int) -> None:
        self._version = version

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        return tuple(await asyncio.gather(*(self._complete(prompt_ids, params) for _ in range(n))))

    async def _complete(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        ids = tuple(self._script(prompt_ids, self._rng))
        finish = Finish.STOP if len(ids) <= params.max_tokens else Finish.LENGTH
        ids = ids[: params.max_tokens]
        before = self._version
        await asyncio.sleep(0.5 * len(ids) * self._token_s)
        after = self._version
        await asyncio.sleep(0.5 * len(ids) * self._token_s)
        half = len(ids) // 2
        edges = [(before, 0, half), (after, half, len(ids))] if before != after else [(before, 0, len(ids))]
        spans = tuple(VersionSpan(version, start, end) for version, start, end in edges if start < end)
        return Completion(ids, (LOGPROB,) * len(ids), spans, finish)
