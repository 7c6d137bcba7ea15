"""The training loop. Every rank runs it; rank 0 alone talks to the feed and the publisher, the others hear from rank 0.

    warm start   next(sft, i) -> pack -> engine.step(nll)                                   i = 1 .. warmstart.steps
    v0           publish; evaluate "warmstart"
    RL step s    next(rl, s) -> bound checked, packed -> [proximal, reference log-probs]
                 -> engine.step(objective) on v(s-1) -> v(s) -> publish -> report           s = 1 .. train_iters
    end          evaluate "final"; checkpoint; HF export                                    without RL steps v0 is the last one

Who waits on whom: the loop waits for the feed only. A slow or dead server is the orchestrator's business.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from neox_rl.batch.pack import pack_rl, pack_sft
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import MicroBatch, StepBatch
from neox_rl.codec import decode_groups, encode_groups
from neox_rl.config.derived import keeps_reference, makes_policy, max_policy_tokens, shares_prefixes, trains_steps, warmstart_skipped
from neox_rl.config.run import RunConfig
from neox_rl.engines.port import Engine, StepReport
from neox_rl.errors import DiskFullError, DiskStaysFullError
from neox_rl.loss.policy import make_loss_fn, make_sft_loss_fn, needs_proximal
from neox_rl.queue.wire import Phase
from neox_rl.step.feed import Feed
from neox_rl.step.metrics import check_mismatch, step_metrics
from neox_rl.step.position import Position
from neox_rl.step.schedule import rl_lr, warmstart_lr
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import finite
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Group
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import make_snapshot

logger = logging.getLogger(__name__)
DISK_S = 1.0
"""Between two tries to save on a full disk."""


@dataclass(frozen=True)
class Leader:
    """What only rank 0 has."""

    feed: Feed
    publisher: Publisher | None

    def close(self) -> None:
        self.feed.close()
        if self.publisher is not None:
            self.publisher.close()


class TrainingLoop:
    """``run`` trains everything the config asks for and returns why it ended."""

    def __init__(self, config: RunConfig, engine: Engine, leader: Leader | None, events: EventLog, paths: RunPaths) -> None:
        self.config, self.engine, self.leader, self.events, self.paths = config, engine, leader, events, paths
        self.position = Position()
        engine.on_retry = lambda tries: events.progress(overflows=tries)
        topology = engine.topology
        accumulate, share = config.neox.gradient_accumulation_steps, shares_prefixes(config)
        self._layout = Layout(config.metarl.pack_tokens, topology.dp, topology.tp, accumulate, share)
        self._checkpoints = Path(config.neox.save) if config.neox.save else paths.checkpoints
        self._saved = (-1, -1)
        self._published = 0.0

    def run(self, resume: bool) -> str:
        """Trains, with ``resume`` from the run's newest checkpoint on. Returns "finished" or "stopped"."""
        self._begin(resume)
        reason = "finished" if self._warm_start() and self._reinforce() else "stopped"
        self._checkpoint(force=True)
        if reason == "finished":
            self._when_room(lambda: self.engine.save_hf(self.paths.root / "model"))
        if self.leader is not None:
            self.leader.feed.done(reason)
        self.engine.barrier()
        return reason

    def _begin(self, resume: bool) -> None:
        """Resuming goes on where the run's checkpoint was made. ``load`` takes weights and optimizer of another run: they are v0 here."""
        load, warmstart = self.config.neox.load, self.config.metarl.warmstart
        source = str(self._checkpoints) if resume else load or warmstart.hf_checkpoint
        with self.events.span("load", directory=source) if source else nullcontext():
            if resume:
                self.position = Position.from_json(self.engine.load(self._checkpoints))
                self._saved = (self.position.sft_step, self.position.rl_step)
            elif load:
                self.engine.load(Path(load))
            elif source:
                self.engine.load_hf(Path(source))
        if not resume and warmstart_skipped(self.config):
            self.position.sft_step = warmstart.steps
        if self.leader is not None:
            self.leader.feed.hello(self.engine.topology.world_size, self.position)

    def _warm_start(self) -> bool:
        for step in range(self.position.sft_step + 1, self.config.metarl.warmstart.steps + 1):
            if not self._train(Phase.SFT, step):
                return False
            self.position.sft_step = step
            self._checkpoint(force=False)
        return True

    def _reinforce(self) -> bool:
        if not makes_policy(self.config):
            return True
        if self.position.rl_step == 0 and keeps_reference(self.config.metarl.objective):
            self.engine.set_reference()  # later checkpoints hold it: the policy then is not the reference any more
        self._publish()
        if self.position.rl_step == 0 and not self._evaluate("warmstart"):
            return False
        for step in range(self.position.rl_step + 1, self.config.neox.train_iters + 1):
            if not self._train(Phase.RL, step):
                return False
            self.position.rl_step = step
            if step % self.config.metarl.weights.publish_every == 0 or step == self.config.neox.train_iters:
                self._publish()
            self._checkpoint(force=False)
        return self.config.neox.train_iters == 0 or self._evaluate("final")

    def _train(self, phase: Phase, step: int) -> bool:
        """One optimizer step; False when the feed asks to stop."""
        start = time.monotonic()
        with self.events.span("wait_batch", phase=phase.value, step=step):
            groups = self._next_groups(phase, step)
        wait_s = time.monotonic() - start
        if not groups:
            return False
        batch = self._pack(phase, step, groups)
        start, cpu_start = time.monotonic(), time.process_time()
        with self.events.span("train_step", phase=phase.value, step=step, tokens=batch.stats.trained_tokens):
            report = self._optimize(phase, step, batch)
        took, cpu = time.monotonic() - start, time.process_time() - cpu_start
        whole = phase is Phase.SFT or not trains_steps(self.config)
        metrics = step_metrics(phase, batch.stats, report, wait_s, took, cpu, self._published, whole)
        if self.leader is not None:
            self.leader.feed.report(phase, step, metrics)
        self.position.report = {"phase": phase.value, "step": step, "metrics": finite(metrics)[0]}
        if self.config.metarl.debug.mode == "run" and self.config.metarl.rollout.generator == "vllm":
            check_mismatch(metrics, self.config.metarl.weights.max_mismatch_kl, step)
        return True

    def _next_groups(self, phase: Phase, step: int) -> Sequence[Group]:
        """Rank 0's groups on every rank: each packs the same batch alone, so only rollouts travel, never Python objects."""
        groups = self.leader.feed.next_groups(phase, step) if self.leader is not None else ()
        if self.leader is not None:
            self.position.feed_state = self.leader.feed.state
        if self.engine.topology.world_size == 1:
            return groups
        frames = [bytes(frame) for frame in encode_groups(groups)] if self.leader is not None else []
        with self._handing_over():
            sizes: list[int] = json.loads(self.engine.broadcast_bytes(json.dumps([len(f) for f in frames]).encode()))
            data = memoryview(self.engine.broadcast_bytes(b"".join(frames)))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return decode_groups([data[end - size : end] for size, end in zip(sizes, ends, strict=True)])[0]

    def _pack(self, phase: Phase, step: int, groups: Sequence[Group]) -> StepBatch:
        if phase is Phase.SFT:
            return pack_sft(groups, step, layout=self._layout)
        metarl = self.config.metarl
        return pack_rl(
            groups,
            step,
            staleness=metarl.staleness,
            objective=metarl.objective,
            max_new_tokens=max_policy_tokens(self.config),
            layout=self._layout,
        )

    def _optimize(self, phase: Phase, step: int, batch: StepBatch) -> StepReport:
        microbatches = batch.microbatches[self.engine.topology.dp_rank]
        if phase is Phase.SFT:
            return self.engine.step(microbatches, make_sft_loss_fn(), warmstart_lr(self.config.metarl.warmstart, step))
        if self.config.metarl.debug.mode == "rollout_only":
            return StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, metrics={})
        objective, temperature = self.config.metarl.objective, self.config.metarl.rollout.temperature
        loss_fn = make_loss_fn(objective, step - 1)
        return self.engine.step(self._with_logprobs(microbatches), loss_fn, rl_lr(self.config.neox, step), temperature)

    def _with_logprobs(self, microbatches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Adds the proximal and reference log-probs that the objective reads."""
        objective, temperature = self.config.metarl.objective, self.config.metarl.rollout.temperature
        if needs_proximal(objective):
            current = self.engine.logprobs(microbatches, "current", temperature)
            microbatches = [m.with_logprobs(proximal=p) for m, p in zip(microbatches, current, strict=True)]
        if keeps_reference(objective):
            reference = self.engine.logprobs(microbatches, "reference", temperature)
            microbatches = [m.with_logprobs(reference=r) for m, r in zip(microbatches, reference, strict=True)]
        return microbatches

    def _publish(self) -> None:
        """Offers the weights as version ``rl_step``. The gather is collective; only rank 0 has the tensors."""
        if self.config.metarl.debug.mode == "train_only":
            return
        start = time.monotonic()
        version = self.position.rl_step
        with self.events.span("publish", version=version):
            tensors = list(self.engine.named_tensors())  # every rank takes part in the gather, rank 0 alone gets something
            if self.leader is not None:
                digest = ""
                if self.leader.publisher is not None:
                    snapshot = make_snapshot(version, tensors)
                    self.leader.publisher.offer(snapshot)
                    digest = snapshot.digest
                self.leader.feed.published(version, digest)
        self._published = time.monotonic() - start

    def _evaluate(self, label: str) -> bool:
        """False, on every rank, when the run is to stop instead."""
        with self.events.span("evaluate", label=label, version=self.position.rl_step):
            evaluated = self.leader is not None and self.leader.feed.evaluate(label, self.position.rl_step)
            with self._handing_over():
                return self.engine.broadcast_bytes(b"\x01" if evaluated else b"\x00") == b"\x01"

    def _handing_over(self) -> AbstractContextManager[object]:
        """Rank 0 has what all waited for: from here on it waits for ranks, which may take as long as a step, not as a batch."""
        return nullcontext() if self.leader is None else self.events.span("hand_over")

    def _checkpoint(self, force: bool) -> None:
        here = (self.position.sft_step, self.position.rl_step)
        factor = self.config.neox.checkpoint_factor
        due = force or (factor > 0 and sum(here) % factor == 0)
        if due and here != self._saved:
            with self.events.span("checkpoint", step=sum(here)):
                self._when_room(lambda: self.engine.save(self._checkpoints, self.position.to_json()))
            self._saved = here
            if self.leader is not None:
                self.leader.feed.saved(self.position)

    def _when_room(self, write: Callable[[], object]) -> None:
        """A full disk is waited for as the journal waits; rank 0's clock decides. Raises DiskStaysFullError after ``queue.disk_full_s``."""
        limit_s, begin = self.config.metarl.queue.disk_full_s, time.monotonic()
        for tries in count():
            try:
                write()
                return
            except DiskFullError as error:
                waited_s = time.monotonic() - begin
                if self.engine.broadcast_bytes(b"\x01" if waited_s < limit_s else b"\x00") == b"\x00":
                    raise DiskStaysFullError(
                        f"waited {waited_s:.0f} s for room to save: {error}; the run goes on from its last checkpoint"
                    ) from error
                if tries == 0:
                    logger.warning("waits up to %.0f s to save: %s", limit_s, error)
                with self.events.span("wait_disk", directory=str(self._checkpoints)):
                    time.sleep(DISK_S)
