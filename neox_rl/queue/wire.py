"""The experience socket: the orchestrator (ROUTER, asyncio) binds, training rank 0 (DEALER, blocking) connects.

    trainer                                orchestrator
    hello {world, pid, state}        ->    ok                              state: what the checkpoint kept, or {}
    next {phase, step}               ->    batch (groups, state)           the codec of neox_rl/codec.py
    evaluate {label, version}        ->    result {metrics}
    report {phase, step, metrics}    ->    (one way)
    published {version}              ->    (one way)
    done {reason}                    ->    ok
                                     <-    heartbeat {waiting_for}         every second while the trainer waits
                                     <-    error {message}                 raised at the trainer as NeoxRLError

The trainer numbers its messages 1, 2, 3 ... within a session. The orchestrator handles them in this order, each once: it ignores
a number after a gap, answers a repeated last request with the answer it gave, and says in every message how far it has
got (``acked``). The trainer repeats what is not acknowledged when it hears nothing. So a connection may break at any point and
no message is lost, none handled twice, and no batch trained twice; only the answer to ``done`` cannot be repeated.
One trainer holds the session until it is done.

A malformed message is counted and answered with an error; it changes nothing. Non-finite metrics travel as null.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import zmq
import zmq.asyncio

from neox_rl.codec import decode_groups, encode_groups
from neox_rl.errors import DeadlineError, NeoxRLError, ProtocolError, WireError
from neox_rl.framing import MAX_HEADER_BYTES, Frame, pack, unpack
from neox_rl.keys import Keys, suspicion
from neox_rl.queue.consumption import TrainedOnce
from neox_rl.queue.wire_messages import ONE_WAY, Message, Phase, finite, parse_answer, parse_request
from neox_rl.types import Group, Json

__all__ = ("Delivery", "ExperienceClient", "ExperienceHandler", "ExperienceServer", "Phase")

logger = logging.getLogger(__name__)
HEARTBEAT_S: Final = 1.0
RESEND_S: Final = 3.0
SILENCE_S: Final = 15.0
"""A greeted orchestrator that says nothing for this long is dead or stuck. It beats every second; on a loaded machine it may stutter."""
LINGER_MS: Final = 2000
MAX_MESSAGE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Delivery:
    """The groups of one step, and the orchestrator's state after them, which the trainer keeps in the checkpoint of that step.

    No groups: the orchestrator asks the trainer to stop.
    """

    groups: Sequence[Group]
    state: Mapping[str, Json] = field(default_factory=dict)


class ExperienceHandler(Protocol):
    """What the orchestrator does with the trainer's messages. An exception is told to the trainer, then ends ``serve``."""

    async def hello(self, world: int, pid: int, state: Mapping[str, Json]) -> None: ...

    async def next_groups(self, phase: Phase, step: int) -> Delivery: ...

    async def evaluate(self, label: str, version: int) -> Mapping[str, Json]: ...

    async def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...

    async def published(self, version: int) -> None: ...

    async def done(self, reason: str) -> None: ...

    def waiting_for(self) -> str:
        """What the request in progress waits for, in words, e.g. ``TicketQueue.waiting_for``."""
        ...


class ExperienceServer:
    """The orchestrator's end. ``malformed``, ``strangers``, ``duplicates`` and ``out_of_order`` count the messages that were not used."""

    def __init__(self, bind_host: str, port: int, heartbeat_s: float = HEARTBEAT_S, keys: Keys | None = None) -> None:
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
        if keys is not None:
            keys.apply_server(self._socket)
        try:
            self._socket.bind(f"tcp://{bind_host}:{port or '*'}")
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise NeoxRLError(f"cannot bind the experience socket to {bind_host}:{port}: {error}; set network.experience_port") from error
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.malformed = self.strangers = self.duplicates = self.out_of_order = 0
        self._heartbeat_s = heartbeat_s
        self._beat_at = 0.0
        self._session = ""
        self._peer = b""  # changes when the trainer reconnects
        self._last = 0
        self._reply: list[Frame] = []
        self._working: asyncio.Task[list[Frame]] | None = None
        self._done: str | None = None

    async def serve(self, handler: ExperienceHandler) -> str:
        """Answers until the trainer is done; returns its reason. Raises what the handler raises, once the trainer was told."""
        receiving = asyncio.ensure_future(self._socket.recv_multipart())
        try:
            while self._done is None or self._working is not None:
                waits = {receiving, self._working} if self._working else {receiving}
                await asyncio.wait(waits, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    frames = receiving.result()
                    receiving = asyncio.ensure_future(self._socket.recv_multipart())
                    await self._receive(frames, handler)
                if self._working is not None:
                    await (self._finish() if self._working.done() else self._beat(handler))
            return self._done
        finally:
            receiving.cancel()
            if self._working is not None:
                self._working.cancel()

    def close(self) -> None:
        """Lets the last answers go out for ``LINGER_MS``."""
        self._socket.close()

    async def _receive(self, frames: Sequence[bytes], handler: ExperienceHandler) -> None:
        peer, *rest = frames
        try:
            message = parse_request(rest)
        except WireError as error:
            self.malformed += 1
            await self._send(peer, self._pack("error", 0, message=f"malformed message: {error}"))
            return
        if not self._session and message.kind == "hello" and message.id == 1:
            self._session = message.session
        if message.session != self._session:
            self.strangers += 1
            reason = "another trainer holds the session" if self._session else "this orchestrator was restarted and knows no session"
            await self._send(peer, self._pack("error", message.id, message=f"{reason}: restart the run"))
        elif message.id <= self._last:
            self.duplicates += 1
            self._peer = peer
            if message.id == self._last and self._reply:
                await self._send(peer, self._reply)
        elif message.id > self._last + 1 or self._working is not None:
            self.out_of_order += 1
        else:
            self._last, self._peer, self._reply, self._beat_at = message.id, peer, [], time.monotonic()
            self._working = asyncio.create_task(self._answer(message, handler))
            if message.kind in ONE_WAY:
                await self._finish()

    async def _answer(self, message: Message, handler: ExperienceHandler) -> list[Frame]:
        """The frames of the answer; none for a one-way message."""
        body = message.body
        match message.kind:
            case "hello":
                await handler.hello(**body)
            case "next":
                delivery = await handler.next_groups(Phase(body["phase"]), body["step"])
                meta: dict[str, Json] = {"id": message.id, "acked": message.id, "state": dict(delivery.state)}
                return encode_groups(delivery.groups, meta, kind="batch")
            case "evaluate":
                return self._pack("result", message.id, metrics=finite(await handler.evaluate(**body)))
            case "report":
                await handler.report(Phase(body["phase"]), body["step"], body["metrics"])
                return []
            case "published":
                await handler.published(**body)
                return []
            case "done":
                await handler.done(**body)
                self._done = body["reason"]
        return self._pack("ok", message.id)

    async def _finish(self) -> None:
        """The answer of the request in progress, or its failure: told to the trainer, then raised here."""
        assert self._working is not None
        working, self._working = self._working, None
        try:
            self._reply = await working
        except Exception as error:
            await self._send(self._peer, self._pack("error", self._last, message=f"{type(error).__name__}: {error}"))
            raise
        if self._reply:
            await self._send(self._peer, self._reply)

    async def _beat(self, handler: ExperienceHandler) -> None:
        if (now := time.monotonic()) - self._beat_at >= self._heartbeat_s:
            self._beat_at = now
            await self._send(self._peer, self._pack("heartbeat", self._last, waiting_for=handler.waiting_for()))

    def _pack(self, kind: str, id: int, **body: Json) -> list[Frame]:
        return pack(kind, {"id": id, "acked": self._last, **body}, {})

    async def _send(self, peer: bytes, frames: Sequence[Frame]) -> None:
        # A ROUTER drops what it sends to a peer that is gone: the trainer repeats its request when it is back.
        await self._socket.send_multipart([peer, *frames])


class ExperienceClient:
    """The trainer's end; blocking, one thread. Every wait ends with an answer or with a DeadlineError naming what was waited for.

    ``deadline_s`` is for one answer, ``evaluate_s`` for that of an evaluation. ``silence_s``: once greeted, an orchestrator
    that says nothing for this long is taken for dead, long before the deadline.
    """

    def __init__(
        self,
        address: str,
        deadline_s: float,
        evaluate_s: float | None = None,
        silence_s: float = SILENCE_S,
        resend_s: float = RESEND_S,
        keys: Keys | None = None,
    ) -> None:
        self._address, self._deadline_s, self._silence_s, self._resend_s = address, deadline_s, silence_s, resend_s
        self._evaluate_s = deadline_s if evaluate_s is None else evaluate_s
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # No zmq.IMMEDIATE here: with it libzmq throws away answers that came but were not read yet when the peer closes.
        if keys is not None:
            keys.apply_client(self._socket)
        self._keys = keys
        self._socket.connect(address)
        self._session = uuid.uuid4().hex
        self._id = 0
        self._unacked: dict[int, list[Frame]] = {}
        self._greeted = False
        self.malformed = 0
        self._trained = TrainedOnce()
        self.state: dict[str, Json] = {}
        """The orchestrator's state after the last batch: keep it in the checkpoint, give it back to ``hello``. A delivery of
        no groups (the orchestrator asks to stop) leaves it as it was, so that the checkpoint of a stopped run can be resumed."""

    def hello(self, world: int, state: Mapping[str, Json] | None = None) -> None:
        """The first call. Waits for an orchestrator that may start later; ``state`` is that of the checkpoint resumed from."""
        what = f"the orchestrator to answer on {self._address}"
        self._request("ok", what, "hello", world=world, pid=os.getpid(), state=dict(state or {}))
        self._greeted = True
        self.state = dict(state or {})

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        """The batch of a step. Raises StalenessError when a ticket comes a second time in the RL phase."""
        frames = self._request("batch", f"the batch of {phase} step {step}", "next", phase=str(phase), step=step)
        groups, meta = decode_groups(frames, "batch")
        if phase is Phase.RL:
            self._trained.add(groups, step)
        state = meta.get("state")
        if groups and isinstance(state, dict):
            self.state = state
        return groups

    def evaluate(self, label: str, version: int) -> dict[str, Json]:
        """Held-out metrics of a version, once the servers serve it. Takes as long as generation does."""
        frames = self._request("result", f"the evaluation {label!r} of v{version}", "evaluate", label=label, version=version)
        metrics = unpack(frames, "result")[0].get("metrics")
        if not isinstance(metrics, dict):
            raise WireError(f"the result of evaluation {label!r} has no metrics")
        return metrics

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        """Metrics of a trained step. Does not wait; it arrives before the next request does."""
        self._post("report", phase=str(phase), step=step, metrics=finite(metrics))

    def published(self, version: int) -> None:
        """The weights of ``version`` are offered to the servers. Does not wait."""
        self._post("published", version=version)

    def done(self, reason: str) -> None:
        """The last call: everything sent has been handled when it returns."""
        self._request("ok", "the orchestrator to take note of the end", "done", reason=reason)

    def close(self) -> None:
        self._socket.close()

    def _post(self, kind: str, **body: Json) -> None:
        self._id += 1
        self._unacked[self._id] = pack(kind, {"session": self._session, "id": self._id, **body}, {})
        self._send(self._id)

    def _send(self, *ids: int) -> None:
        try:
            for id in ids:
                self._socket.send_multipart(self._unacked[id], zmq.DONTWAIT)
        except zmq.Again:
            return  # the outgoing buffer is full, for want of a peer: repeated by the next request

    def _request(self, expected: str, what: str, kind: str, **body: Json) -> list[bytes]:
        self._post(kind, **body)
        start = heard = sent = time.monotonic()
        limit_s = self._evaluate_s if kind == "evaluate" else self._deadline_s
        waiting_for = ""
        while True:
            now = time.monotonic()
            if now - start > limit_s:
                raise DeadlineError(what, now - start, f"the orchestrator last waited for {waiting_for}" if waiting_for else self._hint())
            if self._greeted and now - heard > self._silence_s:
                raise DeadlineError(f"a word from the orchestrator at {self._address} about {what}", now - heard, self._hint())
            if now - max(heard, sent) > self._resend_s:
                self._send(*self._unacked)
                sent = now
            if not self._socket.poll(int(1000 * min(0.5, self._resend_s))):
                continue
            frames = self._socket.recv_multipart()
            try:
                answer, id, said = parse_answer(frames)
            except ProtocolError:
                raise
            except WireError as error:
                self.malformed += 1
                logger.warning("ignored an answer of the orchestrator: %s", error)
                continue  # damaged on its way: the request is repeated, and so is its answer
            if id not in (self._id, 0):
                continue  # a second answer to a repeated request
            heard = time.monotonic()
            if answer == "error":
                raise NeoxRLError(f"the orchestrator failed while the trainer waited for {what}: {said.get('message')}")
            self._unacked = {i: f for i, f in self._unacked.items() if i > int(str(said["acked"]))}
            if answer == "heartbeat":
                waiting_for = str(said.get("waiting_for"))
            elif answer == expected:
                return frames
            else:
                raise WireError(f"answer of kind {answer!r} while waiting for {what}")

    def _hint(self) -> str:
        hint = f"see the orchestrator's log; is it alive and bound to {self._address}?"
        return hint if self._greeted else f"{hint} {suspicion(self._keys)}"
