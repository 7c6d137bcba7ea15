"""What a simulation counts, and the invariants that it checks against books of its own, apart from the queue's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from neox_rl.ages import beyond
from neox_rl.errors import StalenessError
from neox_rl.types import Group


@dataclass(slots=True)
class Outcome:
    """Counts in tokens, times in seconds; of the surviving timeline where a rollback undid steps, except ``generated`` and times.

    ``long_frac``: of the tokens in the longest tenth of the rollouts, the share that got gradient. ``ages``: trained tokens by staleness.
    """

    tokens_generated: int = 0
    tokens_consumed: int = 0
    tokens_masked: int = 0
    tokens_beyond: int = 0
    tokens_dropped: int = 0
    tokens_refused: int = 0
    tokens_lost: int = 0
    """Sampled and lost by a crash, generated again."""
    ages: Counter[int] = field(default_factory=Counter)
    idle_s: float = 0.0
    """Waits for the batches after the first."""
    elapsed_s: float = 0.0
    longest_wait_s: float = 0.0
    num_groups: int = 0
    groups_s: float = 0.0
    """From admission to delivery, over all groups, refused ones included."""
    server_s: float = 0.0
    """Seconds that servers were there, all together."""
    busy_s: float = 0.0
    sequence_s: float = 0.0
    long_frac: float = 0.0
    steps: int = 0
    first_batch_s: float = 0.0
    """When the first step began: times are counted from there on."""
    events: Counter[str] = field(default_factory=Counter)
    """Faults and recoveries that happened, by name."""

    @property
    def tokens_trained(self) -> int:
        return self.ages.total()

    @property
    def max_staleness(self) -> int:
        return max(self.ages, default=-1)

    @property
    def mean_staleness(self) -> float:
        return sum(age * tokens for age, tokens in self.ages.items()) / max(1, self.tokens_trained)

    @property
    def beyond_frac(self) -> float:
        """Of the tokens consumed, those that got gradient though older than S."""
        return self.tokens_beyond / max(1, self.tokens_consumed)

    @property
    def masked_frac(self) -> float:
        return self.tokens_masked / max(1, self.tokens_consumed)

    @property
    def dropped_frac(self) -> float:
        """Of the tokens generated in finished rollouts, those of rollouts thrown away."""
        return self.tokens_dropped / max(1, self.tokens_generated)

    @property
    def idle_frac(self) -> float:
        """Of the time from the first batch to the last step, the trainer's share without a batch."""
        return self.idle_s / max(self.elapsed_s, 1e-9)

    @property
    def busy_frac(self) -> float:
        """Of the servers' time, the share with at least one request, pauses included."""
        return self.busy_s / max(self.server_s, 1e-9)

    @property
    def running_mean(self) -> float:
        """Sequences running at once on a server, on average over its time."""
        return self.sequence_s / max(self.server_s, 1e-9)

    @property
    def group_s(self) -> float:
        """Mean time of a group from admission to delivery."""
        return self.groups_s / max(1, self.num_groups)

    @property
    def tokens_per_s(self) -> float:
        """Tokens consumed by training steps a second."""
        return self.tokens_consumed / max(self.elapsed_s, 1e-9)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step trained."""

    tickets: tuple[int, ...]
    ages: Counter[int]
    masked: int
    rollouts: tuple[tuple[int, int], ...]
    """(tokens, tokens with gradient) of each."""


class Books:
    """Raises StalenessError where an invariant is broken. ``bound`` is S; ``masks``: tokens beyond it get no gradient.

    ``guards``: a token beyond the bound that gets gradient is an error, not a count; so for the project's own rule.
    """

    def __init__(self, bound: int, masks: bool, guards: bool) -> None:
        self.bound, self._masks, self._guards = bound, masks, guards
        self._steps: dict[int, Step] = {}
        self._step_of: dict[int, int] = {}

    def train(self, step: int, batch: tuple[Group, ...], lengths: dict[int, tuple[int, ...]]) -> int:
        """Takes note of a step; ``lengths`` is what each rollout was to have. The tokens of the batch."""
        if step != len(self._steps) + 1:
            raise StalenessError(f"step {step} trains after step {len(self._steps)}")
        spans: list[tuple[int, int, int]] = []  # rollout, version, tokens
        names: list[str] = []
        for group in batch:
            if group.ticket in self._step_of:
                raise StalenessError(f"ticket {group.ticket} is trained at step {self._step_of[group.ticket]} and at step {step}")
            self._step_of[group.ticket] = step
            if (found := tuple(t.num_tokens for t in group.traces)) != lengths[group.ticket]:
                raise StalenessError(f"ticket {group.ticket} brings rollouts of {found} tokens where {lengths[group.ticket]} were sampled")
            for trace in group.traces:
                spans += [(len(names), s.version, len(s.ids)) for s in trace.segments]
                names.append(trace.id)
        rollout, versions, counts = np.array(spans).T
        falls = (np.diff(versions) < 0) & (np.diff(rollout) == 0)
        if falls.any():
            raise StalenessError(f"versions fall within {names[int(rollout[falls.argmax()])]}")
        old = beyond(step - 1 - versions, self.bound)
        if versions.max() > step - 1 or (self._guards and not self._masks and old.any()):
            raise StalenessError(f"step {step} trains versions {sorted(set(versions.tolist()))} under the bound {self.bound}")
        used = np.where(old, 0, counts) if self._masks else counts
        by_age = np.bincount(step - 1 - versions, weights=used)
        ages = Counter({age: int(tokens) for age, tokens in enumerate(by_age) if tokens})
        totals, trained = (np.bincount(rollout, weights=tokens).astype(int).tolist() for tokens in (counts, used))
        masked = int(counts.sum() - used.sum())
        self._steps[step] = Step(tuple(g.ticket for g in batch), ages, masked, tuple(zip(totals, trained, strict=True)))
        return int(counts.sum())

    def roll_back(self, step: int) -> None:
        """The steps after ``step`` did not happen."""
        for undone in [s for s in self._steps if s > step]:
            for ticket in self._steps.pop(undone).tickets:
                del self._step_of[ticket]

    def close(self, outcome: Outcome, num_tickets: int, dropped: tuple[Group, ...] = ()) -> None:
        """The sums of the surviving timeline. Raises StalenessError unless every ticket was trained exactly once."""
        if sorted(self._step_of) != list(range(num_tickets)):
            missing = sorted(set(range(num_tickets)) - self._step_of.keys())[:8]
            raise StalenessError(f"{len(self._step_of)} of {num_tickets} tickets were trained; not {missing}")
        lengths = [(sum(t.num_tokens for t in group.traces), 0) for group in dropped]
        outcome.tokens_dropped = sum(tokens for tokens, _ in lengths)
        for step in self._steps.values():
            outcome.ages.update(step.ages)
            outcome.tokens_masked += step.masked
            lengths += step.rollouts
        outcome.steps = len(self._steps)
        outcome.tokens_consumed = outcome.tokens_trained + outcome.tokens_masked
        outcome.tokens_beyond = sum(tokens for age, tokens in outcome.ages.items() if age > self.bound)
        longest = sorted(lengths)[-max(1, len(lengths) // 10) :]
        outcome.long_frac = sum(used for _, used in longest) / max(1, sum(total for total, _ in longest))
