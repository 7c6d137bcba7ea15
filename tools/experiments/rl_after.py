"""RL after SFT on solutions and after SFT on search traces: what improves, and does the search grow with difficulty?

``python tools/experiments/rl_after.py`` starts from the policies of ``sft_traces.py`` (trained now if they are not there) and runs the
main job's asynchronous RL on each. Levels of difficulty are quarters of the held-out problems by the exact mean number of steps of a
depth-first search, from the project's own solver.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sft_traces
from common import (
    COLORS,
    LEVELS,
    QUIET,
    Job,
    arguments,
    error_bars,
    levels,
    mean_of,
    panels,
    parser,
    percent,
    run_jobs,
    save,
    table,
    tokens_of,
)

from neox_rl.config.load import load_resolved
from neox_rl.problems.sources import load_problems
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rundata import FIRST, LAST, RunData, load_run
from neox_rl.telemetry.stats import paired_difference_ci

STARTS = sft_traces.COMPARED
ITERATIONS = 300
RL_SETTINGS = {"countdown": ("metarl.rollout.max_new_tokens=40",), "game24": ("metarl.rollout.max_new_tokens=160",)}


def job(args: argparse.Namespace, start: str, seed: int) -> Job:
    """The main job's RL on the policy of ``sft_traces.py``."""
    first = sft_traces.job(args.task, start, args.steps, seed, args.quick)
    settings = (
        *QUIET,
        *sft_traces.TASKS[args.task],
        *RL_SETTINGS[args.task],
        "metarl.warmstart.steps=0",
        f"metarl.warmstart.hf_checkpoint={args.work / first.name / 'model'}",
        f"metarl.seed={seed}",
        f"train_iters={args.iterations}",
        "metarl.evaluation.num_problems=250",
        *(sft_traces.QUICK if args.quick else ()),
    )
    return Job(f"rl-after-{args.task}-{start}-{args.steps}-{args.iterations}-s{seed}", settings)


def levels_of(run: RunData, rates: Path | None) -> dict[str, int]:
    config = load_resolved(run.paths.config)
    return levels(load_problems(config.metarl.problems, config.metarl.seed).heldout, rates)


def per_problem(run: RunData, label: str, mode: str = "sampled") -> list[list[object]]:
    row = run.evaluation(label, mode)
    assert row is not None
    return list(row["per_problem"])


def main() -> None:
    p = parser(__doc__, "rl_after")
    p.add_argument("--task", choices=sft_traces.TASKS, default="countdown")
    p.add_argument("--steps", type=int, default=sft_traces.STEPS[-1], help="steps of the SFT that RL begins from")
    p.add_argument("--iterations", type=int, default=ITERATIONS, help="RL steps of 16 groups of 8")
    p.add_argument("--seeds", type=int, nargs="+", default=[1])
    p.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="what the SFT showed")
    p.add_argument(
        "--main", type=Path, nargs="*", default=[], help="finished runs of one config with other seeds, looked at in the same way"
    )
    p.add_argument("--only-main", action="store_true", help="train nothing")
    p.add_argument(
        "--human-rates",
        type=Path,
        metavar="24.csv",
        help="levels of the Game of 24 by human solve rate (princeton-nlp/tree-of-thought-llm)",
    )
    args = arguments(p)
    if args.only_main and not args.main:
        p.error("--only-main looks at the runs of --main: name at least one")
    tasks = {} if args.only_main else {f"--task {args.task}": args.task}
    tasks |= {f"--main {each}": load_resolved(RunPaths.of(each).config).metarl.problems.source for each in args.main}
    for name, task in tasks.items() if args.human_rates else ():
        if task != "game24":
            p.error(f"--human-rates knows hands of the Game of 24, and {name} is {task}: leave one of them out, or take --task game24")
    if args.quick:
        args.steps, args.iterations, args.seeds, args.starts = 10, 2, [1], ["mixed"]
    found = {} if args.only_main else runs_of(args)
    if args.main:
        found["main job"] = [load_run(each) for each in args.main]
    rows = []
    for start, runs in found.items():
        before, after = ([row for run in runs for row in per_problem(run, label)] for label in (FIRST, LAST))
        gain = paired_difference_ci(before, after)
        rows.append([start, "all", percent(mean_of(before)[0]), percent(mean_of(after)[0]), percent(gain), *_lengths(before, after)])
        for level in range(LEVELS):
            old, new = (_at(runs, label, level, args.human_rates) for label in (FIRST, LAST))
            change = percent(paired_difference_ci(old, new))
            rows.append([start, str(level + 1), percent(mean_of(old)[0]), percent(mean_of(new)[0]), change, *_lengths(old, new)])
    table(["start", "level", "before RL %", "after RL %", "gain, points", "tokens before", "tokens after"], rows)
    _quality(found)
    _plot(found, args.human_rates, args.picture)


def runs_of(args: argparse.Namespace) -> dict[str, list[RunData]]:
    run_jobs([sft_traces.job(args.task, start, args.steps, seed, args.quick) for start in args.starts for seed in args.seeds], args)
    jobs = {(start, seed): job(args, start, seed) for start in args.starts for seed in args.seeds}
    runs = run_jobs(list(jobs.values()), args, side_by_side=False)
    found: dict[str, list[RunData]] = defaultdict(list)
    for (start, _), each in jobs.items():
        found[start].append(runs[each.name])
    return found


def _at(runs: list[RunData], label: str, level: int, rates: Path | None) -> list[list[object]]:
    return [row for run in runs for known in [levels_of(run, rates)] for row in per_problem(run, label) if known[str(row[0])] == level]


def _lengths(before: list[list[object]], after: list[list[object]]) -> list[str]:
    return [f"{i.mean:.1f} [{i.low:.1f}, {i.high:.1f}]" for i in map(tokens_of, (before, after))]


def _quality(found: dict[str, list[RunData]]) -> None:
    names = ("wrong_nodes_frac", "repeated_nodes_frac", "false_goals_per_output", "first_on_path_frac", "mean_nodes", "answer_frac")
    rows = []
    for start, runs in found.items():
        for label in (FIRST, LAST):
            rates = [row["search"] for run in runs if (row := run.evaluation(label, "sampled"))]
            rows.append([start, label, *(f"{sum(r.get(name, 0.0) for r in rates) / len(rates):.2f}" for name in names)])
    table(["start", "evaluated", *names], rows)


def _plot(found: dict[str, list[RunData]], rates: Path | None, path: Path) -> None:
    figure, axes = panels(2, 6.0)
    for start, runs in found.items():
        color = COLORS[[*STARTS, "main job"].index(start)]
        for label, line in ((FIRST, "--"), (LAST, "-")):
            found_at = [_at(runs, label, level, rates) for level in range(LEVELS)]
            name = f"{start}, {'before' if label == FIRST else 'after'} RL"
            x = [level + 1.0 for level in range(LEVELS)]
            error_bars(axes[0], x, [mean_of(rows)[0] for rows in found_at], name, color, linestyle=line)
            error_bars(axes[1], x, [tokens_of(rows) for rows in found_at], name, color, 1.0, linestyle=line)
    axes[0].set_ylabel("held-out accuracy, sampled, %")
    axes[1].set_ylabel("tokens an answer")
    for each in axes:
        each.set_xlabel(f"difficulty: quarters by {'human solve rate' if rates else 'the steps of a blind search'}")
        each.set_xticks(range(1, LEVELS + 1))
        each.set_ylim(bottom=0)
    seeds = max(map(len, found.values()))
    figure.suptitle(f"{'one seed' if seeds == 1 else f'{seeds} seeds pooled'}; 95 % over number multisets", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
