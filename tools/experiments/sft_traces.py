"""SFT on search traces against SFT on solutions alone, at equal tokens and at equal CPU time: countdown and Game of 24, held out.

``python tools/experiments/sft_traces.py``: each point is a whole run with ``train_iters: 0``, its policy evaluated by a vLLM server on
problems whose numbers are in no training problem. Styles: solutions alone (2); depth-first searches told as they were (3), all alike or of
the main job's mixed quality; the right path with a wrong step before each right one at a rate of 50 % (8); up to 8 wrong attempts, then the
right one (5). CPU time is that of the training rank in its steps, which other work on the machine hardly changes. Each budget is a run of
its own, since the learning rate falls to its end.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import COLORS, QUIET, Job, arguments, error_bars, mean_of, panels, parser, percent, run_jobs, save, table

from neox_rl.telemetry.rundata import FIRST, RunData
from neox_rl.telemetry.stats import Interval

Point: TypeAlias = tuple[float, float, Interval, float]
"""Tokens with a loss, CPU seconds, accuracy, tokens an answer."""

STYLES = {
    "solutions": ("metarl.warmstart.style=solution",),
    "search": ("metarl.warmstart.style=dfs",),
    "mixed": ("metarl.warmstart.style=mixed",),
    "backtrack": ("metarl.warmstart.style=dfs", "metarl.warmstart.telling=backtrack"),
    "revision": ("metarl.warmstart.style=dfs", "metarl.warmstart.telling=revision"),
}
TOLD = {"backtrack": "a wrong step that cannot be won before half of the right ones"}
"""What the settings leave open, for the name of a run."""
TASKS = {
    "countdown": ("seq_length=208", "metarl.rollout.max_new_tokens=160"),  # the main job's problems
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
COMPARED = ("solutions", "mixed")
"""The styles of the Game of 24, and those that ``rl_after.py`` begins from."""
BUDGET = 40
"""Tokens of an answer in the main job."""
STEPS = (325, 1300)
"""Of 2,048 tokens; the second is the main job's warm start."""

QUICK = ("metarl.evaluation.num_problems=8", "metarl.rollout.max_new_tokens=24")


def job(task: str, style: str, steps: int, seed: int, quick: bool = False) -> Job:
    """The run whose policy ``rl_after.py`` uses too: model and problems of ``configs/metarl.yml``."""
    settings = (
        *QUIET,
        *TASKS[task],
        *STYLES[style],
        f"metarl.warmstart.steps={steps}",
        f"metarl.seed={seed}",
        "metarl.evaluation.num_problems=250",
        "metarl.evaluation.samples=1",
        *(QUICK if quick else ()),
    )
    return Job(f"sft-{task}-{style}-{steps}-s{seed}", settings, "traces", TOLD.get(style, ""))


def points(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(task, style, steps, seed) of every run."""
    if args.quick:
        return [("countdown", "mixed", 10, 1)]
    found = [("countdown", style, steps, seed) for seed in args.seeds for steps in args.steps for style in args.styles]
    return found + [("game24", style, args.steps[-1], seed) for seed in args.game24 for style in COMPARED]


def trained(run: RunData) -> tuple[float, float]:
    """(tokens with a loss, CPU seconds of the training rank in its steps)."""
    return float(sum(row["tokens_trained"] for row in run.sft)), float(sum(row["step_cpu_s"] for row in run.sft))


def main() -> None:
    p = parser(__doc__, "sft_traces")
    p.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="optimizer steps of 2,048 tokens, one run each")
    p.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="of countdown")
    p.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of the runs on countdown")
    p.add_argument("--game24", type=int, nargs="*", default=[1], metavar="SEED", help=f"of the longest runs of {', '.join(COMPARED)} on it")
    args = arguments(p)
    wanted = points(args)
    jobs = {point: job(*point, args.quick) for point in wanted}
    runs = run_jobs(list(jobs.values()), args)
    cells: dict[tuple[str, str, int], list[RunData]] = defaultdict(list)
    for point in wanted:
        cells[point[:3]].append(runs[jobs[point].name])
    rows, curves = [], dict[tuple[str, str], list[Point]]()
    for (task, style, steps), found in cells.items():
        greedy, sampled = ([row for run in found for row in _rows(run, mode)] for mode in ("greedy", "sampled"))
        tokens, seconds = np.mean([trained(run) for run in found], axis=0)
        accuracy, length = mean_of(greedy)
        within = mean_of([[*row[:2], float(bool(row[2]) and float(str(row[3])) <= BUDGET), row[3]] for row in greedy])[0]
        seeds = ", ".join(f"{100 * mean_of(_rows(run, 'greedy'))[0].mean:.1f}" for run in found)
        shown = [percent(accuracy), seeds, percent(within), percent(mean_of(sampled)[0]), f"{length:.0f}"]
        rows.append([task, style, str(steps), f"{tokens / 1e6:.2f} M", f"{seconds:.0f}", *shown])
        curves.setdefault((task, style), []).append((tokens, seconds, accuracy, length))
    within_name = f"greedy within {BUDGET} tokens %"
    costs = ("task", "style", "steps", "tokens with a loss", "CPU s")
    table([*costs, "greedy %", "seeds", within_name, "sampled %", "tokens an answer"], rows)
    _plot(curves, args.picture)


def _rows(run: RunData, mode: str) -> list[list[object]]:
    row = run.evaluation(FIRST, mode)
    assert row is not None
    return list(row["per_problem"])


def _plot(curves: dict[tuple[str, str], list[Point]], path: Path) -> None:
    figure, axes = panels(3)
    for (task, style), found in curves.items():
        color = COLORS[list(STYLES).index(style)]
        dashed: dict[str, Any] = {"linestyle": "--", "marker": "s"} if task == "game24" else {}
        accuracies = [row[2] for row in found]
        for each, x in zip(axes, ([row[0] / 1e6 for row in found], [row[1] for row in found], [row[3] for row in found]), strict=True):
            error_bars(each, x, accuracies, f"{style}, {task}", color, **dashed)
    names = ("million tokens with a loss", "CPU seconds of the training rank", "tokens an answer, greedy")
    for each, what in zip(axes, names, strict=True):
        each.set(xlabel=what, ylabel="held-out accuracy, greedy, %")
        each.set_ylim(bottom=0)
        each.set_xlim(left=0)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
