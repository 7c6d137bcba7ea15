"""fp16 of GPT-NeoX on one rank: a step that overflows is taken again, and where no loss scale helps the run says so."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.gpt_neox import GptNeoXEngine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import NeoxRLError
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split

pytestmark = pytest.mark.neox
NEOX = NeoXConfig(hidden_size=32, num_attention_heads=2, num_layers=2, seq_length=64, precision="fp16")


@contextmanager
def engine_of(scaling: dict[str, Any]) -> Iterator[GptNeoXEngine]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR"):
            patch.delenv(name, raising=False)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            patch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
        built = build_engine(RunConfig(NEOX, MetaRLConfig(engine="gpt-neox"), {"fp16": scaling}), VOCAB)
        assert isinstance(built, GptNeoXEngine)
        yield built
        built.close()


def test_a_step_that_overflows_is_taken_again_and_counted_once() -> None:
    with engine_of({"initial_scale_power": 30, "hysteresis": 1}) as engine:
        report = engine.step(split(sequences(), 2), loss_fn, 1e-3)
        assert report.tokens == sum(len(s) - 1 for s in sequences())
        assert 1.0 < engine._engine.optimizer.loss_scale < 2**30 and engine._engine.skipped_steps > 0
        assert 0.0 < report.grad_norm < 100.0


@pytest.mark.parametrize("scaling", [{"loss_scale": 2**30}, {"initial_scale_power": 30, "min_loss_scale": 2**29, "hysteresis": 1}])
def test_a_loss_scale_that_cannot_be_lowered_ends_the_run_with_the_weights_as_they_were(scaling: dict[str, Any]) -> None:
    with engine_of(scaling) as engine:
        before = {name: tensor.clone() for name, tensor in engine.named_tensors()}
        with pytest.raises(NeoxRLError, match=r"optimizer step 1: .* overflow fp16 at loss scale .*precision bfloat16 or fp32"):
            engine.step(split(sequences(), 2), loss_fn, 1e-3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.named_tensors())
