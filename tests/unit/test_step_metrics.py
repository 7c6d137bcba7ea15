"""The trainer's half of a metrics row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from neox_rl.batch.types import BatchStats
from neox_rl.engines.port import StepReport
from neox_rl.errors import WeightError
from neox_rl.queue.wire import Phase
from neox_rl.step.metrics import MIN_FRESH_TOKENS, check_mismatch, step_metrics
from neox_rl.telemetry.rows import MetricsRow

SUMS = {"tokens": 10.0, "ratio/tokens": 10.0, "ratio_square/tokens": 10.0, "truncated_frac/tokens": 5.0, "mismatch_kl/fresh_tokens": 0.0}


def stats(staleness: Mapping[int, int], trained: Mapping[int, int]) -> BatchStats:
    total, kept = sum(staleness.values()), sum(trained.values())
    verdicts = {"mismatch": 1, "match": 3}
    return BatchStats(
        2, 4, 60, 60, total, total - kept, total - kept, kept, staleness, trained, 0.5, 0.5, 0.5, 1, 12.0, 20, 0.25, 0.9, verdicts
    )


def row(phase: Phase = Phase.RL, staleness: Mapping[int, int] | None = None, trained: Mapping[int, int] | None = None) -> dict[str, Any]:
    report = StepReport(0.1, 1.0, 1e-4, 10, SUMS | {"fresh_tokens": 4.0})
    staleness = staleness or {0: 10}
    return step_metrics(phase, stats(staleness, staleness if trained is None else trained), report, 0.5, 0.25, 0.2, 0.01)


def test_masked_tokens_do_not_count_as_trained_staleness_but_stand_in_the_histogram() -> None:
    found = row(staleness={0: 6, 2: 2, 5: 4}, trained={0: 6, 2: 2})
    assert found["staleness_max"] == 2 and found["staleness_mean"] == pytest.approx(0.5)
    assert found["staleness_hist"] == {"0": 6, "2": 2, "5": 4} and found["tokens_masked_stale"] == 4


def test_old_tokens_that_are_kept_with_a_truncated_ratio_do_count() -> None:
    assert row(staleness={0: 6, 5: 4})["staleness_max"] == 5
    assert row(staleness={0: 6, 5: 4, 7: 1}, trained={0: 6, 5: 4})["staleness_max"] == 5, "also where some are masked"


def test_nobody_s_verdict_is_no_accuracy_of_zero() -> None:
    report = StepReport(0.1, 1.0, 1e-4, 10, SUMS | {"fresh_tokens": 4.0})
    unverified = replace(stats({0: 10}, {0: 10}), correct_frac=None, reasons={"unverified": 4})
    found = step_metrics(Phase.RL, unverified, report, 0.5, 0.25, 0.2, 0.01)
    assert "accuracy" not in found and found["verdicts"] == {"unverified": 4} and row()["accuracy"] == 0.5


def test_the_share_of_truncated_ratios_is_not_taken_for_that_of_truncated_rollouts() -> None:
    found = row()
    assert found["truncated_frac"] == 0.25, "rollouts that ran into their budget"
    assert found["verdicts"] == {"match": 3, "mismatch": 1}
    assert found["ratio_truncated_frac"] == 0.5 and found["ratio_mean"] == 1.0 and found["ess"] == 1.0


def test_of_traces_that_are_steps_of_searches_no_share_is_told_as_one_of_rollouts() -> None:
    report = StepReport(0.1, 1.0, 1e-4, 10, SUMS | {"fresh_tokens": 4.0})
    found = step_metrics(Phase.RL, stats({0: 10}, {0: 10}), report, 0.5, 0.25, 0.2, 0.01, whole=False)
    of_rollouts = {"accuracy", "reward_mean", "reward_std", "length_mean", "length_max", "truncated_frac", "verdicts"}
    assert not of_rollouts & found.keys() and of_rollouts < row().keys() and found.keys() == row().keys() - of_rollouts


def test_names_are_those_of_the_row_and_a_warm_start_has_no_rollouts() -> None:
    known = {*MetricsRow.__annotations__, "zero_variance_groups", "fresh_tokens"}
    assert row().keys() <= known
    warm = row(Phase.SFT)
    assert not {"reward_mean", "staleness_max", "truncated_frac", "publish_s"} & warm.keys() and warm["loss"] == 0.1


def test_a_policy_in_the_servers_that_is_not_the_trainer_s_stops_the_run() -> None:
    for harmless in (None, float("nan"), 1e-12, 0.5):
        check_mismatch({"mismatch_kl": harmless, "fresh_tokens": 1e4}, 0.5, 3)
    check_mismatch({"mismatch_kl": 9.0, "fresh_tokens": 1e4}, 0.0, 3)
    with pytest.raises(WeightError, match=r"step 3: mismatch KL 8.7 .* above weights.max_mismatch_kl = 0.5"):
        check_mismatch({"mismatch_kl": 8.7, "fresh_tokens": float(MIN_FRESH_TOKENS)}, 0.5, 3)


def test_a_handful_of_fresh_tokens_does_not_stop_a_run() -> None:
    check_mismatch({"mismatch_kl": 8.7, "fresh_tokens": MIN_FRESH_TOKENS - 1.0}, 0.5, 3)
    check_mismatch({"mismatch_kl": 8.7}, 0.5, 3)
