"""Binding a ZeroMQ socket where one may just have been closed; which interface others are to bind."""

from __future__ import annotations

import errno
import socket
import time
from typing import Any

import psutil
import zmq

from neox_rl.config.network import is_loopback

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


def interface_towards(host: str) -> str:
    """The network interface of this machine that reaches ``host``; empty where none does, or only loopback though ``host`` is not.

    gloo and NCCL have to be told: gloo takes the address that this machine's name resolves to, which is often a loopback one or none, and
    hands it to ranks on other machines; or it is the network's, and ranks that are all here listen there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only chooses the interface
            own = str(probe.getsockname()[0])
    except OSError:
        return ""
    if is_loopback(own) and not is_loopback(host):
        return ""
    return next((name for name, found in psutil.net_if_addrs().items() if any(address.address == own for address in found)), "")
