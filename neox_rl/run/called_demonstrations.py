"""Worked solutions that call the calculator, told as a rollout has them (``warmstart.style: written`` with ``episodes.tool: calculator``).

A row's solution holds the calls alone: ``[CALC 9 + 4] [CALC 13 - 5] The answer is \\boxed{8}.`` The policy imitates each call, with the EOS
that hands it over; the answer is the calculator's, and context.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from neox_rl.config.run import RunConfig
from neox_rl.episodes.calculator import CALL, calculator
from neox_rl.episodes.objectives import tagged, tags_of
from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.search.demonstrations import Source, alone
from neox_rl.search.linearize import DEMONSTRATED
from neox_rl.types import MAX_CALLS, Finish, Problem, Role, Segment, Trace


def with_calls(config: RunConfig, problems: Sequence[Problem], tokenizer: Tokenizer) -> Source:
    """Of ``problems``, all of which have a worked solution. Raises ConfigError for one with more calls than a rollout may make."""
    for problem in problems:
        if (calls := len(CALL.findall(str(problem.meta["solution"])))) > MAX_CALLS:
            raise ConfigError(
                f"problem {problem.id}: its solution calls the tool {calls} times, a rollout may {MAX_CALLS} times; leave it out"
            )
    tags = list(tags_of(config.metarl.episodes.gammas).values())

    def draw(rng: random.Random, id: str) -> Trace:
        problem = rng.choice(problems)
        segments = [Segment(tokenizer.encode_prompt(tagged(problem.prompt, rng.choice(tags))), Role.PROMPT)]
        for words, answer in turns(str(problem.meta["solution"])):
            segments.append(Segment((*tokenizer.encode(words), tokenizer.eos_id), Role.THINK, mask=1.0))
            segments += [Segment(tokenizer.encode(answer), Role.ENV)] if answer else []
        return Trace(id, problem.id, tuple(segments), reward=1.0, finish=Finish.STOP, verdict=DEMONSTRATED)

    return alone(draw)


def turns(solution: str) -> Iterator[tuple[str, str]]:
    """What the policy writes up to each call, and the calculator's answer; at last what follows all calls, which has none."""
    at = 0
    for call in CALL.finditer(solution):
        words = solution[at : call.end()].strip()
        yield words, calculator(words) or ""
        at = call.end()
    if rest := solution[at:].strip():
        yield rest, ""
