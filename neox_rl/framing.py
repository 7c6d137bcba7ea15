"""One framing for everything that crosses a process: a JSON header and one raw frame an array. Never pickle.

Message = [header, array 0, array 1, ...]. The header is UTF-8 JSON:
``{"v": 1, "kind": "...", "meta": {...}, "arrays": [[name, dtype, shape], ...]}``. A receiver checks the protocol version,
the kind, the number of frames, each dtype against a fixed list and each frame's size in bytes before it uses a byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neox_rl.errors import WireError
from neox_rl.types import Json

PROTOCOL = 1
DTYPES = frozenset({"uint8", "int32", "int64", "float32", "float64", "bool"})
MAX_HEADER_BYTES = 64 << 20
Frame = bytes | memoryview
Array = np.ndarray[Any, Any]


def pack(kind: str, meta: Mapping[str, Json], arrays: Mapping[str, Array]) -> list[Frame]:
    """The frames of a message. Arrays are sent without a copy when they are C-contiguous."""
    rows: list[list[Any]] = []
    frames: list[Frame] = []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise WireError(f"array {name!r} has dtype {array.dtype.name}; a message carries only {sorted(DTYPES)}")
        rows.append([name, array.dtype.name, list(array.shape)])
        frames.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    header = {"v": PROTOCOL, "kind": kind, "meta": dict(meta), "arrays": rows}
    return [json.dumps(header, separators=(",", ":"), allow_nan=False).encode(), *frames]


def unpack(frames: Sequence[Frame], kind: str) -> tuple[dict[str, Json], dict[str, Array]]:
    """``(meta, arrays)`` of a message of this ``kind``; arrays are read-only views of the frames. Raises WireError."""
    header = _header(frames)
    if header.get("v") != PROTOCOL:
        raise WireError(f"protocol version {header.get('v')!r}, this side speaks {PROTOCOL}: run one release on both sides")
    if header.get("kind") != kind:
        raise WireError(f"message of kind {str(header.get('kind'))[:64]!r} where {kind!r} was expected")
    meta, rows = header.get("meta"), header.get("arrays")
    if not isinstance(meta, dict) or not isinstance(rows, list) or len(rows) != len(frames) - 1:
        raise WireError(f"{kind}: {len(frames) - 1} array frames do not match the header")
    arrays: dict[str, Array] = {}
    for row, frame in zip(rows, frames[1:], strict=True):
        name, array = _array(kind, row, frame)
        if name in arrays:
            raise WireError(f"{kind}: array {name!r} comes twice")
        arrays[name] = array
    return meta, arrays


def kind_of(frames: Sequence[Frame]) -> str:
    """The kind that a message says it is, to choose who unpacks it; nothing else is checked. Raises WireError."""
    kind = _header(frames).get("kind")
    if not isinstance(kind, str):
        raise WireError("header has no kind")
    return kind


def _header(frames: Sequence[Frame]) -> dict[str, Any]:
    if not frames:
        raise WireError("empty message")
    raw = bytes(frames[0]) if len(frames[0]) <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WireError(f"header of {len(frames[0])} bytes is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("header is not a JSON object")
    return header


def _array(kind: str, row: object, frame: Frame) -> tuple[str, Array]:
    match row:
        case [str() as name, str() as dtype, list() as shape] if (
            dtype in DTYPES and all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and len(shape) <= 8
        ):
            expected = math.prod(shape) * np.dtype(dtype).itemsize
        case _:
            raise WireError(f"{kind}: array entry {str(row)[:120]} is not [name, dtype, shape]")
    if len(frame) != expected:
        raise WireError(f"{kind}: array {name!r} has {len(frame)} bytes, its header says {expected}")
    return name, np.frombuffer(frame, dtype=dtype).reshape(shape)
