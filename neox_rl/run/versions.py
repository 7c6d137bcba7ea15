"""Keeps every server at the newest version that the trainer offers, and says which version is live.

    one task a member:  probe -> init -> [staged v -> switch (pause, load, resume) -> attests v] -> probe twice a heartbeat -> ...
    one clock:          who is late is left behind; promised versions have deadlines, and every member its own

The decisions are ``run/members.py``; here are the requests. Every member goes its own way, so that a slow or dead one delays nobody beyond
the heartbeat that the rule gives it. A version that was superseded while it was staged is skipped.

A server whose switch failed may hold a mixture of two policies: it is lost, and whoever started it is asked to start it again. So is one
that is past its deadline, however well the others do.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from neox_rl.config.schema import DeadlinesConfig, ServersConfig, WeightsConfig
from neox_rl.errors import ConfigError, DeadlineError, WeightError
from neox_rl.keys import Keys
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_control import ServerGoneError, VllmControl
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run.members import Member, Members, State
from neox_rl.telemetry.events import EventLog
from neox_rl.types import NO_VERSION
from neox_rl.weights.watcher import Watcher

logger = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_S = 0.5
"""Between probes of a server that does not serve: a restart between two of them would not be seen."""
ABSENT_RETRY_S = 0.1
"""Of one that does not answer, which may at any moment, or must first be seen to be gone."""
TICK_S = 0.1
EVENT_OF = {State.STARTING: "joined"} | {state: str(state) for state in State if state is not State.STARTING}


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each stage of a version's way may take."""

    servers_s: float
    publish_s: float
    stage_s: float
    switch_s: float
    heartbeat_s: float
    drain_s: float

    @classmethod
    def of(cls, servers: ServersConfig, weights: WeightsConfig, deadlines: DeadlinesConfig) -> Deadlines:
        return cls(
            servers.start_timeout_s,
            deadlines.publish_s,
            weights.stage_timeout_s,
            weights.switch_timeout_s,
            servers.heartbeat_s,
            servers.request_timeout_s,
        )

    @property
    def probe_s(self) -> float:
        """Between an answer and the next probe, and again until that one is given up: together the one heartbeat of silence."""
        return self.heartbeat_s / 2


@dataclass(slots=True)
class _Tended:
    """What the requests to a member need beside its state. ``answering``: its last probe came through; else it is silent since
    ``silent_since``. ``gone``: nobody has listened at its address since it was lost, so that what answers there next is another process;
    ``held`` is the version that it had then. ``found``: what it attested when its staging began, and goes on attesting until its first
    switch. ``leaving``: it gets no new requests."""

    control: VllmControl
    restart: Callable[[str], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    answering: bool = False
    silent_since: float = 0.0
    gone: bool = True
    held: int = NO_VERSION
    found: int = NO_VERSION
    suspect: bool = False
    leaving: bool = False

    @property
    def silence(self) -> float:
        """Since when it is silent; inf where it answers."""
        return math.inf if self.answering else self.silent_since

    def hush(self, now: float) -> None:
        """It does not answer. The time counts from when it last did."""
        if self.answering:
            self.answering, self.silent_since = False, now


class ServerKeeper:
    """The servers over HTTP, the publisher over ZeroMQ. ``log_of(name, address)`` opens the event log of a server."""

    def __init__(
        self,
        generator: VllmGenerator,
        publisher: str,
        deadlines: Deadlines,
        events: EventLog,
        log_of: Callable[[str, str], EventLog],
        keys: Keys | None = None,
    ) -> None:
        self._generator, self._publisher, self._deadlines, self._events, self._log_of = generator, publisher, deadlines, events, log_of
        self.members = Members(deadlines.heartbeat_s, time.monotonic(), self._changed, self._live)
        self._tended: dict[str, _Tended] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._beside: list[Coroutine[Any, Any, None]] = []
        self._watcher = Watcher(publisher, self._heard, keys)
        self._report_live: Callable[[int], None] = lambda _: None
        self._promised = self._offered = NO_VERSION
        self._promised_at = self._offered_at = 0.0
        # Two keepers never share a name for a server's life, so no ack of an earlier one's is taken for this one's.
        self._lives = (f"{secrets.token_hex(3)}.{n}" for n in itertools.count(1))
        self.on_states: Callable[[dict[str, str]], None] = lambda _: None
        """Called with ``states()`` whenever one changes."""
        self.on_member: Callable[[Member], None] = lambda _: None
        """Called after every change of a member's state or version."""
        self._told: dict[str, str] = {}
        generator.on_failure = self._suspect

    # who belongs to the run

    def add(self, spec: ServerSpec, restart: Callable[[str], None]) -> None:
        """A server that is there, or will be. ``restart(why)`` asks whoever started it to end it and start it again.

        Raises ConfigError when its name or address is taken.
        """
        if self.members.get(spec.name) is not None or self.members.at(spec.address) is not None:
            raise ConfigError(
                f"{spec.name} at {spec.address}: the name or the address is another server's; choose another --name or --port"
            )
        self._tended[spec.name] = _Tended(VllmControl(spec.address), restart)
        self._log_of(spec.name, spec.address)
        self._generator.suspend(spec.address)
        member = self.members.join(spec.name, spec.address, spec.tensor_parallel_size, time.monotonic())
        self._tended[spec.name].silent_since = member.since
        if self._tasks is not None:
            self._tasks.create_task(self._tend(member), name=spec.name)

    async def remove(self, name: str, why: str, drain_s: float = 0.0) -> None:
        """No new requests; what is in flight gets ``drain_s`` to end, then begins again elsewhere."""
        if (member := self.members.get(name)) is None:
            return
        self._tended[name].leaving = True
        self._generator.suspend(member.address)
        end = time.monotonic() + min(drain_s, self._deadlines.drain_s)
        while time.monotonic() < end and self._generator.inflight.get(member.address):
            await asyncio.sleep(0.02)
        self.members.leave(member, why, time.monotonic())

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Has ``work`` run as long as this keeper runs. Before ``run``."""
        self._beside.append(work)

    # versions

    def promise(self, version: int) -> None:
        self._promised, self._promised_at = version, time.monotonic()

    def waiting_for(self) -> str:
        if self._promised == NO_VERSION:
            what = "the trainer to publish v0"
        elif self._promised > self._offered:
            what = f"v{self._promised} from the publisher {self._publisher}"
        elif self.members.live >= self._offered:
            what = f"the trainer to publish v{self._offered + 1}"
        else:
            what = f"the servers to switch to v{self._offered}"
        absent = [str(member) for member in self.members.all if member.state is not State.SERVING]
        return what + (f"; {', '.join(absent)}" if absent else "")

    def states(self) -> dict[str, str]:
        """The state of each member by its name, in a word."""
        return {member.name: str(member.state) for member in self.members.all}

    async def run(self, on_live: Callable[[int], None]) -> None:
        """Raises DeadlineError for a promised version that is not offered, and when no server can get to the offered one in time."""
        self._report_live, self._offered_at = on_live, time.monotonic()
        started, begin = time.time_ns(), time.monotonic_ns()
        try:
            async with self._watcher, asyncio.TaskGroup() as self._tasks:
                for work in self._beside:
                    self._tasks.create_task(work)
                for member in self.members.all:
                    self._tasks.create_task(self._tend(member), name=member.name)
                starting = True
                while True:
                    if starting and all(member.incarnation for member in self.members.all):
                        starting = False
                        self._events.add_span("start_servers", started, time.monotonic_ns() - begin)
                    self._tick()
                    await asyncio.sleep(TICK_S)
        finally:
            await asyncio.gather(*(tended.control.close() for tended in self._tended.values()))

    def _tick(self) -> None:
        self._watcher.check()
        now, limits = time.monotonic(), self._deadlines
        self.members.tick(now)
        if self._promised > self._offered and now - self._promised_at > limits.publish_s:
            raise DeadlineError(f"v{self._promised} from {self._publisher}", limits.publish_s, "is the trainer alive?")
        if why := self._hopeless(now):
            raise DeadlineError(f"a server to serve v{max(0, self._offered)}", now - self._offered_at, f"{why}; see the servers' logs")

    def _hopeless(self, now: float) -> str:
        limits = self._deadlines
        return self.members.hopeless(now, limits.servers_s, limits.stage_s + limits.switch_s, self._offered, self._offered_at)

    # one member

    async def _tend(self, member: Member) -> None:
        tended, probe_at = self._tended[member.name], 0.0
        try:
            while member.here:
                if tended.suspect or time.monotonic() >= probe_at:
                    await self._probe(member, tended)
                    retry_s = RETRY_S if tended.answering else ABSENT_RETRY_S
                    wait_s = self._deadlines.probe_s if member.state is State.SERVING else retry_s
                    probe_at = time.monotonic() + min(wait_s, self._deadlines.probe_s)
                self._give_up_in_time(member, tended)
                held = self._watcher.staged_by(member.workers)
                if tended.answering and member.here and held > member.version and held >= self.members.live:
                    await self._switch(member, tended, held)
                else:
                    if tended.answering and member.here and held > member.version and self.members.copied(member, held, time.monotonic()):
                        logger.warning("%s", member)
                    tended.wake.clear()
                    await _until(tended.wake, probe_at - time.monotonic())
        finally:
            await tended.control.close()
            if self._tended.get(member.name) is tended:
                del self._tended[member.name]

    async def _probe(self, member: Member, tended: _Tended) -> None:
        tended.suspect = False
        try:
            label = await _of_server(member, tended.control.probe(self._deadlines.probe_s))
        except (WeightError, DeadlineError) as error:
            tended.hush(now := time.monotonic())
            if isinstance(error, ServerGoneError) and not tended.gone:
                tended.gone, tended.silent_since = True, now  # it was lost, and has been ended: it has the time of a start from here on
            self.members.suspend(member, str(error), now)
            return
        another = tended.gone or (label == NO_VERSION and tended.held != NO_VERSION)
        if not member.here or (member.state is State.LOST and not another):
            return
        if member.incarnation and label == (tended.found if member.version == NO_VERSION else member.version):
            silent_since, tended.answering = tended.silence, True
            self.members.answers(member, silent_since, time.monotonic())
            if member.state is State.SERVING:
                self._serve(member)
            return
        # Its first answer; or it was started again; or a switch that was given up here came to its end there. Whatever it holds, staging
        # begins anew, and it serves after a whole switch.
        incarnation = f"{member.name}@{next(self._lives)}"
        try:
            await _of_server(member, tended.control.init_weights(self._publisher, incarnation, self._deadlines.switch_s))
        except (WeightError, DeadlineError) as error:
            tended.hush(now := time.monotonic())
            self.members.suspend(member, str(error), now)
        else:
            tended.answering, tended.found = True, label
            self.members.begin(member, incarnation, time.monotonic())

    def _give_up_in_time(self, member: Member, tended: _Tended) -> None:
        """Where no member has hope left the run ends, and nobody is asked for a new start."""
        now, limits = time.monotonic(), self._deadlines
        stage_s = limits.stage_s + limits.switch_s
        why = self.members.overdue(member, tended.silence, now, limits.servers_s, stage_s) if member.here else ""
        if why and not self._hopeless(now):
            self._lose(member, tended, why, gone=False)

    async def _switch(self, member: Member, tended: _Tended, version: int) -> None:
        started, digest = time.time_ns(), self._watcher.digests.get(version, "")
        log = self._log_of(member.name, member.address)
        log.instant("staged", version=version, digest=digest, incarnation=member.incarnation)
        try:
            with self._generator.standing(member.address):
                times = await _of_server(member, tended.control.switch(version, self._deadlines.switch_s))
            attested = await _of_server(member, tended.control.live_version(self._deadlines.switch_s))
            if attested != version:
                raise WeightError(f"{member.address} attests v{attested} after a switch to v{version}: another run updates this server")
        except (WeightError, DeadlineError) as error:
            self._lose(member, tended, f"its switch to v{version} failed: {error}", gone=isinstance(error, ServerGoneError))
            return
        log.add_span("paused", started + round(times.lead_s * 1e9), round(times.pause_s * 1e9), version=version, load_s=times.load_s)
        if member.here:
            self.members.attested(member, version, digest, time.monotonic())

    def _lose(self, member: Member, tended: _Tended, why: str, *, gone: bool) -> None:
        now = time.monotonic()
        tended.answering, tended.silent_since, tended.gone, tended.held = False, now, gone, member.version
        self.members.lose(member, why, now)
        if not gone:  # whoever started it sees by itself that a process is gone
            tended.restart(why)

    # what others say

    def _heard(self) -> None:
        if self._watcher.offered != self._offered:
            self._offered, self._offered_at = self._watcher.offered, time.monotonic()
            self.members.offer(self._offered, self._offered_at)
            self._events.instant("offered", version=self._offered, digest=self._watcher.digests.get(self._offered, ""))
        for tended in self._tended.values():
            tended.wake.set()

    def _suspect(self, address: str, why: str) -> None:
        """A request failed there: nothing new goes there before it has answered a probe."""
        member = self.members.at(address)
        if member is not None and (tended := self._tended.get(member.name)):
            if not tended.suspect:  # one that dies fails all that is in flight there
                self._log_of(member.name, address).instant("error", message=why)
            self._generator.suspend(address)
            tended.suspect = True
            tended.wake.set()

    def _changed(self, member: Member) -> None:
        log = self._log_of(member.name, member.address)
        told = {"version": member.version, "digest": member.digest, "incarnation": member.incarnation}
        log.instant(EVENT_OF[member.state], **told, **({"why": member.why} if member.why else {}))
        if member.state is State.LEFT:
            log.close()
        elif member.state in (State.SUSPENDED, State.LOST):
            log.flush()  # it may be the last that is said of it
        if member.state is State.SERVING:
            self._serve(member)
        elif member.state is State.LEFT:
            self._generator.forget(member.address)
            if tended := self._tended.get(member.name):
                tended.wake.set()
        else:
            self._generator.move(member.address)
        self.on_member(member)
        if (states := self.states()) != self._told:
            self._told = states
            self.on_states(states)
        if member.state in (State.SUSPENDED, State.LOST):
            logger.warning("%s", member)
        else:
            logger.info("%s%s", member, f" v{member.version}" if member.state is State.SERVING else "")

    def _serve(self, member: Member) -> None:
        if not self._tended[member.name].leaving:
            self._generator.serve(member.address)

    def _live(self, version: int) -> None:
        self._events.instant("live", version=version)
        self._report_live(version)


async def _of_server(member: Member, answer: Awaitable[T]) -> T:
    """What the answer of one server does to the code that reads it, whatever it is, is that server's failure: the others and the run go on.
    Raises WeightError or DeadlineError."""
    try:
        return await answer
    except (WeightError, DeadlineError):
        raise
    except Exception as error:
        logger.debug("%s at %s", member.name, member.address, exc_info=True)
        raise WeightError(f"{member.address}: its answer cannot be read: {error!r:.300}") from error


async def _until(event: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            pass
