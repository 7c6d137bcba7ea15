"""Endless seeded demonstrations for the warm start: a problem, a search by the solver, its linearization as a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.search.dfs import MIXED, dfs, solution_path
from neox_rl.search.linearize import demonstration, linearize
from neox_rl.types import Problem, Trace, Tree

Style: TypeAlias = Callable[[Problem, random.Random], Tree]


def mixed(problem: Problem, rng: random.Random) -> Tree:
    """A search by one of several searchers of mixed quality: what a collection of demonstrations from many hands looks like."""
    (strategy,) = rng.choices(list(MIXED), weights=list(MIXED.values()))
    return dfs(problem, rng, strategy)


STYLES: Mapping[str, Style] = {"dfs": dfs, "mixed": mixed, "solution": solution_path}
MAX_SKIPS = 1_000


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
        self.style, self.choice_weight, self.max_tokens = STYLES[style], choice_weight, max_tokens
        self.draws, self.ticket, self.skipped = draws, ticket, 0

    def __next__(self) -> Trace:
        """Raises ConfigError when MAX_SKIPS traces in a row do not fit."""
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
        problem = rng.choice(self.problems)
        spans = linearize(self.style(problem, rng), problem)
        return demonstration(problem, spans, self.tokenizer, self.choice_weight, f"g{self.ticket:06d}/r0")
