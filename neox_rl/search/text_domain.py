"""Free text as a search space: a step is a line (or a run of tokens), and a path ends where the policy ends its completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neox_rl.errors import ConfigError
from neox_rl.ports import Verifier
from neox_rl.search.domain import MARKER_LINES, Rejection, State, Stepped
from neox_rl.types import Problem, Verdict

MAX_STEP_CHARS = 20_000


class TextState(NamedTuple):
    """The lines so far, stripped, and whether the policy ended there."""

    lines: tuple[str, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class TextDomain:
    """``verifier`` judges ended paths against the gold answer: for the record, never for the search."""

    problem: Problem
    verifier: Verifier

    @property
    def root(self) -> State:
        return TextState((), False)

    @property
    def checkable(self) -> bool:
        return False

    def step(self, state: State, text: str, ended: bool) -> Stepped | Rejection:
        """A line that the path already has is a cycle: a policy that repeats itself would do so until the budget ends."""
        assert isinstance(state, TextState)
        line = text.strip()
        if not line and not (ended and state.lines):
            return Rejection.EMPTY
        if len(text) > MAX_STEP_CHARS:
            return Rejection.TOO_LONG
        if not MARKER_LINES.isdisjoint(part.strip() for part in line.splitlines()):
            return Rejection.ILLEGAL
        if "\n" in line:
            return Rejection.UNPARSABLE  # a token with more behind its newline: no text could tell such a step from two
        if line in state.lines:
            return Rejection.CYCLE
        return Stepped(text, TextState((*state.lines, line), ended))

    def is_end(self, state: State) -> bool:
        assert isinstance(state, TextState)
        return state.ended

    def legal(self, state: State) -> Sequence[str]:
        raise ConfigError(f"problem {self.problem.id}: the steps of a text cannot be enumerated; give --server, whose policy proposes them")

    def solved_value(self, state: State) -> float:
        raise ConfigError(f"problem {self.problem.id}: an oracle knows arithmetic problems only; use --value monte-carlo, prm or judge")

    def guess(self, state: State) -> float:
        raise ConfigError(f"problem {self.problem.id}: the heuristic knows arithmetic problems only; use --value monte-carlo, prm or judge")

    def answer(self, texts: Sequence[str]) -> str:
        return "".join(texts)

    async def judge(self, texts: Sequence[str], state: State) -> Verdict:
        return await self.verifier.check(self.problem, self.answer(texts))
