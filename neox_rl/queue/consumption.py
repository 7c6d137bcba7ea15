"""The staleness bound checked again where a batch is consumed, from the versions that the engine attests, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from neox_rl.errors import StalenessError
from neox_rl.types import NO_VERSION, Group, Segment, Trace


@dataclass(frozen=True, slots=True)
class ConsumptionReport:
    """What one step consumes. Only tokens that a policy sampled are counted.

    ``by_staleness`` maps staleness in optimizer steps to tokens, masked ones included. ``masked`` are tokens beyond the bound
    without gradient, ``beyond`` tokens beyond the bound that would get gradient. ``max_staleness`` is over tokens with
    gradient; -1 when there is none.
    """

    step: int
    bound: int
    tokens: int
    by_staleness: dict[int, int]
    masked: int
    beyond: int
    max_staleness: int


def token_staleness(segment: Segment, step: int) -> int:
    """(step - 1) - version, in optimizer steps. Raises StalenessError for a version that step ``step`` cannot have seen."""
    staleness = step - 1 - segment.version
    if staleness < 0:
        raise StalenessError(
            f"step {step} trains v{step - 1} but its batch has tokens of v{segment.version}, which does not exist yet: "
            f"the servers hold weights of another run or of a later checkpoint"
        )
    return staleness


def mask_stale(groups: Sequence[Group], step: int, bound: int) -> tuple[Group, ...]:
    """The groups with loss weight 0 on every token older than ``bound`` at ``step``; rewards and other tokens are kept."""
    return tuple(_mask_group(group, step, bound) for group in groups)


def _mask_group(group: Group, step: int, bound: int) -> Group:
    traces = tuple(_mask_trace(trace, step, bound) for trace in group.traces)
    return group if all(a is b for a, b in zip(traces, group.traces, strict=True)) else replace(group, traces=traces)


def _mask_trace(trace: Trace, step: int, bound: int) -> Trace:
    def stale(segment: Segment) -> bool:
        return segment.version != NO_VERSION and segment.mask > 0 and token_staleness(segment, step) > bound

    if not any(map(stale, trace.segments)):
        return trace
    return replace(trace, segments=tuple(replace(s, mask=0.0) if stale(s) else s for s in trace.segments))


def consumption_report(groups: Iterable[Group], step: int, bound: int) -> ConsumptionReport:
    """Counts the sampled tokens of a batch by staleness. Raises StalenessError for tokens of a version yet to be made."""
    by_staleness: dict[int, int] = {}
    masked = beyond = 0
    max_staleness = -1
    for segment in (s for g in groups for t in g.traces for s in t.segments if s.version != NO_VERSION):
        staleness, num = token_staleness(segment, step), len(segment.ids)
        by_staleness[staleness] = by_staleness.get(staleness, 0) + num
        if segment.mask > 0 and num:
            max_staleness = max(max_staleness, staleness)
        if staleness > bound:
            masked += num if segment.mask == 0 else 0
            beyond += num if segment.mask > 0 else 0
    return ConsumptionReport(step, bound, sum(by_staleness.values()), dict(sorted(by_staleness.items())), masked, beyond, max_staleness)


def check_bound(report: ConsumptionReport) -> None:
    """Raises StalenessError when a token beyond the bound would get gradient: the run must stop."""
    if report.beyond:
        raise StalenessError(
            f"step {report.step} would train {report.beyond} of {report.tokens} tokens beyond the staleness bound S = {report.bound} "
            f"(oldest: {report.max_staleness} steps): the queue admitted or delivered a group against its rule"
        )


class TrainedOnce:
    """Remembers the tickets that were trained, apart from the queue's own books. Raises StalenessError on a second time."""

    def __init__(self) -> None:
        self._step_of: dict[int, int] = {}

    def add(self, groups: Iterable[Group], step: int) -> None:
        for group in groups:
            if group.ticket in self._step_of:
                first = self._step_of[group.ticket]
                raise StalenessError(f"ticket g{group.ticket:06d} was trained at step {first} and comes again at step {step}")
            self._step_of[group.ticket] = step
