"""Equal requests as one: episodes ask for single short completions, many of them at once after the same context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from neox_rl.ports import Generator
from neox_rl.types import Completion, SamplingParams

MAX_COMPLETIONS = 64
"""Of one request, so that several servers share what is asked for at once. A single caller that wants more has it in one request."""

Key = tuple[tuple[int, ...], SamplingParams]
Answer = asyncio.Future[tuple[Completion, ...]]


@dataclass(frozen=True, slots=True)
class _Waiter:
    n: int
    rollout_id: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Gathered:
    """Another generator, asked once for all equal requests that come in one turn of the event loop.

    Equal are those of the same tokens and sampling parameters without a seed: the completions of one request are independent samples of
    one distribution, and so are those dealt out of it, each with the version spans of its own tokens. Greedy requests have all the same
    answer: one completion, which each of them gets. A request with a seed must be repeatable, and goes through alone. What the generator
    raises, each of them gets. A caller that is cancelled takes nobody along; the request ends with its last caller.
    """

    generator: Generator
    _waiting: dict[Key, list[_Waiter]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _calls: set[asyncio.Task[None]] = field(default_factory=set, init=False, compare=False, repr=False)

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``. An error may name another of the rollouts that were asked for together."""
        if params.seed is not None:
            return await self.generator.sample(prompt_ids, params, n, rollout_id)
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._send)
        waiter = _Waiter(n, rollout_id, loop.create_future())
        self._waiting.setdefault((tuple(prompt_ids), params), []).append(waiter)
        return await waiter.answer

    def _send(self) -> None:
        asked = list(self._waiting.items())
        self._waiting.clear()
        for key, waiters in asked:
            unanswered = [waiter for waiter in waiters if not waiter.answer.done()]
            for together in [unanswered] * bool(unanswered) if _greedy(key) else portions(unanswered):
                call = asyncio.get_running_loop().create_task(self._ask(key, together))
                self._calls.add(call)  # the loop alone would not keep it alive
                call.add_done_callback(self._calls.discard)
                for waiter in together:
                    waiter.answer.add_done_callback(partial(_end_if_alone, call, together))

    async def _ask(self, key: Key, waiters: Sequence[_Waiter]) -> None:
        ids, params = key
        wanted = sum(waiter.n for waiter in waiters)
        try:
            if _greedy(key):  # of which vLLM makes one, and refuses to make more
                completions = wanted * await self.generator.sample(ids, params, 1, waiters[0].rollout_id)
            else:
                completions = await self.generator.sample(ids, params, wanted, waiters[0].rollout_id)
        except asyncio.CancelledError:
            for waiter in waiters:
                waiter.answer.cancel()
            raise
        except Exception as error:  # whatever it is, it is the callers' to judge: each raises it
            for waiter in waiters:
                if not waiter.answer.done():
                    waiter.answer.set_exception(error)
            return
        start = 0
        for waiter in waiters:
            if not waiter.answer.done():
                waiter.answer.set_result(completions[start : start + waiter.n])
            start += waiter.n


def _greedy(key: Key) -> bool:
    return key[1].temperature == 0.0


def portions(waiters: Sequence[_Waiter]) -> list[list[_Waiter]]:
    """In order, each of at most MAX_COMPLETIONS completions, or of one caller."""
    cut: list[list[_Waiter]] = []
    room = 0
    for waiter in waiters:
        if not cut or waiter.n > room:
            cut.append([])
            room = MAX_COMPLETIONS
        cut[-1].append(waiter)
        room -= waiter.n
    return cut


def _end_if_alone(call: asyncio.Task[None], waiters: Sequence[_Waiter], _: Answer) -> None:
    if all(waiter.answer.cancelled() for waiter in waiters):
        call.cancel()
