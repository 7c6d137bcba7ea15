"""Where a step's groups come from: the orchestrator's socket, or a directory of recorded batches. Rank 0 only.

An empty tuple of groups means: stop after the last step, save, and end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from neox_rl.batch.record import read_batch, record_batch, recorded_steps
from neox_rl.config.derived import staleness_bound
from neox_rl.config.run import RunConfig
from neox_rl.errors import DiskStaysFullError
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.queue.wire_messages import Phase
from neox_rl.step.position import Position
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import unless_full
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rewind import rewind
from neox_rl.telemetry.rows import MetricsRow
from neox_rl.telemetry.status import Status, write_status
from neox_rl.types import Group, Json

DISK_S = 0.5


class Feed(Protocol):
    """What rank 0 asks and tells. ``state`` is what a checkpoint keeps to continue the feed after the last batch."""

    @property
    def state(self) -> Mapping[str, Json]: ...

    def hello(self, world: int, position: Position) -> None: ...

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]: ...

    def evaluate(self, label: str, version: int) -> bool:
        """False when the evaluation was given up, because the run is to stop."""
        ...

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...

    def published(self, version: int, digest: str) -> None:
        """The weights of ``version`` are offered; ``digest`` is that of their snapshot, empty where nobody publishes."""
        ...

    def saved(self, position: Position) -> None:
        """Every rank has saved a checkpoint at ``position``."""
        ...

    def done(self, reason: str) -> None: ...

    def close(self) -> None: ...


class LiveFeed:
    """The orchestrator. With ``record`` every delivered batch is also written to that directory, whose full disk is waited for."""

    def __init__(self, client: ExperienceClient, record: Path | None, disk_full_s: float, events: EventLog) -> None:
        self._client, self._record, self._disk_full_s, self._events = client, record, disk_full_s, events
        self.report, self.published, self.done, self.close = client.report, client.published, client.done, client.close

    @property
    def state(self) -> Mapping[str, Json]:
        return self._client.state

    def hello(self, world: int, position: Position) -> None:
        steps: dict[str, Json] = {"sft_step": position.sft_step, "rl_step": position.rl_step}
        report: dict[str, Json] = {"report": dict(position.report)} if position.report else {}
        self._client.hello(world, dict(position.feed_state or {}) | steps | report)

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        groups = self._client.next_groups(phase, step)
        if self._record is not None and groups:
            self._write(self._record, phase, step, groups)
        return groups

    def _write(self, record: Path, phase: Phase, step: int, groups: tuple[Group, ...]) -> None:
        """Raises DiskStaysFullError."""
        begin = time.monotonic()
        while True:
            with unless_full():
                record_batch(record, phase.value, step, groups)
                return
            if (waited_s := time.monotonic() - begin) > self._disk_full_s:
                what = "for room to record a batch (metarl.debug.record_batches): make room there, or record none"
                raise DiskStaysFullError(f"waited {waited_s:.0f} s on the disk of {record} {what}; the run goes on with --resume")
            with self._events.span("wait_disk", directory=str(record)):  # the launcher hears of it
                time.sleep(DISK_S)

    def evaluate(self, label: str, version: int) -> bool:
        return bool(self._client.evaluate(label, version))

    def saved(self, position: Position) -> None:
        self._client.checkpoint(position.sft_step, position.rl_step)


class RecordedFeed:
    """Batches of an earlier run, in order. There is no orchestrator, so rank 0 writes metrics and status itself.

    ``paths.stop`` asks to stop: a signal would reach the ranks through their runner, which kills them at the first.
    """

    def __init__(self, config: RunConfig, paths: RunPaths) -> None:
        self._config, self._paths, self._directory = config, paths, Path(config.metarl.debug.batches)
        self._writer = MetricsWriter(paths, config.metarl.logging)
        self.state: Mapping[str, Json] = {}

    def hello(self, world: int, position: Position) -> None:
        rewind(self._paths, position.sft_step, position.rl_step)
        write_status(self._paths.status, Status(phase="rl" if position.rl_step else "warmstart"))

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        if self._paths.stop.exists() or step > max(recorded_steps(self._directory, phase.value), default=0):
            return ()
        return read_batch(self._directory, phase.value, step)[0]

    def evaluate(self, label: str, version: int) -> bool:
        return True

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        sft, bound = phase is Phase.SFT, staleness_bound(self._config)
        row: dict[str, Json] = {"phase": phase.value, "step": step, "version": 0 if sft else step - 1, "time": time.time(), **metrics}
        if not sft:
            row["staleness_bound"] = bound
        self._writer.step(cast(MetricsRow, row))
        self._wait_for_room()
        total = self._config.metarl.warmstart.steps if sft else self._config.neox.train_iters
        loss = cast("float | None", metrics.get("loss"))
        write_status(self._paths.status, Status("warmstart" if sft else "rl", step, total, bound=bound, loss=loss))

    def _wait_for_room(self) -> None:
        """One row waits at most: what a full disk does not take would fill the memory. Raises DiskStaysFullError."""
        begin, limit_s = time.monotonic(), self._config.metarl.queue.disk_full_s
        while not self._writer.written():
            if (waited_s := time.monotonic() - begin) > limit_s:
                raise DiskStaysFullError(f"waited {waited_s:.0f} s for room on the disk of {self._paths.metrics}: make room there")
            time.sleep(DISK_S)

    def published(self, version: int, digest: str) -> None:
        return None

    def saved(self, position: Position) -> None:
        return None

    def done(self, reason: str) -> None:
        write_status(self._paths.status, Status("report", message=reason))

    def close(self) -> None:
        self._writer.close()
