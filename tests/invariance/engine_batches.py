"""Fixed sequences, packed in different ways: what every layout of the engine must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from neox_rl.batch.types import MicroBatch

VOCAB = 101
LENGTHS = (9, 31, 17, 24, 5, 28, 12, 2)


def sequences(seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Without token 0: transformers gives the embedding of ``pad_token_id`` no gradient, wherever it stands."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, n) for n in LENGTHS]


def pack(chosen: Sequence[np.ndarray[Any, Any]], size: int, all_sequences: Sequence[np.ndarray[Any, Any]]) -> MicroBatch:
    """One micro-batch of ``size`` tokens. Every predicted token of the global batch weighs the same; advantages vary by position."""
    zeros = np.zeros(size, np.float32)
    tokens, targets, positions = (np.zeros(size, np.int64) for _ in range(3))
    index, weight, advantages, ends = np.full(size, -1, np.int64), zeros.copy(), zeros.copy(), [0]
    loss_tokens = sum(len(s) - 1 for s in all_sequences)
    for number, sequence in enumerate(chosen):
        start, end = ends[-1], ends[-1] + len(sequence)
        tokens[start:end], positions[start:end], index[start:end] = sequence, np.arange(len(sequence)), number
        targets[start : end - 1] = sequence[1:]
        weight[start : end - 1] = 1.0 / loss_tokens
        advantages[start:end] = np.cos(np.arange(len(sequence)) + len(sequence))
        ends.append(end)
    if ends[-1] < size:
        positions[ends[-1] :] = np.arange(size - ends[-1])
        ends.append(size)
    cu_seqlens = np.array(ends, np.int32)
    versions = np.zeros(size, np.int64)
    every, longest = np.arange(size), int(np.diff(cu_seqlens).max())
    return MicroBatch(
        tokens, positions, cu_seqlens, every, targets, every, weight, advantages, zeros, zeros, zeros, versions, index, longest
    )


def split(seqs: Sequence[np.ndarray[Any, Any]], parts: int, size: int = 136) -> list[MicroBatch]:
    """The sequences dealt round-robin to ``parts`` micro-batches of one size."""
    return [pack(seqs[part::parts], size, seqs) for part in range(parts)]


def loss_fn(logprobs: torch.Tensor, entropy: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A policy gradient with an entropy term: both outputs of the model carry gradient."""
    weight, advantages = (torch.from_numpy(x).to(logprobs.device) for x in (batch.loss_weight, batch.advantages))
    loss = -(weight * (advantages * logprobs + 0.1 * entropy)).sum()
    return loss, {"entropy": (weight * entropy).sum(), "logprob": (weight * logprobs).sum()}
