"""One training rank. ``python train.py --run-dir runs/<name>`` under DeepSpeed's runner, torchrun, mpirun or srun."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.engines.registry import build_engine
from neox_rl.queue.wire import ExperienceClient, Phase
from neox_rl.step.feed import LiveFeed, RecordedFeed
from neox_rl.step.loop import Leader, TrainingLoop
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Json
from neox_rl.weights.publisher import Publisher

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__)
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of the run")
    parser.add_argument("--local_rank", type=int, help="given by DeepSpeed's runner; the environment says it too")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    paths = RunPaths.of(args.run_dir)
    config = load_resolved(paths.config)
    endpoints: dict[str, Any] = json.loads(paths.endpoints.read_text())
    engine = build_engine(config, int(endpoints["vocab_size"]))
    rank = engine.topology.rank
    events = EventLog(paths.event_log(f"trainer-{rank}"), f"trainer-{rank}")
    leader = _leader(config, paths, endpoints) if rank == 0 else None
    try:
        loop = TrainingLoop(config, engine, leader, events, paths)
        reason = loop.run(_checkpoint_to_continue(config, paths, args.resume))
        logger.info("rank %d: %s", rank, reason)
    finally:
        events.close()
        if leader is not None:
            leader.feed.close()
            if leader.publisher is not None:
                leader.publisher.close()
        engine.close()
    return 0


def _checkpoint_to_continue(config: RunConfig, paths: RunPaths, resume: bool) -> Path | None:
    if resume:
        return Path(config.neox.save) if config.neox.save else paths.checkpoints
    return Path(config.neox.load) if config.neox.load else None


def _leader(config: RunConfig, paths: RunPaths, endpoints: dict[str, Any]) -> Leader:
    metarl = config.metarl
    if metarl.debug.mode == "train_only":
        writer = MetricsWriter(paths, metarl.logging)

        def sink(phase: Phase, step: int, metrics: Any) -> None:
            row: dict[str, Json] = {"phase": phase.value, "step": step, "version": max(0, step - 1), "time": time.time(), **metrics}
            writer.step(row)  # type: ignore[arg-type]  # the keys are those of MetricsRow by step_metrics

        return Leader(RecordedFeed(Path(metarl.debug.batches), sink), None)
    client = ExperienceClient(str(endpoints["experience"]), metarl.deadlines.batch_s)
    record = Path(metarl.debug.record_batches) if metarl.debug.record_batches else None
    return Leader(LiveFeed(client, record), Publisher(metarl.network.bind_host, int(endpoints["weights_port"])))
