"""What rank 0 reports of a step: the trainer's share of a ``telemetry.rows.MetricsRow``."""

from __future__ import annotations

from collections.abc import Mapping

from neox_rl.batch.types import BatchStats
from neox_rl.engines.port import StepReport
from neox_rl.errors import WeightError
from neox_rl.loss.metrics import finalize
from neox_rl.queue.wire import Phase
from neox_rl.types import Json

_RENAMED = {"ratio": "ratio_mean", "truncated_frac": "ratio_truncated_frac"}
"""Names of the loss that would say too little beside the others of a row, or be taken for one of them."""
_OF_ROLLOUTS = ("accuracy", "reward_mean", "reward_std", "length_mean", "length_max", "truncated_frac", "verdicts")
MIN_FRESH_TOKENS = 256
"""Tokens of the version that is trained, before their mean is a measure of anything."""


def step_metrics(
    phase: Phase,
    stats: BatchStats,
    report: StepReport,
    wait_s: float,
    step_s: float,
    step_cpu_s: float,
    publish_s: float,
    whole: bool = True,
) -> dict[str, Json]:
    """``publish_s`` is the time of the last publish before this report. ``whole``: a trace is a rollout. Where a search gives one for each
    of its steps, most end without an answer, and means over them say nothing of its rollouts: they are left out."""
    metrics: dict[str, Json] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "length_mean": stats.length_mean,
        "length_max": stats.length_max,
        "tokens_trained": stats.trained_tokens,
        "pack_efficiency": stats.packing_efficiency,
        "wait_s": wait_s,
        "step_s": step_s,
        "step_cpu_s": step_cpu_s,
    }
    if phase is Phase.RL:
        metrics |= _rollout_metrics(stats) | {"publish_s": publish_s}
    if not whole:
        metrics = {name: value for name, value in metrics.items() if name not in _OF_ROLLOUTS}
    return metrics | {_RENAMED.get(name, name): value for name, value in finalize(report.metrics).items() if name != "tokens"}


def _rollout_metrics(stats: BatchStats) -> dict[str, Json]:
    trained, tokens = stats.trained_staleness, stats.trained_tokens
    accuracy: dict[str, Json] = {} if stats.correct_frac is None else {"accuracy": stats.correct_frac}
    return accuracy | {
        "reward_mean": stats.reward_mean,
        "reward_std": stats.reward_std,
        "truncated_frac": stats.truncated_frac,
        "tokens_masked_stale": stats.masked_tokens,
        "staleness_mean": sum(age * count for age, count in trained.items()) / tokens if tokens else 0.0,
        "staleness_max": max(trained, default=0),
        "staleness_hist": {str(age): count for age, count in stats.staleness.items()},
        "zero_variance_groups": stats.zero_variance_groups,
        "verdicts": dict(sorted(stats.reasons.items())),
    }


def check_mismatch(metrics: Mapping[str, Json], limit: float, step: int) -> None:
    """Raises WeightError when trainer and servers, at one version, are not one policy. Too few tokens of that version say nothing:
    in a step of old groups one unlucky token among three would end the run.

    Rounding alone stays far below any sensible limit (1e-12 in fp32, 1e-3 in bf16). Beyond it the servers hold other weights or another
    model than the trainer, and every importance ratio is noise: the run would go on, and learn nothing, without a word.
    """
    mismatch_kl, fresh_tokens = metrics.get("mismatch_kl"), metrics.get("fresh_tokens")
    if not isinstance(mismatch_kl, float) or not isinstance(fresh_tokens, int | float):
        return
    if mismatch_kl > limit > 0 and fresh_tokens >= MIN_FRESH_TOKENS:
        raise WeightError(
            f"step {step}: mismatch KL {mismatch_kl:.3g} between trainer and servers at the same version is above "
            f"weights.max_mismatch_kl = {limit:g}: the servers generate with another policy; compare model/config.json with the NeoX keys, "
            f"and servers.dtype with precision"
        )
