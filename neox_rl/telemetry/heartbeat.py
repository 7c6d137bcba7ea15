"""Signs of life: each rank and the orchestrator say every few moments that they go on, and what they are at. The launcher listens.

    heartbeat = Heartbeat(paths.beats, "trainer-0", events, every_s)
    heartbeat.start()            a thread: it goes on while the main thread waits in a collective
    await heartbeat.forever()    a task: it stops with its event loop

A process that is stopped, or holds the interpreter for good, stops beating. One that beats but stays at the same thing for too long waits
for somebody: what each was at tells for whom. Times of two machines are never compared: a beat counts when its number was not seen before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import read_json, rewrite_json

BEATS_A_DEADLINE = 10
LONGEST_S = 3.0
MAX_DOING = 200


@dataclass(frozen=True, slots=True)
class Beat:
    """``number`` counts up from 1; ``doing`` is the innermost open span of the process, empty between two."""

    process: str
    pid: int
    host: str
    number: int
    doing: str


def interval_s(silence_s: float) -> float:
    """How often to beat where silence of ``silence_s`` means death."""
    return min(LONGEST_S, silence_s / BEATS_A_DEADLINE)


class Heartbeat:
    """Writes ``<directory>/<process>.json``. ``start`` beats from a thread of its own until ``stop``."""

    def __init__(self, directory: Path, process: str, events: EventLog, every_s: float) -> None:
        self._path, self._process, self._events, self._every_s = directory / f"{process}.json", process, events, every_s
        self._number = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def beat(self) -> None:
        self._number += 1
        beat = Beat(self._process, os.getpid(), socket.gethostname(), self._number, self._events.doing[:MAX_DOING])
        rewrite_json(self._path, asdict(beat))

    async def forever(self) -> None:
        """Beats until it is cancelled."""
        while True:
            self.now()
            await asyncio.sleep(self._every_s)

    def start(self) -> Heartbeat:
        self.now()
        self._thread.start()
        return self

    def stop(self) -> None:
        """The last beat stays, so that the end of a process is not taken for silence by who reads it late."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.now()

    def now(self) -> None:
        """A beat between two, of a change that somebody waits to hear of; ``beat`` for a disk that may refuse it."""
        with contextlib.suppress(OSError):  # a disk that is broken, not a full one: silence is what the launcher then hears, and should
            self.beat()


def read_beats(directory: Path, prefix: str) -> dict[str, Beat]:
    """The last beat of each process whose name begins so. Files of another shape are left out."""
    found: dict[str, Beat] = {}
    names = {f.name for f in fields(Beat)}
    for path in sorted(directory.glob(f"{prefix}*.json")):
        try:
            row = read_json(path)
        except (OSError, ValueError):
            continue  # forgotten between the listing and the reading, or half rewritten: the next look finds it
        if row.keys() == names:
            found[path.stem] = Beat(**row)
    return found


def forget_beats(directory: Path, prefix: str) -> None:
    """Before the processes of these names are started: no beat of a predecessor is taken for one of theirs."""
    for path in directory.glob(f"{prefix}*"):  # what a killed writer left unfinished included
        path.unlink(missing_ok=True)
