"""Values by models: a process reward model behind a scorer, a language model that votes, and values that see earlier attempts."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
import msgspec

from neox_rl.bounded import ANY_BYTES, read_bounded
from neox_rl.errors import DeadlineError, NeoxRLError, WireError
from neox_rl.ports import Generator, Tokenizer
from neox_rl.search.earlier import MAX_EARLIER_CHARS, earlier_of, text_before
from neox_rl.search.proposers import Position
from neox_rl.search.values import Scores, Value, every
from neox_rl.types import SamplingParams

JUDGE_PROMPT = "{path}\n\nCan this be continued to a right answer? Answer with one word: sure, likely or impossible.\nAnswer:"
VOTES: Mapping[str, float] = {"sure": 1.0, "likely": 0.5, "impossible": 0.0}
"""The three words of Tree of Thoughts (arXiv 2305.10601), as values."""
SHORT = "?"
"""A text that every scorer can read."""


SCORE_BYTES = 1 << 16
"""Of a text's classes, as JSON: two take 100, a thousand 22,000."""


class Scorer(Protocol):
    async def score(self, texts: Sequence[str]) -> Sequence[float]:
        """How hopeful each text is, in [0, 1]."""
        ...


class ScorerFailedError(NeoxRLError):
    """A served scorer that did not answer, or answered with an error."""


class TextsRefusedError(ScorerFailedError):
    """A served scorer that cannot read these texts: one is longer than its context."""


def path_text(position: Position, earlier_chars: int = 0) -> str:
    """The question and the path; between them so much of what the search did before: v(Z, S, q) (8.3.4)."""
    path = "\n".join(text.strip() for text in position.texts)
    before = text_before(earlier_of(position, earlier_chars), position.problem)
    told = f"The search so far:\n{before}\n\nNow:\n" if before else ""
    return f"{position.problem.prompt.rstrip()}\n{told}{path}\n"


@dataclass(frozen=True)
class PrmValue:
    """A process reward model v(q, S_t) (arXiv 2501.04682, 3.2); with ``sees_earlier`` the meta-critic v(Z_t, S_t, q) (8.3.4),
    told as much of what the search did before as the scorer can read. NaN for a path that alone is too long for it."""

    scorer: Scorer
    sees_earlier: bool = False

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        """See ``Value``. Raises TextsRefusedError where the scorer refuses texts of any length."""
        try:
            return Scores(await self._told(positions))
        except TextsRefusedError:  # one text that is too long has all that are asked with it refused
            return Scores([await self._alone(position) for position in positions])

    async def _told(self, positions: Sequence[Position]) -> Sequence[float]:
        """Raises TextsRefusedError where the paths alone are too long."""
        chars = MAX_EARLIER_CHARS if self.sees_earlier else 0
        while True:
            try:
                return await self.scorer.score([path_text(p, chars) for p in positions])
            except TextsRefusedError:  # nobody tells the length of its context in characters
                if not chars:
                    raise
                chars //= 2

    async def _alone(self, position: Position) -> float:
        try:
            return (await self._told([position]))[0]
        except TextsRefusedError:
            await self.scorer.score([SHORT])  # refused too, it is not the length: a search would go on without any value
            return math.nan


@dataclass(frozen=True)
class JudgeValue:
    """The mean of ``votes`` sampled verdicts of a language model. A vote that names no word of VOTES is not counted; with none left: NaN.

    Only what the judge writes costs tokens, as with the policy. ``max_context`` bounds prompt and answer, 0: no bound; a path that leaves
    no room for an answer is not asked about: NaN.
    """

    generator: Generator
    tokenizer: Tokenizer
    votes: int = 3
    max_tokens: int = 8
    prompt: str = JUDGE_PROMPT
    sees_earlier: bool = False
    max_context: int = 0
    words: Mapping[str, float] = field(default_factory=lambda: VOTES)

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        cap = self.max_tokens if max_tokens is None else min(self.max_tokens, max_tokens // (self.votes * len(positions)))
        if cap < 1:
            return Scores(())
        return await every(self._ask(position, cap) for position in positions)

    async def _ask(self, position: Position, cap: int) -> tuple[float, int]:
        prompt = self._prompt(position, cap)
        if self.max_context and len(prompt) + cap > self.max_context:
            return math.nan, 0
        params = SamplingParams(cap, seed=position.seed)
        completions = await self.generator.sample(prompt, params, self.votes, f"{position.problem.id}/judge")
        votes = [vote for c in completions if (vote := self._vote(self.tokenizer.decode(c.ids))) is not None]
        return (sum(votes) / len(votes) if votes else math.nan), sum(len(c.ids) for c in completions)

    def _prompt(self, position: Position, cap: int) -> tuple[int, ...]:
        """As much of what the search did before as leaves room for an answer."""
        chars = MAX_EARLIER_CHARS if self.sees_earlier else 0
        while True:
            ids = self.tokenizer.encode_prompt(self.prompt.replace("{path}", path_text(position, chars)))
            if not chars or not self.max_context or len(ids) + cap <= self.max_context:
                return ids
            chars //= 2

    def _vote(self, text: str) -> float | None:
        """By whole words: ``unlikely`` is none of them."""
        said = text.lower()
        found = [(match.start(), value) for word, value in self.words.items() if (match := re.search(rf"\b{re.escape(word)}\b", said))]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class Discouraged:
    """Another value, and a discount of ``decay`` for every earlier attempt that took the same last step: the search turns to what was not
    tried yet. A tried step is worth what it was before, so what is recorded and trained is the other value as it is."""

    value: Value
    decay: float = 0.9

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        scores = await self.value.score(positions, max_tokens)
        if not scores.values:
            return scores
        tried = [sum(p.texts[-1] in attempt for attempt in p.earlier) if p.texts else 0 for p in positions]
        return scores._replace(discounts=[self.decay**n for n in tried])


class _Class(msgspec.Struct):
    index: int
    probs: list[float]


class _Classes(msgspec.Struct):
    data: list[_Class]


@dataclass(frozen=True)
class ServedScorer:
    """A sequence classifier that vLLM serves (``--runner pooling --convert classify``): the chance of its last class.

    Raises ScorerFailedError when the server fails, TextsRefusedError where a text is too long for it, WireError where it refuses
    otherwise or its answer cannot be, DeadlineError.
    """

    address: str
    model: str
    deadline_s: float = 60.0

    async def score(self, texts: Sequence[str]) -> Sequence[float]:
        try:
            async with (
                asyncio.timeout(self.deadline_s),
                aiohttp.ClientSession() as session,
                session.post(f"{self.address}/classify", json={"model": self.model, "input": list(texts)}) as response,
            ):
                raw = await read_bounded(response, ANY_BYTES + SCORE_BYTES * len(texts), WireError)
        except TimeoutError as error:
            raise DeadlineError(f"{len(texts)} scores from {self.address}", self.deadline_s) from error
        except aiohttp.ClientError as error:
            raise ScorerFailedError(f"{self.address}: {error!r}") from error
        if response.status != 200:
            failures = {400: TextsRefusedError} | dict.fromkeys(range(500, 600), ScorerFailedError)
            raise failures.get(response.status, WireError)(f"{self.address} answered {response.status}: {raw[:200]!r}")
        try:
            found = sorted(msgspec.json.decode(raw, type=_Classes).data, key=lambda item: item.index)
            values = [item.probs[-1] for item in found]
        except (msgspec.DecodeError, IndexError) as error:
            raise WireError(f"{self.address}: answer not as expected: {error}") from error
        if len(values) != len(texts):
            raise WireError(f"{self.address}: {len(values)} scores for {len(texts)} texts")
        return values
