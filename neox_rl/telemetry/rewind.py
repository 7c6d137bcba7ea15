"""Takes a run's files back to the checkpoint that it continues from, so that no step stands in them twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.paths import RunPaths

SMALL, TRAIN = "step ", "train"
"""How the labels of small evaluations begin, and the label of recorded rollouts of training problems."""


def rewind(paths: RunPaths, sft_step: int, rl_step: int) -> None:
    """Cuts metrics, evaluations and recorded rollouts that come after the last finished steps of both phases.

    Files are cut in place: a writer that holds one open for appending goes on at its new end. Without an RL step the warm start is
    evaluated again, and the final evaluation always is.
    """
    last = {"sft": sft_step, "rl": rl_step}
    cut(paths.metrics, lambda row: row["step"] <= last[row["phase"]])
    cut(paths.evaluations, lambda row: 0 < rl_step >= row["step"] and row["label"] != "final")
    cut(paths.rollouts, lambda row: 0 < rl_step >= row["step"] and row["label"] != "final")


def settle(paths: RunPaths, sft_step: int, rl_step: int, evaluated: Collection[str]) -> None:
    """Cuts what an orchestrator wrote and could not answer for before it died: it is told, or does it, again.

    ``sft_step`` and ``rl_step`` are the last steps whose report counts, ``evaluated`` the full evaluations that do.
    """
    last = {"sft": sft_step, "rl": rl_step}
    cut(paths.metrics, lambda row: row["step"] <= last[row["phase"]])
    cut(paths.evaluations, lambda row: row["label"] in evaluated or row["label"].startswith(SMALL))
    cut(paths.rollouts, lambda row: row["label"] in evaluated or row["label"] == TRAIN)


def lacks_row(paths: RunPaths, phase: str, step: int) -> bool:
    """Whether ``step`` is the next one that metrics have no row of."""
    last = {row.get("phase"): row.get("step") for row in read_jsonl(paths.metrics)}
    return last.get(phase, 0) == step - 1


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Truncates a JSON-lines file before the first row that is not to be kept, or before a last line that was not finished.

    A line that is no such row (blank, or torn by an earlier crash) says nothing about the rows behind it: it stays, and they do.
    No file is an empty one.
    """
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _stays(line, keep):
                break
            kept += len(line)
    if kept < path.stat().st_size:
        os.truncate(path, kept)


def _stays(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return True
