"""The hand-written backwards against torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from neox_rl.engines.fused_ops import SwiGLU, rms_norm


def test_rms_norm_is_torchs_in_value_and_gradient() -> None:
    x, weight = torch.randn(5, 1, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    assert gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


def test_rms_norm_of_half_precision_is_computed_in_fp32() -> None:
    x, weight = torch.randn(3, 64).bfloat16() * 100, torch.ones(64).bfloat16()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (64,), eps=1e-5).bfloat16())


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    x = torch.randn(4, 1, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(SwiGLU.apply(x), F.silu(x[..., :3]) * x[..., 3:])
    assert gradcheck(SwiGLU.apply, (x,))
