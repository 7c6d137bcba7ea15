"""Waiting for a descriptor until a deadline of ``time.monotonic``. By ``poll``: ``select`` refuses descriptors from 1,024 on, and an
orchestrator with many connections has those."""

from __future__ import annotations

import select
import time


def readable(descriptor: int, deadline: float) -> bool:
    """Whether there is something to read, or the end of the file, by the deadline."""
    return _ready(descriptor, select.POLLIN, deadline)


def writable(descriptor: int, deadline: float) -> bool:
    """Whether a write would not block by the deadline; it may fail, for want of a reader."""
    return _ready(descriptor, select.POLLOUT, deadline)


def _ready(descriptor: int, event: int, deadline: float) -> bool:
    waiting = select.poll()
    waiting.register(descriptor, event)
    return bool(waiting.poll(max(0.0, deadline - time.monotonic()) * 1e3))
