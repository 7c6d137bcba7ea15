"""fp16 of GPT-NeoX on one rank: a step that overflows is taken again, and where no loss scale helps the run says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.base import MAX_TRIES
from neox_rl.engines.gpt_neox import GptNeoXEngine
from neox_rl.engines.registry import build_engine
from neox_rl.errors import NeoxRLError
from tests.contracts.one_rank import one_rank
from tests.invariance.engine_batches import VOCAB, loss_fn, sequences, split

pytestmark = pytest.mark.neox
NEOX = NeoXConfig(hidden_size=32, num_attention_heads=2, num_layers=2, seq_length=64, precision="fp16")


@contextmanager
def engine_of(scaling: dict[str, Any], **keys: Any) -> Iterator[GptNeoXEngine]:
    with pytest.MonkeyPatch.context() as patch:
        one_rank(patch)
        neox = replace(NEOX, **keys)
        built = build_engine(RunConfig(neox, MetaRLConfig(engine="gpt-neox"), {"fp16": scaling}), VOCAB)
        assert isinstance(built, GptNeoXEngine)
        try:
            yield built
        finally:
            built.close()  # the next engine would find a world of ranks already there


def test_a_step_that_overflows_is_taken_again_and_counted_once() -> None:
    with engine_of({"initial_scale_power": 30, "hysteresis": 1}) as engine:
        tries: list[int] = []
        engine.on_retry = tries.append
        report = engine.step(split(sequences(), 2), loss_fn, 1e-3)
        assert tries == [n + 1 for n in range(round(report.metrics["overflows"]))], "each is told: it may take as long as a step"
        assert report.tokens == sum(len(s) - 1 for s in sequences())
        assert 1.0 < report.metrics["loss_scale"] < 2**30
        assert report.metrics["overflows"] == engine._engine.skipped_steps > 0
        assert 0.0 < report.grad_norm < 100.0


@pytest.mark.parametrize(
    ("scaling", "fix"),
    [
        ({"loss_scale": 2**30}, r"fp16.loss_scale: 0 \(dynamic\)"),
        ({"initial_scale_power": 30, "min_loss_scale": 2**29, "hysteresis": 1}, "fp16.min_loss_scale: 1"),
    ],
)
def test_a_loss_scale_that_cannot_be_lowered_ends_the_run_with_the_weights_as_they_were(scaling: dict[str, Any], fix: str) -> None:
    with engine_of(scaling) as engine:
        before = {name: tensor.clone() for name, tensor in engine.named_tensors()}
        with pytest.raises(
            NeoxRLError, match=rf"optimizer step 1: .* overflow fp16 at loss scale .*warmstart.hf_checkpoint.*or resume with {fix}"
        ):
            engine.step(split(sequences(), 2), loss_fn, 1e-3)
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.named_tensors())


def test_a_step_that_never_stops_overflowing_ends_the_run() -> None:
    """The rules refuse such a block; whatever else keeps DeepSpeed from lowering the scale ends in the same way."""
    never = pytest.raises(NeoxRLError, match=f"optimizer step 1: .*overflowed in each of {MAX_TRIES} tries")
    with engine_of({"initial_scale_power": 30, "hysteresis": 0}) as engine, never:
        engine.step(split(sequences(), 2), loss_fn, 1e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_step_that_grows_the_loss_scale_takes_the_gradient_whole(stage: int) -> None:
    """The gradient is read from Adam's first moment. Another scale rounds another way where numbers are tiny, and that is all."""
    found = {}
    for name, scaling in {"static": {"loss_scale": 1024}, "growing": {"initial_scale_power": 10, "loss_scale_window": 1}}.items():
        with engine_of(scaling, pipe_parallel_size=0, zero_optimization={"stage": stage}, gradient_clipping=0.5) as engine:
            scales = []
            for step in range(3):
                report = engine.step(split(sequences(step), 2), loss_fn, 1e-3)
                assert report.grad_norm > 0.5, "it is clipped"
                scales.append(engine._engine.optimizer.loss_scale)
            states = engine._engine.optimizer.optimizer.state.values()
            found[name] = scales, [state["exp_avg"].clone() for state in states], dict(engine.named_tensors())
    assert found["static"][0] == [1024, 1024, 1024] and found["growing"][0] == [1024, 2048, 4096]
    for one, other in zip(found["static"][1], found["growing"][1], strict=True):
        assert (one - other).norm() < 1e-3 * one.norm()
    for key, tensor in found["static"][2].items():
        torch.testing.assert_close(tensor, found["growing"][2][key], rtol=1e-2, atol=1e-4)


def test_a_resume_goes_on_at_the_loss_scale_that_was_saved_and_keeps_to_the_keys_of_its_own_run(tmp_path: Path) -> None:
    with engine_of({"initial_scale_power": 30, "hysteresis": 1}) as engine:
        engine.step(split(sequences(), 2), loss_fn, 1e-3)
        scale = engine._engine.optimizer.loss_scale
        engine.save(tmp_path, {})
    blocks: list[tuple[dict[str, Any], float]] = [
        ({"loss_scale_window": 7}, scale),
        ({"min_loss_scale": 2 * int(scale)}, 2 * scale),
        ({"loss_scale": 8}, 8),
    ]
    for block, expected in blocks:
        with engine_of(block, gradient_clipping=0.25) as engine:
            engine.load(tmp_path)
            optimizer = engine._engine.optimizer
            assert optimizer.loss_scale == expected and optimizer.clip_grad == 0.25
            assert not optimizer.loss_scaler.dynamic or optimizer.loss_scaler.scale_window == block.get("loss_scale_window", 1000)
            engine.step(split(sequences(), 2), loss_fn, 1e-3)
