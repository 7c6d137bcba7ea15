"""The plots of the report as inline SVG.

Colors are written as stand-ins that become CSS variables of the page, so one plot suits a light and a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from neox_rl.telemetry.rundata import Row, RunData

COLORS: Final = {
    "ink": "#0a0b01",
    "muted": "#0a0b02",
    "grid": "#0a0b03",
    "blue": "#0a0b04",
    "orange": "#0a0b05",
    "green": "#0a0b06",
    "red": "#0a0b07",
}
MAX_POINTS: Final = 600
STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": COLORS["ink"],
    "axes.edgecolor": COLORS["grid"],
    "axes.labelcolor": COLORS["muted"],
    "xtick.color": COLORS["grid"],
    "ytick.color": COLORS["grid"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Chart:
    """One plot with its heading and a caption that says how to read it."""

    title: str
    caption: str
    svg: Markup


def charts(run: RunData) -> list[Chart]:
    """Every plot that the run has data for, in the order of the report."""
    kept = [
        _chart(_reward_title(run), REWARD, _reward, run) if _has(run.rl, "reward_mean") else None,
        _chart("What searches found", SEARCHED, _searched, run) if _has(run.rl, "searched") else None,
        _chart(_heldout_title(run), HELDOUT, _heldout, run) if run.evaluations else None,
        _chart("Found by each episode", EPISODES, _episodes, run) if _several(run.evaluations) else None,
        _chart("Warm start", WARMSTART, _warmstart, run) if _has(run.sft, "loss") else None,
        _chart("Staleness of the trained tokens", STALENESS, _staleness, run) if _has(run.rl, "staleness_hist") else None,
        _chart("Length of the attempts", LENGTH, _length, run) if _has(run.rl, "length_mean") else None,
        _chart("Entropy of the policy", ENTROPY, _entropy, run) if _has(run.rl, "entropy") else None,
        _chart("Mismatch between trainer and engine", MISMATCH, _mismatch, run) if _has(run.rl, "mismatch_kl") else None,
        _chart("Importance ratios", RATIO, _ratio, run) if _has(run.rl, "ratio_mean") else None,
    ]
    return [chart for chart in kept if chart is not None]


REWARD = "What the policy earned on the problems it practiced on, per optimizer step (faint) and smoothed."
SEARCHED = "Problems that a step's searches solved; generated tokens that are trained. Preferred: pairs that the policy ranks right."
HELDOUT = "Share of never-trained problems solved, with 95 % intervals that respect problems sharing their numbers."
EPISODES = "Share of never-trained problems that a rollout got right in one of its first k attempts, with 95 % intervals."
WARMSTART = "Loss per token while the model imitated demonstrations, before any RL."
STALENESS = "Optimizer steps between the weights that wrote a token and those trained on it. Tokens beyond the bound get no gradient."
LENGTH = "Tokens of an attempt: the mean and the longest of each step. The dashed line, right, is the share that was cut off."
ENTROPY = "How undecided the policy is, in nats a token. A fall to zero would mean that it stopped exploring."
MISMATCH = "Difference between the log-probabilities of the two programs at equal weights. It should stay at rounding error."
RATIO = "Mean ratio of the trained policy to the one that wrote the tokens (1 is expected), and effective sample size."


def _chart(title: str, caption: str, draw: Callable[[Axes, RunData], None], run: RunData) -> Chart:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, run)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, caption, _inline(buffer.getvalue(), title))


def _inline(svg: str, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="\\1">', svg, count=1
    )
    for name, stand_in in COLORS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(svg)  # matplotlib escapes every text it draws


def _has(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def _series(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Steps and values, null left out, averaged in blocks where there are more than MAX_POINTS."""
    pairs = np.array([(row["step"], row[key]) for row in rows if row.get(key) is not None], dtype=np.float64).reshape(-1, 2)
    block = -(-len(pairs) // MAX_POINTS) if len(pairs) else 1
    if block > 1:
        pairs = np.array([pairs[i : i + block].mean(axis=0) for i in range(0, len(pairs), block)])
    return pairs[:, 0], pairs[:, 1]


def _smooth(y: Any) -> Any:
    """Centered moving average over about a fifteenth of the run, with smaller windows at the ends."""
    half = max(len(y) // 30, 1)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _line(axes: Axes, rows: Sequence[Row], key: str, color: str, label: str) -> None:
    """The raw values faint, the smoothed ones strong; with few steps only the values, marked."""
    x, y = _series(rows, key)
    if len(x) == 0:
        return
    if len(x) < 12:
        axes.plot(x, y, color=COLORS[color], label=label, marker="o", markersize=3.5)
        return
    axes.plot(x, y, color=COLORS[color], alpha=0.28, linewidth=0.9)
    axes.plot(x, _smooth(y), color=COLORS[color], label=label)


def _finish(axes: Axes, xlabel: str, *, legend: bool = True) -> None:
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.margins(x=0.02)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.0, handlelength=1.4, fontsize=8.5)


def _reward_title(run: RunData) -> str:
    return "Reward and training accuracy" if _has(run.rl, "accuracy") else "Reward"


def _reward(axes: Axes, run: RunData) -> None:
    verified = _has(run.rl, "accuracy")
    same = all(row.get("accuracy") is None or row.get("reward_mean") == row["accuracy"] for row in run.rl)
    unit = "reward (1 for a correct answer)" if same else "reward"
    _line(axes, run.rl, "reward_mean", "blue", unit if verified else "reward (nats)")
    if not same:
        _line(axes, run.rl, "accuracy", "green", "correct answers")
    _finish(axes, "RL step")


def _searched(axes: Axes, run: RunData) -> None:
    rows = [
        {
            "step": row["step"],
            "solved": found["solved_frac"],
            "preferred": row.get("preferred_frac"),
            "trained": found["tokens_trained"] / found["tokens_paid"] if found["tokens_paid"] else None,
        }
        for row in run.rl
        if (found := row.get("searched"))
    ]
    for key, color in (("solved", "green"), ("trained", "muted"), ("preferred", "blue")):
        _line(axes, rows, key, color, key)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, "RL step")


def _heldout_title(run: RunData) -> str:
    return f"Held-out accuracy, right in {run.solved_in}" if run.solved_in else "Held-out accuracy"


def _heldout(axes: Axes, run: RunData) -> None:
    for mode, color, shift in (("greedy", "blue", -0.25), ("sampled", "orange", 0.25)):
        rows = sorted((e for e in run.evaluations if e["mode"] == mode), key=lambda e: e["step"])
        if not rows:
            continue
        x = np.array([e["step"] for e in rows], dtype=np.float64) + shift
        mean, low, high = (np.array([e["accuracy"][k] for e in rows], dtype=np.float64) for k in ("mean", "ci95_low", "ci95_high"))
        span = np.vstack([np.maximum(mean - low, 0.0), np.maximum(high - mean, 0.0)])
        axes.errorbar(x, mean, yerr=span, color=COLORS[color], label=mode, marker="o", markersize=4, capsize=3, elinewidth=1.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, f"RL step (0: {run.first})")


def _several(evaluations: Sequence[Row]) -> bool:
    """Whether rollouts had more than one episode."""
    return any(len(row.get("found_by") or ()) > 1 for row in evaluations)


def _episodes(axes: Axes, run: RunData) -> None:
    for label, name, color in (("warmstart", run.first, "muted"), ("final", "after RL", "blue")):
        row = run.evaluation(label, "sampled") or run.evaluation(label, "greedy")
        if row is None or not row.get("found_by"):
            continue
        mean, low, high = (np.array([found[k] for found in row["found_by"]]) for k in ("mean", "ci95_low", "ci95_high"))
        span = np.vstack([np.maximum(mean - low, 0.0), np.maximum(high - mean, 0.0)])
        x = np.arange(1, len(mean) + 1)
        axes.errorbar(
            x, mean, yerr=span, color=COLORS[color], label=f"{name}, {row['mode']}", marker="o", markersize=4, capsize=3, elinewidth=1.1
        )
    axes.set_ylim(0.0, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, "episode k")


def _warmstart(axes: Axes, run: RunData) -> None:
    _line(axes, run.sft, "loss", "blue", "loss")
    _finish(axes, "warm-start step", legend=False)


def _staleness(axes: Axes, run: RunData) -> None:
    total: dict[int, int] = {}
    for row in run.rl:
        for key, count in (row.get("staleness_hist") or {}).items():
            total[int(key)] = total.get(int(key), 0) + int(count)
    bound = next((row["staleness_bound"] for row in reversed(run.rl) if row.get("staleness_bound") is not None), None)
    ages = list(range(max(total, default=0) + 1))
    whole = max(sum(total.values()), 1)
    shares = [total.get(age, 0) / whole for age in ages]
    beyond = [bound is not None and age > bound for age in ages]
    bars = axes.bar(ages, shares, width=0.62, color=[COLORS["muted" if late else "blue"] for late in beyond])
    axes.bar_label(bars, labels=[f"{100 * s:.1f} %" for s in shares], color=COLORS["muted"], fontsize=8, padding=2)
    if bound is not None:
        axes.axvline(bound + 0.5, color=COLORS["red"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(f" bound {bound}", (bound + 0.5, 0.94), xycoords=("data", "axes fraction"), color=COLORS["red"], fontsize=8.5)
        axes.set_xlim(-0.6, max(ages[-1] + 0.6, bound + 1.4))
    axes.set_ylim(0, max(shares) * 1.15 + 1e-9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _finish(axes, "staleness, optimizer steps", legend=False)


def _length(axes: Axes, run: RunData) -> None:
    _line(axes, run.rl, "length_mean", "blue", "mean")
    _line(axes, run.rl, "length_max", "muted", "longest")
    axes.set_ylim(bottom=0)
    x, y = _series(run.rl, "truncated_frac")
    if len(x):
        other = axes.twinx()
        other.grid(visible=False)
        other.plot(x, _smooth(y), color=COLORS["red"], linewidth=1.1, linestyle=(0, (4, 3)))
        other.set_ylim(0, max(0.05, float(y.max()) * 1.3))
        other.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.plot([], [], color=COLORS["red"], linewidth=1.1, linestyle=(0, (4, 3)), label="cut off")
    _finish(axes, "RL step")


def _entropy(axes: Axes, run: RunData) -> None:
    _line(axes, run.rl, "entropy", "blue", "entropy")
    axes.set_ylim(bottom=0)
    _finish(axes, "RL step", legend=False)


def _mismatch(axes: Axes, run: RunData) -> None:
    x, y = _series(run.rl, "mismatch_kl")
    axes.plot(x, np.abs(y), color=COLORS["blue"], marker=".", markersize=3, linewidth=0.9)
    # Zero is the best value and has no place on a log axis: linear below the smallest useful difference.
    axes.set_yscale("symlog", linthresh=1e-9)
    axes.set_ylim(0, max(1e-5, float(np.abs(y).max()) * 3))
    _finish(axes, "RL step", legend=False)


def _ratio(axes: Axes, run: RunData) -> None:
    _line(axes, run.rl, "ratio_mean", "blue", "mean ratio")
    _line(axes, run.rl, "ess", "green", "effective sample size, share")
    axes.axhline(1.0, color=COLORS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
    _finish(axes, "RL step")
