"""The seams between the parts. A stage depends on these protocols, never on another stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from neox_rl.types import Completion, Problem, SamplingParams, Verdict


class Generator(Protocol):
    """Samples completions from the policy. Concurrency lives behind this port."""

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """``n`` completions of one prompt. Raises DeadlineError naming ``rollout_id`` and the server when it passes."""
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

    def decode(self, ids: Sequence[int]) -> str: ...
