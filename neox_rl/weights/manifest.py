"""What a snapshot message says of itself, and the check of its every byte. Without torch: whoever only stages needs none.

Layout (``neox_rl.framing``, kind ``snapshot``): one uint8 frame a tensor, in the order of the manifest, and
``meta = {"version": v, "digest": d, "manifest": [[name, dtype, shape, blake3 of the bytes], ...]}``. ``digest`` hashes the
manifest alone, so equal digests mean equal names, dtypes, shapes and bytes, whatever the version: the trainer and every server
compare 32 characters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from neox_rl import framing
from neox_rl.errors import WeightError, WireError
from neox_rl.types import Json

KIND = "snapshot"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a manifest. ``digest`` is the blake3 (128 bits, hex) of its bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def to_json(self) -> list[Json]:
        return [self.name, self.dtype, list(self.shape), self.digest]


@dataclass(frozen=True, slots=True)
class Verified:
    """A snapshot whose every byte is what its manifest says. ``arrays`` hold the bytes of each tensor, writeable."""

    version: int
    digest: str
    rows: tuple[TensorRow, ...]
    arrays: Mapping[str, framing.Array]


def manifest_digest(rows: Sequence[TensorRow]) -> str:
    """Digest of the whole snapshot: a hash over names, dtypes, shapes and tensor digests, in order."""
    return blake3(json.dumps([row.to_json() for row in rows], separators=(",", ":")).encode()).hexdigest(16)


def verify(frames: Sequence[framing.Frame]) -> Verified:
    """After the size and digest of every tensor are checked. The arrays share the frames' memory where that can be written.

    Raises WeightError naming the first tensor that is not what the manifest says; nothing of the message may be used then.
    """
    try:
        meta, arrays = framing.unpack(frames, KIND, self_digested=True)
    except WireError as error:
        raise WeightError(f"not a snapshot: {error}") from error
    version, digest, manifest = meta.get("version"), meta.get("digest"), meta.get("manifest")
    if type(version) is not int or version < 0 or not _is_digest(digest) or not isinstance(manifest, list):
        raise WeightError("snapshot without version, digest and manifest")
    assert isinstance(digest, str)
    rows = [_row(version, entry) for entry in manifest]
    check_names(version, [row.name for row in rows])
    if {row.name for row in rows} != arrays.keys():
        raise WeightError(f"v{version}: the manifest names {len(rows)} tensors, the message holds {len(arrays)} others")
    for row in rows:
        array = arrays[row.name]
        if array.dtype != np.uint8 or array.nbytes != row.nbytes:
            raise WeightError(f"v{version}: {row.name!r} has {array.nbytes} bytes, {row.dtype}{list(row.shape)} needs {row.nbytes}")
        if bytes_digest(array) != row.digest:
            raise WeightError(f"v{version}: the bytes of {row.name!r} do not match its digest {row.digest}")
    if manifest_digest(rows) != digest:
        raise WeightError(f"v{version}: the manifest does not match the snapshot's digest {digest}")
    return Verified(version, digest, tuple(rows), {name: a if a.flags.writeable else a.copy() for name, a in arrays.items()})


def bytes_digest(array: framing.Array) -> str:
    return blake3(array.reshape(-1).data).hexdigest(16)


def _row(version: int, entry: Json) -> TensorRow:
    match entry:
        case [str() as name, str() as dtype, list() as shape, str() as digest] if dtype in ITEM_BYTES and _is_digest(digest):
            sizes = tuple(n for n in shape if type(n) is int and 0 <= n < 1 << 48)
            if len(sizes) == len(shape):
                return TensorRow(name, dtype, sizes, digest)
    raise WeightError(f"v{version}: manifest entry {repr(entry)[:120]} is not [name, dtype, shape, digest]")


def _is_digest(value: Json) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def check_names(version: int, names: list[str]) -> None:
    if not names:
        raise WeightError(f"v{version}: a snapshot without tensors")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise WeightError(f"v{version}: tensors named twice: {twice[:5]}")
