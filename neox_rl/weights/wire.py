"""The ``weights`` socket: who says what. Every message is ``neox_rl.framing``; only ``snapshot`` carries arrays.

    worker    -> publisher   fetch  {have, who}            the newest version > have, as soon as there is one
    publisher -> worker      snapshot                      see ``neox_rl.weights.manifest``
    worker    -> publisher   staged {version, who, digest} every byte of ``version`` is verified, and held until a switch
    watcher   -> publisher   watch  {}                     tell me what is and what comes
    publisher -> watcher     offered {version, digest}, staged {version, who, digest}

Requests are repeated every ``RESEND_S`` seconds, so that a peer that joins late, or comes back, needs no handshake.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import zmq

from neox_rl import framing
from neox_rl.errors import WireError
from neox_rl.types import Json

RESEND_S = 3.0
LOOK_S = 0.5
"""Between looks for a refusal of this side's keys."""
FORGET_S = 10 * RESEND_S
"""A watcher that has not repeated its request for this long is gone."""

FETCH, STAGED, WATCH, OFFERED = "fetch", "staged", "watch", "offered"
MAX_CONTROL_BYTES = 1 << 16
_WORD = re.compile(r"[!-~]{1,200}")
"""What a name or a digest may be: they go into logs."""
_FIELDS: dict[str, dict[str, type]] = {
    FETCH: {"have": int, "who": str},
    STAGED: {"version": int, "who": str, "digest": str},
    WATCH: {},
    OFFERED: {"version": int, "digest": str},
}


def control(kind: str, **fields: Json) -> list[framing.Frame]:
    """A message without arrays."""
    return framing.pack(kind, fields, {})


def read_control(frames: Sequence[framing.Frame], kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """``(kind, fields)`` of a message that is one of ``kinds``, each field of its exact type and in its range. Raises WireError."""
    kind, meta, arrays = framing.unpack_any(frames, kinds)
    if arrays:
        raise WireError(f"{kind}: a message with {len(arrays)} arrays")
    fields = _FIELDS[kind]
    if meta.keys() != fields.keys() or any(type(meta[name]) is not wanted for name, wanted in fields.items()):
        raise WireError(f"{kind}: fields {str(sorted(meta))[:200]} are not {sorted(fields)} with their types")
    for name, value in meta.items():
        if (isinstance(value, int) and not -1 <= value < 1 << 53) or (isinstance(value, str) and not _WORD.fullmatch(value)):
            raise WireError(f"{kind}: {name} {str(value)[:64]!r} is no version, name or digest")
    return kind, dict(meta)


def prepare(socket: zmq.Socket[Any] | zmq.SyncSocket) -> None:
    """Options of every socket of this protocol: a dead peer is noticed, and closing never blocks."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30000)
