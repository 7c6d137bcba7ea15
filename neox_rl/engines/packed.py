"""Packed micro-batches on the device: which rows attend to which, and the rotary tables, computed once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUCKET_FILL = 0.7
"""Sequences share one padded attention call while the shortest has at least this share of the longest's length."""
CAUSAL_SHARE = 0.5
"""A path of a prefix tree of which so much is its own is attended as a whole, under the causal mask, which is faster than any other mask
and takes no memory; of a path that shares more, its own rows alone attend."""


@dataclass(frozen=True)
class Block:
    """One attention call: ``count`` paths, of each ``queries`` slots that attend to ``keys`` slots.

    Without a ``mask`` they are the same slots, and a slot sees those before it. ``mask`` [count, 1, queries, keys] is added to the scores.
    """

    count: int
    queries: int
    keys: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class PackLayout:
    """Where the rows go. A chain of rows, each the child of the one before it, is one path of a block.

    ``queries`` [sum of count x queries] and ``keys`` [sum of count x keys] name for each slot of each block the row it takes; padding takes
    a row of its path, which no real row sees under the block's mask. ``rows`` [T] is the query slot of each row: whatever else a slot
    computes is thrown away. ``seen`` is, for each block with a mask, how many keys each query sees [count, queries]; None for the others.
    ``shared``: whether rows have several key slots.
    """

    blocks: tuple[tuple[int, int, int], ...]
    queries: NDArray[np.int64]
    keys: NDArray[np.int64]
    rows: NDArray[np.int64]
    seen: tuple[NDArray[np.int64] | None, ...]
    shared: bool


@dataclass(frozen=True)
class Pack:
    """:class:`PackLayout` on the device. ``cos`` and ``sin`` are [T, 1, rotary_dim / 2]. ``trivial``: one sequence, nothing to move.

    ``qkv_format`` tells megatron-core that this is no THD pack of its own: it passes the object through untouched.
    """

    blocks: tuple[Block, ...]
    queries: Tensor
    keys: Tensor
    rows: Tensor
    cos: Tensor
    sin: Tensor
    shared: bool
    trivial: bool
    qkv_format: str = "sbhd"


def pack_layout(positions: NDArray[np.int64]) -> PackLayout:
    """The layout of sequences and prefix trees (``neox_rl.batch.prefixes``), both of which ``positions`` [T] describes.

    Paths of similar length share a block, so that little of it is padding.
    """
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    paths = _paths(positions, starts)
    length = np.array([len(path) for path in paths])
    own = np.diff(starts, append=len(positions))
    whole = own >= CAUSAL_SHARE * length
    groups = list(_buckets(length, np.flatnonzero(whole)))
    groups += [chosen for near in _buckets(length, np.flatnonzero(~whole)) for chosen in _buckets(own, near)]
    blocks, queries, keys, seen = [], [], [], []
    rows, offset = np.empty(len(positions), np.int64), 0
    for chosen in groups:
        taken = length if whole[chosen[0]] else own
        size, longest = int(taken[chosen].max()), int(length[chosen].max())
        first = length[chosen] - taken[chosen]
        column = np.arange(size)[None, :]
        real = column < taken[chosen][:, None]
        place = np.where(real, column, 0) + first[:, None]
        padded = np.stack([np.append(paths[i], np.full(longest - length[i], paths[i][0])) for i in chosen])
        query = np.take_along_axis(padded, place, 1)
        mine = real & (query >= starts[chosen][:, None])
        rows[query[mine]] = offset + np.flatnonzero(mine)
        blocks.append((len(chosen), size, longest))
        queries.append(query.reshape(-1))
        keys.append(padded.reshape(-1))
        seen.append(None if whole[chosen[0]] else place + 1)
        offset += query.size
    return PackLayout(tuple(blocks), np.concatenate(queries), np.concatenate(keys), rows, tuple(seen), bool((own < length).any()))


def _paths(positions: NDArray[np.int64], starts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Of each chain the rows from the root to its end: a chain hangs on a row of the path before it."""
    found: list[NDArray[np.int64]] = []
    for start, end in zip(starts, np.append(starts[1:], len(positions)), strict=True):
        before = found[-1][: positions[start]] if found else starts[:0]
        found.append(np.append(before, np.arange(start, end)))
    return found


def _buckets(sizes: NDArray[np.int64], chosen: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """``chosen`` indices of ``sizes`` in parts of similar size, the largest first."""
    order = chosen[np.argsort(-sizes[chosen], kind="stable")]
    at = 0
    while at < len(order):
        end = at + int(np.searchsorted(-sizes[order[at:]], -BUCKET_FILL * sizes[order[at]], side="right"))
        yield order[at:end]
        at = end


def rotary_tables(positions: Tensor, dim: int, base: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, dim / 2] of the rotary embedding (arXiv 2104.09864), computed in fp32."""
    inverse = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = torch.outer(positions.float(), inverse)
    return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)


def make_pack(positions: NDArray[np.int64], dim: int, base: int, dtype: torch.dtype, device: torch.device) -> Pack:
    """The pack of one micro-batch, on ``device``."""
    layout = pack_layout(positions)

    def put(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device)

    def mask(seen: NDArray[np.int64] | None, keys: int) -> Tensor | None:
        if seen is None:
            return None
        hidden = torch.arange(keys, device=device) >= put(seen)[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    blocks = tuple(Block(*block, mask(seen, block[2])) for block, seen in zip(layout.blocks, layout.seen, strict=True))
    cos, sin = rotary_tables(put(positions), dim, base, dtype)
    trivial = layout.queries.shape == layout.rows.shape and bool((layout.queries == np.arange(len(positions))).all())
    return Pack(blocks, put(layout.queries), put(layout.keys), put(layout.rows), cos, sin, layout.shared, trivial)


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


class Gather(torch.autograd.Function):
    """Rows [T, ...] at ``index`` [S], which may name a row more than once: its gradients add up, in one order always."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        full = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        if grads[0].is_cuda:  # where index_add is atomic, and its sums depend on who comes first
            return full.index_put_((index,), grads[0], accumulate=True), None
        return full.index_add_(0, index, grads[0]), None


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
