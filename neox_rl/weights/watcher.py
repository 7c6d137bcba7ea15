"""The orchestrator's view of the ``weights`` socket: which version is offered, and which workers have staged it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Self

import zmq
import zmq.asyncio

from neox_rl.errors import DeadlineError, WireError
from neox_rl.keys import Handshakes, Keys
from neox_rl.weights.stager import MAX_HELD
from neox_rl.weights.wire import LOOK_S, OFFERED, RESEND_S, STAGED, WATCH, control, prepare, read_control

logger = logging.getLogger(__name__)


class Watcher:
    """``async with Watcher(address) as watcher``. The publisher may come later, or come back. ``on_change`` is called after every message.

    ``offered`` is the newest offered version, -1 before the first; ``digests`` those of as many as a worker may hold, and of what is
    ``staged``: it maps version to the workers that hold it with this digest.
    """

    def __init__(self, address: str, on_change: Callable[[], None] = lambda: None, keys: Keys | None = None) -> None:
        self.address, self._keys = address, keys
        self.offered = -1
        self.digests: dict[int, str] = {}
        self.staged: dict[int, set[str]] = {}
        self.malformed = 0
        self._on_change = on_change
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._handshakes: Handshakes | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="weight-watcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def staged_by(self, who: Collection[str]) -> int:
        """The newest version that every worker in ``who`` holds; -1 for none, and for nobody."""
        return max((held for held, workers in self.staged.items() if who and workers.issuperset(who)), default=-1)

    def check(self) -> None:
        """Raises what ended the receiving task: without it nothing is heard any more."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def wait_offered(self, after_version: int, deadline_s: float) -> int:
        """The newest offered version once it is > ``after_version``. Raises DeadlineError."""
        found = await self._wait(lambda: self.offered if self.offered > after_version else None, deadline_s)
        if found is None:
            raise DeadlineError(f"a policy version after v{after_version} from {self.address}", deadline_s, self._hint())
        return found

    async def wait_staged(self, version: int, who: Collection[str], deadline_s: float) -> int:
        """The newest version >= ``version`` that every worker in ``who`` holds, once there is one.

        A slow worker may skip a version that was superseded before it asked, so waiting for exactly ``version`` could last forever.
        Raises DeadlineError naming the missing workers.
        """
        wanted = set(who)

        def common() -> int | None:
            return found if (found := self.staged_by(wanted)) >= version else None

        found = await self._wait(common, deadline_s)
        if found is None:
            late = {held: wanted - workers for held, workers in self.staged.items() if held >= version} or {version: wanted}
            best = min(late, key=lambda held: (len(late[held]), -held))
            what = f"v{best} to be staged by {', '.join(sorted(late[best]))}"
            raise DeadlineError(what, deadline_s, f"offered by {self.address} is v{self.offered}; see the servers' logs")
        return found

    async def _wait(self, check: Callable[[], int | None], deadline_s: float) -> int | None:
        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(lambda: check() is not None or self._failed())
        except TimeoutError:
            return None
        return check()

    def _failed(self) -> bool:
        """A waiter must not sleep to its deadline for a task that has ended."""
        self.check()
        return False

    def _hint(self) -> str:
        return "is the trainer alive?" + (f" {self._handshakes.suspicion()}" if self.offered < 0 and self._handshakes is not None else "")

    async def _run(self) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        self._handshakes = Handshakes(socket, self.address, self._keys)
        try:
            prepare(socket)
            if self._keys is not None:
                self._keys.apply_client(socket)
            socket.connect(self.address)
            await self._listen(socket, self._handshakes)
        finally:
            self._handshakes.close()
            socket.close(linger=0)
            context.term()
            async with self._changed:
                self._changed.notify_all()

    async def _listen(self, socket: zmq.asyncio.Socket, handshakes: Handshakes) -> None:
        due = 0.0
        while True:
            if time.monotonic() >= due:
                await socket.send_multipart(control(WATCH))
                due = time.monotonic() + RESEND_S
            if not await socket.poll(max(1, round(min(LOOK_S, due - time.monotonic()) * 1000))):
                handshakes.check()
                continue
            frames = await socket.recv_multipart()
            try:
                kind, fields = read_control(frames, (OFFERED, STAGED))
            except WireError as error:
                self.malformed += 1
                logger.warning("ignored a message on the weights socket: %s", error)
                continue
            async with self._changed:
                self._note(kind, fields)
                self._changed.notify_all()
            self._on_change()

    def _note(self, kind: str, fields: dict[str, Any]) -> None:
        version, digest = fields["version"], fields["digest"]
        if kind == OFFERED:
            self.offered = version
            if self.digests.get(version) != digest:  # new; or a trainer that went back made it again: what was staged is of undone steps
                self.staged = {held: who for held, who in self.staged.items() if held < version}
                self.digests = {held: known for held, known in self.digests.items() if held < version} | {version: digest}
            newest = sorted(self.digests)[-MAX_HELD:]
            self.digests = {held: known for held, known in self.digests.items() if held in newest or held in self.staged}
        elif self.digests.get(version) == digest:  # what is held of a version whose offer nobody here heard could be another run's
            self.staged.setdefault(version, set()).add(fields["who"])
            self.staged = dict(sorted(self.staged.items())[-MAX_HELD:])
