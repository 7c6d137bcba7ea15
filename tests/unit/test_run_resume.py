"""What may change between two parts of a run, and who may work in its directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.leaves import blocks, leaves
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.run.launch import prepare
from neox_rl.run.resume import FIXED, hold, refuse_changes
from tests.unit.small_run import small_config, small_paths


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_config(tmp_path)


def test_every_fixed_key_exists() -> None:
    assert set(FIXED) - {"optimizer.type"} <= {*leaves(), *blocks()}


def test_what_the_checkpoint_depends_on_must_stay(config: RunConfig) -> None:
    rollout = replace(config.metarl.rollout, groups_per_step=4)
    changed = RunConfig(replace(config.neox, hidden_size=32), replace(config.metarl, rollout=rollout))
    with pytest.raises(ConfigError) as error:
        refuse_changes(config, changed)
    assert str(error.value).splitlines() == [
        "hidden_size = 32: the run to resume has 64; set it back, or start another run",
        "metarl.rollout.groups_per_step = 4: the run to resume has 2; set it back, or start another run",
    ]


def test_longer_training_other_rates_and_other_deadlines_may_come(config: RunConfig) -> None:
    neox = replace(config.neox, train_iters=99, optimizer={"type": "Adam", "params": {"lr": 1.0}})
    refuse_changes(config, RunConfig(neox, replace(config.metarl, deadlines=replace(config.metarl.deadlines, stop_s=1.0))))
    refuse_changes(config, config)


def test_a_kl_term_needs_the_reference_policy_from_the_beginning(config: RunConfig) -> None:
    with_kl = RunConfig(config.neox, replace(config.metarl, objective=replace(config.metarl.objective, kl_coef=0.1)))
    with pytest.raises(ConfigError, match=r"metarl\.objective\.kl_coef = 0\.1"):
        refuse_changes(config, with_kl)
    refuse_changes(with_kl, config)


def test_resume_says_what_is_missing(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        prepare(config, resume=True)
    prepare(config, resume=False)
    with pytest.raises(ConfigError, match=r"holds no checkpoint \(checkpoint_factor = 0\)"):
        prepare(config, resume=True)


def test_an_earlier_run_is_moved_aside_and_a_running_one_is_left_alone(config: RunConfig) -> None:
    paths = prepare(config, resume=False)
    (paths.root / "mark").touch()
    prepare(config, resume=False)
    assert (paths.root.with_name("small.1") / "mark").exists() and not (paths.root / "mark").exists()
    (paths.checkpoints / "step000001").mkdir()
    with hold(paths):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"small is running; .* another --name"):
                prepare(config, resume)
    prepare(config, resume=True)


def test_a_request_to_stop_does_not_outlive_its_run(config: RunConfig) -> None:
    paths = small_paths(config)
    prepare(config, resume=False)
    (paths.checkpoints / "step000001").mkdir()
    paths.stop.touch()
    assert not prepare(config, resume=True).stop.exists()
