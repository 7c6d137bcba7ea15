"""Search in one context by the trained policy against explicit tree search with the same policy and the same tokens: which wins where.

``python tools/experiments/in_context.py --run runs/metarl``, after ``test_time.py`` or instead of it: the measurements are shared. In
context the policy writes its whole search, dead ends and ways back included, and begins again when it was wrong; explicit search asks it
for one step at a time and keeps the tree itself. Both stop at the first right answer, which can be checked.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import searching
from common import COLORS, LEVELS, arguments, error_bars, levels, panels, parser, percent, save, table
from searching import BUDGETS, IN_CONTEXT

from neox_rl.telemetry.stats import Interval, paired_difference_ci

EXPLICIT = ("best-of-n", "best-first, none", "best-first, prm", "best-first, oracle")
SHOWN = (16, 32, 64, 128)


def main() -> None:
    p = parser(__doc__, "in_context")
    searching.options(p)
    args = arguments(p)
    if args.quick:
        args.problems, args.attempts = 8, 2
    known, problems = searching.checkpoints(args), searching.heldout(args)
    found = {c.name: asyncio.run(searching.measure(args, c, c is known[-1])) for c in known}
    level = levels(problems)
    rows = []
    for checkpoint in known:
        measured = found[checkpoint.name]
        for name in EXPLICIT:
            cells = [percent(_lead(measured, name, budget)) for budget in SHOWN]
            rows.append([checkpoint.name, name, *cells])
    table(["checkpoint", "in context minus, points", *(f"{budget} tokens" for budget in SHOWN)], rows)
    last, rows = found[known[-1].name], []
    for budget in SHOWN[1:3]:
        for number in range(LEVELS):
            keep = {id for id, each in level.items() if each == number}
            cells = [percent(searching.at(last, name, budget, keep)) for name in (IN_CONTEXT, *EXPLICIT)]
            rows.append([str(budget), str(number + 1), *cells])
    print(f"{known[-1].name}, by difficulty:\n")
    table(["tokens", "level", IN_CONTEXT, *EXPLICIT], rows)
    figure, axes = panels(len(known) + 1, 4.6)
    for each, checkpoint in zip(axes, known, strict=False):
        for color, name in zip(COLORS, (IN_CONTEXT, *EXPLICIT), strict=False):
            error_bars(each, BUDGETS, searching.curve(found[checkpoint.name], name), name, color)
        each.set_xscale("log", base=2)
        each.set_title(checkpoint.name)
        each.set_xlabel("tokens a problem")
    for color, name in zip(COLORS, (IN_CONTEXT, *EXPLICIT), strict=False):
        keeps = [{id for id, each in level.items() if each == number} for number in range(LEVELS)]
        error_bars(axes[-1], range(1, LEVELS + 1), [searching.at(last, name, 32, keep) for keep in keeps], name, color)
    axes[-1].set_title(f"{known[-1].name}, 32 tokens")
    axes[-1].set_xlabel("difficulty: quarters by the steps of a blind search")
    axes[-1].set_xticks(range(1, LEVELS + 1))
    for each in axes:
        each.set_ylabel("solved, %")
        each.set_ylim(0, 100)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, args.picture)


def _lead(measured: dict[str, list[searching.Spent]], name: str, budget: int) -> Interval:
    """Solved in context minus solved by explicit search, problem by problem."""
    other = measured[f"best-of-n, {budget}" if name == "best-of-n" else name]
    ours, theirs = ([[s.problem, s.cluster, s.tokens <= budget] for s in spent] for spent in (measured[IN_CONTEXT], other))
    return paired_difference_ci(theirs, ours)


if __name__ == "__main__":
    main()
