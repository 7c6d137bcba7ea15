"""One group: n attempts at one problem, verified and rewarded, as traces."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from neox_rl.ports import Chunks, Generator, Requests, Tokenizer, Verifier
from neox_rl.rollout.vllm_client import NobodyServesError
from neox_rl.types import Completion, Finish, Group, Problem, Reason, Role, SamplingParams, Segment, Trace, Verdict

Answer = TypeVar("Answer")
Reward = Callable[[Problem, Verdict, str, int], float]
"""(problem, verdict, completion as text, its tokens) -> reward."""
CUT_OFF = Verdict(correct=False, extracted="", reason=Reason.NO_ANSWER, ms=0.0)
"""A completion that the token budget ended has no final answer, whatever its text holds so far."""


@dataclass(frozen=True, slots=True)
class Patient:
    """Another generator, waited for: a server may take longer to start again than a request may take; while none serves nothing failed."""

    generator: Generator

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``."""
        return await patiently(lambda: self.generator.sample(prompt_ids, params, n, rollout_id))


async def patiently(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """What ``ask`` gives, asked again for as long as no server is there."""
    while True:
        try:
            return await ask()
        except NobodyServesError:
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Named:
    """Another generator, whose requests are all named after one rollout, whoever makes them for it."""

    generator: Generator
    rollout_id: str

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        """See ``ports.Generator``."""
        return await self.generator.sample(prompt_ids, params, n, self.rollout_id)


@dataclass(frozen=True, slots=True)
class Attempts:
    """How a problem is attempted by sampling: the ``ports.GroupMaker`` of ``rollout.method: sample``.

    ``solution_id``: the token that ends the search and begins the solution, None where there is none.
    """

    generator: Generator
    verifier: Verifier
    tokenizer: Tokenizer
    reward: Reward
    solution_id: int | None = None

    async def group(self, problem: Problem, ticket: int, params: SamplingParams, size: int) -> Group:
        """``size`` rollouts of ``problem`` under the ticket's name."""
        return Group(ticket, problem.id, await self.attempt(problem, f"g{ticket:06d}", params, size))

    def chunked(self, chunks: Chunks) -> Self:
        """See ``ports.GroupMaker``."""
        return replace(self, generator=chunks(self.generator, Requests.ONE))

    def by_tag(self) -> Mapping[str, Self]:
        """Its prompts have no tags."""
        return {"": self}

    async def attempt(self, problem: Problem, name: str, params: SamplingParams, size: int) -> tuple[Trace, ...]:
        """``size`` verified rollouts of ``problem``, ids ``<name>/r<i>``. Raises what the generator raises."""
        prompt = self.tokenizer.encode_prompt(problem.prompt)
        completions = await Patient(self.generator).sample(prompt, params, size, name)
        texts = [self.tokenizer.decode(completion.ids) for completion in completions]
        verdicts = await asyncio.gather(*(self._verdict(problem, c, text) for c, text in zip(completions, texts, strict=True)))
        rows = zip(completions, texts, verdicts, strict=True)
        return tuple(self._trace(f"{name}/r{i}", problem, prompt, *row) for i, row in enumerate(rows))

    def _trace(self, id: str, problem: Problem, prompt: tuple[int, ...], completion: Completion, text: str, verdict: Verdict) -> Trace:
        return Trace(
            id=id,
            problem_id=problem.id,
            segments=(Segment(prompt, Role.PROMPT), *segments(completion, self.solution_id)),
            reward=self.reward(problem, verdict, text, len(completion.ids)),
            finish=completion.finish,
            verdict=verdict,
        )

    async def _verdict(self, problem: Problem, completion: Completion, text: str) -> Verdict:
        return await self.verifier.check(problem, text) if completion.finish is Finish.STOP else CUT_OFF


def segments(completion: Completion, solution_id: int | None) -> Iterator[Segment]:
    """The completion cut where the version or the role changes; every token gets full loss weight."""
    ids = completion.ids
    turn = ids.index(solution_id) if solution_id is not None and solution_id in ids else len(ids)
    for span in completion.spans:
        for start, end, role in ((span.start, min(span.end, turn), Role.THINK), (max(span.start, turn), span.end, Role.SOLUTION)):
            if start < end:
                yield Segment(ids[start:end], role, completion.logprobs[start:end], span.version, mask=1.0)


def sampled_ids(trace: Trace) -> list[int]:
    """The tokens that the policy wrote."""
    return [i for segment in trace.written if segment.logprobs for i in segment.ids]
