"""Episodes of one rollout, as words of its context: what the policy may write at the end of one, and what comes back.

::

    <prompt>
    ... the first attempt ...
    [EPISODE 2] wrong                      environment: the next episode, and feedback: none, binary, or a text
    ... the second attempt ...
    [RESET s1]                             policy: the next episode begins at the state that it reached first, not at the start
    [EPISODE 3] wrong from s1 ...          environment: what stands at that state
    ...
    [STOP]                                 policy: no more episodes

Words are parted by white space of any kind: a vocabulary of words has no line breaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from neox_rl.errors import ConfigError
from neox_rl.metacot import EPISODE, FROM, RIGHT, WRONG

MAX_MARKER_CHARS = 64
_LAST = re.compile(r"(?:^|(?<=\s))(?:\[STOP\]|\[RESET ([A-Za-z0-9_.-]{1,40})\])$")
_MARKERS = re.compile(r"\[(?:EPISODE|RESET|STOP)\b")


class Feedback(StrEnum):
    """What the policy is told of the episode that ended: that it ended, whether it was right, or what the environment says."""

    NONE = "none"
    BINARY = "binary"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Rules:
    """At most ``num_episodes`` of at most ``max_episode_tokens`` tokens each, ``max_tokens`` in all, of the policy's own tokens.

    ``max_context``: tokens of everything, prompt, feedback and tools included. What would not fit any more ends the rollout.
    """

    num_episodes: int
    feedback: Feedback
    max_episode_tokens: int
    max_tokens: int
    max_context: int

    def __post_init__(self) -> None:
        for name in ("num_episodes", "max_episode_tokens", "max_tokens", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1: a rollout is at least one episode")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an episode. ``states``: the names, given in it, of states that a later episode may begin at."""

    reward: float
    correct: bool
    message: str = ""
    states: frozenset[str] = frozenset()


class Environment(Protocol):
    def reset(self, state: str | None) -> str:
        """Begin at the start, or at a state that an earlier ``Outcome`` named. Returns what the policy is shown of that state."""
        ...

    async def step(self, text: str, num_tokens: int, finished: bool) -> Outcome:
        """Judge one episode: its text, how many tokens the policy wrote for it, and whether it ended it or the token budget did."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How an episode's text ends: ``reset`` names a state, ``stop`` ends the rollout. ``attempt`` is the text without those words."""

    attempt: str
    stop: bool = False
    reset: str | None = None


def read_ending(text: str) -> Ending:
    """Reset and stop are read from the end alone; both may stand there, each once."""
    stop, reset = False, None
    while found := _LAST.search((text := text.rstrip())[-MAX_MARKER_CHARS:]):
        if found[1] is None and not stop:
            stop = True
        elif found[1] is not None and reset is None:
            reset = found[1]
        else:
            break
        text = text[: len(text) - len(found[0])]
    return Ending(text, stop, reset)


@dataclass
class Progress:
    """The episodes of one rollout so far.

    ``ends``: the policy's tokens up to the end of each. ``forged_markers``: words of the policy that look like the environment's.
    ``cut``: there was no room in the context for more.
    """

    rules: Rules
    outcomes: list[Outcome] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    stopped: bool = False
    cut: bool = False
    begins_at: str | None = None
    unknown_resets: int = 0
    forged_markers: int = 0

    @property
    def num_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def done(self) -> bool:
        return self.stopped or self.cut or len(self.outcomes) >= self.rules.num_episodes or self.num_tokens >= self.rules.max_tokens

    def tokens_left(self, num_context: int) -> int:
        """For the next episode, behind a context of so many tokens."""
        rules = self.rules
        return min(rules.max_episode_tokens, rules.max_tokens - self.num_tokens, rules.max_context - num_context)

    def end_episode(self, ending: Ending, outcome: Outcome, num_tokens: int) -> None:
        """Books an episode of so many tokens of the policy."""
        self.outcomes.append(outcome)
        self.ends.append(self.num_tokens + num_tokens)
        self.stopped = ending.stop
        self.forged_markers += len(_MARKERS.findall(ending.attempt))
        self.begins_at = None
        if ending.reset is not None:
            if any(ending.reset in o.states for o in self.outcomes):
                self.begins_at = ending.reset
            else:
                self.unknown_resets += 1


def announcement(number: int, outcome: Outcome, feedback: Feedback, begins_at: str | None = None, shown: str = "") -> str:
    """The environment's words before episode ``number`` (from 2): what became of the one before, and where this one begins."""
    start = f"{FROM} {begins_at} {shown}" if begins_at else shown
    words = (f"{EPISODE} {number}]", feedback_of(outcome, feedback), start.strip())
    return "\n" + " ".join(word for word in words if word) + "\n"


def feedback_of(outcome: Outcome, feedback: Feedback) -> str:
    """One line; a message holds no line break and no marker, whatever the answer that it repeats."""
    match feedback:
        case Feedback.NONE:
            return ""
        case Feedback.BINARY:
            return RIGHT if outcome.correct else WRONG
        case Feedback.TEXT:
            return " ".join(unmarked(outcome.message).split())


def unmarked(text: str) -> str:
    """What others wrote, without the bracket of each marker of the protocol that it spells."""
    return _MARKERS.sub(lambda found: found[0][1:], text)
