"""What each process did and when: spans, instants and counters, one JSONL file a process.

A row is ``{"process", "kind", "name", "t_ns", "dur_ns", "fields"}``. ``t_ns`` is wall-clock time (comparable between the
processes of one machine), ``dur_ns`` comes from the monotonic clock, so a clock step moves a span but never stretches it.
Names are a fixed vocabulary, because the report and the timeline give each of them a meaning.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from neox_rl.telemetry.jsonl import LineFile, finite, read_jsonl

SPANS: Final[dict[str, str]] = {
    # launcher
    "start_servers": "vLLM servers are starting",
    "start_ranks": "training ranks are starting",
    "heal": "from the death of a process to its successor's first sign of life",
    "shutdown": "processes are being ended",
    # trainer
    "build": "the model and the optimizer are built",
    "load": "a checkpoint is compared with its digests, and loaded",
    "wait_batch": "waiting for rollouts",
    "hand_over": "rank 0 has what it waited for, and gives it to the other ranks",
    "train_step": "forward, backward, optimizer",
    "publish": "offering new weights",
    "checkpoint": "saving",
    "wait_disk": "waiting for room on the disk, to save",
    "evaluate": "held-out evaluation",
    # orchestrator
    "prepare": "the problems, the verifier and the sockets are made, and the journal is read",
    "demonstrate": "building demonstrations",
    "generate": "rollouts in flight",
    # server
    "generating": "at least one request in flight",
    "paused": "paused to load weights",
}
INSTANTS: Final[dict[str, str]] = {
    "phase": "a phase of the run begins",
    "offered": "the trainer offers a version",
    "staged": "every worker of a server holds a version, not yet used",
    "acked": "a worker of a server tells the trainer that it holds a version, by a digest of its own reckoning",
    "live": "every serving server attests a version",
    "admitted": "a ticket is admitted",
    "delivered": "a batch goes to the trainer",
    "refused": "a group is refused by dynamic sampling",
    "error": "something failed",
    "recovered": "an orchestrator took over from the journal, or a trainer began anew from its checkpoint",
    "violation": "the audit finds that the run broke one of its rules",
    "journal": "damage that was found in the journal, or a disk that cannot take it",
    "dropped": "events of this process that a full disk did not take",
    # a server, as the orchestrator sees it: neox_rl/run/members.py
    "joined": "a server belongs to the run from now on",
    "staging": "it answers, and gets its first version since it was started",
    "serving": "it attests a version, with this digest, and gets requests",
    "suspended": "it gets no requests: late, or silent",
    "lost": "it is gone, or a switch failed: only a new start helps",
    "left": "it belongs to the run no longer",
    "died": "a process ended that should not have, or gave no sign of life",
    "restarted": "a process that died was started again",
}
COUNTERS: Final[dict[str, str]] = {"queue": "groups ready and in flight", "tokens": "tokens generated so far"}
_VOCABULARY: Final = {"span": SPANS, "instant": INSTANTS, "counter": COUNTERS}
ONCE_A_PART: Final = ("start_ranks", "start_servers", "build", "load")
"""Spans that a process has once each time the run is started or resumed; no other event of a part is older than its start_ranks."""
FLUSH_S: Final = 1.0
AT_ONCE: Final = frozenset({"acked", "staged", "serving"})
"""On the disk before anybody acts on it: an audit has no other word of what a server held, and whoever heard it may be killed the moment
after. One each a server and version."""
MOST_BYTES: Final = 8 << 20
"""Of events that wait for room on a full disk, in each process."""


@dataclass(frozen=True, slots=True)
class Event:
    """One row of an event file. ``dur_ns`` is 0 except for spans."""

    process: str
    kind: str
    name: str
    t_ns: int
    dur_ns: int = 0
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def end_ns(self) -> int:
        return self.t_ns + self.dur_ns


class EventLog:
    """Appends events of one process. Cheap: lines are buffered and reach the disk about once a second and at exit; ``AT_ONCE`` do not wait.

    May be used from several threads. A forked child must open its own: rows of this one are never written by it. A full disk is waited for:
    what does not fit into ``MOST_BYTES`` meanwhile is dropped, and how much that was is an event.
    """

    def __init__(self, path: Path, process: str) -> None:
        self.process = process
        self._file = LineFile(path, MOST_BYTES)
        self._told = 0
        self.closed = False
        self._lock = threading.Lock()
        self._open: dict[int, str] = {}
        self._come: dict[int, str] = {}
        self.failed_at = ""
        """The innermost span that the first exception left, in the words of ``doing``."""
        self._pid = os.getpid()
        self._flushed = time.monotonic()
        atexit.register(self.close)

    @contextmanager
    def span(self, name: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Record how long the body took, also when it raises. Fields known only at the end are put into the yielded dict."""
        _check("span", name)
        wall, start = time.time_ns(), time.monotonic_ns()
        self._open[start] = at = " ".join([name, *(f"{key} {value}" for key, value in fields.items())])
        try:
            yield fields
        except BaseException:
            self.failed_at = self.failed_at or at
            raise
        finally:
            self._open.pop(start, None)
            self._come.pop(start, None)
            self._emit("span", name, wall, time.monotonic_ns() - start, fields)

    @property
    def doing(self) -> str:
        """The span that was opened last and is still open, with the fields it began with, and how far it has come:
        ``train_step phase rl step 17``; or nothing."""
        start, at = next(reversed(self._open.copy().items()), (0, ""))
        return at + self._come.get(start, "")

    def progress(self, **fields: Any) -> None:
        """How far the span that was opened last has come: a change of ``doing``, which tells a long span from one that stands still."""
        if start := next(reversed(self._open.copy()), 0):
            self._come[start] = "".join(f" {key} {value}" for key, value in fields.items())

    def add_span(self, name: str, start_ns: int, dur_ns: int, **fields: Any) -> None:
        """A span that the caller timed: wall-clock start and monotonic duration, nanoseconds."""
        self._emit("span", name, start_ns, dur_ns, fields)

    def instant(self, name: str, **fields: Any) -> None:
        self._emit("instant", name, time.time_ns(), 0, fields)

    def counter(self, name: str, **values: float) -> None:
        """Values that hold from now on, e.g. ``counter("queue", ready=3, inflight=12)``."""
        self._emit("counter", name, time.time_ns(), 0, values)

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Flush; what comes later is written at once."""
        with self._lock:
            self.closed = True
            self._flush()
        atexit.unregister(self.close)

    def _emit(self, kind: str, name: str, t_ns: int, dur_ns: int, fields: dict[str, Any]) -> None:
        _check(kind, name)
        line = self._line(kind, name, t_ns, dur_ns, fields)
        with self._lock:
            self._file.add(line)
            if self.closed or name in AT_ONCE or time.monotonic() - self._flushed >= FLUSH_S:
                self._flush()

    def _line(self, kind: str, name: str, t_ns: int, dur_ns: int, fields: dict[str, Any]) -> bytes:
        row: dict[str, Any] = {"process": self.process, "kind": kind, "name": name, "t_ns": t_ns, "dur_ns": dur_ns}
        row["fields"] = finite(fields)[0]
        return json.dumps(row, separators=(",", ":"), allow_nan=False, default=str).encode() + b"\n"

    def _flush(self) -> None:
        # A forked child inherits the buffer; were it to write, every buffered row would appear twice.
        if os.getpid() != self._pid:
            self._file.forget()
        self._file.flush()
        if not self._file.waiting and self._file.dropped > self._told:
            self._file.add(self._line("instant", "dropped", time.time_ns(), 0, {"events": self._file.dropped - self._told}))
            self._file.flush()
            self._told = self._file.dropped
        self._flushed = time.monotonic()


def _check(kind: str, name: str) -> None:
    if name not in _VOCABULARY[kind]:
        raise ValueError(f"{kind} {name!r} is not in the vocabulary of telemetry/events.py; known: {', '.join(_VOCABULARY[kind])}")


def read_events(directory: Path) -> list[Event]:
    """The events of all processes in order of time. Torn lines and rows of another shape are left out."""
    rows = [row for path in sorted(directory.glob("*.jsonl")) for row in read_jsonl(path)]
    events = [event for event in map(_event, rows) if event is not None]
    return sorted(events, key=lambda e: (e.t_ns, e.process))


def _event(row: dict[str, Any]) -> Event | None:
    process, kind, name, fields = row.get("process"), row.get("kind"), row.get("name"), row.get("fields", {})
    t_ns, dur_ns = row.get("t_ns"), row.get("dur_ns", 0)
    if not (isinstance(process, str) and kind in _VOCABULARY and isinstance(name, str) and isinstance(fields, dict)):
        return None
    if not (isinstance(t_ns, int) and isinstance(dur_ns, int)) or dur_ns < 0:
        return None
    return Event(process, str(kind), name, t_ns, dur_ns, fields)


def parts_of(events: Sequence[Event]) -> list[list[Event]]:
    """Events in order of time, cut where the run was started again: at each start of the ranks by the launcher.

    A launcher that was killed early left no such event. Then a process that starts for the second time in a part begins the next, unless
    the launcher says that it started it again.
    """
    parts: list[list[Event]] = []
    begun: set[tuple[str, str]] = set()
    for event in events:
        start = (event.process, event.name)
        if not parts or (event.name in ONCE_A_PART and (event.name == "start_ranks" or start in begun)):
            parts.append([])
            begun.clear()
        if event.name in ONCE_A_PART:
            begun.add(start)
        elif event.name == "restarted":
            begun.clear()
        parts[-1].append(event)
    return parts
