"""The trainer's end of the experience socket; ``wire.py`` has the protocol."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Final

import zmq

from neox_rl.codec import groups_of
from neox_rl.errors import DeadlineError, NeoxRLError, ProtocolError, WireError
from neox_rl.framing import Frame, pack
from neox_rl.keys import Handshakes, Keys
from neox_rl.queue.consumption import TrainedOnce
from neox_rl.queue.wire import LINGER_MS, MAX_MESSAGE_BYTES
from neox_rl.queue.wire_messages import Answer, Phase, finite, parse_answer
from neox_rl.types import Group, Json

logger = logging.getLogger(__name__)
RESEND_S: Final = 3.0
SILENCE_S: Final = 60.0
"""A greeted orchestrator that says nothing for this long is dead or stuck. It beats every second; a restart takes some seconds."""


class ExperienceClient:
    """The trainer's end; blocking, one thread. Every wait ends with an answer or with a DeadlineError naming what was waited for;
    with ConfigError where the orchestrator refuses this side's keys.

    ``deadline_s`` is for one answer, ``evaluate_s`` for that of an evaluation. ``silence_s``: once greeted, an orchestrator
    that says nothing for this long is taken for dead, long before the deadline; until then a successor may answer. ``attempt``: of ATTEMPT.
    """

    def __init__(
        self,
        address: str,
        deadline_s: float,
        evaluate_s: float | None = None,
        silence_s: float = SILENCE_S,
        resend_s: float = RESEND_S,
        keys: Keys | None = None,
        attempt: int = 0,
    ) -> None:
        self._attempt = attempt
        self._address, self._deadline_s, self._silence_s, self._resend_s = address, deadline_s, silence_s, resend_s
        self._evaluate_s = deadline_s if evaluate_s is None else evaluate_s
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # No zmq.IMMEDIATE here: with it libzmq throws away answers that came but were not read yet when the peer closes.
        if keys is not None:
            keys.apply_client(self._socket, "trainer")
        self._handshakes = Handshakes(self._socket, address, keys)
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
        self._request("ok", what, "hello", world=world, pid=os.getpid(), attempt=self._attempt, state=dict(state or {}))
        self._greeted = True
        self.state = dict(state or {})
        self._trained = TrainedOnce(self.state.get("queue"))

    def next_groups(self, phase: Phase, step: int) -> tuple[Group, ...]:
        """The batch of a step. Raises StalenessError when a ticket comes a second time in the RL phase."""
        answer = self._request("batch", f"the batch of {phase} step {step}", "next", phase=str(phase), step=step)
        groups = groups_of(answer.arrays)
        if phase is Phase.RL:
            self._trained.add(groups, step)
        state = answer.body.get("state")
        if groups and isinstance(state, dict):
            self.state = state
        return groups

    def evaluate(self, label: str, version: int) -> dict[str, Json]:
        """Held-out metrics of a version, once the servers serve it. Takes as long as generation does."""
        answer = self._request("result", f"the evaluation {label!r} of v{version}", "evaluate", label=label, version=version)
        metrics = answer.body.get("metrics")
        if not isinstance(metrics, dict):
            raise WireError(f"the result of evaluation {label!r} has no metrics")
        return metrics

    def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        """Metrics of a trained step. Does not wait; it arrives before the next request does."""
        self._post("report", phase=str(phase), step=step, metrics=finite(metrics))

    def published(self, version: int, digest: str) -> None:
        """The weights of ``version``, with this digest, are offered to the servers. Does not wait."""
        self._post("published", version=version, digest=digest)

    def checkpoint(self, sft_step: int, rl_step: int) -> None:
        """Every rank has saved after these steps: a resume goes back no further. Does not wait."""
        self._post("checkpoint", sft_step=sft_step, rl_step=rl_step)

    def done(self, reason: str) -> None:
        """The last call: everything sent has been handled when it returns."""
        self._request("ok", "the orchestrator to take note of the end", "done", reason=reason)

    def close(self) -> None:
        self._handshakes.close()
        self._socket.close()

    def _post(self, kind: str, **body: Json) -> None:
        self._id += 1
        since = min(self._unacked, default=self._id)
        self._unacked[self._id] = pack(kind, {"session": self._session, "id": self._id, "since": since, **body}, {})
        self._send(self._id)

    def _send(self, *ids: int) -> None:
        try:
            for id in ids:
                self._socket.send_multipart(self._unacked[id], zmq.DONTWAIT)
        except zmq.Again:
            return  # the outgoing buffer is full, for want of a peer: repeated by the next request

    def _request(self, expected: str, what: str, kind: str, **body: Json) -> Answer:
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
                self._handshakes.check()
                continue
            frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
            try:
                answer = parse_answer(frames)
            except ProtocolError:
                raise
            except WireError as error:
                self.malformed += 1
                logger.warning("ignored an answer of the orchestrator: %s", error)
                continue  # damaged on its way: the request is repeated, and so is its answer
            if answer.id not in (self._id, 0):
                continue  # a second answer to a repeated request
            heard = time.monotonic()
            if answer.kind == "error":
                raise NeoxRLError(f"the orchestrator failed while the trainer waited for {what}: {answer.body.get('message')}")
            self._unacked = {i: f for i, f in self._unacked.items() if i > answer.acked}
            if answer.kind == "heartbeat":
                waiting_for = str(answer.body.get("waiting_for"))
            elif answer.kind == expected:
                return answer
            else:
                raise WireError(f"answer of kind {answer.kind!r} while waiting for {what}")

    def _hint(self) -> str:
        hint = f"see the orchestrator's log; is it alive and bound to {self._address}?"
        return hint if self._greeted else f"{hint} {self._handshakes.suspicion()}"
