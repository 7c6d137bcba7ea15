"""Replays what a policy wrote as a search: where it was, what it did, and what is wrong with it. Never raises on any text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from neox_rl.arithmetic import State, compute, state_of, without
from neox_rl.metacot import BACK, EOS, GOAL, PAD, Answer, Junk, Mark, Step, compare_word, parse, step_text
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
CACHED_TEXTS = 1 << 10
"""The reward and the analysis read the same text within seconds of one another, and a group holds it more than once."""


@dataclass(frozen=True, slots=True)
class Played:
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


@dataclass(slots=True)
class _Frame:
    state: State
    sound: bool


def num_wrong_steps(problem: Problem, text: str) -> int:
    """Steps whose arithmetic is false, whose numbers are not at hand, or that the rules forbid, and leaves compared falsely."""
    return sum(played.flaw in CHARGED_FLAWS for played in replay(problem, text))


def replay(problem: Problem, text: str) -> tuple[Played, ...]:
    """The events of ``text``, the completion after the prompt, replayed with a stack of states.

    After a wrong step the search goes on from the state that the policy has in mind: its result in the place of the
    two operands, or of the largest numbers where the state does not hold them. So one slip is counted once, and the
    steps below it are judged by themselves, but nothing below it is sound.
    """
    return _replayed(rules(problem), text)


@lru_cache(CACHED_TEXTS)
def _replayed(game: tuple[State, int, int], text: str) -> tuple[Played, ...]:
    return tuple(_events(_Player(*game), text))


def _events(player: _Player, text: str) -> Iterator[Played]:
    for event in parse(" ".join(word for word in text.split() if word not in (EOS, PAD))):
        match event:
            case Step():
                yield player.step(event)
            case Mark(word) if word == BACK:
                yield player.back()
            case Mark(word):
                yield player.compare(word)
            case Answer(expression):
                yield player.other(Kind.ANSWER, expression)
            case Junk(words):
                yield player.other(Kind.JUNK, " ".join(words), Flaw.JUNK)


class _Player:
    def __init__(self, root: State, target: int, max_value: int) -> None:
        self.target, self.max_value = target, max_value
        self.path = [_Frame(root, sound=True)]
        self.tried: set[tuple[State, State]] = set()

    def step(self, step: Step) -> Played:
        self._leave_leaf()
        frame = self.path[-1]
        rest = without(frame.state, step.left, step.right)
        flaw = Flaw.OPERAND if rest is None else self._flaw(step)
        after = state_of((*(frame.state[:-2] if rest is None else rest), step.result))
        repeated = (frame.state, after) in self.tried
        self.tried.add((frame.state, after))
        played = Played(
            Kind.LEAF if len(after) == 1 else Kind.STEP,
            step_text(step),
            len(self.path) - 1,
            frame.state,
            after,
            flaw,
            repeated,
            frame.sound and flaw is None,
        )
        self.path.append(_Frame(after, played.sound))
        return played

    def _flaw(self, step: Step) -> Flaw | None:
        result = compute(step.left, step.operator, step.right)
        if result is None or result > self.max_value:
            return Flaw.ILLEGAL
        return None if result == step.result else Flaw.ARITHMETIC

    def compare(self, word: str) -> Played:
        frame, depth = self.path[-1], len(self.path) - 1
        true_word = compare_word(frame.state[0], self.target) if len(frame.state) == 1 else None
        if word == true_word:
            flaw = None
        elif word == GOAL:
            flaw = Flaw.FALSE_GOAL
        else:
            flaw = Flaw.MISPLACED if true_word is None else Flaw.COMPARISON
        self._leave_leaf()
        return Played(Kind.COMPARE, word, depth, frame.state, self.path[-1].state, flaw, sound=frame.sound)

    def back(self) -> Played:
        self._leave_leaf()
        frame, depth = self.path[-1], len(self.path) - 1
        if depth == 0:
            return Played(Kind.BACK, BACK, 0, frame.state, frame.state, Flaw.BACKTRACK)
        self.path.pop()
        return Played(Kind.BACK, BACK, depth, frame.state, self.path[-1].state, sound=frame.sound)

    def other(self, kind: Kind, text: str, flaw: Flaw | None = None) -> Played:
        frame = self.path[-1]
        depth = 0 if kind is Kind.ANSWER else len(self.path) - 1
        return Played(kind, text, depth, frame.state, frame.state, flaw, sound=frame.sound)

    def _leave_leaf(self) -> None:
        """A leaf, compared or not, is left as soon as the search goes on."""
        if len(self.path) > 1 and len(self.path[-1].state) == 1:
            self.path.pop()
