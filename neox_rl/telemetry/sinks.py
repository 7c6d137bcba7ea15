"""Writers beside the JSON lines. Each is imported only when the config asks for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from neox_rl.config.schema import LoggingConfig
from neox_rl.errors import ConfigError
from neox_rl.telemetry.paths import RunPaths


class Sink(Protocol):
    """Takes the finite numbers of one row; ``prefix`` is "sft", "rl", "heldout_greedy" or "heldout_sampled"."""

    def write(self, prefix: str, values: Mapping[str, float], step: int, time_s: float) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in ``runs/<name>/tensorboard``, through TensorBoard's own writer, which needs neither torch nor TensorFlow."""

    def __init__(self, paths: RunPaths) -> None:
        # By name, because the package carries no types.
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._open = importlib.import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self._directory = str(paths.tensorboard)
        self._writer = self._open(self._directory)

    def write(self, prefix: str, values: Mapping[str, float], step: int, time_s: float) -> None:
        rows = [self._summary.Value(tag=f"{prefix}/{key}", simple_value=value) for key, value in values.items()]
        if self._writer is None:
            self._writer = self._open(self._directory)
        try:
            self._writer.add_event(self._event(wall_time=time_s, step=step, summary=self._summary(value=rows)))
            self._writer.flush()
        except OSError:
            self._writer = None  # its thread has ended, and it would raise this error ever after: the next row gets a new file
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbSink:
    """One Weights & Biases run; ``WANDB_MODE=offline`` writes to the run directory and needs no account."""

    def __init__(self, paths: RunPaths, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        # The run keeps its own logs, and a second hook on standard output would garble the live display.
        settings = wandb.Settings(console="off")
        try:
            self._run = wandb.init(project=project, name=paths.name, dir=str(paths.root), config=dict(config), settings=settings)
        except wandb.errors.Error as error:
            raise ConfigError(
                f"metarl.logging.wandb: true, but wandb does not start: {error}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # Each phase counts its own steps; wandb's global step would refuse the second phase as going back.
        for prefix in ("sft", "rl", "heldout_greedy", "heldout_sampled"):
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def write(self, prefix: str, values: Mapping[str, float], step: int, time_s: float) -> None:
        self._run.log({f"{prefix}/{key}": value for key, value in values.items()} | {f"{prefix}/step": step})

    def close(self) -> None:
        self._run.finish()


def check_logging(logging: LoggingConfig) -> None:
    """Raises ConfigError where a writer that the config asks for is not installed. Call it before any process starts."""
    for wanted, module, key in (
        (logging.tensorboard, "tensorboard.summary.writer.event_file_writer", "tensorboard"),
        (logging.wandb, "wandb", "wandb"),
    ):
        if not wanted:
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"metarl.logging.{key}: true, but {module} cannot be imported ({error}); `pip install {key}`, or set the key to false"
            ) from error


def open_sinks(paths: RunPaths, logging: LoggingConfig, config: Mapping[str, Any]) -> tuple[Sink, ...]:
    check_logging(logging)
    sinks: list[Sink] = []
    if logging.tensorboard:
        sinks.append(TensorBoardSink(paths))
    if logging.wandb:
        sinks.append(WandbSink(paths, logging.wandb_project, config))
    return tuple(sinks)
