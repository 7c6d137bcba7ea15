"""What a strategy and a value are worth without a model: Game of 24 over all legal steps, accuracy against tokens.

``python tools/experiments/without_policy.py`` runs ``python -m neox_rl.search`` without a server; a step costs its words. The rows may
be any file of hands (``--hands``); by default they are the held-out hands of ``configs/game24.yml``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import COLORS, ROOT, arguments, budget_axis, digest, error_bars, human_rates, panels, parser, percent, save, table

from neox_rl.config.load import load_config
from neox_rl.problems.make_rows import write_rows
from neox_rl.problems.sources import load_problems
from neox_rl.telemetry.stats import Interval, cluster_mean_ci

STRATEGIES = ("bfs", "dfs", "beam", "best-first", "astar", "mcts")
VALUES = ("none", "heuristic", "monte-carlo", "oracle")
BUDGETS = (48, 96, 192, 384, 768, 1536, 3072)
SHOWN = (96, 192, 384, 768, 3072)
PEOPLE = (("dfs", "heuristic"), ("best-first", "none"), ("best-first", "oracle"))
FIFTHS = 5
SEARCHES = [*((s, "heuristic") for s in STRATEGIES), *(("best-first", v) for v in VALUES if v != "heuristic"), ("mcts", "monte-carlo")]


def rows(args: argparse.Namespace) -> Path:
    if args.hands is not None:
        return Path(args.hands)
    files = [ROOT / "configs/game24.yml", ROOT / "configs/models/llama_tiny.yml"]
    config, path = load_config(files).metarl, Path(args.work, "without_policy.rows.jsonl")
    write_rows(path, load_problems(config.problems, config.seed).heldout[: args.problems])
    return path


def searched(args: argparse.Namespace, path: Path, strategy: str, value: str) -> list[dict[str, Any]]:
    """The lines of ``python -m neox_rl.search``."""
    how = ["--strategy", strategy, "--value", value, "--playouts", "4", "--budget-nodes", "100000", "--budget-tokens", str(BUDGETS[-1])]
    out = Path(args.work, f"without_policy-{strategy}-{value}-{digest(*how, path.read_text())}.jsonl")
    if not out.is_file():
        argv = [sys.executable, "-m", "neox_rl.search", *how, "--problems", str(path)]
        out.write_bytes(subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return [json.loads(line) for line in out.read_text().splitlines()]


def within(lines: Sequence[Mapping[str, Any]]) -> list[Interval]:
    """Share solved within each of BUDGETS, read off the run with the largest: a search with a smaller budget is the beginning of this one.
    With the value monte-carlo that holds to within its last rounds, whose playouts are cut to what is left of the budget: what is read is
    what the large budget's search had found by then."""
    spent = [line["tokens"] if line["solved"] else np.inf for line in lines]
    return [cluster_mean_ci([float(s <= budget) for s in spent], [line["id"] for line in lines]) for budget in BUDGETS]


def by_people(args: argparse.Namespace) -> dict[tuple[str, str], list[Interval]]:
    """Thousands of tokens until solved, by fifths of the hands as people solve them: easy first."""
    rates = human_rates(args.human_rates)
    path = Path(args.work, "without_policy-people.rows.jsonl")
    path.write_text("".join(json.dumps({"id": " ".join(map(str, hand)), "numbers": hand, "target": 24}) + "\n" for hand in rates))
    ranked = sorted(rates, key=lambda hand: (-rates[hand], hand))
    level = {" ".join(map(str, hand)): rank * FIFTHS // len(ranked) for rank, hand in enumerate(ranked)}
    found: dict[tuple[str, str], list[Interval]] = {}
    for key in PEOPLE:
        lines = searched(args, path, *key)
        parts = [[line for line in lines if level[line["id"]] == fifth] for fifth in range(FIFTHS)]
        bounds = (0.0, BUDGETS[-1] / 1000)
        found[key] = [cluster_mean_ci([x["tokens"] / 1000 for x in part], [x["id"] for x in part], bounds) for part in parts]
        print(f"{' '.join(key)}: {sum(line['solved'] for line in lines)} of {len(lines)} hands solved within {BUDGETS[-1]} tokens")
    names = [f"fifth {fifth + 1}" for fifth in range(FIFTHS)]
    shown = [[*key, *(f"{1000 * i.mean:.0f} [{1000 * i.low:.0f}, {1000 * i.high:.0f}]" for i in each)] for key, each in found.items()]
    people = [f"{np.mean([rates[hand] for hand in ranked if level[' '.join(map(str, hand))] == fifth]):.1f}" for fifth in range(FIFTHS)]
    table(["strategy", "value", *names], [["people who solve it, %", "", *people], *shown])
    return found


def main() -> None:
    p = parser(__doc__, "without_policy")
    p.add_argument("--hands", type=Path, metavar="FILE.jsonl", help="rows {numbers, target}, instead of the config's")
    p.add_argument("--problems", type=int, default=150, help="held-out hands")
    p.add_argument(
        "--human-rates", type=Path, metavar="24.csv", help="of princeton-nlp/tree-of-thought-llm: is search longer where people fail?"
    )
    args = arguments(p)
    if args.quick:
        args.problems = 10
    path = rows(args)
    found = {key: within(searched(args, path, *key)) for key in SEARCHES}
    people = {} if args.human_rates is None else by_people(args)
    cells = [[*key, *(percent(each[BUDGETS.index(b)]) for b in SHOWN)] for key, each in found.items()]
    table(["strategy", "value", *(f"{b} tokens %" for b in SHOWN)], cells)
    figure, (left, right, *more) = panels(3 if people else 2, 5.2)
    for color, strategy in zip(COLORS, STRATEGIES, strict=False):
        error_bars(left, BUDGETS, found[strategy, "heuristic"], strategy, color)
    for color, value in zip(COLORS, VALUES, strict=False):
        error_bars(right, BUDGETS, found["best-first", value], value, color)
    left.set_title("strategies, by the heuristic")
    right.set_title("values, for best-first")
    for color, ((strategy, value), measured), axes in zip(COLORS, people.items(), more * len(people), strict=False):
        error_bars(axes, range(1, FIFTHS + 1), measured, f"{strategy}, {value}", color, unit=1.0)
    for axes in more:
        axes.set(title="search length by human difficulty", ylabel="thousand tokens until solved", xticks=range(1, FIFTHS + 1))
        axes.set(xlabel="all 1,362 hands in fifths by human solve rate, hardest last")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        budget_axis(axes, BUDGETS, "tokens a hand, those of the value included")
        axes.set_ylabel("hands solved, %")
        axes.set_ylim(0, 102)
        axes.legend(frameon=False, fontsize=8)
    save(figure, args.picture)


if __name__ == "__main__":
    main()
