"""Where the steps of a search come from: the policy behind a generator, or every legal step of the problem's own rules."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

from neox_rl import metacot
from neox_rl.errors import ConfigError
from neox_rl.ports import Generator, Tokenizer
from neox_rl.search.domain import Domain, State
from neox_rl.types import Completion, Finish, Problem, SamplingParams, Tree, VersionSpan

WORD_STEP = "3 *5 =15"
CACHED_PROMPTS = 4096
UNBOUNDED = 1 << 30
MARKS = (metacot.LOW, metacot.HIGH, metacot.GOAL, metacot.BACK)


@dataclass(frozen=True, slots=True)
class Position:
    """A node as proposers and values see it: its state, and the path that leads there.

    ``ids``: the path's tokens, prompt left out. For values that see earlier attempts, as it was before the round that made the node:
    ``earlier``, the steps of every path that the search had ended, which grows with the search, and ``visited``, the tree.
    """

    problem: Problem
    domain: Domain
    state: State
    texts: tuple[str, ...]
    ids: tuple[int, ...]
    seed: int
    earlier: Sequence[tuple[str, ...]] = ()
    visited: Callable[[], Tree] | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """A proposed next step. ``complete``: it came to the end of a step. ``ended``: the policy ended its completion there.

    ``cut_short``: it is not complete since less was asked for than a step may have, as where a budget runs out: nobody knows what it would
    have become.
    """

    text: str
    num_tokens: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    spans: tuple[VersionSpan, ...] = ()
    complete: bool = True
    ended: bool = False
    cut_short: bool = False


class Proposer(Protocol):
    """``step_tokens``: the most tokens that one proposal may have."""

    @property
    def step_tokens(self) -> int: ...

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        """At most ``n`` steps of at most ``max_tokens`` tokens, the same for the same position and seed; none where there is no room."""
        ...


@runtime_checkable
class Attempter(Proposer, Protocol):
    """A proposer that writes whole attempts in one request: a request a step would wait for the slowest sibling at every step."""

    async def attempt(self, position: Position, n: int, max_tokens: int) -> Sequence[Sequence[Proposal]]:
        """At most ``n`` attempts from ``position`` on, of at most ``max_tokens`` tokens each, as chains of steps."""
        ...


@dataclass(frozen=True)
class ExhaustiveProposer:
    """Every legal step of the domain, or ``n`` of them drawn by seed: a search without a model. A step costs its words as tokens."""

    tokenizer: Tokenizer | None = None

    @property
    def step_tokens(self) -> int:
        return 0

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        legal = position.domain.legal(position.state)
        if n < len(legal):
            legal = random.Random(position.seed).sample(legal, n)
        return [self._proposal(text) for text in legal]

    def _proposal(self, text: str) -> Proposal:
        ids = self.tokenizer.encode(text) if self.tokenizer is not None else ()
        return Proposal(text, len(ids) or len(text.split()), ids)


@dataclass(frozen=True)
class PolicyProposer:
    """Samples the next step from the policy, given the prompt and the path's own tokens, so that siblings share their prefix.

    ``max_context`` bounds prompt, path and step together; 0: no bound. A step that ``max_step_tokens`` cuts off is too long, unless
    ``cut_steps``: then that is where a step ends.
    """

    generator: Generator
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    max_step_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    max_context: int = 0
    seeded: bool = True
    cut_steps: bool = False
    _prompts: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    _marks: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def step_tokens(self) -> int:
        return self.max_step_tokens

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        found = self._prompts.get(problem.prompt)
        if found is None:
            if len(self._prompts) >= CACHED_PROMPTS:
                self._prompts.clear()
            found = self._prompts[problem.prompt] = self.tokenizer.encode_prompt(problem.prompt)
        return found

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        completions = await self._sample(position, n, min(self.max_step_tokens, max_tokens), self.stop_token_ids)
        room = self._room(position)
        return [self._proposal(c, room) for c in completions]

    async def attempt(self, position: Position, n: int, max_tokens: int) -> Sequence[Sequence[Proposal]]:
        """See ``Attempter``. A marker (``back``, ``low``) ends an attempt, a result only a step."""
        room = self._room(position)
        return [self._steps(c, room) for c in await self._sample(position, n, max_tokens, self._attempt_ends)]

    async def _sample(self, position: Position, n: int, cap: int, stops: tuple[int, ...]) -> Sequence[Completion]:
        prompt = (*self.prompt_ids(position.problem), *position.ids)
        cap = min(cap, self._room(position))
        if cap < 1:
            return ()
        params = SamplingParams(cap, self.temperature, self.top_p, stops, position.seed if self.seeded else None)
        return await self.generator.sample(prompt, params, n, position.problem.id)

    def _room(self, position: Position) -> int:
        """How many tokens the context has left."""
        return self.max_context - len(self.prompt_ids(position.problem)) - len(position.ids) if self.max_context else UNBOUNDED

    def _proposal(self, c: Completion, room: int) -> Proposal:
        """``room``: what the context had left for it."""
        complete = c.finish is Finish.STOP or self.cut_steps
        cut_short = not complete and len(c.ids) < min(self.max_step_tokens, room)
        ended = c.ids[-1:] == (self.tokenizer.eos_id,) or (c.finish is Finish.STOP and c.ids[-1:] not in self._stops)
        return Proposal(self.tokenizer.decode(c.ids), len(c.ids), c.ids, c.logprobs, c.spans, complete, ended, cut_short)

    def _steps(self, c: Completion, room: int) -> list[Proposal]:
        """The completion cut where its steps end, each piece as if it had been asked for alone."""
        steps: list[Proposal] = []
        start, last = 0, len(c.ids)
        for end in range(1, last + 1):
            stop, full = (c.ids[end - 1],) in self._stops, end - start == self.max_step_tokens
            if stop or full or end == last:
                finish = Finish.STOP if stop else Finish.LENGTH if full else c.finish
                steps.append(self._proposal(piece(c, start, end, finish), room - start))
                start = end
        if c.finish is Finish.STOP and (not c.ids or c.ids[-1] in set(self.stop_token_ids) - set(self._attempt_ends)):
            steps.append(self._proposal(piece(c, last, last, Finish.STOP), room - last))  # its end, a token that the engine leaves out
        return steps

    @cached_property
    def _stops(self) -> frozenset[tuple[int, ...]]:
        return frozenset((i,) for i in self.stop_token_ids)

    @cached_property
    def _attempt_ends(self) -> tuple[int, ...]:
        if self.stop_token_ids not in self._marks:  # a run asks with thousands, for each of its searches
            marks = (*MARKS, metacot.SOLUTION)
            self._marks[self.stop_token_ids] = tuple(i for i in self.stop_token_ids if self.tokenizer.decode((i,)).strip() in marks)
        return self._marks[self.stop_token_ids]


def piece(c: Completion, start: int, end: int, finish: Finish) -> Completion:
    """Tokens ``start:end`` of a completion as one of their own."""
    cut = ((s.version, max(s.start, start) - start, min(s.end, end) - start) for s in c.spans)
    spans = tuple(VersionSpan(version, first, last) for version, first, last in cut if first < last)
    return Completion(c.ids[start:end], c.logprobs[start:end], spans, finish)


def writes_words(tokenizer: Tokenizer) -> bool:
    """Whether it is a tokenizer of ``neox_rl.metacot``: a token for each word of a step."""
    ids = tokenizer.encode(WORD_STEP)
    return len(ids) == len(WORD_STEP.split()) and tokenizer.decode(ids) == WORD_STEP


def step_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a step: among the words of ``neox_rl.metacot`` every result and marker, else every token with a newline.

    Raises ConfigError when there is none: a step would never end.
    """
    texts = [(i, tokenizer.decode((i,))) for i in range(tokenizer.vocab_size)]
    if writes_words(tokenizer):
        return tuple(i for i, text in texts if text.startswith("=") or text in (*MARKS, metacot.SOLUTION))
    found = tuple(i for i, text in texts if "\n" in text)
    if not found:
        raise ConfigError("no token of the tokenizer ends a step: none holds a newline; search needs one that writes lines")
    return found


def derived_seed(*parts: object) -> int:
    """31 bits that depend on ``parts`` alone."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "big") >> 1
