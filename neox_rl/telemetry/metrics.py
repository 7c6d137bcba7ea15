"""Metrics and evaluations: JSON lines always, TensorBoard and Weights & Biases where the config asks for them."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from neox_rl.config.schema import LoggingConfig
from neox_rl.telemetry.jsonl import JsonlWriter, unless_full
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rows import EvaluationRow, MetricsRow
from neox_rl.telemetry.sinks import Sink, open_sinks


class MetricsWriter:
    """The one writer of ``metrics.jsonl`` and ``evaluations.jsonl`` of a run; every row is on disk when the call returns.

    On a full disk it is not: no row is lost as long as ``written`` is called until it says that all are. What TensorBoard's files cannot
    take is missing there alone.

    NaN and infinities are written as null and counted in the row's ``nonfinite``. Raises ConfigError when a writer that the config asks for
    cannot be opened.
    """

    def __init__(self, paths: RunPaths, logging: LoggingConfig, config: Mapping[str, Any] | None = None) -> None:
        self._sinks: tuple[Sink, ...] = open_sinks(paths, logging, config or {})
        self._metrics = JsonlWriter(paths.metrics)
        self._evaluations = JsonlWriter(paths.evaluations)

    def step(self, row: MetricsRow) -> None:
        written = self._metrics.write(row)
        self._send(scalars(written), row["phase"], row["step"], row["time"])

    def evaluation(self, row: EvaluationRow) -> None:
        written = self._evaluations.write(row)
        found = scalars({key: value for key, value in written.items() if key != "per_problem"})
        self._send(found, f"heldout_{row['mode']}", row["step"], row["time"])

    def written(self) -> bool:
        """Tries again what a full disk did not take; whether every row is on the disk now."""
        return all([self._metrics.flush(), self._evaluations.flush()])

    def close(self) -> None:
        """Raises OSError where the disk is full and rows would be lost."""
        for sink in self._sinks:
            with unless_full():
                sink.close()
        if not self.written():
            raise OSError(errno.ENOSPC, "the disk is full: its last rows are missing", str(self._metrics.path))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _send(self, values: dict[str, float], prefix: str, step: int, time_s: float) -> None:
        for sink in self._sinks:
            with unless_full():
                sink.write(prefix, values, step, time_s)


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row by path (``search/wrong_node_frac``); step, time, text and null are left out."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not (prefix == "" and key in ("step", "time")):
            found[prefix + key] = float(value)
    return found
