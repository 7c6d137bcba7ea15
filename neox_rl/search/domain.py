"""What a search is over: states, the steps between them, and how a path ends. Pure but for ``judge``, which may ask a verifier."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

from neox_rl.types import Verdict

State: TypeAlias = Hashable
"""Equal states have the same future: a search that meets one again has learned nothing."""
BACK_LINE, RIGHT_LINE, WRONG_LINE, SOLUTION_LINE = "[BACK]", "[RIGHT]", "[WRONG]", "[SOLUTION]"
MARKER_LINES = frozenset((BACK_LINE, RIGHT_LINE, WRONG_LINE, SOLUTION_LINE))
"""Lines with which a linearized search over lines of text moves; no step may hold one."""


class Rejection(StrEnum):
    """Why a proposed step did not become a node."""

    EMPTY = "empty"
    TOO_LONG = "too_long"  # no end of the step within its tokens
    DECLINED = "declined"  # the policy asks to go back
    UNPARSABLE = "unparsable"
    ILLEGAL = "illegal"  # against the rules of the problem, or false arithmetic
    CYCLE = "cycle"  # leads back to a state of its own path
    REPEATED = "repeated"  # leads to a state that the search has met


class Stepped(NamedTuple):
    """A legal step in its canonical words, and the state after it."""

    text: str
    state: State


class Domain(Protocol):
    """One problem as a space of states.

    ``checkable``: a right answer can be told from the question alone, so a search may stop at one; where only the gold answer
    tells, it must not. ``solved_value`` and ``guess`` raise ConfigError where the domain has none.
    """

    @property
    def root(self) -> State: ...

    @property
    def checkable(self) -> bool: ...

    def step(self, state: State, text: str, ended: bool) -> Stepped | Rejection:
        """The step that ``text`` says. ``ended``: the policy ended its completion with it."""
        ...

    def is_end(self, state: State) -> bool: ...

    def legal(self, state: State) -> Sequence[str]:
        """Every legal step, in a fixed order."""
        ...

    def solved_value(self, state: State) -> float:
        """1 where a right answer can still be reached, else 0: the exact oracle."""
        ...

    def guess(self, state: State) -> float:
        """A heuristic in [0, 1]; higher is more hopeful."""
        ...

    def answer(self, texts: Sequence[str]) -> str:
        """What a verifier is shown of an ended path, by the texts of its steps."""
        ...

    async def judge(self, texts: Sequence[str], state: State) -> Verdict:
        """The verdict on an ended path."""
        ...
