"""Accuracy against test-time tokens: every strategy, several checkpoints, several values; sigmoids, and the train/test trade-off.

``python tools/experiments/test_time.py --run runs/metarl``, after ``make demo`` and ``prm.py``: ``python -m neox_rl.search`` on vLLM
servers that serve the run's checkpoints. A sigmoid in the logarithm of the budget is fitted to each curve; the budget at which it passes
50 % against the tokens that the checkpoint was trained on is the trade-off of Jones (arXiv 2104.03113).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import searching
from common import COLORS, arguments, error_bars, panels, parser, percent, save, table
from searching import BUDGETS, VALUES, Checkpoint, Spent

from neox_rl.telemetry.stats import Interval

WAYS = ("in context", "best-of-n", "best-first, none", "best-first, prm")
SHOWN = ("16", "32", "64", "128")
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


def half_at(found: Sequence[Interval]) -> float:
    """The budget at which half of the problems are solved, between two measured ones on the log axis; infinite beyond the last."""
    y = [i.mean for i in found]
    for (b0, y0), (b1, y1) in zip(zip(BUDGETS, y, strict=True), list(zip(BUDGETS, y, strict=True))[1:], strict=False):
        if y0 < 0.5 <= y1:
            return float(2 ** (np.log2(b0) + (0.5 - y0) / (y1 - y0) * (np.log2(b1) - np.log2(b0))))
    return float(BUDGETS[0]) if y[0] >= 0.5 else np.inf


def main() -> None:
    p = parser(__doc__, "test_time")
    searching.options(p)
    args = arguments(p)
    if args.quick:
        args.problems, args.attempts = 8, 2
    known = searching.checkpoints(args)
    most = known[-1]
    found = {c.name: asyncio.run(searching.measure(args, c, c is most)) for c in known}
    rows = []
    for checkpoint in known:
        names = [*WAYS[:2], *(f"{s}, prm" for s in args.strategies), *(f"best-first, {v}" for v in VALUES)]
        for name in names if checkpoint is most else [*WAYS, "best-first, oracle"]:
            measured = searching.curve(found[checkpoint.name], name)
            fit = fitted(measured)
            text = f"{100 * fit[0]:.0f} %, {fit[1]:.2f}, {2 ** fit[2]:.0f}"
            at = [percent(measured[BUDGETS.index(int(budget))]) for budget in SHOWN]
            rows.append([checkpoint.name, name, *at, f"{half_at(measured):.0f}", text])
    table(["checkpoint", "search, value", *(f"{b} tokens %" for b in SHOWN), "tokens to 50 %", "sigmoid: top, slope, middle"], rows)
    _trade(known, found)
    _plot(known, found, args.strategies, args.picture)


def _trade(known: Sequence[Checkpoint], found: Found) -> None:
    """The slope of log test tokens to 50 % over log training tokens, where at least two checkpoints get there."""
    for name in WAYS:
        points = [(c.tokens, half_at(searching.curve(found[c.name], name))) for c in known]
        points = [point for point in points if np.isfinite(point[1])]
        if len(points) < 2:
            print(f"{name}: fewer than two checkpoints solve half within {BUDGETS[-1]} tokens")
            continue
        logs = np.log(np.array(points))
        slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
        shown = ", ".join(f"{train / 1e6:.2f} M: {test:.0f}" for train, test in points)
        print(f"{name}: training tokens: test tokens to 50 %: {shown}; slope in log-log {slope:.2f}")
    print()


def _plot(known: Sequence[Checkpoint], found: Found, strategies: Sequence[str], path: Path) -> None:
    figure, axes = panels(3, 5.0)
    lines = dict(zip([c.name for c in known], (":", "--", "-")[-len(known) :], strict=True))
    for color, name in zip(COLORS, WAYS, strict=False):
        for checkpoint in known:
            measured = searching.curve(found[checkpoint.name], name)
            error_bars(axes[0], BUDGETS, measured, f"{name}; {checkpoint.name}", color, linestyle="none")
            x = np.geomspace(BUDGETS[0], BUDGETS[-1], 100)
            axes[0].plot(x, 100 * sigmoid(np.log2(x), *fitted(measured)), color=color, linestyle=lines[checkpoint.name], linewidth=1)
    handles = [axes[0].plot([], [], color=c, label=n)[0] for c, n in zip(COLORS, WAYS, strict=False)]
    handles += [axes[0].plot([], [], color="black", linestyle=line, label=name)[0] for name, line in lines.items()]
    axes[0].legend(handles=handles, frameon=False, fontsize=8)
    axes[0].set_title("checkpoints, with fitted sigmoids")
    most = found[known[-1].name]
    for color, strategy in zip(COLORS, strategies, strict=False):
        error_bars(axes[1], BUDGETS, searching.curve(most, f"{strategy}, prm"), strategy, color)
    axes[1].set_title(f"strategies with the PRM, {known[-1].name}")
    for color, value in zip(COLORS, (*VALUES, "prm"), strict=False):
        error_bars(axes[2], BUDGETS, searching.curve(most, f"best-first, {value}"), value, color)
    axes[2].set_title(f"values for best-first, {known[-1].name}")
    for each in axes:
        each.set_xscale("log", base=2)
        each.set_xlabel("tokens a problem")
        each.set_ylabel("solved, %")
        each.set_ylim(0, 100)
    for each in axes[1:]:
        each.legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main()
