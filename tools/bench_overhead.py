"""CPU time of the processes of a run during its RL phase: ``python tools/bench_overhead.py configs/metarl.yml --set train_iters=60``.

Starts the run and samples the CPU time of every process it started. The orchestrator's line is orchestrator, queue, client and
verifier together, worker processes of the verifier included. Arguments after the files go to ``deepy.py`` as they are.
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

from neox_rl.telemetry.jsonl import read_jsonl

SAMPLE_S = 0.5
ROOT = Path(__file__).resolve().parent.parent
PARTS = {"neox_rl.run.orchestrator": "orchestrator + queue + verifier", "vllm": "servers", "VLLM": "servers", "train.py": "training ranks"}
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
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    runs = next((a.partition("=")[2] for a in sys.argv if a.startswith("metarl.runs_dir=")), "runs")
    started = time.time()
    samples = measure([sys.executable, "deepy.py", "train.py", *sys.argv[1:]])
    newest = max((ROOT / runs).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    times = [row["time"] for row in read_jsonl(newest) if row["phase"] == "rl" and row["time"] > started]
    if len(times) < 2:
        raise SystemExit(f"{newest} has {len(times)} RL steps of this run: at least 2 are needed")
    wall = times[-1] - times[0]
    print(f"\n{newest.parent.name}: RL steps 2 to {len(times)}, {wall:.1f} s")
    for part, rows in sorted(samples.items()):
        cpu = between(rows, times[0], times[-1])
        print(f"{part:<32}{cpu:>8.2f} s of CPU{100 * cpu / wall:>8.1f} % of a core{1e3 * cpu / (len(times) - 1):>9.2f} ms a step")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
