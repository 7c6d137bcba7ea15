"""Which messages the experience socket carries, and the check of each before anything of it is used; who says what: ``wire.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from neox_rl.errors import ConfigError, WireError
from neox_rl.framing import Array, Frame, unpack_any
from neox_rl.types import Json

ATTEMPT: Final = "NEOX_RL_ATTEMPT"
"""In the environment of trainers and orchestrator: how often trainers of this run were started before."""
_FIELDS: Final[dict[str, dict[str, type]]] = {
    "hello": {"world": int, "pid": int, "attempt": int, "state": dict},
    "next": {"phase": str, "step": int},
    "evaluate": {"label": str, "version": int},
    "report": {"phase": str, "step": int, "metrics": dict},
    "published": {"version": int, "digest": str},
    "checkpoint": {"sft_step": int, "rl_step": int},
    "done": {"reason": str},
}
ONE_WAY: Final = frozenset({"report", "published", "checkpoint"})  # not waited for: the next message may come while they are handled
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
    since: int
    body: Mapping[str, Any]


def parse_request(frames: Sequence[Frame]) -> Message:
    """A trainer's message whose every field is what ``_FIELDS`` says. Raises WireError."""
    kind, body, arrays = unpack_any(frames, _FIELDS)
    fields = _FIELDS[kind]
    if arrays:
        raise WireError(f"{kind}: a request with {len(arrays)} arrays")
    session, id, since = body.pop("session", None), body.pop("id", None), body.pop("since", None)
    if not isinstance(session, str) or not 1 <= len(session) <= _MAX_SESSION or type(id) is not int or not 1 <= id < _MAX_INT:
        raise WireError(f"{kind}: session {str(session)[:64]!r} or id {str(id)[:64]!r} is not one")
    if type(since) is not int or not 1 <= since <= id:
        raise WireError(f"{kind}: since {str(since)[:64]!r} is not in 1..{id}")
    if body.keys() != fields.keys() or any(type(body[name]) is not of for name, of in fields.items()):
        raise WireError(f"{kind}: fields {str(body)[:200]} are not {sorted(fields)}")
    for name, value in body.items():
        if (isinstance(value, int) and not 0 <= value < _MAX_INT) or (isinstance(value, str) and len(value) > _MAX_TEXT):
            raise WireError(f"{kind}: {name} {str(value)[:64]!r} is beyond 0..{_MAX_INT} or {_MAX_TEXT} characters")
    if body.get("phase", Phase.RL) not in set(Phase):
        raise WireError(f"{kind}: phase {str(body['phase'])[:64]!r} is not one of {sorted(Phase)}")
    return Message(kind, session, id, since, body)


@dataclass(frozen=True, slots=True)
class Answer:
    """One message of the orchestrator. ``id`` is the request's number, 0 where it answers none; ``acked`` how far it has got."""

    kind: str
    id: int
    acked: int
    body: Mapping[str, Json]
    arrays: Mapping[str, Array]


def parse_answer(frames: Sequence[Frame]) -> Answer:
    """An orchestrator's message; the caller decodes a batch's groups. Raises WireError."""
    kind, body, arrays = unpack_any(frames, _ANSWERS)
    id, acked = body.get("id"), body.get("acked")
    if type(id) is not int or type(acked) is not int or min(id, acked) < 0 or max(id, acked) >= _MAX_INT:
        raise WireError(f"{kind}: answer without id and acked: {str(body)[:200]}")
    return Answer(kind, id, acked, body, arrays)


def finite(metrics: Mapping[str, Json]) -> dict[str, Json]:
    """JSON has no nan and no inf: a metric without a value is null, and does not end the run."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def attempt_of(env: Mapping[str, str]) -> int:
    """The attempt that the environment names; 0 where it names none. Raises ConfigError."""
    text = env.get(ATTEMPT, "0")
    if not text.isdecimal():
        raise ConfigError(f"{ATTEMPT}={text!r}: must be a number, counted up with each start of the run's trainers")
    return int(text)
