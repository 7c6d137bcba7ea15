"""Which messages the experience socket carries, and the check of each before anything of it is used; who says what: ``wire.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from neox_rl.errors import WireError
from neox_rl.framing import Frame, kind_of, unpack
from neox_rl.types import Json

_FIELDS: Final[dict[str, dict[str, type]]] = {
    "hello": {"world": int, "pid": int, "state": dict},
    "next": {"phase": str, "step": int},
    "evaluate": {"label": str, "version": int},
    "report": {"phase": str, "step": int, "metrics": dict},
    "published": {"version": int},
    "done": {"reason": str},
}
ONE_WAY: Final = frozenset({"report", "published"})  # handled at once, before the next message is read
_ANSWERS: Final = frozenset({"ok", "batch", "result", "heartbeat", "error"})
_MAX_INT, _MAX_TEXT, _MAX_SESSION = 1 << 53, 1000, 64


class Phase(StrEnum):
    """What a batch is for: demonstrations, or rollouts through the ticket queue."""

    SFT = "sft"
    RL = "rl"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the trainer. ``body`` holds the fields of its kind, each of its type and in its range."""

    kind: str
    session: str
    id: int
    body: Mapping[str, Any]


def parse_request(frames: Sequence[Frame]) -> Message:
    """A trainer's message whose every field is what ``_FIELDS`` says. Raises WireError."""
    kind = kind_of(frames)
    fields = _FIELDS.get(kind)
    if fields is None or len(frames) != 1:
        raise WireError(f"{len(frames)} frames of unknown kind {kind[:64]!r}")
    body = unpack(frames, kind)[0]
    session, id = body.pop("session", None), body.pop("id", None)
    if not isinstance(session, str) or not 1 <= len(session) <= _MAX_SESSION or type(id) is not int or not 1 <= id < _MAX_INT:
        raise WireError(f"{kind}: session {str(session)[:64]!r} or id {str(id)[:64]!r} is not one")
    if body.keys() != fields.keys() or any(type(body[name]) is not of for name, of in fields.items()):
        raise WireError(f"{kind}: fields {str(body)[:200]} are not {sorted(fields)}")
    for name, value in body.items():
        if (isinstance(value, int) and not 0 <= value < _MAX_INT) or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise WireError(f"{kind}: {name} {str(value)[:64]!r} is beyond 0..{_MAX_INT} or {_MAX_TEXT} characters")
    if body.get("phase", Phase.RL) not in set(Phase):
        raise WireError(f"{kind}: phase {str(body['phase'])[:64]!r} is not one of {sorted(Phase)}")
    return Message(kind, session, id, body)


def parse_answer(frames: Sequence[Frame]) -> tuple[str, int, Mapping[str, Json]]:
    """``(kind, id, body)`` of an orchestrator's message; the caller decodes a batch's groups. Raises WireError."""
    kind = kind_of(frames)
    if kind not in _ANSWERS:
        raise WireError(f"{len(frames)} frames of unknown kind {kind[:64]!r}")
    body = unpack(frames, kind)[0]
    inner = body.get("meta") if kind == "batch" else body
    numbers = [inner.get("id"), inner.get("acked")] if isinstance(inner, dict) else []
    match numbers, inner:
        case [int() as id, int() as acked], dict() as said if (
            bool not in map(type, numbers) and min(id, acked) >= 0 and max(id, acked) < _MAX_INT
        ):
            return kind, id, said
    raise WireError(f"{kind}: answer without id and acked: {str(inner)[:200]}")


def finite(metrics: Mapping[str, Json]) -> dict[str, Json]:
    """JSON has no nan and no inf: a metric without a value is null, and does not end the run."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
