"""Log-probs and entropy over a sharded, padded vocabulary equal the dense softmax in value and gradient."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

from neox_rl.loss.vocab_parallel import token_logprobs_and_entropy


def dense(logits: Tensor, targets: Tensor, valid: int, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits[:, :valid] / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def problem(dtype: torch.dtype = torch.float64, tokens: int = 9, vocab: int = 12, valid: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, valid, (tokens,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_equals_the_dense_softmax_without_the_padded_columns(chunk: int, temperature: float) -> None:
    logits, targets = problem()
    ours, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = token_logprobs_and_entropy(ours, targets, valid_vocab=11, temperature=temperature, chunk=chunk)
    expected = dense(reference, targets, 11, temperature)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    factors = torch.randn(2, len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours_grad,) = torch.autograd.grad(got, ours, tuple(factors))
    (expected_grad,) = torch.autograd.grad(expected, reference, tuple(factors))
    torch.testing.assert_close(ours_grad, expected_grad, rtol=0, atol=1e-12)
    assert ours_grad[:, 11].abs().max() == 0


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_by_finite_differences(output: int) -> None:
    logits, targets = problem(tokens=3, vocab=6, valid=5)
    targets = targets.clamp(max=4)

    def run(x: Tensor) -> Tensor:
        return token_logprobs_and_entropy(x, targets, valid_vocab=5, chunk=2)[output]

    assert torch.autograd.gradcheck(run, logits.requires_grad_())


def test_large_logits_neither_overflow_nor_lose_the_target() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1]), valid_vocab=3)
    assert logprobs.item() == -2e4 and entropy.item() == 0.0


class LargestFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest fp32 tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.numel = max(self.numel, out.numel())
        return out


def test_bf16_logits_are_never_copied_whole_to_fp32() -> None:
    logits, targets = problem(torch.bfloat16, tokens=64, vocab=100, valid=100)
    logits.requires_grad_()
    with LargestFloat32() as largest:  # type: ignore[no-untyped-call]
        logprobs, entropy = token_logprobs_and_entropy(logits, targets, valid_vocab=100, chunk=8)
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    assert largest.numel <= 8 * 100
    assert (logprobs.dtype, entropy.dtype, gradient.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    exact, _ = dense(logits.detach().double(), targets, 100, 1.0)
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-5)


def test_what_has_no_logprob_is_refused() -> None:
    logits, targets = problem()
    with pytest.raises(ValueError, match=r"vocabulary is 0\.\.3"):
        token_logprobs_and_entropy(logits, targets, valid_vocab=4)
    with pytest.raises(ValueError, match="temperature 0"):
        token_logprobs_and_entropy(logits, targets, valid_vocab=11, temperature=0.0)


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    # valid 11: the padding is on the last rank; valid 5: rank 1 holds nothing but padding.
    for valid in (11, 5):
        logits, targets = problem()
        targets = targets % valid
        reference = logits.clone().requires_grad_()
        shard = logits[:, 6 * rank : 6 * rank + 6].clone().requires_grad_()
        got = token_logprobs_and_entropy(
            shard, targets, vocab_start=6 * rank, valid_vocab=valid, group=dist.group.WORLD, temperature=0.9, chunk=4
        )
        expected = dense(reference, targets, valid, 0.9)
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad((got[0] + 0.3 * got[1]).sum(), shard)
        (whole,) = torch.autograd.grad((expected[0] + 0.3 * expected[1]).sum(), reference)
        torch.testing.assert_close(gradient, whole[:, 6 * rank : 6 * rank + 6], rtol=0, atol=1e-12)
    dist.destroy_process_group()


def test_two_ranks_with_half_the_vocabulary_each_agree_with_one(tmp_path: Path) -> None:
    context = start_processes(_rank, args=(str(tmp_path / "store"),), nprocs=2, join=False, daemon=True)  # type: ignore[no-untyped-call]
    assert context is not None
    deadline = time.monotonic() + 240
    while not context.join(timeout=5):
        assert time.monotonic() < deadline, "the two ranks did not end within 240 s"
