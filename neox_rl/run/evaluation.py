"""Held-out accuracy: every problem once greedily and some times sampled, with intervals over clusters.

During training the servers move on to newer versions while an evaluation runs: its row says which versions made its tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from neox_rl.config.derived import max_policy_tokens, num_episodes
from neox_rl.config.placement import num_servers
from neox_rl.config.run import RunConfig
from neox_rl.episodes.objectives import SOLVED_IN, Objective
from neox_rl.episodes.rollout import FOUND
from neox_rl.errors import DeadlineError, NeoxRLError, ServerFailedError
from neox_rl.ports import Tokenizer
from neox_rl.rollout.groups import sampled_ids
from neox_rl.run.pump import MAX_FAILURES, RETRY_S
from neox_rl.search.quality import analysis_of, summary
from neox_rl.telemetry.rows import EpisodeRow, EvaluationRow, IntervalRow, TagRow
from neox_rl.telemetry.stats import cluster_mean_ci
from neox_rl.types import NO_VERSION, Problem, SamplingParams, Trace

FILL = 2
"""Completions asked for at once, as a multiple of what the servers decode at once: enough that none idles, few enough to wait little."""


class Attempting(Protocol):
    """How held-out problems are attempted."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def by_tag(self) -> Mapping[str, Self]:
        """The same under each tag that the run's prompts may have, this one under the last; the only one is "" where they have none."""
        ...

    async def attempt(self, problem: Problem, name: str, params: SamplingParams, size: int) -> tuple[Trace, ...]:
        """``size`` verified rollouts of ``problem``, ids ``<name>/r<i>``. Raises what the generator raises."""
        ...


@dataclass(frozen=True)
class Attempt:
    """One rollout of a problem, and what the policy wrote as text."""

    problem: Problem
    trace: Trace
    text: str
    num_tokens: int


class Evaluator:
    """Evaluates the servers' live policy. ``params`` fixes the stop tokens and the budget; each mode sets its temperature."""

    def __init__(
        self, config: RunConfig, problems: Sequence[Problem], attempts: Attempting, params: SamplingParams, retry_s: float = RETRY_S
    ) -> None:
        evaluation = config.metarl.evaluation
        self._samples, self._seed = evaluation.samples, config.metarl.seed
        self._episodes = num_episodes(config) if config.metarl.rollout.method == "episodes" else 0
        self._solved_in = SOLVED_IN[Objective(config.metarl.episodes.objective)]
        self._problems = tuple(problems[: evaluation.num_problems or None])
        self._small = self._problems[: evaluation.small_problems]
        self._attempts, self._params, self._retry_s = attempts, params, retry_s
        self._most_tokens = max_policy_tokens(config)
        self._limit = FILL * config.metarl.servers.max_num_seqs * max(1, num_servers(config))

    async def full(self, label: str, step: int, version: int) -> tuple[list[EvaluationRow], list[Attempt]]:
        """Rows for greedy and (where the config asks for samples) sampled attempts, and the greedy attempts."""
        greedy, attempts = await self._full_mode("greedy", label, step, version)
        if not self._samples:
            return [greedy], attempts
        return [greedy, (await self._full_mode("sampled", label, step, version))[0]], attempts

    async def small(self, label: str, step: int, version: int) -> EvaluationRow:
        """The first held-out problems, greedily."""
        return (await self._mode(self._small, "greedy", label, step, version))[0]

    async def _full_mode(self, mode: str, label: str, step: int, version: int) -> tuple[EvaluationRow, list[Attempt]]:
        """Under every tag of the prompts: the row is that of the last, and has what the others came to; the attempts are the last's."""
        start = time.monotonic()
        row, attempts = await self._mode(self._problems, mode, label, step, version)
        *hastier, last = self._attempts.by_tag().items()
        if hastier:
            found = {tag: await self._made(self._problems, mode, f"{label}, {tag}", attempting) for tag, attempting in hastier}
            row["by_tag"] = {tag: self._of_tag(made) for tag, made in (*found.items(), (last[0], attempts))}
            row["seconds"] = time.monotonic() - start
        return row, attempts

    def _of_tag(self, attempts: Sequence[Attempt]) -> TagRow:
        tokens = _interval((float(a.num_tokens) for a in attempts), attempts, float(self._most_tokens))
        return {"accuracy": _accuracy(attempts), "tokens": tokens}

    async def _mode(
        self, problems: Sequence[Problem], mode: str, label: str, step: int, version: int
    ) -> tuple[EvaluationRow, list[Attempt]]:
        start = time.monotonic()
        attempts = await self._made(problems, mode, label, self._attempts)
        versions = {s.version for a in attempts for s in a.trace.segments if s.version != NO_VERSION}
        row: EvaluationRow = {
            "label": label,
            "step": step,
            "version": version,
            "versions": [min(versions, default=version), max(versions, default=version)],
            "mode": mode,
            "accuracy": _accuracy(attempts),
            "num_problems": len(problems),
            "num_clusters": len({p.cluster for p in problems}),
            "per_problem": [[a.problem.id, a.problem.cluster, int(a.trace.verdict.correct), a.num_tokens] for a in attempts],
            "search": {} if self._episodes else search_quality(attempts),
            **self._by_episode(attempts),
            "time": time.time(),
            "seconds": time.monotonic() - start,
        }
        return row, attempts

    def _by_episode(self, attempts: Sequence[Attempt]) -> EpisodeRow:
        """Found by episode k, and right in episode k, for every k; nothing where a rollout is one attempt."""
        if not self._episodes:
            return {}
        found: EpisodeRow = {"found_by": [], "right_in": []}
        if self._episodes > 1:
            found["solved_in"] = self._solved_in
        for k in range(1, self._episodes + 1):
            marks = [a.trace.verdict.extracted for a in attempts]
            found["found_by"].append(_interval((float(FOUND in m[:k]) for m in marks), attempts))
            found["right_in"].append(_interval((float(m[k - 1 : k] == FOUND) for m in marks), attempts))
        return found

    async def _made(self, problems: Sequence[Problem], mode: str, label: str, attempting: Attempting) -> list[Attempt]:
        room = asyncio.Semaphore(max(1, self._limit // (1 if mode == "greedy" else self._samples)))
        made = await asyncio.gather(*(self._attempt(problem, i, mode, label, attempting, room) for i, problem in enumerate(problems)))
        return [attempt for some in made for attempt in some]

    async def _attempt(
        self, problem: Problem, index: int, mode: str, label: str, attempting: Attempting, room: asyncio.Semaphore
    ) -> list[Attempt]:
        if mode == "greedy":
            params, size = replace(self._params, temperature=0.0), 1
        else:
            # A server gives the j-th sample of a request the seed + j: no two problems may share one.
            params, size = replace(self._params, seed=self._seed + index * self._samples), self._samples
        async with room:
            traces = await self._try(attempting, problem, f"{label}/{mode}/{problem.id}", params, size)
        return [as_attempt(problem, trace, attempting) for trace in traces]

    async def _try(self, attempting: Attempting, problem: Problem, name: str, params: SamplingParams, size: int) -> tuple[Trace, ...]:
        """As often as the pump tries a ticket: one lost connection must not cost the run its evaluation."""
        for failures in range(MAX_FAILURES):
            try:
                return await attempting.attempt(problem, name, params, size)
            except (ServerFailedError, DeadlineError) as error:
                last = error
                await asyncio.sleep(self._retry_s * 2**failures)
        raise NeoxRLError(f"the evaluation's {name} failed {MAX_FAILURES} times, the last time so: {last}") from last


def _accuracy(attempts: Sequence[Attempt]) -> IntervalRow:
    return _interval((float(a.trace.verdict.correct) for a in attempts), attempts)


def _interval(values: Iterable[float], attempts: Sequence[Attempt], most: float = 1.0) -> IntervalRow:
    """Of one value an attempt, each from 0 to ``most``."""
    return cluster_mean_ci(list(values), [a.problem.cluster for a in attempts], (0.0, most)).row()  # type: ignore[return-value]


def as_attempt(problem: Problem, trace: Trace, attempts: Attempting) -> Attempt:
    ids = sampled_ids(trace)
    return Attempt(problem, trace, attempts.tokenizer.decode(ids), len(ids))


def search_quality(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Rates of the search inside the outputs; empty where they are no searches."""
    found = (analysis_of(a.problem, a.text, a.num_tokens) for a in attempts)
    return summary([analysis for analysis in found if analysis is not None])
