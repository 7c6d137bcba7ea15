"""What the experiments share: whole runs that are made once and kept, served checkpoints, difficulty, intervals, pictures.

Every experiment is one command. What it has finished is kept in ``--work``, so a command that was stopped, or that ``--stop-after`` ended,
goes on where it was when it is given again. Names of what is kept end in a digest of the settings it was made with: other settings make it
anew instead of passing off the old.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neox_rl.guard import guarded_popen, stop
from neox_rl.rollout.vllm_server import ServerSpec, core_ids, server_command, wait_ready
from neox_rl.run.endpoints import free_port
from neox_rl.search.dfs import expected_nodes
from neox_rl.telemetry.rundata import RunData, load_run
from neox_rl.telemetry.stats import Interval, cluster_mean_ci
from neox_rl.types import Problem

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path(__file__).resolve().parent / "pictures"
CORES = tuple(sorted(os.sched_getaffinity(0)))
"""Those that this command may use: ``taskset`` before it leaves some to others."""
START_S = 900.0
RUN_S = 3600.0
NOT_DONE = 75
"""Exit status of a command that ``--stop-after`` ended: give it again."""
LEVELS = 4
COLORS = ("#2c3e50", "#c0392b", "#2980b9", "#27ae60", "#e67e22", "#8e44ad", "#16a085", "#7f8c8d")

# 0.65 M parameters
MODEL = ("num_layers=3", "hidden_size=128", "num_attention_heads=4", "intermediate_size=1152")
QUIET = ("checkpoint_factor=0", "metarl.evaluation.every_steps=0", "metarl.rollout.record_every=0")


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """``--quick`` shows in a minute or two that the experiment runs; its figures mean nothing."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a smoke test: tiny, figures without meaning")
    p.add_argument("--work", type=Path, default=ROOT / "runs/experiments", help="directory for runs, kept from call to call")
    p.add_argument("--picture", type=Path, default=PICTURES / f"{name}.png", help="where the plot goes")
    p.add_argument("--stop-after", type=float, default=1e9, metavar="S", help="begin nothing new after so many seconds")
    return p


def arguments(p: argparse.ArgumentParser) -> argparse.Namespace:
    args = p.parse_args()
    if args.quick:
        args.work, args.picture = args.work / "quick", args.work / "quick" / args.picture.name
    args.work.mkdir(parents=True, exist_ok=True)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.end = time.monotonic() + args.stop_after
    return args


def not_done() -> SystemExit:
    print("not done yet: give the same command again", flush=True)
    return SystemExit(NOT_DONE)


def digest(*facts: object) -> str:
    """Of whatever decides a result, for its name."""
    return hashlib.sha256(json.dumps([str(fact) for fact in facts]).encode()).hexdigest()[:8]


def contents(path: Path) -> str:
    """The sha256 of a file: a run of the same name may have been made anew, and hold other weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Job:
    """One run of ``deepy.py`` with ``configs/<config>.yml``; ``settings`` as for ``--set``. ``data``: a digest of what the program makes
    of them to train or to measure on, where a run that another version of it made is not to pass for this one."""

    title: str
    settings: tuple[str, ...]
    config: str = "metarl"
    data: str = ""

    @property
    def name(self) -> str:
        """Of the run: with a digest of the settings, the config file and the data."""
        facts = (*self.settings, *([self.data] if self.data else []))
        return f"{self.title}-{digest((ROOT / 'configs' / f'{self.config}.yml').read_text(), *facts)}"

    def finished(self, work: Path) -> bool:
        """A run that was stopped is done too, and leaves a summary, but not all of its steps."""
        if not (work / self.name / "summary.json").is_file():
            return False
        status = load_run(work / self.name).status
        return status.phase == "done" and status.step == status.total_steps

    def run(self, work: Path, core: int | None) -> None:
        """With ``core`` everything that computes is on that core, so that another run can have the next one."""
        pinned = () if core is None else (f"metarl.trainer_cores={core}",)
        settings = (*self.settings, *pinned, f"metarl.runs_dir={work}")
        argv = [sys.executable, "deepy.py", "train.py", f"configs/{self.config}.yml", "--name", self.name]
        argv += [word for setting in settings for word in ("--set", setting)]
        if core is not None:
            argv = ["taskset", "-c", str(core), *argv]
        output = work / f"{self.name}.out"
        with output.open("wb") as file:
            done = subprocess.run(
                argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=RUN_S, check=False
            )
        if done.returncode:
            raise SystemExit(f"the run {self.name} ended with status {done.returncode}; see {output} and {work / self.name / 'logs'}")


def run_jobs(jobs: Sequence[Job], args: argparse.Namespace, side_by_side: bool = True) -> dict[str, RunData]:
    """Every job once, one a core at a time (or one over all cores). Raises SystemExit where one fails, after the others, or time was up."""
    cores: list[int | None] = [*CORES] if side_by_side else [None]
    free = list(cores)

    def one(job: Job) -> str:
        if job.finished(args.work) or time.monotonic() > args.end:
            return ""
        core = free.pop()
        print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
        try:
            job.run(args.work, core)
        except SystemExit as failure:
            return str(failure)
        finally:
            free.append(core)
        return ""

    with ThreadPoolExecutor(len(cores)) as pool:
        failures = [failure for failure in pool.map(one, jobs) if failure]
    if failures:
        raise SystemExit("\n".join(failures))
    if not all(job.finished(args.work) for job in jobs):
        raise not_done()
    return {job.name: load_run(args.work / job.name) for job in jobs}


@asynccontextmanager
async def served(model: Path, max_len: int, log: Path, core: int) -> AsyncIterator[str]:
    """The address of a vLLM server with the weights in ``model``, an HF directory, on one core."""
    spec = ServerSpec(log.stem, model, "127.0.0.1", free_port("127.0.0.1"), "float32", max_len, max_num_seqs=256, cores=str(core))
    argv, env = server_command(spec, os.environ)
    at = argv.index("--load-format")
    process = guarded_popen([*argv[:at], *argv[at + 2 :]], env, log, core_ids(spec.cores))
    try:
        await wait_ready(spec, process, START_S)
        yield spec.address
    finally:
        await asyncio.to_thread(stop, process, 20.0)


def difficulty(problem: Problem) -> float:
    """Mean number of steps of a depth-first search in random order until its first goal: exact, by the solver."""
    return expected_nodes(_hand(problem), int(str(problem.meta["target"])), int(str(problem.meta["max_value"])))


def levels(problems: Sequence[Problem], rates: Path | None = None, count: int = LEVELS) -> dict[str, int]:
    """Each problem's level 0 (easy) .. count - 1, levels of equal size by ``difficulty``, or by the human solve rates of a file."""
    known = {} if rates is None else human_rates(rates)
    unsolved = {problem.id: -known[_hand(problem)] if known else difficulty(problem) for problem in problems}
    ranked = sorted(problems, key=lambda p: (unsolved[p.id], p.id))
    return {problem.id: min(count - 1, rank * count // len(ranked)) for rank, problem in enumerate(ranked)}


def human_rates(path: Path) -> dict[tuple[int, ...], float]:
    """Hand of the Game of 24 -> percent of the people who solved it: columns Puzzles and Solved rate of princeton-nlp's 24.csv."""
    with path.open(newline="") as file:
        return {tuple(sorted(map(int, row["Puzzles"].split()))): float(row["Solved rate"].rstrip("%")) for row in csv.DictReader(file)}


def _hand(problem: Problem) -> tuple[int, ...]:
    return tuple(sorted(int(str(n)) for n in problem.meta["numbers"]))  # type: ignore[union-attr]


def mean_of(rows: Sequence[Sequence[object]], keep: Callable[[str], bool] = lambda id: True) -> tuple[Interval, float]:
    """(accuracy, mean tokens) over rows of ``per_problem``: problem, cluster, correct, tokens. Seeds are pooled by their clusters."""
    kept = [row for row in rows if keep(str(row[0]))]
    accuracy = cluster_mean_ci([float(str(row[2])) for row in kept], [str(row[1]) for row in kept])
    return accuracy, float(np.mean([float(str(row[3])) for row in kept]))


def tokens_of(rows: Sequence[Sequence[object]]) -> Interval:
    """Mean tokens of rows of ``per_problem``, with an interval."""
    tokens = [float(str(row[3])) for row in rows]
    return cluster_mean_ci(tokens, [str(row[1]) for row in rows], (0.0, max(tokens) + 1.0))


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, as it stands in the README of the experiments."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def panels(count: int, width: float = 5.2, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    columns = -(-count // rows)
    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, 4.3 * rows), constrained_layout=True, squeeze=False)
    found = list(grid.flat)
    for each in found:
        each.spines[["top", "right"]].set_visible(False)
    return figure, found


def error_bars(
    axes: Axes, x: Sequence[float], found: Sequence[Interval], label: str, color: str, unit: float = 100.0, **style: object
) -> None:
    """Times ``unit`` (percent), with the intervals as bars. Rounding puts some means a hair outside their interval: no bar is negative."""
    middle = unit * np.array([i.mean for i in found])
    reach = unit * np.maximum(0.0, np.array([[i.mean - i.low for i in found], [i.high - i.mean for i in found]]))
    options: Mapping[str, object] = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.4, **style}
    axes.errorbar(x, middle, reach, label=label, color=color, **options)  # type: ignore[arg-type]


def budget_axis(axes: Axes, budgets: Sequence[int], label: str) -> None:
    """Each budget by its number, evenly apart."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel(label)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"plot: {path}", flush=True)
