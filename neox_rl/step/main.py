"""One training rank. ``python train.py --run-dir runs/<name>`` under DeepSpeed's runner, torchrun, mpirun or srun."""

from __future__ import annotations

import argparse
import atexit
import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from neox_rl.build_locks import remove_stale_locks
from neox_rl.config.derived import evaluation_s
from neox_rl.config.load import load_resolved
from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on
from neox_rl.config.placement import place
from neox_rl.config.run import RunConfig
from neox_rl.engines.rank_env import hide_gpus, rank_environment
from neox_rl.engines.registry import build_engine
from neox_rl.errors import ConfigError, NeoxRLError, exit_status
from neox_rl.keys import Keys
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.queue.wire_messages import attempt_of
from neox_rl.sockets import interface_towards
from neox_rl.step.feed import LiveFeed, RecordedFeed
from neox_rl.step.loop import Leader, TrainingLoop
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.heartbeat import Heartbeat, interval_s
from neox_rl.telemetry.paths import RunPaths
from neox_rl.weights.publisher import Publisher

logger = logging.getLogger(__name__)
RUN_DIR = "NEOX_RL_RUN_DIR"
"""Says the run directory where whoever starts the ranks chooses their arguments, as GPT-NeoX's deepy.py does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, also when the run was asked to stop; that of the error where one is the last word of the log."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--run-dir", type=Path, default=os.environ.get(RUN_DIR), help=f"directory of the prepared run; default: ${RUN_DIR}")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by DeepSpeed's runner; the environment says it too")
    for name in ("--deepspeed_config", "--megatron_config"):
        parser.add_argument(name, help="given by GPT-NeoX's deepy.py, and not read: the run directory says what is trained")
    args = parser.parse_args(argv)
    if args.run_dir is None:
        parser.error(f"no run directory: give --run-dir, or set {RUN_DIR}, to one that deepy.py made (train.py CONFIG.yml --prepare)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        train(RunPaths.of(args.run_dir), args.resume)
    except NeoxRLError as error:
        # No tidy end: other ranks may wait in a collective that this one will never join. The runner ends them.
        logger.error("%s: %s", type(error).__name__, error)
        return exit_status(error)
    return 0


def leave(status: int) -> NoReturn:
    """Ends this process with the status of ``main``.

    After a last word nothing is open, and a rank leaves without being taken apart: the interpreter's last garbage collection goes over all
    that torch and megatron-core have imported, 1.4 s of CPU for each rank, and where cores are busy the launcher waited for it past
    ``deadlines.shutdown_s``. A rank that failed has not closed everything, and leaves as usual.
    """
    if status == 0:
        atexit._run_exitfuncs()  # logging's and those of libraries
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    raise SystemExit(status)


def train(paths: RunPaths, resume: bool) -> None:
    if not paths.config.is_file() or not paths.endpoints.is_file():
        raise ConfigError(f"{paths.root} is no prepared run: start it with deepy.py, or make its files with deepy.py --prepare")
    config = load_resolved(paths.config)
    endpoints: dict[str, Any] = json.loads(paths.endpoints.read_text())
    os.environ.setdefault("MASTER_PORT", str(endpoints["master_port"]))  # mpirun and srun say nothing of it
    env = rank_environment(os.environ, config.neox.master_addr)
    if interface := interface_towards(env.master_addr):
        for library in ("GLOO", "NCCL"):  # NCCL by itself listens on another interface than loopback wherever there is one
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    hide_gpus(os.environ)
    pin(config, Machine.here(), env.local_rank)
    if env.local_rank == 0:
        remove_stale_locks(os.environ)  # on the first node the launcher has done so
    name = f"trainer-{env.rank}"
    events = EventLog(paths.event_log(name), name)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # whoever finds this rank stuck asks where it is
    heartbeat = Heartbeat(paths.beats, name, events, interval_s(config.metarl.deadlines.silence_s)).start()
    with events.span("build"):
        engine = build_engine(config, int(endpoints["vocab_size"]))
    leader = _leader(config, paths, endpoints, events) if env.rank == 0 else None
    try:
        reason = TrainingLoop(config, engine, leader, events, paths).run(resume)
    except Exception:
        # A collective that fails names no rank: whose log this is, and what it was at, must stand beside its error.
        logger.error("rank %d of %d failed at %s", env.rank, env.world_size, events.failed_at or "no recorded span")
        raise
    finally:
        events.close()
        if leader is not None:
            leader.close()
    logger.info("rank %d: %s", env.rank, reason)
    engine.close()
    heartbeat.stop()


def pin(config: RunConfig, machine: Machine, local_rank: int) -> None:
    """Binds this rank to its cores, before any math thread starts: threads inherit the affinity. Not on GPU machines.

    One math thread, unless OMP_NUM_THREADS says how many: a launcher that is not ours says nothing, and two threads on the one core of a
    rank wait for one another.
    """
    if machine.num_gpus == 0 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    ranks = place(config, machine).ranks
    if machine.num_gpus == 0 and local_rank < len(ranks) and ranks[local_rank] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, ranks[local_rank])


def _leader(config: RunConfig, paths: RunPaths, endpoints: dict[str, Any], events: EventLog) -> Leader:
    metarl = config.metarl
    if metarl.debug.mode == "train_only":
        return Leader(RecordedFeed(config, paths), None)
    keys = Keys.of_run(curve_on(metarl.network), paths.keys)
    deadlines, attempt = metarl.deadlines, attempt_of(os.environ)
    client = ExperienceClient(
        str(endpoints["experience"]), deadlines.batch_s, evaluation_s(metarl), deadlines.orchestrator_s, keys=keys, attempt=attempt
    )
    record = Path(metarl.debug.record_batches) if metarl.debug.record_batches else None
    feed = LiveFeed(client, record, metarl.queue.disk_full_s, events)
    return Leader(feed, Publisher(metarl.network.bind_host, int(endpoints["weights_port"]), keys, events))
