"""The pictures of ``simulate_staleness.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from neox_rl.queue.sim.books import Outcome
from neox_rl.queue.sim.plan import Rule, demand, predict
from neox_rl.queue.sim.scenario import Scenario

COLORS = {"beyond S": "#c0392b", "dropped": "#e67e22", "masked": "#f1c40f", "trainer idle": "#7f8c8d"}
LOADS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Servers, as multiples of those that would do if they were always full."""
MOST_BOUNDS = 4


def plot_rules(outcomes: dict[str, Outcome], bound: int, path: Path) -> None:
    """What each rule costs, and how old the tokens are that it trains."""
    figure, (costs, ages) = plt.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True)
    names = list(outcomes)
    shares = {
        "beyond S": [o.beyond_frac for o in outcomes.values()],
        "dropped": [o.dropped_frac for o in outcomes.values()],
        "masked": [o.masked_frac for o in outcomes.values()],
        "trainer idle": [o.idle_frac for o in outcomes.values()],
    }
    height = 0.8 / len(shares)
    for i, (label, values) in enumerate(shares.items()):
        at = np.arange(len(names)) + (i - 1.5) * height
        bars = costs.barh(at, 100 * np.array(values), height, label=label, color=COLORS[label])
        costs.bar_label(bars, [f"{100 * v:.0f}" if v >= 0.005 else "" for v in values], padding=2, fontsize=8)
    costs.set_yticks(range(len(names)), names)
    costs.invert_yaxis()
    costs.set_xlabel("% of tokens; of the trainer's time")
    costs.set_title(f"what a bound of {bound} steps costs")
    costs.legend(frameon=False, loc="lower right")
    limit = 3 * bound + 3
    for name, outcome in outcomes.items():
        counts = np.array([outcome.ages[age] for age in range(limit)])
        ages.plot(range(limit), 100 * counts / max(1, outcome.tokens_trained), marker="o", markersize=3, label=name)
    ages.axvline(bound + 0.5, color="black", linestyle=":", linewidth=1)
    ages.annotate("bound", (bound + 0.6, ages.get_ylim()[1] * 0.94))
    ages.set_xlabel("staleness of trained tokens, optimizer steps")
    ages.set_ylabel("% of trained tokens")
    ages.set_title("how old the trained tokens are")
    ages.legend(frameon=False)
    for axes in (costs, ages):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_plan(scenario: Scenario, rule: Rule, path: Path) -> None:
    """Trainer idle and tokens masked over the number of servers, for some bounds."""
    needed = demand(scenario)
    servers = sorted({max(1, round(load * needed)) for load in LOADS} | {scenario.num_servers})
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True, sharex=True)
    for admission in sorted({0, 1, 2, rule.admission_slack})[:MOST_BOUNDS]:
        this = replace(rule, admission_slack=admission)
        rates = [predict(replace(scenario, num_servers=n), this)[1] for n in servers]
        for axes, values in zip(panels, ([r.idle_frac for r in rates], [r.masked_frac for r in rates]), strict=True):
            axes.plot(servers, 100 * np.array(values), marker="o", markersize=4, label=f"S = {this.bound}")
    for axes, title in zip(panels, ("trainer idle", "tokens masked"), strict=True):
        axes.axvline(needed, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("servers (dotted: enough if always full)")
        axes.set_ylabel("%")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
