"""Packed micro-batches as rows of a matrix [B, L], one sequence a row: every attention kernel masks them alike, flash included.

A row is padded at its end, where no real token sees it under the causal mask. What a pack saves is given up: the rows of a step are
all as long as its longest sequence. A pack's own padding fills rows as well, so that each of its tokens has a place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neox_rl.batch.types import PADDING, MicroBatch


@dataclass(frozen=True)
class Rows:
    """``tokens`` and ``positions`` [B, L]; ``slots`` [T]: where in the flattened rows each token of the pack lies."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor


def rows_shape(microbatches: Sequence[MicroBatch], multiple: int = 1) -> tuple[int, int]:
    """(B, L) that holds every one of them; L is a multiple of ``multiple``."""
    longest = max(1, *(int(np.diff(batch.cu_seqlens[: _real(batch) + 1]).max(initial=0)) for batch in microbatches))
    length = -(-longest // multiple) * multiple
    return max(len(_bounds(batch, length)) - 1 for batch in microbatches), length


def make_rows(batch: MicroBatch, shape: tuple[int, int]) -> Rows:
    """The micro-batch as rows of ``shape``, on the CPU. Rows to spare and padding hold token 0."""
    bounds = _bounds(batch, shape[1])
    number = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    slots: NDArray[np.int64] = number * shape[1] + np.arange(len(batch)) - bounds[number]
    tokens = np.zeros(shape[0] * shape[1], np.int64)
    tokens[slots] = batch.tokens
    positions = torch.arange(shape[1]).expand(shape)
    return Rows(torch.from_numpy(tokens).view(shape), positions, torch.from_numpy(slots))


def _real(batch: MicroBatch) -> int:
    """The number of sequences before the padding."""
    return int(np.count_nonzero(batch.sequence_index[batch.cu_seqlens[:-1]] != PADDING))


def _bounds(batch: MicroBatch, length: int) -> NDArray[np.int64]:
    """Where the rows begin, and the end: the real sequences, then the padding cut to ``length``."""
    real = batch.cu_seqlens[: _real(batch) + 1].astype(np.int64)
    cuts = np.arange(real[-1] + length, len(batch), length)
    return np.unique(np.concatenate([real, cuts, [len(batch)]]))
