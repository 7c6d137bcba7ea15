"""Learning rates: linear warm-up to the peak, then down to the floor in the style that was asked for."""

from __future__ import annotations

import itertools

import pytest

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import WarmstartConfig
from neox_rl.step.schedule import rl_lr, warmstart_lr, warmup_then


@pytest.mark.parametrize(
    ("style", "half_way", "end"), [("constant", 1.0, 1.0), ("linear", pytest.approx(0.55), 0.1), ("cosine", pytest.approx(0.55), 0.1)]
)
def test_warm_up_then_decay_to_the_floor(style: str, half_way: float, end: float) -> None:
    rates = [warmup_then(step, 110, 10 / 110, 1.0, 0.1, style) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[59] == half_way and rates[-1] == pytest.approx(end)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:])), "never rises after the warm-up"


def test_steps_beyond_the_last_stay_at_the_floor() -> None:
    assert warmup_then(500, 100, 0.1, 1.0, 0.1, "cosine") == pytest.approx(0.1)


def test_one_step_without_warm_up_is_no_division_by_zero() -> None:
    assert warmup_then(1, 1, 0.0, 1.0, 0.5, "linear") == pytest.approx(0.5)


def test_rates_of_the_two_phases_come_from_their_own_keys() -> None:
    assert warmstart_lr(WarmstartConfig(steps=100, lr=3e-3, min_lr_frac=0.1, warmup_frac=0.0), 100) == pytest.approx(3e-4)
    optimizer = {"type": "Adam", "params": {"lr": "2e-4"}}
    neox = NeoXConfig(train_iters=10, warmup=0.2, lr_decay_style="linear", min_lr=1e-5, optimizer=optimizer)
    assert [rl_lr(neox, s) for s in (1, 2, 10)] == pytest.approx([1e-4, 2e-4, 1e-5])
