"""Binding a ZeroMQ socket where one may just have been closed."""

from __future__ import annotations

import errno
import time
from typing import Any

import zmq

REBIND_S = 5.0
"""A closed socket keeps its port until its last messages have left or its linger has passed: longer than the linger of any socket here."""
_AGAIN_S = 0.05


def bind_tcp(socket: zmq.Socket[Any], host: str, port: int, wait_s: float = REBIND_S) -> int:
    """Binds to ``host:port`` (0: a free one) and returns the port. One that is taken is tried again for ``wait_s`` seconds.

    Raises zmq.ZMQError.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
            return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= until:
                raise
        time.sleep(_AGAIN_S)
