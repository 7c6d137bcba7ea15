"""What a strategy and a value are worth without a model: Game of 24 over all legal steps, accuracy against tokens.

``python tools/experiments/without_policy.py`` runs ``python -m neox_rl.search`` without a server; a step costs its words. The rows may
be any file of hands (``--hands``); by default they are the held-out hands of ``configs/game24.yml``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import COLORS, ROOT, arguments, error_bars, panels, parser, percent, save, table

from neox_rl.config.load import load_config
from neox_rl.problems.make_rows import write_rows
from neox_rl.problems.sources import load_problems
from neox_rl.telemetry.stats import Interval, cluster_mean_ci

STRATEGIES = ("bfs", "dfs", "beam", "best-first", "astar", "mcts")
VALUES = ("none", "heuristic", "monte-carlo", "oracle")
BUDGETS = (48, 96, 192, 384, 768, 1536, 3072)
SHOWN = (96, 192, 384, 768, 3072)
SEARCHES = [*((s, "heuristic") for s in STRATEGIES), *(("best-first", v) for v in VALUES if v != "heuristic"), ("mcts", "monte-carlo")]


def rows(args: argparse.Namespace) -> Path:
    if args.hands is not None:
        return Path(args.hands)
    files = [ROOT / "configs/game24.yml", ROOT / "configs/models/llama_tiny.yml"]
    config, path = load_config(files).metarl, Path(args.work, "without_policy.rows.jsonl")
    write_rows(path, load_problems(config.problems, config.seed).heldout[: args.problems])
    return path


def searched(args: argparse.Namespace, path: Path, strategy: str, value: str) -> list[Interval]:
    """Share solved within each of BUDGETS: a search with a smaller budget is the beginning of this one."""
    out = Path(args.work, f"without_policy-{strategy}-{value}.jsonl")
    if not out.is_file():
        argv = [
            sys.executable,
            "-m",
            "neox_rl.search",
            "--strategy",
            strategy,
            "--value",
            value,
            "--problems",
            str(path),
            "--playouts",
            "4",
        ]
        argv += ["--budget-nodes", "100000", "--budget-tokens", str(BUDGETS[-1])]
        lines = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        out.write_bytes(lines)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    spent = [line["tokens"] if line["solved"] else np.inf for line in found]
    return [cluster_mean_ci([float(s <= budget) for s in spent], [line["id"] for line in found]) for budget in BUDGETS]


def main() -> None:
    p = parser(__doc__, "without_policy")
    p.add_argument("--hands", type=Path, metavar="FILE.jsonl", help="rows {numbers, target}, instead of the config's")
    p.add_argument("--problems", type=int, default=150, help="held-out hands")
    args = arguments(p)
    if args.quick:
        args.problems = 10
    path = rows(args)
    found = {key: searched(args, path, *key) for key in SEARCHES}
    cells = [[*key, *(percent(each[BUDGETS.index(b)]) for b in SHOWN)] for key, each in found.items()]
    table(["strategy", "value", *(f"{b} tokens %" for b in SHOWN)], cells)
    figure, (left, right) = panels(2, 5.2)
    for color, strategy in zip(COLORS, STRATEGIES, strict=False):
        error_bars(left, BUDGETS, found[strategy, "heuristic"], strategy, color)
    for color, value in zip(COLORS, VALUES, strict=False):
        error_bars(right, BUDGETS, found["best-first", value], value, color)
    left.set_title("strategies, by the heuristic")
    right.set_title("values, for best-first")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens a hand, those of the value included")
        axes.set_ylabel("hands solved, %")
        axes.set_ylim(0, 102)
        axes.legend(frameon=False, fontsize=8)
    save(figure, args.picture)


if __name__ == "__main__":
    main()
