"""Where the run stands: two small files, replaced at once, that any process may read at any time.

``status.json`` is the orchestrator's, ``processes.json`` the launcher's: each has one writer. On a full disk the first is rewritten in its
place, so that it says so and its phase goes on; the second stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

from neox_rl.telemetry.jsonl import read_json, unless_full, write_json

ROOM: Final = 4096
"""Bytes that ``status.json`` has at least: what a longer message needs is there before the disk is full."""
PHASES = ("starting", "warmstart", "evaluate", "rl", "report", "done", "failed")


@dataclass(frozen=True, slots=True)
class Status:
    """A None is not known yet. ``step`` of ``total_steps`` is within the phase; ``eta_s`` is to the end of the run.

    ``servers``: what the orchestrator knows of each, in a word: ``serving``, ``staging``, ``lost`` ...
    """

    phase: str = "starting"
    step: int = 0
    total_steps: int = 0
    reward: float | None = None
    heldout_accuracy: float | None = None
    tokens_per_s_generated: float | None = None
    tokens_per_s_trained: float | None = None
    staleness_mean: float | None = None
    staleness_max: int | None = None
    bound: int | None = None
    queue_ready: int | None = None
    queue_inflight: int | None = None
    version: int | None = None
    eta_s: float | None = None
    loss: float | None = None
    message: str = ""
    servers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase {self.phase!r} is not one of {', '.join(PHASES)}")


def write_status(path: Path, status: Status) -> None:
    with unless_full():
        write_json(path, asdict(status), room=ROOM)


def read_status(path: Path) -> Status:
    """The status in the file, or a starting one where there is none yet. Keys of another release are left out."""
    known = {f.name for f in fields(Status)}
    return Status(**{key: value for key, value in read_json(path).items() if key in known})


@dataclass(frozen=True, slots=True)
class ProcessState:
    """``state``: running, restarting, lost. ``restarts`` of ``limit`` that are not forgiven yet."""

    state: str = "running"
    restarts: int = 0
    limit: int = 0


def write_processes(path: Path, processes: Mapping[str, ProcessState]) -> None:
    with unless_full():
        write_json(path, {name: asdict(state) for name, state in processes.items()})


def read_processes(path: Path) -> dict[str, ProcessState]:
    """The processes that the launcher knows; none where it has not written yet."""
    names = {f.name for f in fields(ProcessState)}
    return {name: ProcessState(**row) for name, row in read_json(path).items() if isinstance(row, dict) and row.keys() == names}
