"""Both ends of the experience socket for tests: an orchestrator in a thread that writes down what it is asked, and its trainer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from unittest.mock import patch

import zmq

from neox_rl.codec import encode_group
from neox_rl.errors import NeoxRLError
from neox_rl.queue import wire_client
from neox_rl.queue.wire import Delivery, ExperienceServer, Phase
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.types import Finish, Group, Json, Reason, Role, Segment, Trace, Verdict

HEARTBEAT_S, RESEND_S = 0.05, 0.1


def make_group(ticket: int) -> Group:
    segment = Segment((7, 8), Role.THINK, (-0.5, -1.25), 0, 1.0)
    return Group(ticket, "p", (Trace(f"g{ticket:06d}/r0", "p", (segment,), 1.0, Finish.STOP, Verdict(True, "1", Reason.MATCH, 0.1)),))


class Awake:
    """A clock on which the time that this process stood still is short: the machine's, and no silence of the peer."""

    def __init__(self) -> None:
        self._now, self._looked = 0.0, time.monotonic()

    def monotonic(self) -> float:
        before, self._looked = self._looked, time.monotonic()
        self._now += min(self._looked - before, 2.0 * RESEND_S)
        return self._now


class Recorder:
    """A handler that writes down what it is asked, in order. ``delay_s`` is how long a batch takes; the event loop itself stands still
    while it is ``stuck``."""

    def __init__(self, delay_s: float = 0.0, failure: Exception | None = None, same: bool = False) -> None:
        self.delay_s, self.failure, self.same = delay_s, failure, same
        self.stuck: Callable[[], bool] = lambda: False
        self.calls: list[tuple[object, ...]] = []

    async def hello(self, session: str, world: int, pid: int, attempt: int, state: Mapping[str, Json]) -> None:
        self.calls.append(("hello", world, dict(state)))

    async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery:
        self.calls.append(("next", phase, step))
        while self.stuck():
            time.sleep(0.01)
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        return Delivery([encode_group(make_group(0 if self.same else step))], {"after": step})

    async def evaluate(self, id: int, label: str, version: int) -> Mapping[str, Json]:
        self.calls.append(("evaluate", label, version))
        await asyncio.sleep(self.delay_s)
        return {"accuracy": 0.25, "none": float("nan")}

    async def report(self, id: int, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        self.calls.append(("report", phase, step, dict(metrics)))

    async def published(self, id: int, version: int, digest: str) -> None:
        self.calls.append(("published", version))

    async def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None:
        self.calls.append(("checkpoint", sft_step, rl_step))

    async def durable(self) -> None: ...

    async def done(self, reason: str) -> None:
        self.calls.append(("done", reason))

    def waiting_for(self) -> str:
        return "g000003, due by step 5"


class Running:
    """A server in a thread with its own event loop; ``result`` is what ``serve`` returned or raised."""

    def __init__(
        self, handler: Recorder, port: int = 0, session: str | None = None, attempt: int = 0, last: int = 0, lost: str = ""
    ) -> None:
        self.server: ExperienceServer
        self._before = (session, attempt, last, lost)
        self._up, self._handler, self._port = threading.Event(), handler, port
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self.result = ThreadPoolExecutor(1).submit(lambda: asyncio.run(self._main()))
        assert self._up.wait(60)
        self.address = f"tcp://127.0.0.1:{self.server.port}"

    async def _main(self) -> str | None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = await self._bound()
        if self._before[0] is not None:
            self.server.take_over(*self._before)
        self._up.set()
        serving, stopping = asyncio.ensure_future(self.server.serve(self._handler)), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            return serving.result() if serving.done() else None
        finally:
            serving.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)
            self.server.close()

    async def _bound(self) -> ExperienceServer:
        """A socket that was closed in this process lets its port go a moment later."""
        for _ in range(100):
            with suppress(NeoxRLError):
                return ExperienceServer("127.0.0.1", self._port, heartbeat_s=HEARTBEAT_S)
            await asyncio.sleep(0.05)
        return ExperienceServer("127.0.0.1", self._port, heartbeat_s=HEARTBEAT_S)

    def stop(self) -> None:
        with suppress(RuntimeError):  # the server may end by itself, and its loop with it
            self._loop.call_soon_threadsafe(self._stop.set)
        self.result.exception(timeout=60)


@contextmanager
def serving(
    handler: Recorder, port: int = 0, session: str | None = None, attempt: int = 0, last: int = 0, lost: str = ""
) -> Iterator[Running]:
    running = Running(handler, port, session, attempt, last, lost)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def connected(
    address: str,
    deadline_s: float = 30,
    evaluate_s: float = 30,
    silence_s: float = 30,
    greet: bool = True,
    attempt: int = 0,
    resend_s: float = RESEND_S,
) -> Iterator[ExperienceClient]:
    client = ExperienceClient(address, deadline_s, evaluate_s, silence_s, resend_s, attempt=attempt)
    with patch.object(wire_client, "time", Awake()):
        try:
            if greet:
                client.hello(world=2)
            yield client
        finally:
            client.close()


class Gated(Recorder):
    """A batch takes until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        return await super().next_groups(id, phase, step)


def raw_peer(address: str) -> zmq.Socket[bytes]:
    peer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.RCVTIMEO, 60_000)
    peer.connect(address)
    return peer
