"""Episodes of one rollout, as lines of text: what the policy may write at the end of one, and what comes back.

::

    <prompt>
    ... the first attempt ...
    [EPISODE 2] wrong                      environment: the next episode, and feedback: none, binary, or a text
    ... the second attempt ...
    [RESET s1]                             policy: the next episode begins at the state it named s1, not at the start
    [EPISODE 3] wrong, from s1
    ...
    [STOP]                                 policy: no more episodes
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from neox_rl.errors import ConfigError

STOP_LINE = "[STOP]"
_RESET = re.compile(r"^\[RESET ([A-Za-z0-9_.-]{1,40})\]$")
_MARKERS = re.compile(r"^\[(?:EPISODE|RESET|STOP)\b.*\]?$")


class Feedback(StrEnum):
    """What the policy is told of the episode that ended: that it ended, whether it was right, or what the environment says."""

    NONE = "none"
    BINARY = "binary"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Rules:
    """At most ``num_episodes`` of at most ``max_episode_tokens`` tokens, ``max_tokens`` in all, their feedback left out."""

    num_episodes: int
    feedback: Feedback
    max_episode_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name in ("num_episodes", "max_episode_tokens", "max_tokens"):
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
    def reset(self, state: str | None) -> None:
        """Begin at the start, or at a state that an earlier ``Outcome`` named."""
        ...

    async def step(self, text: str) -> Outcome:
        """Judge one episode's text."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How an episode's text ends: ``reset`` names a state, ``stop`` ends the rollout. ``attempt`` is the text without those lines."""

    attempt: str
    stop: bool = False
    reset: str | None = None


def read_ending(text: str) -> Ending:
    """Reset and stop are read from the last lines alone; both may stand there."""
    lines = text.rstrip().split("\n")
    stop, reset = False, None
    while lines:
        line = lines[-1].strip()
        found = _RESET.match(line)
        if line == STOP_LINE and not stop:
            stop = True
        elif found and reset is None:
            reset = found[1]
        else:
            break
        lines.pop()
    return Ending("\n".join(lines), stop, reset)


@dataclass
class Progress:
    """The episodes of one rollout so far. ``forged_markers``: lines of the policy that look like the environment's."""

    rules: Rules
    outcomes: list[Outcome] = field(default_factory=list)
    num_tokens: int = 0
    stopped: bool = False
    begins_at: str | None = None
    unknown_resets: int = 0
    forged_markers: int = 0

    @property
    def done(self) -> bool:
        return self.stopped or len(self.outcomes) >= self.rules.num_episodes or self.num_tokens >= self.rules.max_tokens

    @property
    def tokens_left(self) -> int:
        """For the next episode."""
        return min(self.rules.max_episode_tokens, self.rules.max_tokens - self.num_tokens)

    @property
    def rewards(self) -> Sequence[float]:
        return [outcome.reward for outcome in self.outcomes]

    def end_episode(self, ending: Ending, outcome: Outcome, num_tokens: int) -> str:
        """Books an episode. Returns the environment's words before the next one, empty when there is none."""
        self.outcomes.append(outcome)
        self.num_tokens += num_tokens
        self.stopped = ending.stop
        self.forged_markers += sum(bool(_MARKERS.match(line.strip())) for line in ending.attempt.split("\n"))
        self.begins_at = None
        if ending.reset is not None:
            if any(ending.reset in o.states for o in self.outcomes):
                self.begins_at = ending.reset
            else:
                self.unknown_resets += 1
        if self.done:
            return ""
        start = f", from {self.begins_at}" if self.begins_at else ""
        return f"\n[EPISODE {len(self.outcomes) + 1}] {feedback_of(outcome, self.rules.feedback)}{start}".rstrip() + "\n"


def feedback_of(outcome: Outcome, feedback: Feedback) -> str:
    """One line; a message is no marker and holds no line break, whatever the environment says."""
    match feedback:
        case Feedback.NONE:
            return ""
        case Feedback.BINARY:
            return "right" if outcome.correct else "wrong"
        case Feedback.TEXT:
            return " ".join(outcome.message.split())
