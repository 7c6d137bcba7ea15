"""SFT on search traces against SFT on solutions alone, at equal tokens and equal trainer time: countdown and Game of 24, held out.

``python tools/experiments/sft_traces.py``: each point is a whole run with ``train_iters: 0``, its policy evaluated by a vLLM server on
problems whose numbers are in no training problem. Styles: solutions alone (2); depth-first searches told as they were (3); the right
path with a wrong step before each right one at a rate of 50 % (8); up to 8 wrong attempts, then the right one (5).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import (
    COLORS,
    COUNTDOWN,
    MODEL,
    QUIET,
    Job,
    arguments,
    error_bars,
    mean_of,
    panels,
    parser,
    percent,
    run_jobs,
    save,
    table,
)

from neox_rl.telemetry.rundata import FIRST, RunData
from neox_rl.telemetry.stats import Interval

STYLES = {
    "solutions": ("metarl.warmstart.style=solution",),
    "search": ("metarl.warmstart.style=dfs",),
    "backtrack": ("metarl.warmstart.style=dfs", "metarl.warmstart.telling=backtrack"),
    "revision": ("metarl.warmstart.style=dfs", "metarl.warmstart.telling=revision"),
}
TASKS = {
    "countdown": ("seq_length=208", "metarl.rollout.max_new_tokens=160", *COUNTDOWN),
    "game24": (
        "seq_length=304",
        "metarl.rollout.max_new_tokens=288",
        "metarl.problems.source=game24",
        "metarl.problems.num_numbers=4",
        "metarl.problems.max_number=13",
        "metarl.problems.max_value=60",
        "metarl.problems.heldout_frac=0.2",
    ),
}
COMPARED = ("solutions", "search")
"""The styles that are also trained for longer, and on the Game of 24."""
TOKENS_PER_STEP = 1024
LONG = 1600


def job(task: str, style: str, steps: int, seed: int) -> Job:
    """The run whose policy ``rl_after.py`` and ``test_time.py`` use too."""
    settings = (
        *MODEL,
        *QUIET,
        *TASKS[task],
        *STYLES[style],
        f"metarl.warmstart.steps={steps}",
        f"metarl.warmstart.tokens_per_step={TOKENS_PER_STEP}",
        f"metarl.seed={seed}",
        "train_iters=0",
        "metarl.evaluation.num_problems=250",
        "metarl.evaluation.samples=1",
    )
    return Job(f"sft-{task}-{style}-{steps}-s{seed}", settings)


def points(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(task, style, steps, seed) of every run."""
    if args.quick:
        return [("countdown", style, 20, 1) for style in ("solutions", "search")]
    short, long = args.steps
    found = [("countdown", style, short, seed) for seed in args.seeds for style in STYLES]
    found += [("countdown", style, long, seed) for seed in args.long_seeds for style in COMPARED]
    return found + [("game24", style, short, seed) for seed in args.game24 for style in COMPARED]


def trained(run: RunData) -> tuple[float, float]:
    """(tokens that the trainer saw, seconds that it was busy with them)."""
    return float(sum(row["tokens_trained"] for row in run.sft)), float(sum(row["step_s"] for row in run.sft))


def main() -> None:
    p = parser(__doc__, "sft_traces")
    p.add_argument("--steps", type=int, nargs=2, default=[600, LONG], help=f"optimizer steps of {TOKENS_PER_STEP} tokens, short and long")
    p.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of the short runs")
    p.add_argument("--long-seeds", type=int, nargs="*", default=[1], help="of the long runs of solutions and search")
    p.add_argument("--game24", type=int, nargs="*", default=[1], help="of the short runs on the Game of 24")
    args = arguments(p)
    wanted = points(args)
    runs = run_jobs([job(*point) for point in wanted], args)
    cells: dict[tuple[str, str, int], list[RunData]] = defaultdict(list)
    for point in wanted:
        cells[point[:3]].append(runs[job(*point).name])
    rows, curves = [], dict[tuple[str, str], list[tuple[float, float, Interval, float]]]()
    for (task, style, _), found in cells.items():
        greedy, sampled = ([row for run in found for row in _rows(run, mode)] for mode in ("greedy", "sampled"))
        tokens, seconds = np.mean([trained(run) for run in found], axis=0)
        accuracy, length = mean_of(greedy)
        rows.append(
            [task, style, f"{tokens / 1e6:.2f} M", f"{seconds:.0f} s", percent(accuracy), percent(mean_of(sampled)[0]), f"{length:.0f}"]
        )
        curves.setdefault((task, style), []).append((tokens, seconds, accuracy, length))
    table(["task", "style", "tokens trained", "trainer busy", "held out, greedy %", "sampled %", "tokens an answer"], rows)
    _plot(curves, args.picture)


def _rows(run: RunData, mode: str) -> list[list[object]]:
    row = run.evaluation(FIRST, mode)
    assert row is not None
    return list(row["per_problem"])


def _plot(curves: dict[tuple[str, str], list[tuple[float, float, Interval, float]]], path: Path) -> None:
    figure, axes = panels(3)
    for (task, style), found in curves.items():
        color = COLORS[list(STYLES).index(style)]
        dashed = {"linestyle": "--", "marker": "s"} if task == "game24" else {}
        label = f"{style}, {task}"
        accuracies = [row[2] for row in found]
        for each, x in zip(axes, ([row[0] / 1e6 for row in found], [row[1] for row in found], [row[3] for row in found]), strict=True):
            error_bars(each, x, accuracies, label, color, **dashed)
    for each, what in zip(axes, ("million tokens trained", "seconds that the trainer was busy", "tokens an answer, greedy"), strict=True):
        each.set_xlabel(what)
        each.set_ylabel("held-out accuracy, greedy, %")
        each.set_ylim(bottom=0)
        each.set_xlim(left=0)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
