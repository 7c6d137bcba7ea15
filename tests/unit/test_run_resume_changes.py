"""Which keys may change between two parts of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.leaves import blocks, leaves
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MetaRLConfig, StalenessConfig
from neox_rl.errors import ConfigError
from neox_rl.run.resume import FIXED, refuse_changes
from tests.unit.small_run import small_config


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


@pytest.mark.parametrize(("before", "now"), [("sft", "tis"), ("tis", "sft"), ("dpo", "tis"), ("gspo", "dpo"), ("sft", "dpo")])
def test_what_waits_to_be_trained_by_one_kind_of_objective_is_given_to_no_other(config: RunConfig, before: str, now: str) -> None:
    def with_loss(loss: str) -> RunConfig:
        return replace(config, metarl=replace(config.metarl, objective=replace(config.metarl.objective, loss=loss)))

    with pytest.raises(ConfigError) as error:
        refuse_changes(with_loss(before), with_loss(now))
    said = f"metarl.objective.loss = '{now}': the run to resume has '{before}'; set it back, or start another run"
    assert str(error.value).splitlines() == [said]
    refuse_changes(with_loss("tis"), with_loss("gspo"))


def test_longer_training_other_rates_and_other_deadlines_may_come(config: RunConfig) -> None:
    neox = replace(config.neox, train_iters=99, optimizer={"type": "Adam", "params": {"lr": 1.0}})
    refuse_changes(config, RunConfig(neox, replace(config.metarl, deadlines=replace(config.metarl.deadlines, stop_s=1.0))))
    refuse_changes(config, config)


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ({"gammas": (1.0,)}, {"gammas": (0.99, 1.0)}, "metarl.episodes.gammas = (0.99, 1.0): the run to resume has (1.0,)"),
        ({"count": 2}, {"count": 3}, "metarl.episodes.count = 3: the run to resume has 2"),
        ({"method": "sample"}, {"count": 2}, "metarl.rollout.method = 'episodes': the run to resume has 'sample'"),
    ],
)
def test_the_ids_of_the_symbolic_words_must_stay(tmp_path: Path, before: dict[str, Any], now: dict[str, Any], key: str) -> None:
    """The ranks would find another size of the vocabulary in the checkpoint, once everything is started."""

    def of(changes: dict[str, Any], tokenizer: str = "") -> RunConfig:
        episodes = {"count": 1, **changes}
        method = episodes.pop("method", "episodes")
        return small_config(tmp_path, rollout={"method": method}, episodes=episodes, tokenizer={"path": tokenizer})

    with pytest.raises(ConfigError) as error:
        refuse_changes(of(before), of(now))
    assert str(error.value).startswith(key)
    refuse_changes(of(before, "words"), of(now, "words"))


def test_discounts_may_change_where_the_words_stay(tmp_path: Path) -> None:
    few, many = (small_config(tmp_path, rollout={"method": "episodes"}, episodes={"gammas": g}) for g in ((1.0,), (0.99, 1.0)))
    assert few.metarl.episodes.count > 1
    refuse_changes(few, many)


def test_a_kl_term_needs_the_reference_policy_from_the_beginning(config: RunConfig) -> None:
    with_kl = RunConfig(config.neox, replace(config.metarl, objective=replace(config.metarl.objective, kl_coef=0.1)))
    with pytest.raises(ConfigError, match=r"metarl\.objective\.kl_coef = 0\.1"):
        refuse_changes(config, with_kl)
    refuse_changes(with_kl, config)


def test_strict_mode_cannot_begin_or_tighten_in_the_middle() -> None:
    """More tickets may be due at once than a step takes: the surplus would be trained beyond the bound, and end the run."""

    def with_rule(mode: str, slack: int) -> RunConfig:
        return RunConfig(metarl=MetaRLConfig(staleness=StalenessConfig(mode=mode, delivery_slack=slack)))

    refuse_changes(with_rule("strict", 1), with_rule("strict", 2))
    refuse_changes(with_rule("strict", 2), with_rule("token", 1))
    with pytest.raises(ConfigError, match=r"staleness\.mode = 'strict': the run to resume has 'token'"):
        refuse_changes(with_rule("token", 1), with_rule("strict", 1))
    with pytest.raises(ConfigError, match=r"delivery_slack = 1: the run to resume has 2"):
        refuse_changes(with_rule("strict", 2), with_rule("strict", 1))
