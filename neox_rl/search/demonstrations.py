"""Endless seeded demonstrations for the warm start: a problem, and a linearized search or the solution it came with, as a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.search.dfs import MIXED, dfs, solution_path
from neox_rl.search.linearize import Span, demonstration, linearize
from neox_rl.types import Problem, Role, Trace, Tree

Searcher: TypeAlias = Callable[[Problem, random.Random], Tree]
Style: TypeAlias = Callable[[Problem, random.Random], Sequence[Span]]
WRITTEN = "written"


def mixed(problem: Problem, rng: random.Random) -> Tree:
    """A search by one of several searchers of mixed quality: what a collection of demonstrations from many hands looks like."""
    (strategy,) = rng.choices(list(MIXED), weights=list(MIXED.values()))
    return dfs(problem, rng, strategy)


def searched(searcher: Searcher) -> Style:
    return lambda problem, rng: linearize(searcher(problem, rng), problem)


def written(problem: Problem, rng: random.Random) -> Sequence[Span]:
    """The worked solution that the problem's row brought along."""
    return (Span(str(problem.meta["solution"]), Role.SOLUTION),)


STYLES: Mapping[str, Style] = {"dfs": searched(dfs), "mixed": searched(mixed), "solution": searched(solution_path), WRITTEN: written}
MAX_SKIPS = 1_000


def demonstrable(problems: Sequence[Problem], style: str) -> Sequence[Problem]:
    """The problems that a style can show: all, or with ``written`` those that have a solution. Raises ConfigError when there is none."""
    shown = [p for p in problems if "solution" in p.meta] if style == WRITTEN else problems
    if not shown:
        raise ConfigError(
            f"warmstart.style {style}: none of {len(problems)} training problems has a worked solution; give rows with a solution, or set"
            " warmstart.steps: 0 and start from warmstart.hf_checkpoint or load"
        )
    return shown


class Demonstrations(Iterator[Trace]):
    """Traces of at most ``max_tokens`` tokens, EOS included; ids ``g000000/r0``, ``g000001/r0``, ...

    Draw number d depends on ``(seed, d)`` alone: to continue a stream, pass the ``draws`` and ``ticket`` it had come to.
    A longer trace is skipped and counted in ``skipped``, never cut: a cut trace would teach to stop before the goal.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        seed: int,
        style: str = "dfs",
        choice_weight: float = 1.0,
        max_tokens: int = 1 << 30,
        draws: int = 0,
        ticket: int = 0,
    ) -> None:
        if not problems:
            raise ConfigError("demonstrations need at least one problem")
        if style not in STYLES:
            raise ConfigError(f"warmstart.style {style!r} is none of {sorted(STYLES)}")
        self.problems, self.tokenizer, self.seed = problems, tokenizer, seed
        self.style, self.choice_weight, self.max_tokens = style, choice_weight, max_tokens
        self.draws, self.ticket, self.skipped = draws, ticket, 0

    @cached_property
    def _shown(self) -> Sequence[Problem]:
        return demonstrable(self.problems, self.style)

    def __next__(self) -> Trace:
        """Raises ConfigError when no problem can be shown, or when MAX_SKIPS traces in a row do not fit."""
        for _ in range(MAX_SKIPS):
            trace = self._draw()
            if trace.num_tokens <= self.max_tokens:
                self.ticket += 1
                return trace
            self.skipped += 1
        raise ConfigError(
            f"{MAX_SKIPS} demonstrations in a row are longer than {self.max_tokens} tokens: raise seq_length or use smaller problems"
        )

    def _draw(self) -> Trace:
        rng = random.Random(f"demonstration/{self.seed}/{self.draws}")
        self.draws += 1
        problem = rng.choice(self._shown)
        return demonstration(problem, STYLES[self.style](problem, rng), self.tokenizer, self.choice_weight, f"g{self.ticket:06d}/r0")
