"""A served policy for ``python -m neox_rl.search``: its generator, its tokenizer, how its steps end, and its prefix cache."""

from __future__ import annotations

import argparse
import asyncio
import math
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp

from neox_rl.bounded import read_bounded
from neox_rl.errors import ConfigError, WeightError, WireError
from neox_rl.ports import Generator
from neox_rl.problems.tokenizer import DirectoryTokenizer
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.rollout.vllm_control import VllmControl
from neox_rl.search.proposers import PolicyProposer, step_ends, writes_words
from neox_rl.types import NO_VERSION

METRICS_S = 10.0
METRICS_BYTES = 8 << 20
"""Many times what a vLLM server writes, a hundred engines of its own included."""
_COUNTER = re.compile(r"^vllm:prefix_cache_(queries|hits)(?:_total)?(?:\{[^}]*\})? ([0-9.eE+]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Policy:
    """``writes_words``: its tokenizer is that of ``neox_rl.metacot``, so its prompts and steps are too."""

    generator: Generator
    tokenizer: DirectoryTokenizer
    proposer: PolicyProposer
    writes_words: bool


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Prompt tokens that vLLM looked up in its prefix cache, and those that it found, since it started."""

    queries: float
    hits: float


async def connect(args: argparse.Namespace, template: str, stack: AsyncExitStack) -> Policy:
    """The policy behind ``--server``, asked in ``template``. Raises ConfigError without ``--model``, and what a server raises that
    does not answer."""
    if args.model is None:
        raise ConfigError("--server needs --model DIR: the directory with the tokenizer.json of the policy that it serves")
    tokenizer = DirectoryTokenizer(args.model, template)
    address = args.server.rstrip("/")
    served = await stack.enter_async_context(CompletionsGenerator(address, args.timeout_s))
    generator: Generator = served
    if await _live_version(address) != NO_VERSION:
        # A server of a run: its other route attests which policy version made each token.
        generator = await stack.enter_async_context(VllmGenerator([address], args.timeout_s))
    proposer = PolicyProposer(
        generator,
        tokenizer,
        step_ends(tokenizer),
        args.max_step_tokens,
        args.temperature,
        args.top_p,
        served.max_model_len,
        cut_steps=args.cut_steps,
    )
    return Policy(generator, tokenizer, proposer, writes_words(tokenizer))


async def _live_version(address: str) -> int:
    """NO_VERSION too for a server without the route, or whose weights somebody else labels."""
    try:
        async with VllmControl(address) as control:
            return await control.live_version()
    except WeightError:
        return NO_VERSION


async def cache_counters(address: str) -> CacheCounters | None:
    """None where the server does not say (``--disable-log-stats``), in time or in what can be read: nobody's work is to end for it."""
    try:
        async with (
            asyncio.timeout(METRICS_S),
            aiohttp.ClientSession() as session,
            session.get(address.rstrip("/") + "/metrics") as response,
        ):
            found = _COUNTER.findall((await read_bounded(response, METRICS_BYTES, WireError)).decode(errors="replace"))
        sums = {"queries": 0.0, "hits": 0.0}
        for name, value in found:
            sums[name] += float(value)
    except (TimeoutError, aiohttp.ClientError, WireError, ValueError):
        return None
    return CacheCounters(**sums) if found and all(map(math.isfinite, sums.values())) else None
