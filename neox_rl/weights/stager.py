"""Fetches and verifies new versions in a thread of the vLLM worker, while generation goes on.

An ack is a promise: the version is held until it or a newer one is taken, or ``MAX_HELD`` newer ones have come. The orchestrator switches
to a version that every worker has acked, and a fast worker may have staged several more by then. Where a server is left behind, the others
and the trainer go on without it, and what comes would fill its memory.
"""

from __future__ import annotations

import logging
import threading
import time

import zmq

from neox_rl.errors import ConfigError, DeadlineError, WeightError
from neox_rl.keys import Handshakes, Keys
from neox_rl.weights.manifest import Verified, verify
from neox_rl.weights.wire import FETCH, LOOK_S, RESEND_S, STAGED, control, prepare

logger = logging.getLogger(__name__)

MAX_HELD = 8


class Stager:
    """Stages what the publisher at ``address`` offers. ``who`` is ``<server>/<rank>``, the name in the acks."""

    def __init__(self, address: str, who: str, resend_s: float = RESEND_S, keys: Keys | None = None) -> None:
        self.address, self.who = address, who
        self._resend_s, self._keys = resend_s, keys
        self._changed = threading.Condition()
        self._held: dict[int, Verified] = {}
        self._failure = ""
        self._died: Exception | None = None
        self._have = -1
        self._closing = False
        self._context = zmq.Context()
        self._handshakes: Handshakes | None = None
        self._thread = threading.Thread(target=self._run, name="weight-stager", daemon=True)
        self._thread.start()

    def take(self, version: int, deadline_s: float) -> Verified:
        """Hands over ``version`` and forgets it and every older one.

        Raises WeightError when it was superseded or the thread died, DeadlineError naming version and publisher when it does not come in
        time.
        """
        end = time.monotonic() + deadline_s
        with self._changed:
            while version not in self._held:
                if self._held and min(self._held) > version:
                    raise WeightError(f"{self.who}: v{version} is gone, staged are {sorted(self._held)}: switch to one of these")
                if self._died is not None:
                    raise WeightError(f"{self.who} cannot stage v{version}: its thread ended with {self._died!r}") from self._died
                left = end - time.monotonic()
                if left <= 0 or self._closing:
                    hint = self._failure or f"staged are {sorted(self._held)}; is the publisher there?" + self._suspicion()
                    raise DeadlineError(f"{self.who} to stage v{version} from {self.address}", deadline_s, hint)
                self._changed.wait(left)
            taken = self._held[version]
            self._held = {held: staged for held, staged in self._held.items() if held > version}
            return taken

    def close(self) -> None:
        """Stops the thread and frees what is staged. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._held.clear()
            self._changed.notify_all()
        self._context.term()
        self._thread.join(timeout=10.0)

    def _suspicion(self) -> str:
        return f" {self._handshakes.suspicion()}" if self._have < 0 and self._handshakes is not None else ""

    def _run(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        try:
            prepare(socket)
            self._handshakes = handshakes = Handshakes(socket, self.address, self._keys)
            if self._keys is not None:
                self._keys.apply_client(socket)
            socket.connect(self.address)
            while not self._closing:
                self._ask(socket)
                due = time.monotonic() + self._resend_s
                while (left := due - time.monotonic()) > 0:
                    if not socket.poll(max(1, round(min(LOOK_S, left) * 1000))):
                        handshakes.check()
                        continue
                    if self._receive(socket):
                        self._ask(socket)
                    due = time.monotonic() + self._resend_s
        except zmq.ContextTerminated:
            pass
        except Exception as error:  # whatever it was, take() must not wait for a thread that is gone
            refused = isinstance(error, ConfigError)
            logger.error("%s stages nothing more from %s: %s", self.who, self.address, error, exc_info=not refused)
            with self._changed:
                self._died = error
                self._changed.notify_all()
        finally:
            if self._handshakes is not None:
                self._handshakes.close()
            socket.close(linger=0)

    def _ask(self, socket: zmq.SyncSocket) -> None:
        """Asks for what comes next, and repeats the newest ack in case the publisher never heard it."""
        with self._changed:
            newest = self._held.get(self._have)
        if newest is not None:
            socket.send_multipart(control(STAGED, version=newest.version, who=self.who, digest=newest.digest))
        socket.send_multipart(control(FETCH, have=self._have, who=self.who))

    def _receive(self, socket: zmq.SyncSocket) -> bool:
        """Whether a newer version was staged. A bad one is refused, and asked for again after ``resend_s``."""
        frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
        try:
            staged = verify(frames)
        except WeightError as error:
            logger.error("%s refused a snapshot from %s: %s", self.who, self.address, error)
            self._failure = str(error)
            return False
        if staged.version <= self._have:
            return False
        with self._changed:
            self._have, self._failure = staged.version, ""
            self._held[staged.version] = staged
            while len(self._held) > MAX_HELD:
                del self._held[min(self._held)]
            self._changed.notify_all()
        return True
