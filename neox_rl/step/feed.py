"""Where a step's groups come from: the orchestrator's socket, or a directory of recorded batches. Rank 0 only.

An empty tuple of groups means: stop after the last step, save, and end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from neox_rl.batch.record import read_batch, record_batch, recorded_steps
from neox_rl.queue.wire import ExperienceClient, Phase
from neox_rl.types import Group, Json


class Feed(Protocol):
    """What rank 0 asks and tells. ``state`` is what a checkpoint keeps to continue the feed after the last batch."""

    @property
    def state(self) -> Mapping[str, Json]: ...

    def hello(self, world: int, state: Mapping[str, Json]) -> None: ...

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]: ...

    def evaluate(self, label: str, version: int) -> None: ...

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...

    def published(self, version: int) -> None: ...

    def done(self, reason: str) -> None: ...

    def close(self) -> None: ...


class LiveFeed:
    """The orchestrator. With ``record`` every delivered batch is also written to that directory."""

    def __init__(self, client: ExperienceClient, record: Path | None) -> None:
        self._client, self._record = client, record

    @property
    def state(self) -> Mapping[str, Json]:
        return self._client.state

    def hello(self, world: int, state: Mapping[str, Json]) -> None:
        self._client.hello(world, state)

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        groups = self._client.next_groups(phase, step)
        if self._record is not None and groups:
            record_batch(self._record, phase.value, step, groups)
        return groups

    def evaluate(self, label: str, version: int) -> None:
        self._client.evaluate(label, version)

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        self._client.report(phase, step, metrics)

    def published(self, version: int) -> None:
        self._client.published(version)

    def done(self, reason: str) -> None:
        self._client.done(reason)

    def close(self) -> None:
        self._client.close()


class RecordedFeed:
    """Batches of an earlier run, in order; there is nobody to tell anything, so metrics go to ``sink``."""

    def __init__(self, directory: Path, sink: MetricsSink) -> None:
        self._directory, self._sink = directory, sink
        self.state: Mapping[str, Json] = {}

    def hello(self, world: int, state: Mapping[str, Json]) -> None:
        return None

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        if step > max(recorded_steps(self._directory, phase.value), default=0):
            return ()
        return read_batch(self._directory, phase.value, step)[0]

    def evaluate(self, label: str, version: int) -> None:
        return None

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        self._sink(phase, step, metrics)

    def published(self, version: int) -> None:
        return None

    def done(self, reason: str) -> None:
        return None

    def close(self) -> None:
        return None


class MetricsSink(Protocol):
    """Takes the metrics of a step where no orchestrator does."""

    def __call__(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...
