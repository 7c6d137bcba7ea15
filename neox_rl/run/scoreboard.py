"""What the run writes for people and tools while it goes: a metrics row a step, evaluations, rollouts to read, the status."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import staleness_bound
from neox_rl.config.run import RunConfig
from neox_rl.queue.state import TicketQueue
from neox_rl.queue.wire import Phase
from neox_rl.run.evaluation import Attempt
from neox_rl.run.pump import PumpCounts
from neox_rl.search.render import render
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rollouts import RolloutRecorder, rollout_row
from neox_rl.telemetry.rows import EvaluationRow, MetricsRow, RolloutRow
from neox_rl.telemetry.status import Status, write_status
from neox_rl.types import Json

RATE_WINDOW_S = 30.0
READABLE_PER_EVALUATION = 24


@dataclass
class _Rate:
    """Tokens a second over the last ``RATE_WINDOW_S``."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, now: float, total: float) -> float | None:
        self.points = [(t, n) for t, n in self.points if now - t <= RATE_WINDOW_S] + [(now, total)]
        (first, before), (last, after) = self.points[0], self.points[-1]
        return (after - before) / (last - first) if last > first else None


class Scoreboard:
    """The one writer of the run's metrics, evaluations, rollouts and status."""

    def __init__(self, config: RunConfig, paths: RunPaths, writer: MetricsWriter, queue: TicketQueue, counts: PumpCounts) -> None:
        self._config, self._paths, self._writer, self._queue, self._counts = config, paths, writer, queue, counts
        self._recorder = RolloutRecorder(paths.rollouts, config.metarl.rollout.record_every)
        self._generated, self._trained = _Rate(), _Rate()
        self._tokens_trained = 0.0
        self._step_s: dict[Phase, float] = {}
        self._last_report = time.monotonic()
        self._eta: float | None = None
        self._accuracy: float | None = None
        self._fields: dict[str, Json] = {}
        self._phase = "starting"

    def phase(self, phase: str, message: str = "") -> None:
        self._phase = phase
        self._last_report = time.monotonic()
        self._write(message)

    def step(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        now = time.monotonic()
        row: dict[str, Json] = {"phase": phase.value, "step": step, "version": 0 if phase is Phase.SFT else step - 1, "time": time.time()}
        row |= metrics
        if phase is Phase.RL:
            queue = self._queue
            row |= {
                "tokens_generated": self._counts.tokens_generated,
                "staleness_bound": staleness_bound(self._config),
                "queue_ready": queue.num_ready,
                "queue_inflight": queue.num_in_flight,
                "rollouts_dropped": queue.groups_dropped * self._config.metarl.rollout.group_size,
                "rollouts_trained_twice": queue.groups_trained_twice * self._config.metarl.rollout.group_size,
            }
        else:
            for name in ("reward_mean", "reward_std", "accuracy", "staleness_mean", "staleness_max", "staleness_hist", "truncated_frac"):
                row.pop(name, None)
        self._writer.step(cast(MetricsRow, row))
        took = now - self._last_report
        self._last_report = now
        self._step_s[phase] = 0.9 * self._step_s[phase] + 0.1 * took if phase in self._step_s else took
        self._tokens_trained += float(cast(float, metrics.get("tokens_trained") or 0))
        self._phase = "warmstart" if phase is Phase.SFT else "rl"
        self._fields = {"step": step, "loss": metrics.get("loss")}
        if phase is Phase.RL:
            self._fields |= {name: metrics.get(source) for name, source in _STATUS_FIELDS.items()}
        self._eta = self._time_left(phase, step)
        self._write("", tokens_per_s_trained=self._trained.add(now, self._tokens_trained))

    def evaluation(self, row: EvaluationRow) -> None:
        self._writer.evaluation(row)
        if row["mode"] == "greedy":
            self._accuracy = row["accuracy"]["mean"]
        self._write()

    def readable(self, label: str, step: int, attempts: Sequence[Attempt]) -> None:
        """The same held-out problems after each evaluation, so that a reader can compare."""
        for attempt in attempts[:: max(1, len(attempts) // READABLE_PER_EVALUATION)]:
            self._recorder.record(_row(attempt, label, step))

    def group(self, attempt: Attempt) -> None:
        """A rollout of the training problems."""
        self._recorder.record(_row(attempt, "train", self._queue.step))

    def wants(self, ticket: int) -> bool:
        return self._recorder.wants(ticket)

    def close(self) -> None:
        self._writer.close()
        self._recorder.close()

    def _time_left(self, phase: Phase, step: int) -> float:
        """Steps left at their measured pace; RL steps not measured yet are taken to cost as much a token as the warm start's."""
        warmstart, rollout = self._config.metarl.warmstart, self._config.metarl.rollout
        if phase is Phase.RL:
            return (self._config.neox.train_iters - step) * self._step_s[phase]
        tokens = rollout.groups_per_step * rollout.group_size * 0.75 * rollout.max_new_tokens
        rl_step_s = self._step_s[phase] * tokens / warmstart.tokens_per_step
        return (warmstart.steps - step) * self._step_s[phase] + self._config.neox.train_iters * rl_step_s

    def _write(self, message: str = "", tokens_per_s_trained: float | None = None) -> None:
        warm = self._phase in ("starting", "warmstart")
        total = self._config.metarl.warmstart.steps if warm else self._config.neox.train_iters
        rate = self._generated.add(time.monotonic(), self._counts.tokens_generated) if self._counts.tokens_generated else None
        queue = self._queue
        fields = {k: v for k, v in self._fields.items() if v is not None}
        status = Status(
            phase=self._phase,
            total_steps=total,
            heldout_accuracy=self._accuracy,
            tokens_per_s_generated=rate,
            tokens_per_s_trained=tokens_per_s_trained,
            bound=staleness_bound(self._config),
            queue_ready=queue.num_ready,
            queue_inflight=queue.num_in_flight,
            version=queue.live_version if queue.live_version >= 0 else None,
            eta_s=self._eta,
            message=message,
            **fields,  # type: ignore[arg-type]  # step, loss, reward, staleness: numbers by step_metrics
        )
        write_status(self._paths.status, status)


_STATUS_FIELDS = {"reward": "reward_mean", "staleness_mean": "staleness_mean", "staleness_max": "staleness_max"}


def _row(attempt: Attempt, label: str, step: int) -> RolloutRow:
    problem, text = attempt.problem, attempt.text
    if problem.task in ARITHMETIC_TASKS:
        lines = [asdict(line) for line in render(problem, text)]
    else:
        lines = [{"depth": 0, "text": line, "kind": "text", "wrong": False} for line in text.splitlines()]
    return rollout_row(attempt.trace, problem, text, lines, label=label, step=step)
