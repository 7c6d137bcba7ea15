"""RL against RL^2 (13) and E-RL^2 (14) on goal finding: has the policy found the goal by episode k, and is it right in episode k?

Four doors, one hides the goal (arXiv 2501.04682, the figure of its section on meta-RL). All start from the same kind of warm start, guesses
at random or repeated. RL guesses once in a rollout and is asked anew each time; RL^2 and E-RL^2 guess four times in one context and hear
right or wrong. Drawn in: 1 - (1 - 1/N)^k, what guesses without memory come to, and k/N, what guesses without repetition come to.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from common import COLORS, ROOT, Job, arguments, digest, error_bars, panels, parser, percent, run_jobs, save, table

from neox_rl.config.load import load_config
from neox_rl.problems.goal_finding import memoryless_success, meta_success
from neox_rl.problems.sources import load_problems
from neox_rl.telemetry.rundata import FIRST, LAST, RunData
from neox_rl.telemetry.stats import Interval, cluster_mean_ci, t975

DOORS = 4
"""Instead of the six of the configs, so that a run takes minutes."""


METHODS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "RL": ("rl", "rl2", ("metarl.rollout.method=sample", f"metarl.evaluation.samples={DOORS}", "metarl.objective.entropy_coef=0.02")),
    "RL^2": ("rl2", "rl2", ()),
    "E-RL^2": ("erl2", "erl2", ()),
}
"""Title -> run name, config, settings. One guess earns less than four: RL has the bonus of E-RL^2, or it names no doors."""
EPISODES = list(range(1, DOORS + 1))
SHOWN: Mapping[str, str] = {FIRST: "before RL", LAST: "after RL"}
PANELS = {"found_by": "found by episode k", "right_in": "right in episode k"}
BEST = [meta_success(DOORS, k) for k in EPISODES]
FORMS = {
    "found_by": {
        "no memory": ("1 - (1 - 1/N)^k", [memoryless_success(DOORS, k) for k in EPISODES]),
        "no repetition": ("k/N", BEST),
    },
    "right_in": {"no memory": ("1/N", [1 / DOORS] * DOORS), "no repetition": ("k/N", BEST)},
}
"""Panel -> who -> the closed form and its values."""
QUICK = ("train_iters=4", "metarl.warmstart.steps=4", "metarl.evaluation.num_problems=20", "metarl.rollout.groups_per_step=4")


def jobs(args: argparse.Namespace) -> dict[str, list[Job]]:
    common = (
        f"metarl.problems.num_goals={DOORS}",
        f"metarl.episodes.count={DOORS}",
        f"train_iters={args.iterations}",
        "metarl.rollout.groups_per_step=32",
        "metarl.evaluation.num_problems=300",
        "metarl.evaluation.every_steps=0",
        "metarl.rollout.record_every=0",
        "checkpoint_factor=0",
        *(QUICK if args.quick else ()),
    )

    entropy = () if args.entropy is None else (f"metarl.objective.entropy_coef={args.entropy}",)

    def job(name: str, config: str, settings: Sequence[str], seed: int) -> Job:
        settings = (*common, *settings, *entropy, f"metarl.seed={seed}")
        known = load_config([ROOT / f"configs/{config}.yml"], settings).metarl
        heldout = load_problems(known.problems, seed).heldout[: known.evaluation.num_problems]
        return Job(f"{name}-s{seed}", settings, config, digest(*(problem.id for problem in heldout)))

    return {
        title: [job(name, config, settings, seed) for seed in range(1, args.seeds + 1)]
        for title, (name, config, settings) in METHODS.items()
        if title in args.methods
    }


def curve(run: RunData, label: str, key: str) -> list[Interval]:
    """Of the sampled evaluation ``label``: entry k - 1 is found by episode k (``found_by``) or right in episode k (``right_in``)."""
    (row,) = [row for row in run.evaluations if row["label"] == label and row["mode"] == "sampled"]
    if key in row:
        return [Interval(i["mean"], i["ci95_low"], i["ci95_high"], i["n"]) for i in row[key]]
    attempts: dict[str, list[float]] = defaultdict(list)  # a run of single attempts: those at a problem, in the order they were drawn
    for problem, _, correct, _ in row["per_problem"]:
        attempts[str(problem)].append(float(correct))
    first = 0 if key == "found_by" else 1  # the attempts 1 to k, or the k-th alone
    return [cluster_mean_ci([max(found[first * (k - 1) : k]) for found in attempts.values()], list(attempts)) for k in range(1, DOORS + 1)]


def over_seeds(curves: Sequence[Sequence[Interval]]) -> list[Interval]:
    """The mean of the seeds with its 95 % t interval over them; of one seed its interval over problems."""
    if len(curves) == 1:
        return list(curves[0])
    found = []
    for k in range(DOORS):
        means = np.array([each[k].mean for each in curves])
        reach = t975(len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
        found.append(
            Interval(float(means.mean()), max(0.0, float(means.mean()) - reach), min(1.0, float(means.mean()) + reach), len(means))
        )
    return found


def main() -> None:
    p = parser(__doc__, "meta_rl")
    p.add_argument("--seeds", type=int, default=3, help="runs of each method")
    p.add_argument("--iterations", type=int, default=200, help="RL steps of 32 groups of 4")
    p.add_argument("--entropy", type=float, help="bonus for entropy, metarl.objective.entropy_coef, instead of the configs'")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to compare")
    args = arguments(p)
    wanted = jobs(args)
    runs = run_jobs([job for seed in zip(*wanted.values(), strict=True) for job in seed], args)  # seed 1 of every method first
    start = max(wanted, key=lambda title: METHODS[title][0] != "rl")  # drawn once: all begin alike, RL^2 and E-RL^2 with the very same
    figure, axes = panels(2)
    for each, (key, name) in zip(axes, PANELS.items(), strict=True):
        rows = []
        for (title, some), color in zip(wanted.items(), COLORS, strict=False):
            for label, when in SHOWN.items():
                curves = [curve(runs[job.name], label, key) for job in some]
                rows.append([f"{title}, {when}", *map(percent, over_seeds(curves))])
                if label == LAST:
                    error_bars(each, EPISODES, over_seeds(curves), f"{title}, {when}", color)
                    for seed in curves:
                        each.plot(EPISODES, [100 * i.mean for i in seed], color=color, linewidth=0.6, alpha=0.5)
                elif title == start:
                    error_bars(each, EPISODES, over_seeds(curves), f"{title}, {when}", "dimgray", linestyle=":")
        for label, dashes, color in (("no memory", "--", "gray"), ("no repetition", "-.", "black")):
            form, values = FORMS[key][label]
            each.plot(EPISODES, [100 * v for v in values], dashes, color=color, label=f"{label}: {form}", zorder=5)
            rows.append([f"closed form, {label}: {form}", *(f"{100 * v:.1f}" for v in values)])
        each.set(xlabel="episode k", xticks=EPISODES, ylabel=f"{name}, %", ylim=(0, 103))
        print(f"{name}, %; seeds: {args.seeds}")
        table(["", *(f"k = {k}" for k in EPISODES)], rows)
    bars = "one seed, 95 % over problems" if args.seeds == 1 else f"{args.seeds} seeds (thin), their mean with 95 %"
    figure.suptitle(f"goal finding, {DOORS} doors; {bars}", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    save(figure, args.picture)


if __name__ == "__main__":
    main()
