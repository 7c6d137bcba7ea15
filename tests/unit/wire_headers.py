"""Reading the header of a framed message unchecked, and rewriting it as a hostile sender would: with a digest that is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from neox_rl.framing import PREFIX_BYTES, Frame, seal


def header_of(frames: Sequence[Frame]) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(bytes(frames[0])[PREFIX_BYTES:])
    return header


def kind_of(frames: Sequence[Frame]) -> str:
    return str(header_of(frames)["kind"])


def resealed(header: object, arrays: Sequence[Frame], self_digested: bool = False) -> list[Frame]:
    """The message of this ``header`` and these array frames; ``header`` may also be raw JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return [seal(raw, [] if self_digested else arrays), *arrays]
