"""Where the run stands: one small file, replaced at once, that any process may read at any time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from neox_rl.telemetry.jsonl import read_json, write_json

PHASES = ("starting", "warmstart", "evaluate", "rl", "report", "done", "failed")


@dataclass(frozen=True, slots=True)
class Status:
    """A None is not known yet. ``step`` of ``total_steps`` is within the phase; ``eta_s`` is to the end of the run."""

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

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase {self.phase!r} is not one of {', '.join(PHASES)}")


def write_status(path: Path, status: Status) -> None:
    write_json(path, asdict(status))


def read_status(path: Path) -> Status:
    """The status in the file, or a starting one where there is none yet. Keys of another release are left out."""
    known = {f.name for f in fields(Status)}
    return Status(**{key: value for key, value in read_json(path).items() if key in known})
