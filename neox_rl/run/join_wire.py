"""The ``join`` socket: a server's agent (DEALER, ``run/serve.py``) asks a run (ROUTER, in the orchestrator) to take its server in.

    agent -> run   join {token, name, host, port}        name may be empty; repeated until there is an answer
    run -> agent   welcome {name, generator, publisher, drain_s, server}, files    what the server must be told, and what it reads
                   refused {message}                      and why
    agent -> run   beat {token, name}                     every second
    run -> agent   beaten {state, version, restarts}      its server as the run sees it; how often it is to be started again
                   unknown {}                             the orchestrator is another than before: join again, the server may stay
    agent -> run   leave {token, name, reason}            repeated until gone
    run -> agent   gone {}                                no request is in flight there
                   over {reason}                          the run has ended

Every message is ``neox_rl.framing``; only ``welcome`` has arrays: the files, as bytes. ``token`` tells two agents of one name apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import zmq
import zmq.asyncio

from neox_rl.config.rules_run import HOST
from neox_rl.errors import NeoxRLError, WireError
from neox_rl.framing import Frame, pack, unpack_any
from neox_rl.keys import Handshakes, Keys
from neox_rl.sockets import bind_tcp
from neox_rl.types import Json

JOIN, BEAT, LEAVE = "join", "beat", "leave"
WELCOME, REFUSED, BEATEN, UNKNOWN, GONE, OVER = "welcome", "refused", "beaten", "unknown", "gone", "over"
BEAT_S: Final = 1.0
MAX_REQUEST_BYTES: Final = 1 << 16
MAX_FILES: Final = 16
MAX_FILE_BYTES: Final = 1 << 28
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of servers and of files: neither leads out of a directory."""
_WORD = re.compile(r"[!-~]{1,200}")
_TEXT_CHARS = 1000

_FIELDS: Final[dict[str, dict[str, type]]] = {
    JOIN: {"token": str, "name": str, "host": str, "port": int},
    BEAT: {"token": str, "name": str},
    LEAVE: {"token": str, "name": str, "reason": str},
    WELCOME: {"name": str, "generator": str, "publisher": str, "drain_s": float, "server": dict},
    REFUSED: {"message": str},
    BEATEN: {"state": str, "version": int, "restarts": int},
    UNKNOWN: {},
    GONE: {},
    OVER: {"reason": str},
}
_SERVER: Final[dict[str, type]] = {
    "dtype": str,
    "max_model_len": int,
    "max_num_seqs": int,
    "tensor_parallel_size": int,
    "enforce_eager": bool,
    "seed": int,
    "kv_cache_gib": float,
    "gpu_memory_frac": float,
    "stats": bool,
}
"""The fields of a ServerSpec that the run decides."""
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the protocol, checked. ``files`` by name; empty but in a welcome."""

    kind: str
    fields: Mapping[str, Any]
    files: Mapping[str, bytes]


def message(kind: str, files: Mapping[str, bytes] | None = None, **fields: Json) -> list[Frame]:
    return pack(kind, fields, {name: np.frombuffer(data, np.uint8) for name, data in (files or {}).items()})


def read_message(frames: Sequence[Frame], kinds: Sequence[str]) -> Message:
    """A message that is one of ``kinds``, each field of its exact type and in its range. Raises WireError."""
    kind, meta, arrays = unpack_any(frames, kinds)
    if len(arrays) > (MAX_FILES if kind == WELCOME else 0):
        raise WireError(f"{kind}: a message with {len(arrays)} files")
    _check_types(kind, meta, _FIELDS[kind])
    for name, value in meta.items():
        text = value if isinstance(value, str) else "-"
        fits = len(text) <= _TEXT_CHARS if name in ("reason", "message") else bool(_WORD.fullmatch(text))
        if name == "name":
            fits = bool(NAME.fullmatch(text)) or (kind == JOIN and not text)
        if not fits or (name == "port" and not 1 <= int(str(value)) <= 65535):
            raise WireError(f"{kind}: {name} {str(value)[:64]!r} is none")
        if name == "host" and not HOST.fullmatch(text):  # it becomes part of a URL, and `[` or `a/b` makes none
            raise WireError(f"{kind}: host {text[:64]!r} must be an IPv4 address or a host name, without port")
    if kind == WELCOME:
        _check_welcome(meta)
    for name, array in arrays.items():
        if not NAME.fullmatch(name) or array.dtype != np.uint8 or array.nbytes > MAX_FILE_BYTES:
            raise WireError(f"{kind}: file {name[:64]!r} of {array.nbytes} bytes is not one that a server is given")
    return Message(kind, meta, {name: array.tobytes() for name, array in arrays.items()})


def _check_types(kind: str, found: Mapping[str, Json], fields: Mapping[str, type]) -> None:
    if found.keys() != fields.keys() or any(type(found[name]) is not wanted for name, wanted in fields.items()):
        raise WireError(f"{kind}: fields {str(sorted(found))[:200]} are not {sorted(fields)} with their types")


def _check_welcome(meta: Mapping[str, Any]) -> None:
    server = meta["server"]
    _check_types("server", server, _SERVER)
    sizes = (server["max_model_len"], server["max_num_seqs"], server["tensor_parallel_size"])
    if server["dtype"] not in _DTYPES or not all(0 < size < 1 << 31 for size in sizes) or not 0 <= server["seed"] < 1 << 32:
        raise WireError(f"welcome: {str(server)[:300]} describes no server")


class JoinSocket:
    """The run's end. Raises NeoxRLError when it cannot bind."""

    def __init__(self, bind_host: str, port: int, keys: Keys | None = None) -> None:
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        try:
            if keys is not None:
                keys.apply_server(self._socket)
            self.port = bind_tcp(self._socket, bind_host, port)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise NeoxRLError(f"cannot bind the join socket to {bind_host}:{port}: {error}; set network.join_port") from error

    async def receive(self, timeout_s: float) -> tuple[bytes, list[bytes]] | None:
        """``(peer, frames)``; None when nothing came in time."""
        if not await self._socket.poll(max(1, round(timeout_s * 1000))):
            return None
        peer, *frames = await self._socket.recv_multipart()
        return peer, frames

    async def send(self, peer: bytes, frames: Sequence[Frame]) -> None:
        """What is for a peer that is gone is dropped: it repeats its request when it is back."""
        await self._socket.send_multipart([peer, *frames])

    def close(self) -> None:
        self._socket.close()


class JoinClient:
    """The agent's end, for one address ``tcp://host:port``."""

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        self.address = address
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FILE_BYTES)
        self.handshakes = Handshakes(self._socket, address, keys)
        try:
            if keys is not None:
                keys.apply_client(self._socket)
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.handshakes.close()
            self._socket.close(linger=0)
            raise WireError(
                f"{address!r} is no address to join: {error}; give tcp://HOST:PORT, the join address of endpoints.json"
            ) from error

    async def send(self, frames: Sequence[Frame]) -> None:
        """Never waits: what does not go out is repeated."""
        try:
            await self._socket.send_multipart(list(frames), zmq.DONTWAIT)
        except zmq.Again:
            return

    async def receive(self, timeout_s: float, kinds: Sequence[str]) -> Message | None:
        """None when nothing came in time. Raises WireError for what is not of this protocol."""
        if not await self._socket.poll(max(1, round(timeout_s * 1000))):
            return None
        try:
            return read_message(await self._socket.recv_multipart(), kinds)
        except WireError as error:
            raise WireError(f"{self.address} is not the join socket of a run of this release: {error}") from error

    def close(self) -> None:
        self.handshakes.close()
        self._socket.close()
