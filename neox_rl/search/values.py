"""How hopeful a node is, in [0, 1], as an exact oracle, a rule or completions of the policy see it. Models that score: ``scorers``."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.ports import Verifier
from neox_rl.search.domain import Rejection
from neox_rl.search.proposers import PolicyProposer, Position, Proposer, derived_seed
from neox_rl.types import Completion, Finish, SamplingParams


class Scores(NamedTuple):
    """One value a position, NaN where there is none, and the tokens they cost. No values at all: what is left cannot pay for them.
    ``exact``: they are no estimates. ``failed``: why some are missing, which are NaN and may be asked for again; the others are as good.
    ``unpaid``: those that are NaN are it because what is left could not pay for them. ``guide``: they say nothing of the positions; a
    search goes by them, and nobody else. ``discounts``: a search goes by the values times these, where it would rather try another step;
    the values stay what they are."""

    values: Sequence[float]
    num_tokens: int = 0
    exact: bool = False
    failed: Exception | None = None
    unpaid: bool = False
    guide: bool = False
    discounts: Sequence[float] = ()


class Value(Protocol):
    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        """The values of ``positions``, for at most ``max_tokens`` tokens (None: any number)."""
        ...


async def every(asked: Iterable[Awaitable[tuple[float, int]]]) -> Scores:
    """The values and tokens that ``asked`` give, at once. What fails (NeoxRLError, OSError) takes nothing from the others, which came and
    were paid. Raises ConfigError, and all that is no failure of a request."""
    answers = await asyncio.gather(*asked, return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    failed = None
    for error in errors:
        if isinstance(error, ConfigError) or not isinstance(error, NeoxRLError | OSError):
            raise error
        failed = failed or error
    found = [(math.nan, 0) if isinstance(answer, BaseException) else answer for answer in answers]
    return Scores([value for value, _ in found], sum(tokens for _, tokens in found), failed=failed)


class ValueFailedError(NeoxRLError):
    """The value of a search gave no answer: nobody knows what the steps of its last round are worth."""


class NoValue:
    """The same for every node: the search goes by its own order."""

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        return Scores([0.5] * len(positions), guide=True)


class OracleValue:
    """1 where the problem can still be solved, else 0, by the exact solver."""

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        return Scores([p.domain.solved_value(p.state) for p in positions], exact=True)


class HeuristicValue:
    """The domain's own guess."""

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        return Scores([p.domain.guess(p.state) for p in positions])


class Played(NamedTuple):
    """Ways to go on from a place: how many came to a right end, how many ``max_tokens`` cut off, and the tokens of all."""

    right: int
    cut: int
    num_tokens: int


class Playouts(Protocol):
    async def play(self, position: Position, k: int, max_tokens: int) -> Played:
        """``k`` ways to go on from ``position``, each of at most ``max_tokens`` tokens."""
        ...


@dataclass(frozen=True)
class MonteCarloValue:
    """(11): the mean reward of ``k`` completions from the node. The paper takes 16 a step for labels and 128 to evaluate.

    A completion that is not done after ``max_tokens`` tokens is wrong. One that is cut off before, since no more is left of the search's
    budget, says nothing: the mean is over the others, and a node without any has no value.
    """

    playouts: Playouts
    k: int = 8
    max_tokens: int = 128

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        unended = sum(not p.domain.is_end(p.state) for p in positions)
        cap = self.max_tokens if max_tokens is None else min(self.max_tokens, max_tokens // (self.k * max(1, unended)))
        if cap < 1 and unended:
            return Scores(())
        scores = await every(self._mean(position, cap) for position in positions)
        return scores._replace(unpaid=cap < self.max_tokens)

    async def _mean(self, position: Position, cap: int) -> tuple[float, int]:
        played = await self.playouts.play(position, self.k, cap)
        told = self.k - (played.cut if cap < self.max_tokens else 0)
        return played.right / told if told else math.nan, played.num_tokens


@dataclass(frozen=True)
class PolicyPlayouts:
    """The policy goes on to its own end in one request; the verifier says whether it came out right. Of a path that is at its end that is
    known already: what a policy would write after its end is nobody's answer."""

    proposer: PolicyProposer
    verifier: Verifier

    async def play(self, position: Position, k: int, max_tokens: int) -> Played:
        if position.domain.is_end(position.state):
            return Played(k * (await position.domain.judge(position.texts, position.state)).correct, 0, 0)
        policy = self.proposer
        prompt = (*policy.prompt_ids(position.problem), *position.ids)
        room = policy.max_context - len(prompt) if policy.max_context else max_tokens + 1
        cap = min(max_tokens, room)
        if cap < 1:
            return Played(0, 0, 0)
        seed = position.seed if policy.seeded else None
        params = SamplingParams(cap, policy.temperature, policy.top_p, (), seed)
        completions = await policy.generator.sample(prompt, params, k, f"{position.problem.id}/playout")
        right = await asyncio.gather(*(self._right(position, completion) for completion in completions))
        cut = sum(c.finish is Finish.LENGTH for c in completions) if max_tokens < room else 0  # else the context ended them
        return Played(sum(right), cut, sum(len(c.ids) for c in completions))

    async def _right(self, position: Position, completion: Completion) -> bool:
        """A completion that was cut off has no answer."""
        if completion.finish is not Finish.STOP:
            return False
        text = self.proposer.tokenizer.decode((*position.ids, *completion.ids))
        return (await self.verifier.check(position.problem, text)).correct


@dataclass(frozen=True)
class StepPlayouts:
    """Steps of a proposer, one after the other, to an end that the domain can check: with the exhaustive proposer, random play."""

    proposer: Proposer

    async def play(self, position: Position, k: int, max_tokens: int) -> Played:
        played = await asyncio.gather(*(self._play(replace(position, seed=derived_seed(position.seed, i)), max_tokens) for i in range(k)))
        return Played(*map(sum, zip(*played, strict=True)))

    async def _play(self, position: Position, max_tokens: int) -> Played:
        spent = 0
        while not position.domain.is_end(position.state):
            proposals = await self.proposer.propose(position, 1, max_tokens - spent)
            if not proposals:
                return Played(0, int(spent >= max_tokens), spent)
            if spent + proposals[0].num_tokens > max_tokens:
                return Played(0, 1, spent)
            spent += proposals[0].num_tokens
            stepped = position.domain.step(position.state, proposals[0].text, proposals[0].ended)
            if isinstance(stepped, Rejection):
                return Played(0, 0, spent)
            position = replace(
                position,
                state=stepped.state,
                texts=(*position.texts, stepped.text),
                ids=(*position.ids, *proposals[0].ids),
                seed=derived_seed(position.seed, "next"),
            )
        return Played(int((await position.domain.judge(position.texts, position.state)).correct), 0, spent)
