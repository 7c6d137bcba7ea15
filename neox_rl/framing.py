"""One framing for everything that crosses a process: a JSON header and one raw frame an array. Never pickle.

Message = [header, array 0, array 1, ...]. The header is 4 bytes ``nrl`` + protocol version, 8 bytes of XXH3 over the JSON and
every array, then the JSON: ``{"kind": "...", "meta": {...}, "arrays": [[name, dtype, shape], ...]}``. A receiver checks the
version, the digest, the JSON (UTF-8, no nan, no infinity, no key twice, at most ``MAX_DEPTH`` deep), the kind, the number of
frames, each dtype against a fixed list and each frame's size in bytes before it uses a byte. The digest finds damage, not
forgery: that is for the sockets' keys (``neox_rl.keys``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from xxhash import xxh3_64

from neox_rl.errors import ProtocolError, WireError
from neox_rl.types import Json

PROTOCOL = 5
DTYPES = frozenset({"uint8", "int32", "int64", "float32", "float64", "bool"})
MAX_HEADER_BYTES = 64 << 20
MAX_DEPTH = 12
"""Of lists and objects in a header, itself included. Readers that call themselves for each level must not be brought to their limit."""
MAX_INT_DIGITS = 19
MAX_NAME = 512
Frame = bytes | memoryview
Array = np.ndarray[Any, Any]

_MAGIC = b"nrl" + bytes([PROTOCOL])
_DIGEST_BYTES = 8
PREFIX_BYTES = len(_MAGIC) + _DIGEST_BYTES
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def pack(kind: str, meta: Mapping[str, Json], arrays: Mapping[str, Array], self_digested: bool = False) -> list[Frame]:
    """The frames of a message. Arrays are sent without a copy when they are C-contiguous.

    ``self_digested``: ``meta`` holds digests of all arrays, which the receiver compares, so the framing's own covers the header alone.
    """
    rows: list[list[Any]] = []
    frames: list[Frame] = []
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise WireError(f"array {name!r} has dtype {array.dtype.name}; a message carries only {sorted(DTYPES)}")
        rows.append([name, array.dtype.name, list(array.shape)])
        frames.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    header = {"kind": kind, "meta": dict(meta), "arrays": rows}
    raw = _ENCODER.encode(header).encode()
    return [seal(raw, [] if self_digested else frames), *frames]


def seal(raw: bytes, frames: Sequence[Frame]) -> bytes:
    """The header frame of the JSON ``raw``; its digest covers ``frames`` too."""
    return _MAGIC + _digest(raw, frames) + raw


def unpack(frames: Sequence[Frame], kind: str, self_digested: bool = False) -> tuple[dict[str, Json], dict[str, Array]]:
    """``(meta, arrays)`` of a message of this ``kind``; arrays are read-only views of the frames. Raises WireError."""
    _, meta, arrays = unpack_any(frames, (kind,), self_digested)
    return meta, arrays


def unpack_any(
    frames: Sequence[Frame], kinds: Collection[str], self_digested: bool = False
) -> tuple[str, dict[str, Json], dict[str, Array]]:
    """``(kind, meta, arrays)`` of a message that is one of ``kinds``. Raises WireError."""
    raw, digest = _split(frames)
    if _digest(raw, [] if self_digested else frames[1:]) != digest:
        raise WireError(f"message of {len(frames)} frames does not match its digest: it was damaged on its way, or cut")
    header = _parse(raw)
    kind, meta, rows = header.get("kind"), header.get("meta"), header.get("arrays")
    if not isinstance(kind, str) or kind not in kinds:
        raise WireError(f"message of {len(frames)} frames is of unknown kind {str(kind)[:64]!r}; expected is {', '.join(sorted(kinds))}")
    if header.keys() != {"kind", "meta", "arrays"}:
        raise WireError(f"{kind}: header fields {str(sorted(header))[:200]} are not arrays, kind, meta")
    if not isinstance(meta, dict) or not isinstance(rows, list) or len(rows) != len(frames) - 1:
        raise WireError(f"{kind}: {len(frames) - 1} array frames do not match the header")
    arrays: dict[str, Array] = {}
    for row, frame in zip(rows, frames[1:], strict=True):
        name, array = _array(kind, row, frame)
        if name in arrays:
            raise WireError(f"{kind}: array {name!r} comes twice")
        arrays[name] = array
    return kind, meta, arrays


def _digest(raw: Frame, frames: Sequence[Frame]) -> bytes:
    found = xxh3_64(raw)
    for frame in frames:
        found.update(frame)
    return found.digest()


def _split(frames: Sequence[Frame]) -> tuple[bytes, bytes]:
    """``(JSON, digest)`` of the header frame, of a peer that speaks this protocol."""
    if not frames:
        raise WireError("empty message")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are read")
    header = bytes(frames[0])
    if header[:3] != _MAGIC[:3] or len(header) < PREFIX_BYTES:
        raise WireError(
            f"header of {len(header)} bytes begins with {header[:4]!r}, not with {_MAGIC!r}: not a message of this project's protocol"
        )
    if header[3] != PROTOCOL:
        raise ProtocolError(f"protocol version {header[3]}, this side speaks {PROTOCOL}: run one release on both sides")
    return header[PREFIX_BYTES:], header[len(_MAGIC) : PREFIX_BYTES]


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        header = _DECODER.decode(raw.decode())
        if _SURROGATE.search(raw):
            json.dumps(header, ensure_ascii=False).encode()  # half of a pair raises: it could not be written to a log
    except (ValueError, RecursionError) as error:
        raise WireError(f"header of {len(raw)} bytes is not the JSON of a message: {str(error)[:120]}") from error
    if not isinstance(header, dict):
        raise WireError("header is not a JSON object")
    level: list[Any] = [header]
    for _ in range(MAX_DEPTH):
        if not level:
            return header
        level = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, dict | list)
        ]
    raise WireError(f"header is nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is beyond the floats")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_INT_DIGITS + 1:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse, parse_float=_float, parse_int=_int)


def _array(kind: str, row: object, frame: Frame) -> tuple[str, Array]:
    match row:
        case [str() as name, str() as dtype, list() as shape] if (
            dtype in DTYPES and all(type(n) is int and 0 <= n < 1 << 48 for n in shape) and len(shape) <= 8 and len(name) <= MAX_NAME
        ):
            expected = math.prod(shape) * np.dtype(dtype).itemsize
        case _:
            raise WireError(f"{kind}: array entry {repr(row)[:120]} is not [name, dtype, shape]")
    if len(frame) != expected:
        raise WireError(f"{kind}: array {name!r} has {len(frame)} bytes, its header says {expected}")
    return name, np.frombuffer(frame, dtype=dtype).reshape(shape)
