"""Accuracy against test-time tokens: every strategy, several checkpoints, several values; sigmoids, and the train/test trade-off.

``python tools/experiments/test_time.py --run DIR``, a run of ``configs/metarl.yml`` with ``checkpoint_factor: 100``: ``python -m
neox_rl.search`` on vLLM servers that serve its checkpoints; with ``--prm`` a reward model that ``prm.py`` left is one more value. A tree
that has asked all of its nodes is followed by another, as an attempt is. A sigmoid in the logarithm of the budget is fitted to each curve;
the budget at which half of the problems are solved against the tokens that the checkpoint was trained on is the trade-off of Jones (arXiv
2104.03113).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib as mpl
import numpy as np
import searching
from common import COLORS, arguments, budget_axis, error_bars, panels, parser, percent, save, table
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from searching import BEST_OF_N, BUDGETS, IN_CONTEXT, WIDTH, WIDTHS, Checkpoint, Spent, tree

from neox_rl.telemetry.stats import Interval, t975

NARROW, WIDE = tree(WIDTHS[0], "none"), tree(WIDTHS[-1], "none")
WAYS = (IN_CONTEXT, BEST_OF_N, NARROW, WIDE)
SHOWN = (16, 32, 64, 128, 512)
Found = Mapping[str, Mapping[str, Sequence[Spent]]]


def sigmoid(log_budget: np.ndarray, top: float, slope: float, middle: float) -> np.ndarray:
    return top / (1.0 + np.exp(-slope * (log_budget - middle)))


def fitted(found: Sequence[Interval]) -> tuple[float, float, float]:
    """(top, slope, middle) of least squares, the budget in log2: the best of a fine grid of slopes and middles, each with its best top."""
    x, y = np.log2(BUDGETS), np.array([i.mean for i in found])
    best, least = (0.0, 1.0, 0.0), np.inf
    for slope in np.geomspace(0.2, 10.0, 60):
        for middle in np.linspace(-2.0, 12.0, 141):
            shape = sigmoid(x, 1.0, slope, middle)
            top = min(1.0, float(shape @ y / (shape @ shape)))
            error = float(((top * shape - y) ** 2).sum())
            if error < least:
                best, least = (top, float(slope), float(middle)), error
    return best


def half_at(found: Mapping[str, Sequence[Spent]], name: str) -> float:
    """Tokens within which half of the problems are solved, infinite where fewer are: the lower median of what each took.

    Best-of-n has a run for each budget instead of one that goes on: between two of them."""
    if name == BEST_OF_N:
        return between(searching.curve(found, name))
    spent = sorted(s.tokens for s in found[name])
    return spent[(len(spent) - 1) // 2]


def between(found: Sequence[Interval]) -> float:
    """Where a curve over BUDGETS comes to half, on the log axis between two of them; infinite beyond the last. A tree pays in steps as
    wide as its nodes: it has no such line between two budgets."""
    y = [i.mean for i in found]
    for (b0, y0), (b1, y1) in zip(zip(BUDGETS, y, strict=True), list(zip(BUDGETS, y, strict=True))[1:], strict=False):
        if y0 < 0.5 <= y1:
            return float(2 ** (np.log2(b0) + (0.5 - y0) / (y1 - y0) * (np.log2(b1) - np.log2(b0))))
    return float(BUDGETS[0]) if y[0] >= 0.5 else np.inf


def main() -> None:
    p = parser(__doc__, "test_time")
    searching.options(p)
    args = arguments(p)
    searching.quick(args)
    known = searching.checkpoints(args)
    most = known[-1]
    found = {c.name: asyncio.run(searching.measure(args, c, c is most)) for c in reversed(known)}
    rows = []
    for checkpoint in known:
        names = [name for name in found[checkpoint.name] if not name.startswith(f"{BEST_OF_N}, ")]
        for name in [IN_CONTEXT, BEST_OF_N, *(name for name in names if name != IN_CONTEXT)]:
            measured = searching.curve(found[checkpoint.name], name)
            top, slope, middle = fitted(measured)
            at = [percent(measured[BUDGETS.index(budget)]) for budget in SHOWN]
            half = half_at(found[checkpoint.name], name)
            fit = f"{100 * top:.0f} %, {slope:.2f}, {2**middle:.0f}"
            rows.append([checkpoint.name, name, *at, f"{half:.0f}" if np.isfinite(half) else "beyond", fit])
    table(["checkpoint", "search", *(f"{b} tokens %" for b in SHOWN), "tokens to 50 %", "sigmoid: top, slope, middle"], rows)
    for before in [c for c in known if c.name.startswith("SFT")][-1:]:
        last, first, rows = found[most.name], found[before.name], []
        for name in WAYS:
            of = [(searching.run_of(last, name, budget), searching.run_of(first, name, budget), budget) for budget in SHOWN]
            rows.append([name, *(percent(searching.paired(*each)) for each in of)])
        table([f"{most.name} minus {before.name}, points", *(f"{b} tokens" for b in SHOWN)], rows)
    _plot(known, found, args, args.picture)


def alike(found: Mapping[str, Sequence[Spent]], names: Sequence[str]) -> list[list[str]]:
    """Searches that spent the same on every problem, together: they are one curve."""
    same: dict[tuple[float, ...], list[str]] = {}
    for name in names:
        same.setdefault(tuple(s.tokens for s in found[name]), []).append(name)
    return list(same.values())


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """(slope, its 95 % reach, intercept, R^2) of log test tokens over log training tokens; no reach for two points, a line anyway."""
    x, y = np.log(np.array(points)).T
    slope, intercept = np.polyfit(x, y, 1)
    left, spread, free = y - slope * x - intercept, x - x.mean(), len(points) - 2
    reach = t975(free) * float(np.sqrt((left @ left) / free / (spread @ spread))) if free else np.inf
    varies = float(((y - y.mean()) ** 2).sum())
    return float(slope), reach, float(intercept), 1.0 - float(left @ left) / varies if varies else 1.0


def _trade(known: Sequence[Checkpoint], found: Found, axes: Axes) -> None:
    """Test tokens to 50 % over training tokens, of the checkpoints that get there."""
    for color, name in zip(COLORS, WAYS, strict=False):
        points = [(c.tokens, half_at(found[c.name], name)) for c in known]
        points = [point for point in points if BUDGETS[0] < point[1] < np.inf]
        shown = ", ".join(f"{train / 1e6:.2f} M: {test:.0f}" for train, test in points)
        if len(points) < 2:
            print(f"{name}: half of the problems within {BUDGETS[0]} to {BUDGETS[-1]} tokens by fewer than two checkpoints ({shown})")
            continue
        slope, reach, intercept, fit = line(points)
        said = f"{slope:.2f} [{slope - reach:.2f}, {slope + reach:.2f}], R^2 {fit:.2f}"
        print(f"{name}: training tokens: test tokens to 50 %: {shown}; slope in log-log {said}")
        x = np.array([point[0] for point in points])
        axes.plot(x / 1e6, [point[1] for point in points], "o", color=color, markersize=5)
        axes.plot(x / 1e6, np.exp(intercept) * x**slope, color=color, linewidth=1.2, label=f"{name}: slope {slope:.2f}")
    print()
    axes.set(xscale="log", yscale="log", xlabel="million tokens trained on", ylabel="test tokens to solve 50 %")
    axes.set_yticks(BUDGETS[1:-1], [str(budget) for budget in BUDGETS[1:-1]])
    axes.set_xticks([c.tokens / 1e6 for c in known], [f"{c.tokens / 1e6:.1f}" for c in known])
    axes.minorticks_off()
    axes.set_title("train against test compute")
    axes.legend(frameon=False, fontsize=8)


def _plot(known: Sequence[Checkpoint], found: Found, args: argparse.Namespace, path: Path) -> None:
    figure, axes = panels(6, 5.0, rows=2)
    shades = mpl.colormaps["viridis"](np.linspace(0.9, 0.1, len(known)))
    x = np.geomspace(BUDGETS[0], BUDGETS[-1], 100)
    for each, name in zip(axes[:2], (IN_CONTEXT, BEST_OF_N), strict=True):
        for checkpoint, shade in zip(known, shades, strict=True):
            measured = searching.curve(found[checkpoint.name], name)
            error_bars(
                each, BUDGETS, measured, f"{checkpoint.name}: {checkpoint.tokens / 1e6:.1f} M tokens", to_hex(shade), linestyle="none"
            )
            each.plot(x, 100 * sigmoid(np.log2(x), *fitted(measured)), color=shade, linewidth=1.2)
        each.set_title(f"{name}, with fitted sigmoids")
    _trade(known, found, axes[2])
    most = found[known[-1].name]
    for color, width in zip(COLORS, WIDTHS, strict=False):
        for value, dashes in (("none", "-"), ("oracle", "--")):
            name = tree(width, value)
            error_bars(axes[3], BUDGETS, searching.curve(most, name), name, color, linestyle=dashes)
    axes[3].set_title(f"steps sampled at a node, {known[-1].name}")
    for color, value in zip(COLORS, searching.values(args), strict=False):
        error_bars(axes[4], BUDGETS, searching.curve(most, tree(WIDTH, value)), value, color)
    axes[4].set_title(f"values for best-first of {WIDTH}, {known[-1].name}")
    for color, names in zip(COLORS, alike(most, args.strategies), strict=False):
        error_bars(axes[5], BUDGETS, searching.curve(most, names[0]), ", ".join(names), color)
    axes[5].set_title(f"trees of {WIDTH} by the heuristic, {known[-1].name}")
    for each in (*axes[:2], *axes[3:]):
        each.set(ylabel="solved, %", ylim=(0, 102))
        budget_axis(each, BUDGETS, "tokens a problem")
        each.legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, path)


if __name__ == "__main__":
    main()
