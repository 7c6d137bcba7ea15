"""One verifier a task: arithmetic games in this process (pure, bounded, 80,000 a second), mathematics in worker processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.own import is_own, own
from neox_rl.config.schema import VerifyConfig
from neox_rl.errors import ConfigError
from neox_rl.ports import Verifier
from neox_rl.types import Problem, Reason, Verdict
from neox_rl.verify.arithmetic import check_arithmetic, check_arithmetic_gold
from neox_rl.verify.finding import Finding
from neox_rl.verify.goal import GOAL_TASK, check_goal
from neox_rl.verify.pool import VerifierPool

TASKS = (*sorted(ARITHMETIC_TASKS), GOAL_TASK, "math")


class TaskVerifier(Verifier, Protocol):
    """A verifier that can also check gold answers, work without an event loop, and be closed."""

    counts: Counter[Reason]

    def check_sync(self, problem: Problem, text: str) -> Verdict: ...

    def check_gold(self, problem: Problem) -> Verdict: ...

    def close(self) -> None: ...


class ArithmeticVerifier:
    """Countdown and the Game of 24. ``use_all``: every given number exactly once, else each at most once."""

    def __init__(self, use_all: bool = True) -> None:
        self.use_all = use_all
        self.counts: Counter[Reason] = Counter()

    async def check(self, problem: Problem, text: str) -> Verdict:
        return self.check_sync(problem, text)

    def check_sync(self, problem: Problem, text: str) -> Verdict:
        started = time.perf_counter()
        verdict = _timed(check_arithmetic(problem, text, self.use_all), started)
        self.counts[verdict.reason] += 1
        return verdict

    def check_gold(self, problem: Problem) -> Verdict:
        started = time.perf_counter()
        return _timed(check_arithmetic_gold(problem), started)

    def close(self) -> None:
        """Nothing is held."""


class GoalVerifier:
    """Goal finding."""

    def __init__(self) -> None:
        self.counts: Counter[Reason] = Counter()

    async def check(self, problem: Problem, text: str) -> Verdict:
        return self.check_sync(problem, text)

    def check_sync(self, problem: Problem, text: str) -> Verdict:
        started = time.perf_counter()
        verdict = _timed(check_goal(problem, text), started)
        self.counts[verdict.reason] += 1
        return verdict

    def check_gold(self, problem: Problem) -> Verdict:
        started = time.perf_counter()
        return _timed(check_goal(problem, problem.answer), started)

    def close(self) -> None:
        """Nothing is held."""


def _timed(finding: Finding, started: float) -> Verdict:
    return finding.verdict((time.perf_counter() - started) * 1e3)


def make_verifier(config: VerifyConfig, task: str) -> TaskVerifier:
    """The verifier of a task, ready to check. Raises ConfigError on an unknown task, DeadlineError when no worker starts."""
    if task in ARITHMETIC_TASKS:
        return ArithmeticVerifier()
    if task == GOAL_TASK:
        return GoalVerifier()
    if task == "math":
        return VerifierPool(config.workers, config.deadline_s, config.math)
    if is_own(task):
        verifier: TaskVerifier = own(task, "metarl.problems.task")(config)
        return verifier
    raise ConfigError(f"task {task!r} has no verifier; known tasks: {', '.join(TASKS)}, or package.module:name of your own")


def readable_gold(verifier: TaskVerifier, problems: Sequence[Problem]) -> tuple[tuple[Problem, ...], tuple[str, ...]]:
    """The problems whose gold answer the verifier can read, in order, and the ids of all others.

    No attempt at those others can ever be right: trained on, they would punish good reasoning; evaluated, lower every accuracy.
    An answer that takes longer to read than the deadline counts as unreadable.
    """
    readable = [verifier.check_gold(problem).correct for problem in problems]
    kept = tuple(p for p, good in zip(problems, readable, strict=True) if good)
    return kept, tuple(p.id for p, good in zip(problems, readable, strict=True) if not good)
