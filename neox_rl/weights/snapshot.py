"""A snapshot: every tensor of one policy version in HF names, as one message that a receiver can check byte by byte.

Layout (``neox_rl.framing``, kind ``snapshot``): one uint8 frame a tensor, in the order of the manifest, and
``meta = {"version": v, "digest": d, "manifest": [[name, dtype, shape, blake3 of the bytes], ...]}``. ``digest`` hashes the
manifest alone, so equal digests mean equal names, dtypes, shapes and bytes, whatever the version: the trainer and every server
compare 32 characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from neox_rl import framing
from neox_rl.errors import WeightError, WireError
from neox_rl.types import Json

KIND = "snapshot"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a manifest. ``digest`` is the blake3 (128 bits, hex) of its bytes in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> list[Json]:
        return [self.name, self.dtype, list(self.shape), self.digest]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The weights of policy ``version``, copied: the trainer may change its own afterwards. ``frames`` is the message."""

    version: int
    digest: str
    manifest: tuple[TensorRow, ...]
    frames: tuple[framing.Frame, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.manifest)


def make_snapshot(version: int, named: Iterable[tuple[str, torch.Tensor]]) -> Snapshot:
    """Copies ``named`` (HF name, full tensor on any device) into one buffer and digests it. Raises WeightError."""
    tensors = [(name, tensor.detach()) for name, tensor in named]
    _check_names(version, [name for name, _ in tensors])
    offsets = [0]
    for name, tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise WeightError(f"v{version}: tensor {name!r} has dtype {tensor.dtype}; a snapshot carries {sorted(DTYPES)}")
        offsets.append(offsets[-1] + -(-tensor.nbytes // _ALIGN) * _ALIGN)
    # One allocation a snapshot, not one a tensor: freed as a whole, it leaves no holes in the trainer's heap.
    storage = torch.empty(offsets[-1], dtype=torch.uint8)
    arrays: dict[str, framing.Array] = {}
    rows = []
    for (name, tensor), start in zip(tensors, offsets, strict=False):
        raw = storage[start : start + tensor.nbytes]
        raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        arrays[name] = raw.numpy()
        rows.append(TensorRow(name, _NAMES[tensor.dtype], tuple(tensor.shape), _digest(arrays[name])))
    digest = manifest_digest(rows)
    meta: dict[str, Json] = {"version": version, "digest": digest, "manifest": [row.to_json() for row in rows]}
    return Snapshot(version, digest, tuple(rows), tuple(framing.pack(KIND, meta, arrays, self_digested=True)))


def manifest_digest(rows: Sequence[TensorRow]) -> str:
    """Digest of the whole snapshot: a hash over names, dtypes, shapes and tensor digests, in order."""
    return blake3(json.dumps([row.to_json() for row in rows], separators=(",", ":")).encode()).hexdigest(16)


def read_snapshot(frames: Sequence[framing.Frame]) -> tuple[int, str, dict[str, torch.Tensor]]:
    """``(version, digest, tensors)``, after the size and digest of every tensor are verified. The tensors share the frames' memory.

    Raises WeightError naming the first tensor that is not what the manifest says; nothing of the message may be used then.
    """
    try:
        meta, arrays = framing.unpack(frames, KIND, self_digested=True)
    except WireError as error:
        raise WeightError(f"not a snapshot: {error}") from error
    version, digest, manifest = meta.get("version"), meta.get("digest"), meta.get("manifest")
    if type(version) is not int or not isinstance(digest, str) or not isinstance(manifest, list):
        raise WeightError("snapshot without version, digest and manifest")
    rows = [_row(version, entry) for entry in manifest]
    _check_names(version, [row.name for row in rows])
    if {row.name for row in rows} != arrays.keys():
        raise WeightError(f"v{version}: the manifest names {len(rows)} tensors, the message holds {len(arrays)} others")
    for row in rows:
        array = arrays[row.name]
        if array.dtype != np.uint8 or array.nbytes != row.nbytes:
            raise WeightError(f"v{version}: {row.name!r} has {array.nbytes} bytes, {row.dtype}{list(row.shape)} needs {row.nbytes}")
        if _digest(array) != row.digest:
            raise WeightError(f"v{version}: the bytes of {row.name!r} do not match its digest {row.digest}")
    if manifest_digest(rows) != digest:
        raise WeightError(f"v{version}: the manifest does not match the snapshot's digest {digest}")
    return version, digest, {row.name: _tensor(row, arrays[row.name]) for row in rows}


def _digest(array: framing.Array) -> str:
    return blake3(array.reshape(-1).data).hexdigest(16)


def _tensor(row: TensorRow, array: framing.Array) -> torch.Tensor:
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array.reshape(-1)).view(DTYPES[row.dtype]).view(row.shape)


def _row(version: int, entry: Json) -> TensorRow:
    match entry:
        case [str() as name, str() as dtype, list() as shape, str() as digest] if dtype in DTYPES:
            sizes = tuple(n for n in shape if type(n) is int and 0 <= n < 1 << 48)
            if len(sizes) == len(shape):
                return TensorRow(name, dtype, sizes, digest)
    raise WeightError(f"v{version}: manifest entry {str(entry)[:120]} is not [name, dtype, shape, digest]")


def _check_names(version: int, names: list[str]) -> None:
    if not names:
        raise WeightError(f"v{version}: a snapshot without tensors")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise WeightError(f"v{version}: tensors named twice: {twice[:5]}")
