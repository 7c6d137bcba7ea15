"""What rank 0 reports of a step: the trainer's share of a ``telemetry.rows.MetricsRow``."""

from __future__ import annotations

from neox_rl.batch.types import BatchStats
from neox_rl.engines.port import StepReport
from neox_rl.loss.metrics import finalize
from neox_rl.types import Json


def step_metrics(stats: BatchStats, report: StepReport, wait_s: float, step_s: float, publish_s: float) -> dict[str, Json]:
    """``publish_s`` is the time of the last publish before this report."""
    ages = stats.staleness
    tokens = sum(ages.values())
    metrics: dict[str, Json] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "reward_mean": stats.reward_mean,
        "reward_std": stats.reward_std,
        "accuracy": stats.correct_frac,
        "length_mean": stats.length_mean,
        "length_max": stats.length_max,
        "truncated_frac": stats.truncated_frac,
        "tokens_trained": stats.trained_tokens,
        "tokens_masked_stale": stats.masked_tokens,
        "staleness_mean": sum(age * count for age, count in ages.items()) / tokens if tokens else 0.0,
        "staleness_max": stats.max_staleness,
        "staleness_hist": {str(age): count for age, count in ages.items()},
        "zero_variance_groups": stats.zero_variance_groups,
        "pack_efficiency": stats.packing_efficiency,
        "wait_s": wait_s,
        "step_s": step_s,
        "publish_s": publish_s,
    }
    return metrics | finalize(report.metrics)
