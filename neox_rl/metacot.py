"""The language of linearized searches over arithmetic problems: what prompts, search steps and solutions look like as text.

A trace is words separated by single spaces, one token a word::

    numbers 3 5 7 target 26 search          prompt
    3 *5 =15                                a step: two numbers of the state become one; one number more than one is left: deeper
    15 +7 =22 low                           a leaf: one number is left, compared with the target: low, high or goal
    15 -7 =8 low
    back                                    every step worth trying from here was tried: return to the parent state
    ...
    7 *3 =21
    21 +5 =26 goal
    solution ( 7 * 3 ) + 5                  an expression over the given numbers, each used once

After ``low`` or ``high`` the search is in the leaf's parent again. The last token of a completion is the tokenizer's EOS.
This is the stream-of-search style of Meta-CoT (arXiv 2501.04682, section 4.1): Z is everything up to ``goal``, S the solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

OPERATORS = "+-*/"
NUMBERS, TARGET, SEARCH = "numbers", "target", "search"
LOW, HIGH, GOAL, BACK, SOLUTION = "low", "high", "goal", "back", "solution"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
MARKERS = (NUMBERS, TARGET, SEARCH, LOW, HIGH, GOAL, BACK, SOLUTION)
EPISODE, RESET, STOP, RIGHT, WRONG, FROM = "[EPISODE", "[RESET", "[STOP]", "right", "wrong", "from"
TAGS = ("work quickly", "take a moment", "take your time")
"""What a prompt says of the discount a token under which it is trained (21): one policy, several lengths of search."""
NAMED_STATES = tuple(f"s{i}" for i in range(1, 10))
"""Names of the states that a rollout of several episodes may go back to, in the order in which it reached them."""


class Step(NamedTuple):
    """``left operator right = result``; two numbers of the state are replaced by ``result``."""

    left: int
    operator: str
    right: int
    result: int


@dataclass(frozen=True, slots=True)
class Mark:
    """One of low, high, goal, back."""

    word: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The expression after ``solution``, as text."""

    expression: str


@dataclass(frozen=True, slots=True)
class Junk:
    """Words that are no event of the language."""

    words: tuple[str, ...]


Event = Step | Mark | Answer | Junk
_MARKS = {word: Mark(word) for word in (LOW, HIGH, GOAL, BACK)}
CACHED_STEPS = 1 << 14
"""A policy writes the same few thousand steps again and again."""


def prompt_text(numbers: Sequence[int], target: int) -> str:
    return " ".join([NUMBERS, *map(str, numbers), TARGET, str(target), SEARCH])


def step_text(step: Step) -> str:
    return f"{step.left} {step.operator}{step.right} ={step.result}"


def compare_word(result: int, target: int) -> str:
    return GOAL if result == target else LOW if result < target else HIGH


def vocabulary(max_value: int) -> tuple[str, ...]:
    """Every word of the language for values 0..max_value, special tokens first."""
    numbers = [str(n) for n in range(max_value + 1)]
    operands = [f"{op}{n}" for op in OPERATORS for n in range(max_value + 1)]
    results = [f"={n}" for n in range(max_value + 1)]
    return (PAD, EOS, UNKNOWN, *MARKERS, *OPERATORS, "(", ")", *numbers, *operands, *results)


def goal_prompt(num_goals: int) -> str:
    """Of goal finding (``neox_rl.problems.goal_finding``); an attempt is the number of a door."""
    return f"One of the doors 1 to {num_goals} hides the goal. Name a door.\n"


def goal_words(num_goals: int) -> tuple[str, ...]:
    """The words of its prompts that are no numbers."""
    return tuple(dict.fromkeys(word for word in goal_prompt(num_goals).split() if not word.isdigit()))


def episode_words(num_episodes: int, tagged: bool = False) -> tuple[str, ...]:
    """The words around the episodes of one rollout (``neox_rl.episodes.protocol``); of one episode at most, those of TAGS if ``tagged``."""
    tags = tuple(dict.fromkeys(" ".join(TAGS).split()))
    if num_episodes < 2:
        return tags if tagged else ()
    resets = (RESET, FROM, *NAMED_STATES, *(f"{name}]" for name in NAMED_STATES))
    return (EPISODE, *(f"{i}]" for i in range(2, num_episodes + 1)), RIGHT, WRONG, STOP, *resets, *tags)


def parse(text: str) -> list[Event]:
    """The events of a search, in order. Never raises: what does not parse comes as Junk, one event a run of such words."""
    return parse_words(text.split())


def parse_words(words: Sequence[str]) -> list[Event]:
    """As ``parse``, of the words of a text."""
    events: list[Event] = []
    junk: list[str] = []
    at, end = 0, len(words)
    while at < end:
        event, used = _event(words, at)
        if event is None:
            junk.append(words[at])
        else:
            if junk:
                events.append(Junk(tuple(junk)))
                junk = []
            events.append(event)
        at += used
    if junk:
        events.append(Junk(tuple(junk)))
    return events


def _event(words: Sequence[str], at: int) -> tuple[Event | None, int]:
    word = words[at]
    if (mark := _MARKS.get(word)) is not None:
        return mark, 1
    if word == SOLUTION:
        return Answer(" ".join([w for w in words[at + 1 :] if w != EOS])), len(words) - at
    step = _step(*words[at : at + 3]) if at + 3 <= len(words) else None
    return (step, 3) if step is not None else (None, 1)


@lru_cache(CACHED_STEPS)
def _step(*words: str) -> Step | None:
    if words[1][0] not in OPERATORS or words[2][0] != "=":
        return None
    numbers = (words[0], words[1][1:], words[2][1:])
    if not all(n.isascii() and n.isdigit() and len(n) <= 9 for n in numbers):
        return None
    return Step(int(numbers[0]), words[1][0], int(numbers[1]), int(numbers[2]))
