"""Search in one context by the trained policy against explicit tree search with the same policy and the same tokens: which wins where.

``python tools/experiments/in_context.py --run DIR``, a run of ``configs/metarl.yml`` with ``checkpoint_factor: 100``, after
``test_time.py`` or instead of it: the measurements are shared. In context the policy writes its whole search, dead ends and ways back
included, and begins again when it was wrong; explicit search asks it for one step at a time and keeps the tree itself; it begins again
when it has asked every node. Both stop at the first right answer, which can be checked, and both pay for writing it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import searching
from common import COLORS, LEVELS, arguments, budget_axis, error_bars, levels, panels, parser, percent, save, table
from searching import BEST_OF_N, BUDGETS, IN_CONTEXT, WIDTHS, Checkpoint, Spent, tree

from neox_rl.telemetry.stats import Interval

EXPLICIT = (BEST_OF_N, *(tree(width, value) for value in ("none", "oracle") for width in (WIDTHS[0], WIDTHS[-1])))
SHOWN = (16, 32, 64, 128, 256, 512)
AT = 128
"""The budget by difficulty."""


def main() -> None:
    p = parser(__doc__, "in_context")
    searching.options(p)
    args = arguments(p)
    searching.quick(args)
    known, problems = searching.checkpoints(args), searching.heldout(args)
    found = {c.name: asyncio.run(searching.measure(args, c, c is known[-1])) for c in reversed(known)}
    level = levels(problems)
    rows = []
    for checkpoint in known:
        measured = found[checkpoint.name]
        for name in EXPLICIT:
            cells = [percent(_lead(measured, name, budget)) for budget in SHOWN]
            rows.append([checkpoint.name, name, *cells])
    table(["checkpoint", "in context minus, points", *(f"{budget} tokens" for budget in SHOWN)], rows)
    last, rows = found[known[-1].name], []
    for budget in (32, AT):
        for number in range(LEVELS):
            keep = {id for id, each in level.items() if each == number}
            cells = [percent(searching.at(last, name, budget, keep)) for name in (IN_CONTEXT, *EXPLICIT)]
            rows.append([str(budget), str(number + 1), *cells, percent(_lead(last, EXPLICIT[-1], budget, keep))])
    print(f"{known[-1].name}, by difficulty:\n")
    table(["tokens", "level", IN_CONTEXT, *EXPLICIT, f"in context minus {EXPLICIT[-1]}, points"], rows)
    _plot(known, found, level, args.picture)


def _plot(known: Sequence[Checkpoint], found: Mapping[str, Mapping[str, Sequence[Spent]]], level: Mapping[str, int], path: Path) -> None:
    shown = [known[i] for i in sorted({0, len(known) // 2, len(known) - 1})]  # more would be too small to read
    figure, axes = panels(len(shown) + 1, 5.6, rows=2)
    for each, checkpoint in zip(axes, shown, strict=False):
        for color, name in zip(COLORS, (IN_CONTEXT, *EXPLICIT), strict=False):
            error_bars(each, BUDGETS, searching.curve(found[checkpoint.name], name), name, color)
        budget_axis(each, BUDGETS, "tokens a problem")
        each.set_title(checkpoint.name)
    for number, (color, name) in enumerate(zip(COLORS, (IN_CONTEXT, *EXPLICIT), strict=False)):
        keeps = [{id for id, each in level.items() if each == at} for at in range(LEVELS)]
        x = [at + 0.06 * number for at in range(1, LEVELS + 1)]  # beside one another, or the bars hide one another
        error_bars(axes[-1], x, [searching.at(found[known[-1].name], name, AT, keep) for keep in keeps], name, color)
    axes[-1].set(title=f"{known[-1].name}, {AT} tokens", xlabel="difficulty: quarters by the steps of a blind search")
    axes[-1].set_xticks(range(1, LEVELS + 1))
    for each in axes:
        each.set(ylabel="solved, %", ylim=(0, 102))
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


def _lead(measured: Mapping[str, Sequence[Spent]], name: str, budget: int, keep: set[str] | None = None) -> Interval:
    """Solved in context minus solved by explicit search."""
    kept = [s for s in measured[IN_CONTEXT] if keep is None or s.problem in keep]
    return searching.paired(kept, searching.run_of(measured, name, budget), budget)


if __name__ == "__main__":
    main()
