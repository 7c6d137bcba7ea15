"""``summary.json``: the run in some thirty numbers. A number that the run did not get far enough to measure is null, never 0."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from neox_rl.telemetry.events import Event
from neox_rl.telemetry.faults import restarts
from neox_rl.telemetry.jsonl import write_json
from neox_rl.telemetry.rundata import FIRST, LAST, MODES, Row, RunData, load_run, machine
from neox_rl.types import Json


def build_summary(run: RunData) -> dict[str, Json]:
    """The summary of a run, finished or not.

    ``heldout_accuracy_*`` without a mode is the greedy one (the sampled one where greedy was not evaluated): it cannot
    rise by sharpening the distribution alone. ``heldout_solved_in``: of rollouts of several episodes, in which they must be right.
    ``heldout_by_tag_*``: accuracy and tokens under each tag of the prompts, where several discounts have some. ``trainer_idle_frac`` is
    waiting for batches over the time of all RL steps. ``prefix_cache_hit_rate`` is of runs whose rollouts are made by search.
    ``weight_pause_s_median`` is over servers and versions.
    """
    rl, found = run.rl, dict[str, Json]()
    for label, name in ((FIRST, "warmstart"), (LAST, "final")):
        rows = {mode: run.evaluation(label, mode) for mode in MODES}
        main = rows["greedy"] or rows["sampled"]
        found[f"heldout_accuracy_{name}"] = main["accuracy"] if main else None
        for mode, row in rows.items():
            found[f"heldout_accuracy_{name}_{mode}"] = row["accuracy"] if row else None
            found[f"search_{name}_{mode}"] = row.get("search") if row else None
            found[f"heldout_by_tag_{name}_{mode}"] = row.get("by_tag") if row else None
    for mode in MODES:
        gain = run.gain(mode)
        found[f"heldout_accuracy_gain_{mode}"] = gain.row() if gain else None
    found |= {
        "heldout_solved_in": run.solved_in or None,
        "phase": run.status.phase,
        "steps": rl[-1]["step"] if rl else 0,
        "warmstart_steps": run.sft[-1]["step"] if run.sft else 0,
        "max_staleness_bound": _last(rl, "staleness_bound"),
        "max_staleness_seen": max(_values(rl, "staleness_max"), default=None),
        "rollouts_dropped": _last(rl, "rollouts_dropped"),
        "rollouts_trained_twice": _last(rl, "rollouts_trained_twice"),
        "tokens_generated": _last(rl, "tokens_generated"),
        "tokens_trained": _total(rl, "tokens_trained"),
        "tokens_masked_stale": _total(rl, "tokens_masked_stale"),
        "warmstart_tokens_trained": _total(run.sft, "tokens_trained"),
        "mismatch_kl_max": max(_values(rl, "mismatch_kl"), key=abs, default=None),
        "wall_s": run.wall_s,
        "trainer_idle_frac": _idle_frac(rl),
        "prefix_cache_hit_rate": _last([row.get("searched") or {} for row in rl], "prefix_cache_hit_rate"),
        **_weight_updates(run.events),
        "restarts": {**restarts(run.events)},
        "machine": run.summary.get("machine") or machine(),
    }
    return found


def write_summary(run_dir: str) -> dict[str, Json]:
    """Build the summary from what the run has written, write it to the run directory and return it."""
    run = load_run(run_dir)
    summary = build_summary(run)
    write_json(run.paths.summary, summary, indent=2)
    return summary


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def _last(rows: Sequence[Row], key: str) -> Any:
    return next(iter(reversed(_values(rows, key))), None)


def _total(rows: Sequence[Row], key: str) -> Any:
    values = _values(rows, key)
    return sum(values) if values else None


def _idle_frac(rows: Sequence[Row]) -> float | None:
    waited = sum(_values(rows, "wait_s"))
    whole = waited + sum(_values(rows, "step_s")) + sum(_values(rows, "publish_s"))
    return waited / whole if whole > 0 else None


def _weight_updates(events: Sequence[Event]) -> dict[str, Json]:
    pauses = [e for e in events if e.kind == "span" and e.name == "paused"]
    versions = {e.fields.get("version") for e in pauses}
    return {
        "weight_updates": len(versions),
        "weight_pause_s_median": statistics.median(e.dur_ns for e in pauses) / 1e9 if pauses else None,
        "weight_pause_s_max": max((e.dur_ns for e in pauses), default=0) / 1e9 if pauses else None,
    }
