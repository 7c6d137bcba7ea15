"""Keeps every server at the newest version that the trainer offers, and says which version is live.

    trainer publishes v -> every server stages it (in the background) -> every server switches (pause, load, resume) -> v is live

A version that was superseded while it was staged is skipped. Live means: attested by every server after its switch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from neox_rl.config.schema import DeadlinesConfig, ServersConfig, WeightsConfig
from neox_rl.errors import WeightError
from neox_rl.keys import Keys
from neox_rl.rollout.scripted import ScriptedGenerator
from neox_rl.rollout.vllm_control import VllmControl
from neox_rl.rollout.vllm_server import ServerSpec, wait_ready
from neox_rl.telemetry.events import EventLog
from neox_rl.types import NO_VERSION
from neox_rl.weights.watcher import Watcher


class Keeper(Protocol):
    """Whoever brings published versions to the generator."""

    async def run(self, on_live: Callable[[int], None]) -> None:
        """Runs until cancelled; calls ``on_live(version)`` each time every server serves a newer version."""
        ...

    def promise(self, version: int) -> None:
        """The trainer says that ``version`` is offered."""
        ...

    def waiting_for(self) -> str: ...


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each stage of a version's way may take."""

    servers_s: float
    publish_s: float
    stage_s: float
    switch_s: float

    @classmethod
    def of(cls, servers: ServersConfig, weights: WeightsConfig, deadlines: DeadlinesConfig) -> Deadlines:
        return cls(servers.start_timeout_s, deadlines.publish_s, weights.stage_timeout_s, weights.switch_timeout_s)


class ServerKeeper:
    """vLLM servers over HTTP, the publisher over ZeroMQ. ``logs`` has one event log a server, where its pauses go."""

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        publisher: str,
        deadlines: Deadlines,
        events: EventLog,
        logs: Sequence[EventLog],
        keys: Keys | None = None,
    ) -> None:
        self._specs, self._publisher, self._deadlines, self._events, self._logs = specs, publisher, deadlines, events, logs
        self._keys = keys
        self._promised = NO_VERSION
        self._wake = asyncio.Event()
        self._waiting = ""

    def promise(self, version: int) -> None:
        self._promised = version
        self._wake.set()

    def waiting_for(self) -> str:
        return self._waiting

    async def run(self, on_live: Callable[[int], None]) -> None:
        self._waiting = f"{', '.join(s.name for s in self._specs)} to start"
        with self._events.span("start_servers"):
            await asyncio.gather(*(wait_ready(spec, None, self._deadlines.servers_s) for spec in self._specs))
        controls = [VllmControl(spec.address) for spec in self._specs]
        try:
            async with Watcher(self._publisher, keys=self._keys) as watcher:
                await asyncio.gather(*(c.init_weights(self._publisher, s.name) for c, s in zip(controls, self._specs, strict=True)))
                await self._follow(watcher, controls, on_live)
        finally:
            await asyncio.gather(*(control.close() for control in controls))

    async def _follow(self, watcher: Watcher, controls: Sequence[VllmControl], on_live: Callable[[int], None]) -> None:
        live = NO_VERSION
        workers = frozenset[str]().union(*(spec.workers for spec in self._specs))
        while True:
            while self._promised <= live:
                self._waiting = f"the trainer to publish v{live + 1}"
                self._wake.clear()
                await self._wake.wait()
            self._waiting = f"v{self._promised} from the publisher {self._publisher}"
            version = await watcher.wait_offered(live, self._deadlines.publish_s)
            self._events.instant("offered", version=version)
            self._waiting = f"the servers to stage v{version}"
            version = await watcher.wait_staged(version, workers, self._deadlines.stage_s)
            self._events.instant("staged", version=version)
            self._waiting = f"the servers to switch to v{version}"
            with self._events.span("switch", version=version):
                await asyncio.gather(*(self._switch(i, control, version) for i, control in enumerate(controls)))
            live = version
            self._events.instant("live", version=version)
            on_live(version)

    async def _switch(self, index: int, control: VllmControl, version: int) -> None:
        started = time.time_ns()
        times = await control.switch(version, self._deadlines.switch_s)
        self._logs[index].add_span("paused", started, round(times.pause_s * 1e9), version=version, load_s=times.load_s)
        attested = await control.live_version()
        if attested != version:
            raise WeightError(f"{control.address} attests v{attested} after a switch to v{version}: another run updates this server")


class ScriptedKeeper:
    """The scripted generator has no weights: a promised version is live at once."""

    def __init__(self, generator: ScriptedGenerator) -> None:
        self._generator = generator
        self._versions: asyncio.Queue[int] = asyncio.Queue()

    def promise(self, version: int) -> None:
        self._versions.put_nowait(version)

    def waiting_for(self) -> str:
        return "the trainer to publish"

    async def run(self, on_live: Callable[[int], None]) -> None:
        while True:
            version = await self._versions.get()
            self._generator.set_version(version)
            on_live(version)
