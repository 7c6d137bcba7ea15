"""Packed micro-batches on the device: which rows attend to which, and the rotary tables, computed once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUCKET_FILL = 0.7
"""Sequences share one padded attention call while the shortest has at least this share of the longest's length."""


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end in T rows, as padded blocks for attention.

    ``blocks`` are (number of sequences, longest length); ``slots`` [sum of n x L] names for each slot of each block the row it
    takes (padding takes its sequence's first row: finite values that no real row sees under the causal mask), ``rows`` [T] is the
    slot of each row. ``cos`` and ``sin`` are [T, 1, rotary_dim / 2]. ``trivial``: one sequence, nothing to move.

    ``qkv_format`` tells megatron-core that this is no THD pack of its own: it passes the object through untouched.
    """

    blocks: tuple[tuple[int, int], ...]
    slots: Tensor
    rows: Tensor
    cos: Tensor
    sin: Tensor
    trivial: bool
    qkv_format: str = "sbhd"


def pack_layout(cu_seqlens: NDArray[np.int32]) -> tuple[tuple[tuple[int, int], ...], NDArray[np.int64], NDArray[np.int64]]:
    """``(blocks, slots, rows)`` of :class:`Pack`: sequences of similar length share a block, so that little of it is padding."""
    starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    blocks: list[tuple[int, int]] = []
    slots: list[NDArray[np.int64]] = []
    rows = np.empty(int(cu_seqlens[-1]), np.int64)
    at, offset = 0, 0
    while at < len(order):
        longest = int(lengths[order[at]])
        end = at + int(np.searchsorted(-lengths[order[at:]], -BUCKET_FILL * longest, side="right"))
        chosen = order[at:end]
        column = np.arange(longest)[None, :]
        real = column < lengths[chosen][:, None]
        taken = starts[chosen][:, None] + np.where(real, column, 0)
        rows[taken[real]] = offset + np.flatnonzero(real)
        blocks.append((len(chosen), longest))
        slots.append(taken.reshape(-1))
        at, offset = end, offset + taken.size
    return tuple(blocks), np.concatenate(slots), rows


def rotary_tables(positions: Tensor, dim: int, base: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, dim / 2] of the rotary embedding (arXiv 2104.09864), computed in fp32."""
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = torch.outer(positions.float(), inverse)
    return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)


def make_pack(cu_seqlens: NDArray[np.int32], positions: Tensor, dim: int, base: int, dtype: torch.dtype) -> Pack:
    """The pack of one micro-batch, on ``positions``' device."""
    blocks, slots, rows = pack_layout(cu_seqlens)
    cos, sin = rotary_tables(positions, dim, base, dtype)
    device = positions.device
    return Pack(blocks, torch.from_numpy(slots).to(device), torch.from_numpy(rows).to(device), cos, sin, trivial=len(cu_seqlens) == 2)


class ToSlots(torch.autograd.Function):
    """Rows [T, ...] into padded slots [S, ...]. Padding gets no gradient, so the backward is a gather: fast and deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return grads[0].index_select(0, rows), None, None


class ToRows(torch.autograd.Function):
    """Padded slots [S, ...] back into rows [T, ...]; the backward leaves zeros in the padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        full = grads[0].new_zeros(ctx.num_slots, *grads[0].shape[1:])
        return full.index_copy_(0, rows, grads[0]), None


class Rotate(torch.autograd.Function):
    """Rotary embedding of the first 2 x cos.shape[-1] dimensions of [T, heads, d]; the backward is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
