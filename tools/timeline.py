"""Turn the events of a run into a Chrome trace: ``python tools/timeline.py runs/<name>``, then open timeline.json in https://ui.perfetto.dev.

One group of rows a process. Spans of one process that overlap get rows of their own below it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neox_rl.telemetry.events import Event, read_events
from neox_rl.telemetry.paths import RunPaths


def chrome_trace(events: Sequence[Event]) -> dict[str, Any]:
    """The trace, times in microseconds from the first event."""
    start = min((e.t_ns for e in events), default=0)
    rows: list[dict[str, Any]] = []
    for pid, process in enumerate(sorted({e.process for e in events}), start=1):
        mine = [e for e in events if e.process == process]
        rows.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}})
        rows += [_row(event, pid, lane, start) for event, lane in _lanes(mine)]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _lanes(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Each span in the first row that is free at its start: a viewer draws spans of one row as nested calls."""
    free_at: list[int] = []
    placed: list[tuple[Event, int]] = []
    for event in sorted(events, key=lambda e: e.t_ns):
        if event.kind != "span":
            placed.append((event, 0))
            continue
        lane = next((i for i, end in enumerate(free_at) if end <= event.t_ns), len(free_at))
        free_at[lane : lane + 1] = [event.end_ns]
        placed.append((event, lane))
    return placed


def _row(event: Event, pid: int, lane: int, start: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": event.name, "pid": pid, "tid": lane, "ts": (event.t_ns - start) / 1e3, "args": event.fields}
    if event.kind == "span":
        return row | {"ph": "X", "dur": event.dur_ns / 1e3}
    if event.kind == "counter":
        return row | {"ph": "C"}
    return row | {"ph": "i", "s": "p"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run_dir", type=Path)
    paths = RunPaths.of(parser.parse_args(argv).run_dir)
    events = read_events(paths.events)
    if not events:
        parser.error(f"no events under {paths.events}; give a run directory, runs/<name>")
    paths.timeline.write_text(json.dumps(chrome_trace(events)), encoding="utf-8")
    print(f"{paths.timeline}: {len(events)} events of {len({e.process for e in events})} processes; open it in https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
