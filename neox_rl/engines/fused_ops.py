"""Operations that autograd takes apart into many passes over memory, each as one function with a backward of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467). torch has fused kernels for CUDA; on the CPU its backward is three times slower
    than this one. Half precisions go to torch, which computes them in fp32."""
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps);  dx = r (g w - n mean(g w n)),  dw = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        n, r, weight = ctx.saved_tensors
        product = grads[0] * n
        mean = torch.matmul(product, weight).div_(len(weight))[..., None]
        return (grads[0] * weight).addcmul_(n, mean, value=-1.0).mul_(r), product.flatten(0, -2).sum(0), None


class SwiGLU(torch.autograd.Function):
    """[gate | up] -> silu(gate) up (arXiv 2002.05202). The backward writes both halves in place: no concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        out_gate, out_up = out.chunk(2, -1)
        torch.mul(grads[0], activated, out=out_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=out_gate)
        return out
