"""Problem sources by name, and the cursor that hands training problems out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from neox_rl.config.own import found
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.ports import Tokenizer
from neox_rl.problems.countdown import countdown
from neox_rl.problems.files import from_files
from neox_rl.problems.game24 import game24
from neox_rl.problems.goal_finding import goal_finding
from neox_rl.problems.split import ProblemSet
from neox_rl.types import Json, Problem

SOURCES: Mapping[str, Callable[[ProblemsConfig, int], ProblemSet]] = {
    "countdown": countdown,
    "game24": game24,
    "goal_finding": goal_finding,
    "jsonl": from_files,
}


def load_problems(cfg: ProblemsConfig, seed: int) -> ProblemSet:
    """The problems of ``cfg.source``; with ``cfg.limit``, a seeded sample of that many training problems. Raises ConfigError.

    Held-out problems come in a seeded random order, or in the source's own, so that the first n of them are a fair sample.
    """
    problems = found(SOURCES, cfg.source, "metarl.problems.source")(cfg, seed)
    if not problems.heldout_ordered:
        heldout = random.Random(f"heldout/{seed}").sample(problems.heldout, len(problems.heldout))
        problems = replace(problems, heldout=tuple(heldout))
    if 0 < cfg.limit < len(problems.train):
        chosen = sorted(random.Random(f"limit/{seed}").sample(range(len(problems.train)), cfg.limit))
        problems = replace(problems, train=tuple(problems.train[i] for i in chosen))
    return problems


def problems_of_run(config: RunConfig, tokenizer: Tokenizer) -> ProblemSet:
    """The problems of a run, without those of a file whose prompt leaves no room for an attempt in ``seq_length``. Raises ConfigError."""
    problems = load_problems(config.metarl.problems, config.metarl.seed)
    if not config.metarl.problems.free_text:
        return problems
    room = config.neox.seq_length - config.metarl.rollout.max_new_tokens
    train, heldout = (
        tuple(p for p in part if len(tokenizer.encode_prompt(p.prompt)) <= room) for part in (problems.train, problems.heldout)
    )
    too_long = len(problems.train) + len(problems.heldout) - len(train) - len(heldout)
    if not train or (problems.heldout and not heldout):
        raise ConfigError(
            f"{config.metarl.problems.path or config.metarl.problems.source}: {too_long} prompts have more than"
            f" seq_length - max_new_tokens = {room} tokens, and no problem is left to train on, or none to evaluate on; raise seq_length,"
            " or lower metarl.rollout.max_new_tokens"
        )
    return replace(problems, train=train, heldout=heldout, counts=problems.counts | {"prompts_too_long": too_long})


class ProblemCursor:
    """Problems in endless seeded epochs, each a fresh shuffle; the n-th problem depends on ``(problems, seed, n)`` alone."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise ConfigError("a cursor needs at least one problem")
        self._problems, self._seed = tuple(problems), seed
        self._digest = hashlib.sha256("\n".join(p.id for p in self._problems).encode()).hexdigest()[:16]
        self._shuffled: tuple[int, list[int]] | None = None
        self.position = 0

    def next(self) -> Problem:
        problem = self.at(self.position)
        self.position += 1
        return problem

    def at(self, position: int) -> Problem:
        """The problem that ``next`` hands out at ``position``."""
        epoch, index = divmod(position, len(self._problems))
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = list(range(len(self._problems)))
            random.Random(f"epoch/{self._seed}/{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._problems[self._shuffled[1][index]]

    def state(self) -> dict[str, Json]:
        return {"position": self.position, "seed": self._seed, "problems": self._digest}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Continue where ``state`` was taken. Raises ConfigError when it was taken with other problems or another seed."""
        position = state.get("position")
        if state.get("seed") != self._seed or state.get("problems") != self._digest or type(position) is not int or position < 0:
            raise ConfigError(
                f"cursor state {dict(state)} does not fit seed {self._seed} and problems {self._digest}: "
                "resume with the problems config and the seed that the run began with"
            )
        self.position = position
