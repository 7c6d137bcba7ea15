"""A snapshot: every tensor of one policy version in HF names, as one message that a receiver can check byte by byte (``manifest``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from neox_rl import framing
from neox_rl.errors import WeightError
from neox_rl.types import Json
from neox_rl.weights.manifest import KIND, TensorRow, Verified, bytes_digest, check_names, manifest_digest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 64


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
    check_names(version, [name for name, _ in tensors])
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
        rows.append(TensorRow(name, _NAMES[tensor.dtype], tuple(tensor.shape), bytes_digest(arrays[name])))
    digest = manifest_digest(rows)
    meta: dict[str, Json] = {"version": version, "digest": digest, "manifest": [row.to_json() for row in rows]}
    return Snapshot(version, digest, tuple(rows), tuple(framing.pack(KIND, meta, arrays, self_digested=True)))


def tensors_of(verified: Verified) -> dict[str, torch.Tensor]:
    """The tensors by name, in the memory of the message."""
    arrays = verified.arrays
    return {row.name: torch.from_numpy(arrays[row.name].reshape(-1)).view(DTYPES[row.dtype]).view(row.shape) for row in verified.rows}
