"""Completions made chunk by chunk and written down, so that a crash costs at most the requests in flight.

    request 1   prompt                     -> chunk 1 of all n completions
    request 2   prompt + chunk 1           -> chunk 2 of one completion     until it stops or has ``max_tokens``
    ...

Who makes a group again after a crash asks the same again, and gets what is written down of the answer; servers are asked for what is not.
So an attempt goes on in its completion, and a search or a rollout of several episodes walks as it did before, up to where it was.

Every chunk brings its own log-probs and version spans from the engine, and their concatenation is what one request would have given: the
same budget, the same stop tokens, log-probs under the weights that were live. The server's prefix cache has the earlier tokens' keys and
values, but for the switches of version in between. Versions rise along a completion and never fall, nor along a rollout whose requests go
on behind one another: where a server is behind the one that made the chunk before, it is asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from neox_rl.errors import ServerFailedError
from neox_rl.ports import Generator, Requests
from neox_rl.types import NO_VERSION, Completion, Finish, SamplingParams, VersionSpan


class Kept(Protocol):
    """What is written down of the answer to one request. ``whole``: it asks for all rollouts of a group."""

    whole: bool

    @property
    def reached(self) -> int:
        """The newest version of all that the request's rollout was answered so far, NO_VERSION before that."""
        ...

    def earlier(self) -> Mapping[int, Sequence[Completion]]:
        """Number of a completion -> its finished chunks."""
        ...

    def keep(self, index: int, start: int, chunks: Sequence[Completion]) -> None:
        """Of the completions from number ``index`` on a chunk each, behind ``start`` tokens."""
        ...


class Record(Protocol):
    """What is written down of the answers to all requests."""

    def request(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> AbstractContextManager[Kept]:
        """Left without an error the request is answered, and the next equal one is another; with one it may be made again."""
        ...


BEHIND_TRIES, BEHIND_S = 9, 0.1
"""A server switches within moments of another, or stages a large model for the better part of a minute; the pause before the next try
doubles."""


class ChunkedGenerator:
    """``ports.Generator`` around another. ``flush_tokens`` is the most of one chunk; 0: a completion is one chunk.

    ``record`` gets each finished chunk, unless the first one finishes all rollouts of a group and ``requests`` says that nothing follows.
    """

    def __init__(self, generator: Generator, requests: Requests, flush_tokens: int, record: Record) -> None:
        self._generator, self._requests, self._flush_tokens, self._record = generator, requests, flush_tokens, record

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``. Raises ServerFailedError too when only servers with older weights than those of the chunks answer."""
        with self._record.request(prompt_ids, params, n, rollout_id) as kept:
            chunks = {index: list(found) for index, found in kept.earlier().items() if found and index < n}
            if chunks:
                await asyncio.sleep(0)  # a search that is walked again waits for nobody: others have their turn
            else:
                reached = kept.reached if self._requests is Requests.LINE else NO_VERSION
                first = await self._next(prompt_ids, self._params(params, 0, 0), n, rollout_id, reached)
                chunks = {index: [self._stopped(chunk, params)] for index, chunk in enumerate(first)}
                if self._requests is not Requests.ONE or not all(self._done(found, params) for found in chunks.values()):
                    kept.keep(0, 0, [found[0] for found in chunks.values()])
            if len(chunks) < n or not all(self._done(found, params) for found in chunks.values()):
                await self._finish(prompt_ids, params, n, rollout_id, chunks, kept)
            return tuple(merged(chunks[index]) for index in range(n))

    async def _finish(
        self, prompt_ids: Sequence[int], params: SamplingParams, n: int, name: str, chunks: dict[int, list[Completion]], kept: Kept
    ) -> None:
        rest = (self._rest(prompt_ids, params, index, chunks.setdefault(index, []), name, kept) for index in range(n))
        tasks = [asyncio.ensure_future(work) for work in rest]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # one that failed fails the request: no other may hand on chunks after that

    async def _rest(
        self, prompt_ids: Sequence[int], params: SamplingParams, index: int, chunks: list[Completion], name: str, kept: Kept
    ) -> None:
        one = f"{name}/r{index}" if kept.whole else name
        while not self._done(chunks, params):
            ids = [i for chunk in chunks for i in chunk.ids]
            reached = max((span.version for chunk in chunks for span in chunk.spans), default=NO_VERSION)
            (chunk,) = await self._next([*prompt_ids, *ids], self._params(params, index, len(ids)), 1, one, reached)
            if not chunk.ids and chunk.finish is Finish.LENGTH:
                raise ServerFailedError(f"rollout {one}: a server answered with no token, and does not say that the rollout is done")
            chunks.append(self._stopped(chunk, params))
            kept.keep(index, len(ids), chunks[-1:])

    async def _next(self, ids: Sequence[int], params: SamplingParams, n: int, name: str, reached: int) -> Sequence[Completion]:
        """A chunk of ``n`` completions each, none of whose tokens is older than v``reached``."""
        for attempt in range(BEHIND_TRIES):
            chunks = await self._generator.sample(ids, params, n, name)
            if all(not chunk.spans or chunk.spans[0].version >= reached for chunk in chunks):
                return chunks
            await asyncio.sleep(BEHIND_S * 2**attempt)
        oldest = min(chunk.spans[0].version for chunk in chunks if chunk.spans)
        came = f"{BEHIND_TRIES} answers came from older weights, the last from v{oldest}"
        raise ServerFailedError(f"rollout {name}: it has tokens of v{reached}, but {came}: some server stays behind, as its log says")

    def _params(self, params: SamplingParams, index: int, start: int) -> SamplingParams:
        left = params.max_tokens - start
        seed = params.seed if params.seed is None or start == 0 else _seed(params.seed, index, start)
        return replace(params, max_tokens=min(left, self._flush_tokens or left), seed=seed)

    def _stopped(self, chunk: Completion, params: SamplingParams) -> Completion:
        """An engine that looks at the budget first calls a stop token in a chunk's last place its length."""
        if chunk.finish is Finish.LENGTH and chunk.ids and chunk.ids[-1] in params.stop_token_ids:
            return replace(chunk, finish=Finish.STOP)
        return chunk

    def _done(self, chunks: Sequence[Completion], params: SamplingParams) -> bool:
        if not chunks:
            return False
        return chunks[-1].finish is not Finish.LENGTH or sum(len(chunk.ids) for chunk in chunks) >= params.max_tokens


def merged(chunks: Sequence[Completion]) -> Completion:
    """One completion; spans of one version that touch become one."""
    if len(chunks) == 1 and len(chunks[0].spans) == 1:
        return chunks[0]
    spans: list[VersionSpan] = []
    start = 0
    for chunk in chunks:
        for span in chunk.spans:
            if spans and spans[-1].version == span.version:
                spans[-1] = replace(spans[-1], end=start + span.end)
            else:
                spans.append(VersionSpan(span.version, start + span.start, start + span.end))
        start += len(chunk.ids)
    ids = tuple(i for chunk in chunks for i in chunk.ids)
    logprobs = tuple(p for chunk in chunks for p in chunk.logprobs)
    return Completion(ids, logprobs, tuple(spans), chunks[-1].finish)


def _seed(seed: int, index: int, start: int) -> int:
    """Of a later chunk: the same seed again would draw the same numbers again."""
    return int.from_bytes(hashlib.blake2s(f"{seed}/{index}/{start}".encode(), digest_size=4).digest(), "big")
