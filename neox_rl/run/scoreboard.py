"""What the run writes for people and tools while it goes: a metrics row a step, evaluations, rollouts to read, the status."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.derived import staleness_bound, trains_steps
from neox_rl.config.run import RunConfig
from neox_rl.episodes.rollout import num_calls
from neox_rl.errors import DiskStaysFullError
from neox_rl.ports import Tokenizer
from neox_rl.queue.history import Tally
from neox_rl.queue.state import TicketQueue
from neox_rl.queue.wire import Phase
from neox_rl.rollout.groups import sampled_ids
from neox_rl.run.evaluation import Attempt
from neox_rl.run.pace import Pace
from neox_rl.run.searched import books as search_books
from neox_rl.run.searched import laid_out, written_ids
from neox_rl.run.solution_groups import rewards_solutions
from neox_rl.search.quality import Analysis, analysis_of, summary
from neox_rl.search.render import render
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rewind import TRAIN
from neox_rl.telemetry.rollouts import RolloutRecorder, rollout_row
from neox_rl.telemetry.rows import EvaluationRow, MetricsRow, RolloutRow
from neox_rl.telemetry.status import Status, write_status
from neox_rl.types import Group, Json, Problem, Role

RATE_WINDOW_S, COUNT_S = 30.0, 1.0
DISK_S = 0.5
READABLE_PER_EVALUATION = 24
_STATUS_FIELDS = {"loss": "loss", "reward": "reward_mean", "staleness_mean": "staleness_mean", "staleness_max": "staleness_max"}


@dataclass
class Rate:
    """Units a second over the last ``RATE_WINDOW_S``."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, now: float, total: float) -> float | None:
        self.points = [(t, n) for t, n in self.points if now - t <= RATE_WINDOW_S] + [(now, total)]
        (first, before), (last, after) = self.points[0], self.points[-1]
        return (after - before) / (last - first) if last > first else None


class Scoreboard:
    """The one writer of the run's metrics, evaluations, rollouts and status."""

    def __init__(
        self,
        config: RunConfig,
        paths: RunPaths,
        writer: MetricsWriter,
        queue: TicketQueue,
        counts: Tally,
        tokenizer: Tokenizer,
        events: EventLog,
    ) -> None:
        self._config, self._paths, self._writer, self._queue, self._counts = config, paths, writer, queue, counts
        self._tokenizer, self._events = tokenizer, events
        self._recorder = RolloutRecorder(paths.rollouts, config.metarl.rollout.record_every)
        self._generated, self._trained = Rate(), Rate()
        self._tokens_trained = 0.0
        self._pace = Pace(config)
        self._since, self._counted = time.monotonic(), 0.0
        self._searches: dict[int, list[Analysis]] = {}
        self._delivered: list[Analysis] = []
        self._searched: dict[str, float] = {}
        self._made_by_search = config.metarl.rollout.method == "search"
        self._made_of_episodes = config.metarl.rollout.method == "episodes"
        self._may_call = self._made_of_episodes and config.metarl.episodes.tool != "none"
        self._calls: float | None = None
        self._shown_whole = self._made_by_search or rewards_solutions(config)
        self._made_of_steps = trains_steps(config)
        self._word = ""
        self.trouble = ""
        """What a row waits for, in words; empty while none waits."""
        total = config.metarl.warmstart.steps or config.neox.train_iters
        self._status: dict[str, Json] = {"phase": "starting", "total_steps": total, "bound": staleness_bound(config)}

    def phase(self, phase: str, message: str = "") -> None:
        """A phase begins."""
        self._events.instant("phase", phase=phase, message=message)
        self._since = time.monotonic()
        self._show(phase=phase, message=message)

    def say(self, message: str) -> None:
        """A word to whoever watches, until the run ends."""
        self._word = message
        self._show(message=message)

    async def step(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        """A step was trained. Its row is on the disk when this returns; raises DiskStaysFullError where there is no room for it in time."""
        now = time.monotonic()
        row: dict[str, Json] = {"phase": phase.value, "step": step, "version": 0 if phase is Phase.SFT else step - 1, "time": time.time()}
        row |= metrics
        if phase is Phase.RL:
            row |= self._books()
        self._writer.step(cast(MetricsRow, row))
        self._pace.step(phase, now - self._since)
        self._since = now
        self._tokens_trained += float(cast(float, metrics.get("tokens_trained") or 0))
        self._count()
        warm = phase is Phase.SFT
        found = {name: metrics[source] for name, source in _STATUS_FIELDS.items() if metrics.get(source) is not None}
        self._show(
            **found,
            phase="warmstart" if warm else "rl",
            message=self._word,
            step=step,
            total_steps=self._config.metarl.warmstart.steps if warm else self._config.neox.train_iters,
            tokens_per_s_trained=self._trained.add(now, self._tokens_trained),
            eta_s=self._pace.left_s(phase, step),
        )
        await self._written()

    async def _written(self) -> None:
        if self._writer.written():
            return
        begin, limit_s = time.monotonic(), self._config.metarl.queue.disk_full_s
        free = shutil.disk_usage(self._paths.root).free
        self.trouble = f"the disk of {self._paths.metrics} to take a row ({free} bytes free): make room there"
        self._show(message=f"waits for {self.trouble}")
        while not self._writer.written():
            if (waited_s := time.monotonic() - begin) > limit_s:
                raise DiskStaysFullError(f"waited {waited_s:.0f} s for {self.trouble}; the run goes on with --resume")
            await asyncio.sleep(DISK_S)
        self.trouble = ""
        self._show(message=self._word)

    def _books(self) -> dict[str, Json]:
        """What the orchestrator knows of an RL step. Counts are cumulative."""
        queue, size = self._queue, self._config.metarl.rollout.group_size
        books: dict[str, Json] = {
            "tokens_generated": self._counts.tokens_generated,
            "rollouts_generated": self._counts.rollouts,
            "rollouts_refused": self._counts.rollouts_refused,
            "rollouts_dropped": queue.groups_dropped * size,
            "rollouts_trained_twice": queue.groups_trained_twice * size,
            "staleness_bound": staleness_bound(self._config),
            "queue_ready": queue.num_ready,
            "queue_inflight": queue.num_in_flight,
        }
        if self._delivered:
            books["search"] = {**summary(self._delivered)}
        if self._calls is not None:
            books["tool_calls_mean"] = self._calls
        if self._searched:
            books["searched"] = {**self._searched}
        return books

    async def evaluation(self, row: EvaluationRow) -> None:
        """As ``step``."""
        self._writer.evaluation(row)
        if row["mode"] == "greedy":
            self._show(heldout_accuracy=row["accuracy"]["mean"])
        await self._written()

    def evaluated(self, label: str, attempts: Sequence[Attempt], seconds: float) -> None:
        """A full evaluation ended. The same held-out problems are recorded after each, so that a reader can compare."""
        self._pace.evaluated(seconds)
        self._since = time.monotonic()
        for attempt in attempts[:: max(1, len(attempts) // READABLE_PER_EVALUATION)]:
            self._recorder.record(self._to_read(attempt, label))

    def group(self, group: Group, problem: Problem) -> None:
        """A group of a training problem is ready."""
        self._count()
        self.recovered(group, problem)  # here and not when the step takes its batch: the trainer would wait for it
        if self._recorder.wants(group.ticket):
            ids = written_ids(group.traces[0]) if self._shown_whole else sampled_ids(group.traces[0])
            attempt = Attempt(problem, group.traces[0], self._tokenizer.decode(ids), len(ids))
            row = self._to_read(attempt, TRAIN)
            self._recorder.record({**row, "lines": laid_out(group, self._tokenizer)} if self._made_of_steps else row)

    def _to_read(self, attempt: Attempt, label: str) -> RolloutRow:
        if self._made_of_episodes:
            return episodes_to_read(attempt, self._tokenizer, label, self._queue.step)
        return rollout_to_read(attempt, label, self._queue.step)

    def recovered(self, group: Group, problem: Problem) -> None:
        """A group that was ready before this process began."""
        # A path is no search of its own, and several episodes are more than one.
        if not self._made_by_search and not self._made_of_episodes:
            written = [sampled_ids(trace) for trace in group.traces]
            found = (analysis_of(problem, self._tokenizer.decode(ids), len(ids)) for ids in written)
            self._searches[group.ticket] = [analysis for analysis in found if analysis is not None]

    def delivered(self, groups: Sequence[Group], prefix_hit_rate: float | None = None) -> None:
        """A step took these groups. ``prefix_hit_rate``: see ``MetricsRow.searched``."""
        self._delivered = [analysis for group in groups for analysis in self._searches.pop(group.ticket, ())]
        self._searched = search_books(groups) if self._made_by_search else {}
        if self._made_by_search and prefix_hit_rate is not None:
            self._searched["prefix_cache_hit_rate"] = prefix_hit_rate
        calls = [num_calls(trace) for group in groups for trace in group.traces]
        self._calls = sum(calls) / len(calls) if calls and self._may_call else None

    def servers(self, states: Mapping[str, str]) -> None:
        """What each server is now."""
        self._show(servers=dict(states))

    def close(self) -> None:
        self._recorder.close()
        self._writer.close()

    def _count(self) -> None:
        """Counters for the timeline and the rate of generation, at most once a second: groups come by the dozen."""
        now, queue, tokens = time.monotonic(), self._queue, self._counts.tokens_generated
        if now - self._counted < COUNT_S:
            return
        self._counted = now
        self._events.counter("queue", ready=queue.num_ready, inflight=queue.num_in_flight)
        self._events.counter("tokens", generated=tokens)
        if tokens:
            self._status["tokens_per_s_generated"] = self._generated.add(now, tokens)

    def _show(self, **changed: Json) -> None:
        queue = self._queue
        self._status |= changed | {"queue_ready": queue.num_ready, "queue_inflight": queue.num_in_flight}
        self._status["version"] = queue.live_version if queue.live_version >= 0 else None
        write_status(self._paths.status, Status(**self._status))  # type: ignore[arg-type]  # the fields of Status, by name


def rollout_to_read(attempt: Attempt, label: str, step: int) -> RolloutRow:
    """The row of ``rollouts.jsonl``, its search laid out where it is one."""
    problem, text = attempt.problem, attempt.text
    if problem.task in ARITHMETIC_TASKS:
        lines = [asdict(line) for line in render(problem, text)]
    else:
        lines = [{"depth": 0, "text": line, "kind": "text", "wrong": False} for line in text.splitlines()]
    return rollout_row(attempt.trace, problem, text, lines, label=label, step=step)


def episodes_to_read(attempt: Attempt, tokenizer: Tokenizer, label: str, step: int) -> RolloutRow:
    """The row of a rollout of several episodes: a line each, and one for what environment or tool said in between."""
    told = [segment for segment in attempt.trace.segments if segment.role is not Role.PROMPT]
    lines = []
    for (said, _), some in itertools.groupby(told, key=lambda s: (s.role is Role.ENV, s.episode)):
        words = tokenizer.decode([i for segment in some for i in segment.ids]).strip()
        lines.append({"depth": 0 if said else 1, "text": words, "kind": "text", "wrong": False})
    text = "\n".join(str(line["text"]) for line in lines)
    return rollout_row(attempt.trace, attempt.problem, text, lines, label=label, step=step)
