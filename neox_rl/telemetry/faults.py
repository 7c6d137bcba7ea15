"""What went wrong in a run and was healed, or was not: from the launcher's events, and from what the orchestrator saw of the servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from neox_rl.telemetry.events import Event

KINDS = ("server", "orchestrator", "trainer")
_SEEN_BY_THE_ORCHESTRATOR = ("suspended", "lost")


@dataclass(frozen=True)
class Fault:
    """``at_s`` counts from the first event of the run. ``what`` is for a reader; ``healed_s`` None where that is not known."""

    at_s: float
    process: str
    what: str
    healed_s: float | None = None


def restarts(events: Sequence[Event]) -> dict[str, int]:
    """How often processes of each kind were started again."""
    found = Counter(_kind(str(e.fields.get("process", ""))) for e in events if e.name == "restarted")
    return {kind: found[kind] for kind in KINDS}


def faults(events: Sequence[Event]) -> list[Fault]:
    """In order of time. A process is healed when it shows its first sign of life again; a server, when it serves."""
    start = events[0].t_ns if events else 0
    found = []
    for i, event in enumerate(events):
        process = str(event.fields.get("process", event.process))
        if event.name == "died":
            at = f", at {event.fields['doing']}" if event.fields.get("doing") else ""
            healed = _healed_s(events[i:], process, event.t_ns)
            found.append(Fault((event.t_ns - start) / 1e9, process, f"{event.fields.get('why', 'died')}{at}", healed))
        elif event.name in _SEEN_BY_THE_ORCHESTRATOR and event.kind == "instant":
            why = str(event.fields.get("why", ""))
            found.append(Fault((event.t_ns - start) / 1e9, process, f"{event.name}{f': {why}' if why else ''}"))
    return found


def _healed_s(later: Sequence[Event], process: str, died_ns: int) -> float | None:
    for event in later:
        if event.name == "heal" and event.fields.get("process") == process and event.t_ns >= died_ns:
            return event.dur_ns / 1e9
        if event.name == "serving" and event.process == process:
            return (event.t_ns - died_ns) / 1e9
    return None


def _kind(process: str) -> str:
    return process.rpartition("-")[0] or process
