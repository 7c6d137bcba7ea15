"""Log-probability and entropy of tokens from logits whose vocabulary is sharded over tensor-parallel ranks.

The softmax is computed in fp32 in chunks of tokens, forward and again backward, so that beside the logits and their gradient
only one [chunk, V_local] fp32 buffer stands at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class _Shard:
    """This rank's columns: ``num_valid`` of the local ones are real, the rest pad the vocabulary and get probability 0."""

    start: int
    num_valid: int
    group: dist.ProcessGroup | None
    temperature: float
    chunk: int

    def scaled(self, logits: Tensor, top: Tensor, rows: slice) -> Tensor:
        """``(logits - top) / temperature`` [rows, num_valid], at least fp32: never above 0."""
        return (logits[rows, : self.num_valid].to(top.dtype) - top[rows, None]).div_(self.temperature)

    def own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(which targets this rank holds, their local column; 0 where it does not)."""
        local = targets - self.start
        mine = (local >= 0) & (local < self.num_valid)
        return mine, torch.where(mine, local, 0)

    def rows(self, count: int) -> list[slice]:
        return [slice(a, min(a + self.chunk, count)) for a in range(0, count, self.chunk)]


def token_logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    valid_vocab: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """``(log p(target) [T], entropy [T] in nats)`` of ``softmax(logits / temperature)``, fp32 (fp64 for fp64 logits).

    ``logits`` [T, V_local] are columns ``vocab_start : vocab_start + V_local`` of the padded vocabulary on this rank of
    ``group`` (None: the whole vocabulary is here). Columns from ``valid_vocab`` on are padding, outside the softmax, gradient
    0. ``targets`` [T] are global ids, the same on every rank. Both outputs are exact in value and gradient and equal on every
    rank of the group; the gradient is in the logits' dtype. ``temperature`` is the sampling one, so that log-probs are those
    of the sampling distribution. Raises ValueError for a target outside ``0:valid_vocab``.
    """
    if temperature <= 0.0:
        raise ValueError(f"temperature {temperature}: log-probs of greedy sampling are not defined; train with temperature > 0")
    low, high = (int(targets.min()), int(targets.max())) if targets.numel() else (0, 0)
    if low < 0 or high >= valid_vocab:
        raise ValueError(f"targets span {low}..{high}, the vocabulary is 0..{valid_vocab - 1}: wrong tokenizer?")
    num_valid = min(max(valid_vocab - vocab_start, 0), logits.shape[1])
    shard = _Shard(vocab_start, num_valid, group, temperature, chunk)
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, shard)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shard: _Shard) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        top = logits.new_full((logits.shape[0],), -torch.inf, dtype=dtype)
        if shard.num_valid:
            top = logits[:, : shard.num_valid].amax(dim=-1).to(dtype)
        if shard.group is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
        # Rows: sum of exp, sum of exp * scaled logit, scaled logit of the target; one reduction for the three.
        sums = torch.zeros(3, logits.shape[0], dtype=dtype, device=logits.device)
        mine, column = shard.own(targets)
        for rows in shard.rows(logits.shape[0]) if shard.num_valid else []:
            scaled = shard.scaled(logits, top, rows)
            sums[2, rows] = torch.where(mine[rows], scaled.gather(1, column[rows, None])[:, 0], 0)
            weights = scaled.exp()
            sums[0, rows] = weights.sum(dim=-1)
            sums[1, rows] = weights.mul_(scaled).sum(dim=-1)
        if shard.group is not None:
            dist.all_reduce(sums, group=shard.group)
        log_norm = sums[0].log()
        logprobs = sums[2] - log_norm
        entropy = log_norm - sums[1] / sums[0]
        ctx.shard = shard
        ctx.save_for_backward(logits, mine, column, top, log_norm, entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """d logp / d x_j = 1[j = target] - p_j;  d H / d x_j = -p_j (log p_j + H);  x = logits / temperature."""
        grad_logprobs, grad_entropy = grads
        shard: _Shard = ctx.shard
        logits, mine, column, top, log_norm, entropy = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None
        grad = torch.empty_like(logits)
        grad[:, shard.num_valid :] = 0
        for rows in shard.rows(logits.shape[0]) if shard.num_valid else []:
            logp = shard.scaled(logits, top, rows).sub_(log_norm[rows, None])
            probs = logp.exp()
            factor = torch.zeros_like(logp) if grad_entropy is None else logp.add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
            if grad_logprobs is not None:
                factor += grad_logprobs[rows, None]
            x_grad = probs.mul_(factor).neg_()
            if grad_logprobs is not None:
                at_target = torch.where(mine[rows], grad_logprobs[rows], 0)
                x_grad.scatter_add_(1, column[rows, None], at_target[:, None])
            grad[rows, : shard.num_valid] = x_grad.div_(shard.temperature).to(grad.dtype)
        return grad, None, None
