"""Offers the newest snapshot to whoever asks: one thread beside the trainer's rank 0.

    offer(v) --inproc--> loop --ROUTER--> workers that wait for a version > theirs; watchers hear of offers and acks

Nothing here knows how many workers there are: they come, ask, and go. At most one snapshot is on its way to a worker: newer ones
are skipped meanwhile, and then it gets the newest.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import zmq

from neox_rl.errors import WireError
from neox_rl.framing import Frame
from neox_rl.keys import Keys
from neox_rl.sockets import bind_tcp
from neox_rl.telemetry.events import EventLog
from neox_rl.types import NO_VERSION
from neox_rl.weights.snapshot import Snapshot
from neox_rl.weights.stager import MAX_HELD
from neox_rl.weights.wire import FETCH, FORGET_S, MAX_CONTROL_BYTES, OFFERED, STAGED, WATCH, control, prepare, read_control

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Peers:
    """Who waits for what, by ROUTER identity."""

    waiting: dict[bytes, int] = field(default_factory=dict)
    sending: dict[bytes, tuple[int, zmq.MessageTracker]] = field(default_factory=dict)
    watchers: dict[bytes, float] = field(default_factory=dict)
    staged: dict[str, str] = field(default_factory=dict)
    acked: dict[str, int] = field(default_factory=dict)
    """The last version of which each worker's ack is in the events."""
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """The last ack of each worker that has another digest than what was offered: it repeats itself."""
    ahead: dict[str, int] = field(default_factory=dict)
    """Who says that it staged a version that was not offered, and which: one publisher before this one offered it."""


class Publisher:
    """A ROUTER bound at ``bind_host:port`` (port 0: a free one; ``address`` says which). Only the newest snapshot is kept, and
    the digests of as many as a worker may hold: one that stages for longer than a step acks what is not the newest any more.

    Messages that are not of the protocol are counted in ``malformed`` and ignored. ``events`` has what each worker acks, by its digest.
    """

    def __init__(self, bind_host: str = "127.0.0.1", port: int = 0, keys: Keys | None = None, events: EventLog | None = None) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        prepare(self._router)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
        if keys is not None:
            keys.apply_server(self._router)
        try:
            self.address = f"tcp://{bind_host}:{bind_tcp(self._router, bind_host, port)}"
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise WireError(f"cannot bind the weight publisher to {bind_host}:{port}: {error}; set network.weights_port") from error
        self.malformed, self._events = 0, events
        self._lock = threading.Lock()
        self._died: Exception | None = None
        self._offered: Snapshot | None = None
        self._newest: Snapshot | None = None
        self._digests: dict[int, str] = {}
        self._peers = _Peers()
        self._wake = self._context.socket(zmq.PAIR)
        self._woken = self._context.socket(zmq.PAIR)
        self._woken.bind("inproc://wake")
        self._wake.connect("inproc://wake")
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    def offer(self, snapshot: Snapshot) -> None:
        """Makes ``snapshot`` the newest. Returns at once; versions must rise. Raises WireError, also when the thread has died."""
        with self._lock:
            if self._wake.closed:
                raise WireError(f"v{snapshot.version} offered to a closed publisher")
            if self._died is not None:
                raise WireError(f"v{snapshot.version} cannot be offered: the publisher's thread ended with {self._died!r}") from self._died
            if self._offered is not None and snapshot.version <= self._offered.version:
                raise WireError(f"v{snapshot.version} offered after v{self._offered.version}: versions must rise")
            self._offered = snapshot
            self._wake.send(b"offer")

    def close(self) -> None:
        """Stops the thread. Copies that are under way are dropped. A second call does nothing."""
        with self._lock:
            if self._wake.closed:
                return
            self._wake.send(b"close")
            self._wake.close(linger=1000)
        self._thread.join(timeout=10.0)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # whatever it was, the trainer must hear of it, or the servers would wait for versions for ever
            logger.exception("%s publishes nothing more", self.address)
            self._died = error

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._woken in ready:
                if self._woken.recv() == b"close":
                    self._router.close()
                    self._woken.close()
                    return
                self._announce()
            if self._router in ready:
                identity, *frames = self._router.recv_multipart()
                try:
                    self._answer(identity, *read_control(frames, (FETCH, STAGED, WATCH)))
                except WireError as error:
                    self.malformed += 1
                    logger.warning("ignored a message on the weights socket: %s", error)

    def _announce(self) -> None:
        with self._lock:
            self._newest = newest = self._offered
        assert newest is not None
        self._digests = dict(sorted({**self._digests, newest.version: newest.digest}.items())[-MAX_HELD:])
        self._peers.staged.clear()
        self._tell_watchers(control(OFFERED, version=newest.version, digest=newest.digest))
        for identity, have in list(self._peers.waiting.items()):
            self._send_newest(identity, have)

    def _answer(self, identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        if kind == FETCH:
            self._send_newest(identity, fields["have"])
        elif kind == STAGED:
            self._note_staged(fields)
        else:
            self._peers.watchers[identity] = time.monotonic()
            if newest := self._newest:
                self._send(identity, control(OFFERED, version=newest.version, digest=newest.digest))
                for who, digest in self._peers.staged.items():
                    self._send(identity, control(STAGED, version=newest.version, who=who, digest=digest))

    def _send_newest(self, identity: bytes, have: int) -> None:
        newest = self._newest
        if newest is None or newest.version <= have:
            self._peers.waiting[identity] = have
            return
        version, tracker = self._peers.sending.get(identity, (-1, None))
        if have < version and tracker is not None and not tracker.done:
            # It repeats its request while the bytes are on their way, and again once it has them. A second copy would only delay the first,
            # and newer versions queued behind it, one for each repeated request of a slow peer, would fill this machine's memory.
            return
        self._peers.waiting.pop(identity, None)
        self._peers.sending = {peer: sent for peer, sent in self._peers.sending.items() if not sent[1].done}
        tracker = self._router.send_multipart([identity, *newest.frames], copy=False, track=True)
        assert tracker is not None
        self._peers.sending[identity] = (newest.version, tracker)

    def _note_staged(self, fields: dict[str, Any]) -> None:
        newest = self._newest
        if newest is None or fields["version"] > newest.version:
            if self._peers.ahead.get(fields["who"]) == fields["version"]:
                return  # it repeats itself until it has a newer version; once was told
            self._peers.ahead[fields["who"]] = fields["version"]
            raise WireError(f"{fields['who']} staged v{fields['version']}, which was not offered: it is of steps that were undone")
        who, version, digest = fields["who"], fields["version"], fields["digest"]
        offered = self._digests.get(version)
        if offered is None:
            return  # nothing here says whether it is of these steps, so it is no ack, and no server is to switch to it: the newest follows
        if offered != digest:
            if self._peers.refused.get(who) != (version, digest):
                self._peers.refused[who] = version, digest
                self._write_down(fields)
            raise WireError(f"{who} staged v{version} with digest {digest}, offered was {offered}")
        if version > self._peers.acked.get(who, NO_VERSION):
            self._peers.acked[who] = version
            self._write_down(fields)
        if version == newest.version:
            self._peers.staged[who] = digest
        self._tell_watchers(control(STAGED, **fields))

    def _write_down(self, ack: dict[str, Any]) -> None:
        """The server's own reckoning, right or wrong: an audit has no other word of it."""
        if self._events is not None:
            self._events.instant("acked", **ack)

    def _tell_watchers(self, message: list[Frame]) -> None:
        now = time.monotonic()
        self._peers.watchers = {peer: seen for peer, seen in self._peers.watchers.items() if now - seen < FORGET_S}
        for identity in self._peers.watchers:
            self._send(identity, message)

    def _send(self, identity: bytes, message: list[Frame]) -> None:
        self._router.send_multipart([identity, *message])
