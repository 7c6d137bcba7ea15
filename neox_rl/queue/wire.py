"""The experience socket: the orchestrator (ROUTER, asyncio) binds, training rank 0 (DEALER, blocking) connects.

    trainer                                orchestrator
    hello {world, pid, attempt, state} ->  ok                              state: what the checkpoint kept, or {}
    next {phase, step}               ->    batch (state, groups)           one array, as in neox_rl/codec.py
    evaluate {label, version}        ->    result {metrics}
    report {phase, step, metrics}    ->    (one way)
    published {version, digest}      ->    (one way)                       of the weights that the servers are offered
    checkpoint {sft_step, rl_step}   ->    (one way)                       every rank has saved
    done {reason}                    ->    ok
                                     <-    heartbeat {waiting_for}         every second while the trainer waits
                                     <-    error {message}                 raised at the trainer as NeoxRLError

The trainer numbers its messages 1, 2, 3 ... within a session. The orchestrator handles them in this order, each once: it ignores
a number after a gap, answers a repeated last request with the answer it gave, and says in every message how far it has
got (``acked``). The trainer repeats what is not acknowledged when it hears nothing. So a connection may break at any point and
no message is lost, none handled twice, and no batch trained twice; only the answer to ``done`` cannot be repeated. What follows
a one-way message is taken up at once and handled after it: a report that waits for room on the disk must not silence the heartbeats.

The orchestrator may die at any point too. It acknowledges only what its handler has made durable, so that its successor is told again
what is not in the journal, and answers a repeated request as its predecessor did. A message also says which is the first that the
trainer could still repeat (``since``): a successor whose journal ends before that has lost something, and says so.

One trainer holds the session until it is done. Another begins one only at an orchestrator that has not heard of the first, and with a
higher attempt: whoever starts trainers counts them up, once the earlier one is gone.

A malformed message is counted and answered with an error; it changes nothing. Non-finite metrics travel as null.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import zmq

from neox_rl.codec import joined
from neox_rl.errors import JournalError, NeoxRLError, WireError
from neox_rl.framing import MAX_HEADER_BYTES, Array, Frame, pack
from neox_rl.keys import Keys
from neox_rl.queue.wire_messages import ATTEMPT, ONE_WAY, Message, Phase, finite, parse_request
from neox_rl.sockets import bind_tcp
from neox_rl.types import Json

__all__ = ("Delivery", "ExperienceHandler", "ExperienceServer", "Phase")

HEARTBEAT_S: Final = 1.0
NO_ATTEMPT: Final = -1
LINGER_MS: Final = 2000
MAX_MESSAGE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Delivery:
    """The groups of one step, each as ``codec.encode_group`` makes it, and the orchestrator's state after them, which the trainer keeps in
    the checkpoint of that step.

    No groups: the orchestrator asks the trainer to stop.
    """

    groups: Sequence[Frame]
    state: Mapping[str, Json] = field(default_factory=dict)


class ExperienceHandler(Protocol):
    """What the orchestrator does with the trainer's messages. An exception is told to the trainer, then ends ``serve``.

    ``id`` is the message's number, to be written down with its effect. Where this process took over from another, the last message may come
    once more; then its answer must be the same.
    """

    async def hello(self, session: str, world: int, pid: int, attempt: int, state: Mapping[str, Json]) -> None: ...

    async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery: ...

    async def evaluate(self, id: int, label: str, version: int) -> Mapping[str, Json]: ...

    async def report(self, id: int, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...

    async def published(self, id: int, version: int, digest: str) -> None: ...

    async def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None: ...

    async def done(self, reason: str) -> None: ...

    async def durable(self) -> None:
        """Returns once what was written down so far survives a crash."""
        ...

    def waiting_for(self) -> str:
        """What the request in progress waits for, in words, e.g. ``TicketQueue.waiting_for``."""
        ...


class ExperienceServer:
    """The orchestrator's end. ``malformed``, ``strangers``, ``duplicates`` and ``out_of_order`` count the messages that were not used."""

    def __init__(self, bind_host: str, port: int, heartbeat_s: float = HEARTBEAT_S, keys: Keys | None = None) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_HEADER_BYTES)
        if keys is not None:
            keys.apply_server(self._socket, "trainer")
        try:
            self.port = bind_tcp(self._socket, bind_host, port)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise NeoxRLError(f"cannot bind the experience socket to {bind_host}:{port}: {error}; set network.experience_port") from error
        self.malformed = self.strangers = self.duplicates = self.out_of_order = 0
        self._heartbeat_s = heartbeat_s
        self._beat_at = 0.0
        self._session, self._attempt, self._heard = "", NO_ATTEMPT, False
        self._peer = b""  # changes when the trainer reconnects
        self._last = self._acked = 0
        self._follows = False  # nothing was handled since the take-over
        self._lost = ""  # what the journal does not hold, without which no message can be handled
        self._reply: list[Frame] = []
        self._working: asyncio.Task[list[Frame]] | None = None  # the message that was begun last, behind those before it
        self._awaited = False  # the trainer waits for its answer, so that nothing comes after it
        self._wake = asyncio.Event()
        self._done: str | None = None

    async def serve(self, handler: ExperienceHandler) -> str:
        """Answers until the trainer is done; returns its reason. Raises what the handler raises, once the trainer was told."""
        loop, descriptor = asyncio.get_running_loop(), self._socket.FD
        loop.add_reader(descriptor, self._wake.set)
        try:
            while self._done is None or self._working is not None:
                self._wake.clear()
                frames = self._received()
                if frames is not None:
                    self._receive(frames, handler)
                    await asyncio.sleep(0)  # the answer is begun; and a flood of messages starves nobody
                if self._working is not None and self._working.done():
                    await self._finish()
                elif frames is None:
                    await self._sleep()
                self._beat(handler)
            return self._done
        finally:
            loop.remove_reader(descriptor)
            if self._working is not None:
                self._working.cancel()

    def take_over(self, session: str, attempt: int, last: int, lost: str = "") -> None:
        """Before ``serve``: this orchestrator follows on one that handled the messages of ``session`` up to ``last``.

        ``lost``: what it would need to go on, and the journal does not hold. The trainer is told so at its next word.
        """
        self._session, self._attempt, self._last, self._acked, self._lost = session, attempt, last, last, lost
        self._follows = bool(session)

    def close(self) -> None:
        """Lets the last answers go out for ``LINGER_MS``."""
        self._socket.close()

    def _received(self) -> list[bytes] | None:
        # Asked first: an exception for each time that nothing is there costs more than a request.
        return self._socket.recv_multipart(zmq.DONTWAIT) if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN else None

    async def _sleep(self) -> None:
        """Until a message or the answer in progress is there, or a heartbeat is due.

        libzmq makes its descriptor readable once for what comes in, and sending may take that back: only who has found nothing to receive
        since the last send may sleep. And nobody sleeps longer than a heartbeat, whatever was missed.
        """
        left = self._heartbeat_s if not self._awaited else max(0.0, self._beat_at + self._heartbeat_s - time.monotonic())
        with suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._wake.wait()

    def _receive(self, frames: Sequence[bytes], handler: ExperienceHandler) -> None:
        peer, *rest = frames
        try:
            message = parse_request(rest)
        except WireError as error:
            self.malformed += 1
            self._send(peer, self._pack("error", 0, message=f"malformed message: {error}"))
            return
        if message.session != self._session and self._may_begin(message):
            self._session, self._attempt, self._last, self._acked = message.session, message.body["attempt"], 0, 0
        if message.session != self._session:
            self.strangers += 1
            self._send(peer, self._pack("error", message.id, message=self._refusal()))
            return
        self._heard = True
        if self._follows and message.since > self._last + 1:
            self._lost = f"messages {self._last + 1} to {message.since - 1} of the trainer were handled, but the journal does not hold them"
        if lost := self._lost:
            self._send(peer, self._pack("error", 0, message=f"{lost}: the run goes on from its checkpoint, with --resume"))
            raise JournalError(lost)
        if message.id <= self._last:
            self.duplicates += 1
            self._peer = peer
            if message.id == self._last and self._reply:
                self._send(peer, self._reply)
            elif message.id == self._last and self._working is None and message.kind not in ONE_WAY:
                self._begin(message, handler)  # the process that had answered is gone
        elif message.id > self._last + 1 or self._awaited:
            self.out_of_order += 1
        else:
            self._last, self._peer, self._reply, self._beat_at, self._follows = message.id, peer, [], time.monotonic(), False
            self._begin(message, handler)

    def _may_begin(self, message: Message) -> bool:
        return message.kind == "hello" and message.id == 1 and not self._heard and message.body["attempt"] > self._attempt

    def _refusal(self) -> str:
        if self._attempt == NO_ATTEMPT:
            return "this orchestrator was restarted and knows no session: restart the run with --resume"
        return (
            f"another trainer holds the session (attempt {self._attempt}): end it, then go on with --resume; "
            f"who starts orchestrator and ranks by hand gives both {ATTEMPT}={self._attempt + 1} in their environment"
        )

    def _begin(self, message: Message, handler: ExperienceHandler) -> None:
        self._working = asyncio.create_task(self._answer(message, handler, self._working))
        self._working.add_done_callback(lambda _: self._wake.set())
        self._awaited = message.kind not in ONE_WAY

    async def _answer(self, message: Message, handler: ExperienceHandler, before: asyncio.Task[list[Frame]] | None) -> list[Frame]:
        """The frames of the answer, once what it acknowledges is durable; none for a one-way message. Raises what ``before`` raised."""
        if before is not None:
            await before
        body, id = message.body, message.id
        kind, answer, arrays = "ok", dict[str, Json](), dict[str, Array]()
        match message.kind:
            case "report":
                await handler.report(id, Phase(body["phase"]), body["step"], body["metrics"])
                return []
            case "published":
                await handler.published(id, **body)
                return []
            case "checkpoint":
                await handler.checkpoint(id, **body)
                return []
            case "hello":
                await handler.hello(message.session, **body)
            case "next":
                delivery = await handler.next_groups(id, Phase(body["phase"]), body["step"])
                kind, answer, arrays = "batch", {"state": dict(delivery.state)}, joined(delivery.groups)
            case "evaluate":
                kind, answer = "result", {"metrics": finite(await handler.evaluate(id, **body))}
            case "done":
                await handler.done(**body)
        await handler.durable()
        self._acked = max(self._acked, id)
        if message.kind == "done":
            self._done = body["reason"]
        return pack(kind, {"id": id, "acked": self._acked, **answer}, arrays)

    async def _finish(self) -> None:
        """The answer of the request in progress, or its failure: told to the trainer, then raised here."""
        assert self._working is not None
        working, self._working, self._awaited = self._working, None, False
        try:
            self._reply = await working
        except Exception as error:
            self._send(self._peer, self._pack("error", self._last, message=f"{type(error).__name__}: {error}"))
            raise
        if self._reply:
            self._send(self._peer, self._reply)

    def _beat(self, handler: ExperienceHandler) -> None:
        if self._awaited and (now := time.monotonic()) - self._beat_at >= self._heartbeat_s:
            self._beat_at = now
            self._send(self._peer, self._pack("heartbeat", self._last, waiting_for=handler.waiting_for()))

    def _pack(self, kind: str, id: int, **body: Json) -> list[Frame]:
        return pack(kind, {"id": id, "acked": self._acked, **body}, {})

    def _send(self, peer: bytes, frames: Sequence[Frame]) -> None:
        # A ROUTER drops what it sends to a peer that is gone: the trainer repeats its request when it is back.
        self._socket.send_multipart([peer, *frames], zmq.DONTWAIT, copy=False)
