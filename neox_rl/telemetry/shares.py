"""Where the time of each process went, from its spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from neox_rl.telemetry.events import Event, parts_of

PRECEDENCE = (
    "paused", "wait_disk", "checkpoint", "publish", "hand_over", "evaluate", "train_step", "generate", "generating", "demonstrate",
    "prepare", "build", "load", "wait_batch", "heal", "start_servers", "start_ranks", "shutdown",
)  # fmt: skip
"""Of the spans open at one moment, the first named here gets the moment; so shares of one process add up to its time."""
IDLE = "idle"


def time_shares(events: Sequence[Event]) -> dict[str, dict[str, float]]:
    """Seconds a process spent in each kind of span, ``idle`` for none, over the time that the run was running.

    Spans of one process may overlap (hundreds of rollouts are in flight at once): every moment is counted once, for the
    span that PRECEDENCE puts first. Time between two parts of a resumed run is nobody's.
    """
    totals: dict[str, Counter[str]] = {p: Counter() for p in sorted({e.process for e in events if e.kind == "span"})}
    for part in parts_of(events):
        start, end = min(e.t_ns for e in part), max(e.end_ns for e in part)
        for process, seconds in totals.items():
            seconds.update(_shares([e for e in part if e.process == process and e.kind == "span"], start, end))
    return {process: dict(seconds) for process, seconds in totals.items()}


def _shares(spans: Sequence[Event], start: int, end: int) -> dict[str, float]:
    edges = sorted([(s.t_ns, 1, s.name) for s in spans] + [(s.end_ns, -1, s.name) for s in spans])
    seconds: Counter[str] = Counter()
    active: Counter[str] = Counter()
    now = start
    for t, change, name in edges:
        seconds[_first(active)] += t - now
        active[name] += change
        now = t
    seconds[IDLE] += end - now
    return {name: ns / 1e9 for name, ns in seconds.items() if ns > 0}


def _first(active: Counter[str]) -> str:
    return next((name for name in PRECEDENCE if active[name] > 0), IDLE)
