"""The seams between the parts. A stage depends on these protocols, never on another stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Protocol, Self

from neox_rl.types import Completion, Group, Problem, SamplingParams, Verdict


class Generator(Protocol):
    """Samples completions from the policy. Concurrency lives behind this port."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """``n`` completions of one prompt. Raises DeadlineError naming ``rollout_id`` and the server when it passes."""
        ...


class Scorer(Protocol):
    """Says how likely the policy finds given tokens."""

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], rollout_id: str) -> Completion:
        """``ids`` after ``prompt_ids``, as a completion at temperature 1 that the policy might have sampled: the log-probs of its tokens,
        and the one version that gave them."""
        ...


class Requests(Enum):
    """How a maker asks for a group, and so what must be written down of the answers."""

    ONE = auto()
    """Once: with the answer the group is as good as there."""
    MANY = auto()
    """Others follow, or something else that a server may fail at: until then every answer is worth its place."""
    LINE = auto()
    """Many, and those of one rollout each go on behind the answer to the one before."""


Chunks = Callable[[Generator, Requests], Generator]
"""A generator that writes down what another makes."""


class GroupMaker(Protocol):
    """How the groups of a run are made: by sampling whole attempts, by searches, by episodes (``metarl.rollout.method``)."""

    async def group(self, problem: Problem, ticket: int, params: SamplingParams, size: int) -> Group:
        """``size`` rollouts of ``problem``, verified and rewarded, as traces named ``g<ticket>/r<i>``. Raises what the generator raises.

        Made again after a crash it asks the same requests as before, as far as the answers are the same: what it chooses depends on
        ``ticket`` and the answers alone, never on time.
        """
        ...

    def chunked(self, chunks: Chunks) -> Self:
        """The same, with every completion made by ``chunks`` of its generator: what is finished survives a crash, and is given again.

        A request to it is named ``g<ticket>`` where it asks for all rollouts of the group at once, once a group; else ``g<ticket>/r<i>``
        after the rollout it belongs to. Equal requests of one rollout are told apart by the order in which they are made.
        """
        ...


class Verifier(Protocol):
    """Checks one answer against a problem, in bounded time, whatever the text holds."""

    async def check(self, problem: Problem, text: str) -> Verdict: ...


class Tokenizer(Protocol):
    """Text to token ids and back; ``eos_id`` ends a completion."""

    @property
    def eos_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> tuple[int, ...]: ...

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """What the policy is asked, in the template that it is asked in, where there is one."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...
