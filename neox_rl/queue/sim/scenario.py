"""What is simulated: lengths, servers, trainer, publishing, faults. All times in seconds, all lengths in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from neox_rl.errors import ConfigError

Rng = np.random.Generator


class Lengths(Protocol):
    """The law of the lengths of one group's rollouts."""

    def group(self, size: int, rng: Rng) -> NDArray[np.int64]:
        """Lengths [size] in tokens, each at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """``mean`` tokens; ``sigma`` is the spread of the logarithm (at 0.9 one rollout in a hundred is longer than five means).

    ``max_tokens`` cuts, as the token budget does. ``shared_frac`` of the logarithm's variance belongs to the problem: its rollouts are
    long together.
    """

    mean: float = 60.0
    sigma: float = 0.9
    max_tokens: int = 1 << 30
    shared_frac: float = 0.0

    def group(self, size: int, rng: Rng) -> NDArray[np.int64]:
        noise = math.sqrt(self.shared_frac) * rng.standard_normal() + math.sqrt(1 - self.shared_frac) * rng.standard_normal(size)
        lengths = self.mean * np.exp(self.sigma * noise - self.sigma**2 / 2)
        return np.clip(np.rint(lengths), 1, self.max_tokens).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Lengths of groups that a run made, drawn as whole groups: rollouts of one problem are alike."""

    groups: Sequence[Sequence[int]]

    def group(self, size: int, rng: Rng) -> NDArray[np.int64]:
        lengths = np.asarray(self.groups[int(rng.integers(len(self.groups)))], dtype=np.int64)
        return np.maximum(1, lengths if len(lengths) == size else rng.choice(lengths, size))


@dataclass(frozen=True, slots=True)
class Decoding:
    """A server's speed: one decode step over n running sequences takes ``base_s + seq_s * n``, so n / that is its tokens a second.

    A request costs ``latency_s`` for itself (HTTP, verification) and ``prefill_s`` in which its server decodes nothing for anybody;
    after a switch the KV of each running sequence is computed again, ``recompute_s`` each. ``max_num_seqs``: more wait in the server.
    """

    base_s: float = 0.025
    seq_s: float = 0.0
    latency_s: float = 0.0
    prefill_s: float = 0.0
    recompute_s: float = 0.0
    max_num_seqs: int = 1 << 30

    def step_s(self, running: int) -> float:
        return self.base_s + self.seq_s * running

    def tokens_per_s(self, running: int) -> float:
        """Of one server with so many sequences running."""
        n = min(running, self.max_num_seqs)
        return n / self.step_s(n) if n else 0.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step keeps the trainer busy: drawn from ``measured``, or ``base_s + token_s`` x the tokens of its batch."""

    base_s: float = 1.0
    token_s: float = 0.0
    measured: Sequence[float] = ()

    def draw(self, tokens: int, rng: Rng) -> float:
        if self.measured:
            return float(self.measured[int(rng.integers(len(self.measured)))])
        return self.base_s + self.token_s * tokens


@dataclass(frozen=True, slots=True)
class Publishing:
    """From the end of a step to its version live: ``stage_s`` while generation goes on, ``pause_s`` in which nothing is sampled, then
    ``attest_s`` until the server says what it serves, while generation goes on again.

    A server heeds such a call between two of its steps, so each part takes ``..._seq_s`` longer for each sequence that it runs: the longer
    steps, and after the pause the KV that is computed again first. Only then is the next version staged.
    """

    every: int = 1
    stage_s: float = 0.1
    pause_s: float = 0.0
    attest_s: float = 0.0
    stage_seq_s: float = 0.0
    pause_seq_s: float = 0.0
    attest_seq_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Evaluations beside training: at each ``every``-th version ``lengths`` are sampled greedily, one request each. 0: none."""

    every: int = 0
    lengths: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Faults:
    """Mean times between events of a Poisson process, over the whole run, 0 for never; and how long each lasts."""

    until_s: float = math.inf
    """No fault begins after this moment: then all must go on, however little was possible before."""
    server_crash_s: float = 0.0
    server_restart_s: float = 5.0
    join_s: float = 0.0
    leave_s: float = 0.0
    orchestrator_crash_s: float = 0.0
    orchestrator_restart_s: float = 1.0
    rollback_s: float = 0.0
    trainer_restart_s: float = 3.0
    slow_frac: float = 0.0
    """Of the switches of a server, those that take ``slow_s`` longer on average."""
    slow_s: float = 5.0
    heartbeat_s: float = 2.0
    """A server later than this with a switch is suspended."""
    flush_tokens: int = 0
    """Tokens of a chunk: a crash costs the unfinished chunk; 0: the whole rollout."""
    flush_s: float = 0.0
    """Finished groups of the last so many seconds are not in the journal when the orchestrator dies."""
    same_replay_frac: float = 1.0
    """Of the rollbacks, those whose replayed steps make the same weights, so that what undone versions sampled can be used."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """``num_servers`` are there at the start. ``checkpoint_every``: steps between two that a rollback can go back to."""

    num_steps: int = 400
    groups_per_step: int = 16
    group_size: int = 1
    num_servers: int = 1
    max_inflight_groups: int = 0
    lengths: Lengths = field(default_factory=LogNormal)
    decoding: Decoding = field(default_factory=Decoding)
    step: StepTimes = field(default_factory=StepTimes)
    delivery_s: float = 0.0
    """From a trainer that asks to the batch in its hands, where the groups were ready."""
    publishing: Publishing = field(default_factory=Publishing)
    evaluations: Evaluations = field(default_factory=Evaluations)
    faults: Faults = field(default_factory=Faults)
    checkpoint_every: int = 10
    refuse_frac: float = 0.0
    fail_frac: float = 0.0
    patience_s: float = 1e4
    """A trainer that waits longer than this, faults included, is called a deadlock."""
    seed: int = 1

    def __post_init__(self) -> None:
        counts = {"num_steps": self.num_steps, "groups_per_step": self.groups_per_step, "group_size": self.group_size}
        for name, value in {**counts, "num_servers": self.num_servers, "checkpoint_every": self.checkpoint_every}.items():
            if value < 1:
                raise ConfigError(f"{name} = {value} must be at least 1 to simulate anything")
        if self.refuse_frac + self.fail_frac >= 1:
            raise ConfigError(f"refuse_frac + fail_frac = {self.refuse_frac + self.fail_frac}: below 1, or no group is ever delivered")
