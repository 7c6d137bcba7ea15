"""Groups of meta-RL rollouts: several episodes in one context (``metarl.rollout.method: episodes``; arXiv 2501.04682, section 6.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from neox_rl.batch.advantages import group_advantages
from neox_rl.config.derived import max_policy_tokens
from neox_rl.config.run import RunConfig
from neox_rl.episodes.environments import environment_of
from neox_rl.episodes.objectives import Objective, credits, tagged, tags_of
from neox_rl.episodes.protocol import Feedback, Rules
from neox_rl.episodes.rollout import Episodes, Rollout
from neox_rl.episodes.tools import Tool
from neox_rl.ports import Chunks, Requests, Tokenizer
from neox_rl.rollout.groups import Attempts, Patient
from neox_rl.types import Group, Problem, SamplingParams, Trace


@dataclass(frozen=True, slots=True)
class EpisodeGroups:
    """The ``ports.GroupMaker`` of rollouts of several episodes, each of which is an attempt as ``attempts`` has it judged and rewarded.

    ``gammas``: the discounts a token (21), in turn by ticket; ``heldout_gamma``: that under which held-out problems are attempted.
    ``baseline``: as in ``batch.advantages``, over the episodes of one number.
    """

    attempts: Attempts
    rules: Rules
    objective: Objective
    gammas: tuple[float, ...]
    heldout_gamma: float
    baseline: str
    tool: Tool | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.attempts.tokenizer

    @classmethod
    def of(cls, config: RunConfig, attempts: Attempts, tool: Tool | None) -> Self:
        e = config.metarl.episodes
        limits = (config.metarl.rollout.max_new_tokens, max_policy_tokens(config), config.neox.seq_length)
        rules = Rules(e.count, Feedback(e.feedback), *limits)
        return cls(attempts, rules, Objective(e.objective), e.gammas, max(e.gammas), config.metarl.objective.baseline, tool)

    async def group(self, problem: Problem, ticket: int, params: SamplingParams, size: int) -> Group:
        """See ``ports.GroupMaker``."""
        gamma = self.gammas[ticket % len(self.gammas)]
        rollouts = await self._roll_out(problem, f"g{ticket:06d}", params, size, gamma)
        return Group(ticket, problem.id, credited(rollouts, self.objective, self.baseline))

    def by_tag(self) -> Mapping[str, Self]:
        """The same with held-out problems attempted under each discount, the largest last."""
        return {tag: replace(self, heldout_gamma=gamma) for gamma, tag in tags_of(self.gammas).items()}

    async def attempt(self, problem: Problem, name: str, params: SamplingParams, size: int) -> tuple[Trace, ...]:
        """``size`` rollouts for an evaluation, ids ``<name>/r<i>``."""
        return tuple(rollout.trace for rollout in await self._roll_out(problem, name, params, size, self.heldout_gamma))

    def chunked(self, chunks: Chunks) -> Self:
        """See ``ports.GroupMaker``: tools and environments are asked again after a crash."""
        return replace(self, attempts=replace(self.attempts, generator=chunks(self.attempts.generator, Requests.LINE)))

    async def _roll_out(self, problem: Problem, name: str, params: SamplingParams, size: int, gamma: float) -> Sequence[Rollout]:
        a = self.attempts
        episodes = Episodes(Patient(a.generator), a.tokenizer, self.rules, self.objective, self.tool, a.solution_id)
        asked = replace(problem, prompt=tagged(problem.prompt, tags_of(self.gammas)[gamma]))

        def one(i: int) -> asyncio.Future[Rollout]:
            own = params if params.seed is None else replace(params, seed=params.seed + i)
            environment = environment_of(problem, a.verifier, a.reward)
            return asyncio.ensure_future(episodes.roll_out(asked, environment, own, f"{name}/r{i}", gamma))

        tasks = [one(i) for i in range(size)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # one that failed fails the group


def credited(rollouts: Sequence[Rollout], objective: Objective, baseline: str) -> tuple[Trace, ...]:
    """The traces of a group, each episode with the advantage of its own credit over those of the same number in the group.

    ``final`` credits every episode alike, with what the rollout is worth: its advantage in the group holds.
    """
    if objective is Objective.FINAL:
        return tuple(rollout.trace for rollout in rollouts)
    worth = [credits(rollout.rewards, objective) for rollout in rollouts]
    own: list[list[float]] = [[0.0] * len(row) for row in worth]
    for number in range(max(map(len, worth), default=0)):
        there = [i for i, row in enumerate(worth) if len(row) > number]
        for i, advantage in zip(there, group_advantages([worth[i][number] for i in there], baseline), strict=True):
            own[i][number] = advantage
    return tuple(_with_advantages(rollout.trace, row) for rollout, row in zip(rollouts, own, strict=True))


def _with_advantages(trace: Trace, advantages: Sequence[float]) -> Trace:
    return replace(trace, segments=tuple(replace(s, advantage=advantages[s.episode]) if s.mask else s for s in trace.segments))
