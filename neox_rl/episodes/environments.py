"""Environments of the real problem sources: an episode is one attempt at the problem, judged by the run's verifier.

``Judged``: any problem; an episode begins at the start, for no state of it has a name. ``Stepwise``: the arithmetic games, whose states
are known: the k-th one that a search of the rollout reaches by legal steps is called ``s<k>``, and an episode may begin there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias, cast

from neox_rl.arithmetic import ARITHMETIC_TASKS, State, compute, state_of, without
from neox_rl.episodes.protocol import Outcome
from neox_rl.metacot import BACK, HIGH, LOW, NAMED_STATES, RIGHT, WRONG, Mark, Step, parse, prompt_text
from neox_rl.ports import Verifier
from neox_rl.types import Problem, Reason, Verdict

Reward: TypeAlias = Callable[[Problem, Verdict, str, int], float]
"""(problem, verdict, the episode's text, its tokens) -> reward."""
CUT_OFF = Verdict(correct=False, extracted="", reason=Reason.NO_ANSWER, ms=0.0)
"""An episode that the token budget ended has no final answer, whatever its text holds so far."""


MAX_SAID_CHARS = 80
"""Of an answer that an environment repeats."""


def message(verdict: Verdict) -> str:
    """What an environment that speaks says of an episode (feedback ``text``): its answer, and whether it was right."""
    if verdict.reason is Reason.NO_ANSWER:
        return WRONG
    return f"{RIGHT if verdict.correct else WRONG} {verdict.extracted[:MAX_SAID_CHARS]}".rstrip()


class Judged:
    """``protocol.Environment`` without named states."""

    def __init__(self, problem: Problem, verifier: Verifier, reward: Reward) -> None:
        self._problem, self._verifier, self._reward = problem, verifier, reward
        self.game = problem
        """What is to be solved from where the present episode began."""

    def reset(self, state: str | None) -> str:
        return ""

    async def step(self, text: str, num_tokens: int, finished: bool) -> Outcome:
        return await self._judge(text, num_tokens, finished)

    async def _judge(self, text: str, num_tokens: int, finished: bool, states: frozenset[str] = frozenset()) -> Outcome:
        verdict = await self._verifier.check(self.game, text) if finished else CUT_OFF
        return Outcome(self._reward(self.game, verdict, text, num_tokens), verdict.correct, message(verdict), states)


class Stepwise(Judged):
    """``protocol.Environment`` of countdown and the Game of 24.

    From a named state the game is what is left of it: make the target of the numbers there, each used once.
    """

    def __init__(self, problem: Problem, verifier: Verifier, reward: Reward) -> None:
        super().__init__(problem, verifier, reward)
        self._states: dict[str, State] = {}

    def state(self, name: str) -> State:
        """The numbers at a state that an ``Outcome`` named."""
        return self._states[name]

    def reset(self, state: str | None) -> str:
        if state is None:
            self.game = self._problem
            return ""
        numbers = self._states[state]
        prompt = prompt_text(numbers, cast("int", self._problem.meta["target"]))
        self.game = replace(self._problem, prompt=prompt, meta={**self._problem.meta, "numbers": list(numbers)})
        return prompt

    async def step(self, text: str, num_tokens: int, finished: bool) -> Outcome:
        for state in reached(self.game, text):
            if state not in self._states.values() and len(self._states) < len(NAMED_STATES):
                self._states[NAMED_STATES[len(self._states)]] = state
        return await self._judge(text, num_tokens, finished, frozenset(self._states))


def reached(game: Problem, text: str) -> list[State]:
    """The states with two numbers or more that legal steps of a search reach, in its order, each once; nothing behind a false step."""
    path = [state_of(cast("list[int]", game.meta["numbers"]))]
    found: dict[State, None] = {}
    for event in parse(text):
        if isinstance(event, Step) and (after := _after(path[-1], event, cast("int", game.meta["max_value"]))) is not None:
            path.append(after)
            if len(after) > 1:
                found[after] = None
        elif isinstance(event, Mark) and event.word in (LOW, HIGH, BACK) and len(path) > 1:
            path.pop()
        else:
            break
    return list(found)


def _after(state: State, step: Step, max_value: int) -> State | None:
    rest = without(state, step.left, step.right)
    legal = rest is not None and compute(step.left, step.operator, step.right) == step.result <= max_value
    return state_of((*rest, step.result)) if legal and rest is not None else None


def environment_of(problem: Problem, verifier: Verifier, reward: Reward) -> Judged:
    """Where a rollout of several episodes at ``problem`` takes place."""
    return (Stepwise if problem.task in ARITHMETIC_TASKS else Judged)(problem, verifier, reward)
