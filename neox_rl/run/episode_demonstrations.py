"""Demonstrated rollouts of several episodes, so that a policy knows the words around them (``warmstart.style: episodes``).

Goal finding: a door drawn evenly or, half the time, one named before, whatever was said of it. Countdown and the Game of 24: searches of
mixed quality that give up, each with a chance of going back to a state on the way to the target, and at last one that is right, which ends
the rollout. The words in between are those of the environment itself, and every word of the policy is trained.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

from neox_rl.arithmetic import ARITHMETIC_TASKS, solvable
from neox_rl.config.derived import num_episodes
from neox_rl.config.run import RunConfig
from neox_rl.episodes.environments import Judged, Stepwise, environment_of
from neox_rl.episodes.objectives import tagged, tags_of
from neox_rl.episodes.protocol import Feedback, announcement
from neox_rl.errors import ConfigError
from neox_rl.metacot import RESET, STOP
from neox_rl.ports import Tokenizer
from neox_rl.search.demonstrations import Source, alone, mixed
from neox_rl.search.dfs import MIXED, dfs, solution_path
from neox_rl.search.linearize import DEMONSTRATED, linearize, text_of
from neox_rl.types import NO_NODE, Finish, Problem, Role, Segment, Trace, Verdict
from neox_rl.verify.verifier import make_verifier

RESET_FRAC = 0.5
"""Of the attempts that gave up where there is a state worth going back to."""
AGAIN_FRAC = 0.5
"""Of the guesses, those that name a door again which the rollout named before: they find the goal no sooner. Where guesses have nothing to
do with one another the warm start teaches the policy to look at none of them, and RL then stalls at what the last feedback alone tells."""
MOST_STEPS = 6
"""Of a search that gives up."""
DRAWS = 20
ENDING_TOKENS = 3
"""Of a symbolic ending: ``[RESET s1]`` and EOS."""
T = TypeVar("T")


def episode_demonstrations(config: RunConfig, problems: Sequence[Problem], tokenizer: Tokenizer) -> Source:
    """Raises ConfigError for problems that nobody here can attempt."""
    if not problems or problems[0].task not in (*ARITHMETIC_TASKS, "goal_finding"):
        raise ConfigError(
            f"metarl.warmstart.style = episodes: nobody shows attempts at source {config.metarl.problems.source}; set style: written, or"
            " steps: 0 and start from metarl.warmstart.hf_checkpoint or load"
        )
    show = _Shower(config, tokenizer, problems[0].task)
    return alone(lambda rng, id: show.draw(rng.choice(problems), rng, id))


class _Shower:
    def __init__(self, config: RunConfig, tokenizer: Tokenizer, task: str) -> None:
        e = config.metarl.episodes
        self._tokenizer, self._num_episodes, self._feedback = tokenizer, num_episodes(config), Feedback(e.feedback)
        self._tags = list(tags_of(e.gammas).values()) if config.metarl.rollout.method == "episodes" else [""]
        self._most = config.metarl.rollout.max_new_tokens
        self._verifier = make_verifier(config.metarl.verify, task)
        self._guesses = task not in ARITHMETIC_TASKS

    def draw(self, problem: Problem, rng: random.Random, id: str) -> Trace:
        environment = environment_of(problem, self._verifier, _no_reward)
        segments = [Segment(self._tokenizer.encode_prompt(tagged(problem.prompt, rng.choice(self._tags))), Role.PROMPT)]
        last = self._num_episodes - 1 if self._guesses else rng.randrange(self._num_episodes)
        attempts = list[str]()
        for episode in range(last + 1):
            attempt = self._attempt(environment.game, rng, episode == last, attempts)
            attempts.append(attempt)
            outcome = _now(environment.step(attempt, 0, True))
            back = None if episode == last else self._way_back(environment, outcome.states, rng)
            stops = episode == last and last + 1 < self._num_episodes and not self._guesses
            ending = [f"{RESET} {back}]"] if back else [STOP] if stops else []
            ids = (*self._tokenizer.encode("\n".join([attempt, *ending])), self._tokenizer.eos_id)
            segments.append(Segment(ids, Role.THINK, mask=1.0, episode=episode))
            if episode < last:
                words = announcement(episode + 2, outcome, self._feedback, back, environment.reset(back))
                segments.append(Segment(self._tokenizer.encode(words), Role.ENV, episode=episode))
        return Trace(id, problem.id, tuple(segments), reward=1.0, finish=Finish.STOP, verdict=DEMONSTRATED)

    def _attempt(self, game: Problem, rng: random.Random, last: bool, before: Sequence[str]) -> str:
        """Within the budget of an episode, its ending included; the shortest solution where nothing else is short enough."""
        if self._guesses:
            if before and rng.random() < AGAIN_FRAC:
                return rng.choice(before)
            return str(rng.randint(1, cast("int", game.meta["num_goals"])))
        for _ in range(DRAWS):
            tree = mixed(game, rng) if last else dfs(game, rng, rng.choice(list(MIXED)), rng.randint(1, MOST_STEPS))
            text = text_of(linearize(tree, game))
            if (tree.answer != NO_NODE) == last and len(self._tokenizer.encode(text)) <= self._most - ENDING_TOKENS:
                return text
        return text_of(linearize(solution_path(game, rng), game)) if last else ""

    def _way_back(self, environment: Judged, states: frozenset[str], rng: random.Random) -> str | None:
        """A state on the way to the target, or None: the beginning."""
        if not isinstance(environment, Stepwise) or rng.random() >= RESET_FRAC:
            return None
        target, most = (cast("int", environment.game.meta[name]) for name in ("target", "max_value"))
        hopeful = [name for name in sorted(states) if solvable(environment.state(name), target, most)]
        return rng.choice(hopeful) if hopeful else None


def _no_reward(problem: Problem, verdict: Verdict, text: str, num_tokens: int) -> float:
    return 0.0


def _now(work: Coroutine[Any, Any, T]) -> T:
    """The result of what never waits: the games are judged in this process."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise RuntimeError("a game's verifier waited for something")
