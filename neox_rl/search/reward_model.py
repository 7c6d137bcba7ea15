"""A process reward model v(q, S_t) as a language model that says in one word, after a path, whether it is hopeful (2501.04682, 3.2).

The word is ``goal`` or ``back``, which every vocabulary of a search has; with another tokenizer, the first tokens of these words. The
model is trained on it by the objective ``sft`` alone, from any start, by any engine, and served as any language model is: the value of
a path is the chance of ``goal`` against ``back`` as its next token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from neox_rl import metacot
from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.search.earlier import earlier_of, told_before_path
from neox_rl.search.linearize import DEMONSTRATED, glue_of
from neox_rl.search.proposers import Position
from neox_rl.search.values import Scores
from neox_rl.types import Finish, Problem, Role, Segment, Trace

HOPEFUL, HOPELESS = metacot.GOAL, metacot.BACK


class NextToken(Protocol):
    async def next_token(self, prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> Sequence[Sequence[float]]:
        """For each prompt the log-probs of the tokens ``ids`` as the next one; -inf for one far down the list."""
        ...


def value_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """(hopeful, hopeless). Raises ConfigError for a tokenizer that does not tell the two words apart by their first token."""
    found = [tokenizer.encode(f" {word}")[:1] for word in (HOPEFUL, HOPELESS)]
    if not all(found) or found[0] == found[1]:
        raise ConfigError(
            f"the tokenizer begins {HOPEFUL!r} and {HOPELESS!r} with the same token {found}: a reward model cannot say which it means"
        )
    return found[0][0], found[1][0]


def value_context(
    problem: Problem, texts: Sequence[str], tokenizer: Tokenizer, before: Sequence[str] = (), max_tokens: int = 0
) -> tuple[int, ...]:
    """Prompt and path as the model reads them, in training and when it is asked: step by step, so that no token spans two steps.

    ``before``: what the search did before (``earlier``), for a meta-critic: as many of its latest moves as fit in ``max_tokens``, 0: all.
    """
    glue = glue_of(problem)
    prompt, moves = tokenizer.encode_prompt(problem.prompt), [tokenizer.encode(glue + text) for text in before]
    path = [i for text in texts for i in tokenizer.encode(glue + text)]
    room, start = max_tokens - len(prompt) - len(path), len(moves)
    while start and (not max_tokens or len(moves[start - 1]) <= room):
        start -= 1
        room -= len(moves[start])
    return (*prompt, *(i for ids in moves[start:] for i in ids), *path)


def value_trace(
    problem: Problem, texts: Sequence[str], hopeful: bool, tokenizer: Tokenizer, id: str, before: Sequence[str] = (), max_tokens: int = 0
) -> Trace:
    """A path as context, and the one word about it, which alone is trained on."""
    word = value_ids(tokenizer)[0 if hopeful else 1]
    segments = (
        Segment(value_context(problem, texts, tokenizer, before, max_tokens - 1 if max_tokens else 0), Role.PROMPT),
        Segment((word,), Role.VERIFY, mask=1.0),
    )
    return Trace(id, problem.id, segments, reward=1.0, finish=Finish.STOP, verdict=DEMONSTRATED)


@dataclass(frozen=True)
class WordValue:
    """The value of a position by a served model of this kind; it writes one token a position. NaN where it says neither word, and
    for a path that leaves no room for one in ``max_context`` (0: no bound), which is not asked about.

    ``sees_earlier``: the model was trained as a meta-critic, and what the search did before is told to it.
    """

    model: NextToken
    tokenizer: Tokenizer
    sees_earlier: bool = False
    max_context: int = 0

    async def score(self, positions: Sequence[Position], max_tokens: int | None) -> Scores:
        if max_tokens is not None and max_tokens < len(positions):
            return Scores(())
        room = max(0, self.max_context - 1)
        prompts = [value_context(p.problem, p.texts, self.tokenizer, self._before(p), room) for p in positions]
        fitting = [i for i, prompt in enumerate(prompts) if not self.max_context or len(prompt) < self.max_context]
        found = await self.model.next_token([prompts[i] for i in fitting], value_ids(self.tokenizer)) if fitting else ()
        values = [math.nan] * len(positions)
        for i, pair in zip(fitting, found, strict=True):
            values[i] = _share(*map(math.exp, pair))
        return Scores(values, len(fitting))

    def _before(self, position: Position) -> tuple[str, ...]:
        return told_before_path(earlier_of(position), position.problem) if self.sees_earlier else ()


def _share(hopeful: float, hopeless: float) -> float:
    return hopeful / (hopeful + hopeless) if hopeful + hopeless > 0 else math.nan
