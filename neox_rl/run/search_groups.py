"""Groups made by search: the ``ports.GroupMaker`` of ``metarl.rollout.method: search``.

    ticket -> group_size searches of one problem, each by requests for steps to whatever serves -> trees -> traces (search/rollouts.py)

A search is one rollout of the ticket's group and may give several traces. A request that fails is made again, by the generator on other
servers and by the search, so a lost server loses no finished node; while none serves, or the reward model is away, the search waits. When
the orchestrator died, its successor searches open tickets again: seeds and answers are the same, so a tree grows as it did before, from
what the journal has of the policy's steps, playouts and votes; a reward model of its own is asked again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from neox_rl.config.run import RunConfig
from neox_rl.config.schema_search import SearchConfig
from neox_rl.errors import ServerFailedError
from neox_rl.ports import Chunks, Requests
from neox_rl.rollout.groups import Attempts, Named, Patient
from neox_rl.run.search_parts import domain_of, own_value, prm_value
from neox_rl.run.served_value import served_value
from neox_rl.search.demonstrations import TraceStyle
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import Mask
from neox_rl.search.proposers import PolicyProposer, derived_seed, step_ends
from neox_rl.search.rollouts import (
    Baseline,
    Remembering,
    advantages,
    all_samples,
    node_samples,
    pair_traces,
    preferences,
    step_traces,
    told_trace,
)
from neox_rl.search.search import Grown, Search
from neox_rl.search.strategy import Options
from neox_rl.search.styles import BACKTRACK
from neox_rl.search.values import Value, ValueFailedError
from neox_rl.types import NO_VERSION, End, Finish, Group, Problem, SamplingParams, Trace, Tree, Verdict

TRACES, PREFERENCES = "traces", "preferences"


@dataclass(frozen=True)
class SearchGroups:
    """``max_tokens``: of a told trace, prompt included. ``config`` says what is trained. ``value``: of a search with this policy."""

    config: SearchConfig
    attempts: Attempts
    search: Search
    proposer: PolicyProposer
    value: Callable[[PolicyProposer], Value]
    max_tokens: int

    async def group(self, problem: Problem, ticket: int, params: SamplingParams, size: int) -> Group:
        """``size`` searches of ``problem``. ``params`` are those of whole attempts: a search samples by its own.

        Raises ServerFailedError where a search could not take a single step, and where its value failed: what is not scored is not trained.
        """
        searches = [asyncio.ensure_future(self._rollout(problem, ticket, index)) for index in range(size)]
        try:
            found = await asyncio.gather(*searches)
        finally:
            for search in searches:
                search.cancel()  # one that failed has the ticket made again: the others would go on asking for nobody
        traces = [trace for _, some in found for trace in some]
        shown = sum(len(s.ids) for trace in traces for s in trace.segments if s.version != NO_VERSION)
        paid = sum(tree.num_tokens for tree, _ in found)
        named = (replace(trace, id=f"g{ticket:06d}/r{i}") for i, trace in enumerate(traces))
        return Group(ticket, problem.id, tuple(named), max(0, paid - shown))

    def chunked(self, chunks: Chunks) -> Self:
        """See ``ports.GroupMaker``."""
        return replace(self, proposer=replace(self.proposer, generator=chunks(self.proposer.generator, Requests.MANY)))

    async def _rollout(self, problem: Problem, ticket: int, index: int) -> tuple[Tree, Sequence[Trace]]:
        seed = derived_seed(self.search.seed, ticket, index)
        policy = replace(self.proposer, generator=Patient(Named(self.proposer.generator, f"g{ticket:06d}/r{index}")))
        proposer = Remembering(policy)
        budget = Budget(self.config.nodes, self.config.tokens or None)
        grown = await replace(self.search, seed=seed).grown(problem, proposer, self.value(policy), budget)
        tree, failed = grown.tree, grown.tree.end is End.FAILED
        if failed and (len(tree.nodes) == 1 or isinstance(grown.error, ValueFailedError)):
            raise ServerFailedError(f"search g{ticket:06d}/{index}: {tree.error}")
        traces = self._traces(problem, grown, proposer, random.Random(seed))
        return tree, [replace(trace, finish=Finish.ABORT) if failed else trace for trace in traces]

    def _traces(self, problem: Problem, grown: Grown, proposer: Remembering, rng: random.Random) -> Iterator[Trace]:
        tree, rewarder = grown.tree, partial(self._reward, problem)
        if self.config.trains == TRACES:
            style = TraceStyle(self.config.telling, Mask(self.config.mask), self.config.thin)
            return iter((told_trace(tree, problem, style, self.attempts.tokenizer, rng, self.max_tokens, rewarder),))
        every = self.config.samples == "all"
        samples = all_samples(grown, self.search.domain(problem), proposer.asked) if every else node_samples(tree)
        prompt = self.proposer.prompt_ids(problem)
        if self.config.trains == PREFERENCES:
            return pair_traces(tree, problem, prompt, preferences(samples, self.config.margin), rewarder)
        credit = advantages(tree, samples, Baseline(self.config.baseline))
        return step_traces(tree, problem, prompt, samples, credit, rewarder)

    def _reward(self, problem: Problem, verdict: Verdict, text: str, num_tokens: int) -> float:
        return self.attempts.reward(problem, verdict, text, num_tokens)


async def reward_model(config: RunConfig, stack: AsyncExitStack) -> Value | None:
    """The served model that ``search.value: prm`` asks, None with another value. Its server may come later."""
    block = config.metarl.search
    if config.metarl.rollout.method != "search" or block.value != "prm":
        return None
    servers, template = config.metarl.servers, config.metarl.problems.template
    make = prm_value(block.prm_server, block.prm_model, servers.request_timeout_s, stack, block.sees_earlier, template)
    return await served_value(make, block.prm_server, servers.start_timeout_s)


def search_groups(config: RunConfig, attempts: Attempts, prm: Value | None = None) -> SearchGroups:
    """``prm``: the ``reward_model``. Raises ConfigError where no token of the tokenizer ends a step."""
    metarl, block = config.metarl, config.metarl.search
    proposer = PolicyProposer(
        attempts.generator,
        attempts.tokenizer,
        step_ends(attempts.tokenizer),
        block.max_step_tokens,
        metarl.rollout.temperature,
        metarl.rollout.top_p,
        config.neox.seq_length,
        seeded=False,
        cut_steps=block.cut_steps,
    )
    plays = (block.playouts, block.playout_tokens, block.votes, block.sees_earlier)

    def value(policy: PolicyProposer) -> Value:
        return prm or own_value(block.value, policy, attempts.verifier, *plays)

    prune = 0.0 if block.value == "oracle" and block.prune else None
    options = Options(block.width, block.batch, block.beam, prune, exploration=block.exploration)
    domain = partial(domain_of, verifier=attempts.verifier)
    every = block.trains != TRACES or block.telling == BACKTRACK  # whose wrong steps are those that an oracle gives nothing
    search = Search(block.strategy, domain, options, metarl.seed, every_value=every)
    return SearchGroups(block, attempts, search, proposer, value, config.neox.seq_length)
