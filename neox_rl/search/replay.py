"""Replays what a policy wrote as a search: where it was, what it did, and what is wrong with it. Never raises on any text."""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache

import msgspec

from neox_rl.arithmetic import State, compute, state_of, without
from neox_rl.metacot import BACK, EOS, GOAL, PAD, Answer, Event, Junk, Mark, Step, compare_word, parse_words, step_text
from neox_rl.search.dfs import rules
from neox_rl.types import Problem


class Kind(StrEnum):
    """What one event of a search is. A leaf is a step that leaves one number."""

    STEP = "step"
    LEAF = "leaf"
    COMPARE = "compare"
    BACK = "back"
    ANSWER = "answer"
    JUNK = "junk"


class Flaw(StrEnum):
    """What is wrong with an event."""

    OPERAND = "operand"  # takes a number that the state does not hold
    ARITHMETIC = "arithmetic"  # the result is not that of the operation
    ILLEGAL = "illegal"  # no such operation within the rules, or a result beyond max_value
    COMPARISON = "comparison"  # low or high where another word was true
    FALSE_GOAL = "false_goal"  # goal where the result is not the target
    MISPLACED = "misplaced"  # a comparison where no leaf was reached
    BACKTRACK = "backtrack"  # back from the root
    JUNK = "junk"  # words that are no event


STEP_FLAWS = frozenset((Flaw.OPERAND, Flaw.ARITHMETIC, Flaw.ILLEGAL))
CHARGED_FLAWS = STEP_FLAWS | {Flaw.COMPARISON, Flaw.FALSE_GOAL}
# Under names of their own: to look a member up in its enum costs more than the rest of an event.
_STEP, _LEAF, _COMPARE, _BACK, _ANSWER, _JUNK = Kind
_FALSE_GOAL, _MISPLACED, _COMPARISON = Flaw.FALSE_GOAL, Flaw.MISPLACED, Flaw.COMPARISON
CACHED_TEXTS = 1 << 10
"""The reward and the analysis read the same text within seconds of one another, and a group holds it more than once."""
CACHED_STEPS = 1 << 15
"""The rollouts of a group take the same steps from the same states again and again."""
SILENT = frozenset((EOS, PAD))


class Played(msgspec.Struct, frozen=True):
    """One event: its text, the depth of the state it acts in (0: the root, and the answer), that state, and the state after it.

    ``repeated``: a step that leads from a state to one it was led to before. ``sound``: the path from the root to
    here holds no wrong step, so that a goal here is a real one.
    """

    kind: Kind
    text: str
    depth: int
    before: State
    after: State
    flaw: Flaw | None = None
    repeated: bool = False
    sound: bool = True


def num_wrong_steps(problem: Problem, text: str) -> int:
    """Steps whose arithmetic is false, whose numbers are not at hand, or that the rules forbid, and leaves compared falsely."""
    return sum([played.flaw in CHARGED_FLAWS for played in replay(problem, text) if played.flaw is not None])


def replay(problem: Problem, text: str) -> tuple[Played, ...]:
    """The events of ``text``, the completion after the prompt, replayed with a stack of states.

    After a wrong step the search goes on from the state that the policy has in mind: its result in the place of the
    two operands, or of the largest numbers where the state does not hold them. So one slip is counted once, and the
    steps below it are judged by themselves, but nothing below it is sound.
    """
    return _replayed(rules(problem), text)


@lru_cache(CACHED_TEXTS)
def _replayed(game: tuple[State, int, int], text: str) -> tuple[Played, ...]:
    player = _Player(*game)
    return tuple([player.play(event) for event in parse_words([word for word in text.split() if word not in SILENT])])


class _Player:
    """``path``: the states from the root to where the search is, each with whether the way there is sound."""

    def __init__(self, root: State, target: int, max_value: int) -> None:
        self.target, self.max_value = target, max_value
        self.path = [(root, True)]
        self.tried: set[tuple[State, State]] = set()

    def play(self, event: Event) -> Played:
        match event:
            case Step():
                return self._step(event)
            case Mark():
                return self._back() if event.word == BACK else self._compare(event.word)
            case Answer():
                return self._other(_ANSWER, event.expression)
            case Junk():
                return self._other(_JUNK, " ".join(event.words), Flaw.JUNK)

    def _step(self, step: Step) -> Played:
        self._leave_leaf()
        before, sound = self.path[-1]
        kind, text, after, flaw = _taken(before, step, self.max_value)
        move = (before, after)
        repeated, sound = move in self.tried, sound and flaw is None
        self.tried.add(move)
        self.path.append((after, sound))
        return Played(kind, text, len(self.path) - 2, before, after, flaw, repeated, sound)

    def _compare(self, word: str) -> Played:
        (state, sound), depth = self.path[-1], len(self.path) - 1
        true_word = compare_word(state[0], self.target) if len(state) == 1 else None
        if word == true_word:
            flaw = None
        elif word == GOAL:
            flaw = _FALSE_GOAL
        else:
            flaw = _MISPLACED if true_word is None else _COMPARISON
        self._leave_leaf()
        return Played(_COMPARE, word, depth, state, self.path[-1][0], flaw, False, sound)

    def _back(self) -> Played:
        self._leave_leaf()
        (state, sound), depth = self.path[-1], len(self.path) - 1
        if depth == 0:
            return Played(_BACK, BACK, 0, state, state, Flaw.BACKTRACK)
        self.path.pop()
        return Played(_BACK, BACK, depth, state, self.path[-1][0], None, False, sound)

    def _other(self, kind: Kind, text: str, flaw: Flaw | None = None) -> Played:
        state, sound = self.path[-1]
        depth = 0 if kind is _ANSWER else len(self.path) - 1
        return Played(kind, text, depth, state, state, flaw, False, sound)

    def _leave_leaf(self) -> None:
        """A leaf, compared or not, is left as soon as the search goes on."""
        if len(self.path) > 1 and len(self.path[-1][0]) == 1:
            self.path.pop()


@lru_cache(CACHED_STEPS)
def _taken(before: State, step: Step, max_value: int) -> tuple[Kind, str, State, Flaw | None]:
    """What a step is, its text, the state it leads to, and what is wrong with it."""
    rest = without(before, step.left, step.right)
    after = state_of((*(before[:-2] if rest is None else rest), step.result))
    return _LEAF if len(after) == 1 else _STEP, step_text(step), after, Flaw.OPERAND if rest is None else _flaw(step, max_value)


def _flaw(step: Step, max_value: int) -> Flaw | None:
    result = compute(step.left, step.operator, step.right)
    if result is None or result > max_value:
        return Flaw.ILLEGAL
    return None if result == step.result else Flaw.ARITHMETIC
