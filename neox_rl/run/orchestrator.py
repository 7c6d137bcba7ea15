"""The orchestrator process: problems in, verified groups out, versions switched, everything counted.

    trainer --next--> handler -- sft: demonstrations
                              -- rl:  queue.take <- deliver <- pump <- (generator, verifier) <- next_ticket
    trainer --published--> keeper -> servers switch -> live -> queue.set_live -> pump

One event loop owns all state. Each background task that fails ends the process; the launcher names it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.errors import NeoxRLError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.state import TicketQueue
from neox_rl.queue.wire import Delivery, ExperienceServer, Phase
from neox_rl.run.evaluation import Evaluator, as_attempt
from neox_rl.run.parts import Parts, build_parts
from neox_rl.run.pump import RolloutPump
from neox_rl.run.scoreboard import Scoreboard
from neox_rl.search.demonstrations import Demonstrations
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Group, Json, Problem, SamplingParams

logger = logging.getLogger(__name__)


class Orchestrator:
    """The ``ExperienceHandler`` of a run."""

    def __init__(self, config: RunConfig, paths: RunPaths, parts: Parts, writer: MetricsWriter) -> None:
        metarl = config.metarl
        self._config, self._parts = config, parts
        self._stopping = False
        self._waiting = ""
        staleness = metarl.staleness
        self._queue = TicketQueue(
            metarl.rollout.groups_per_step, staleness.admission_slack, staleness.delivery_slack, staleness.mode, config.neox.train_iters
        )
        self._cursor = ProblemCursor(parts.problems.train, metarl.seed)
        params = SamplingParams(
            metarl.rollout.max_new_tokens, metarl.rollout.temperature, metarl.rollout.top_p, (parts.attempts.tokenizer.eos_id,)
        )
        self._pump = RolloutPump(config, self._queue, self._cursor, parts.attempts, params, parts.events, self._on_group)
        self._board = Scoreboard(config, paths, writer, self._queue, self._pump.counts)
        self._evaluator = Evaluator(config, parts.problems.heldout, parts.attempts, params)
        self._demonstrations = self._new_demonstrations(0, 0)
        self._background: set[asyncio.Task[None]] = set()

    def _new_demonstrations(self, draws: int, ticket: int) -> Demonstrations:
        warmstart = self._config.metarl.warmstart
        return Demonstrations(
            self._parts.demonstrated,
            self._parts.attempts.tokenizer,
            self._config.metarl.seed,
            warmstart.style,
            warmstart.choice_weight,
            self._config.neox.seq_length,
            draws,
            ticket,
        )

    def stop(self) -> None:
        """The user asks to end: the trainer gets an empty batch next, saves and ends."""
        self._stopping = True
        self._pump.wake()
        self._board.phase("report", "stopping: the trainer saves after this step")
        self._keep(asyncio.create_task(self._notify()))

    async def _notify(self) -> None:
        async with self._pump.changed:
            self._pump.changed.notify_all()

    async def run(self, server: ExperienceServer) -> str:
        """Serves the trainer until it is done."""
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(self._parts.keeper.run(self._on_live), name="versions")
            pump: asyncio.Task[None] | None = None
            try:
                self._start_pump = asyncio.Event()

                async def pump_when_asked() -> None:
                    await self._start_pump.wait()
                    await self._pump.run()

                pump = tasks.create_task(pump_when_asked(), name="rollouts")
                return await server.serve(self)
            finally:
                keeper.cancel()
                if pump is not None:
                    pump.cancel()
                for task in self._background:
                    task.cancel()

    def close(self) -> None:
        self._board.close()

    # ExperienceHandler

    async def hello(self, world: int, pid: int, state: Mapping[str, Json]) -> None:
        logger.info("trainer with %d ranks, rank 0 is pid %d", world, pid)
        match state:
            case {"queue": dict() as queue, "cursor": dict() as cursor, "draws": int() as draws, "ticket": int() as ticket}:
                self._queue.restore(queue)
                self._cursor.restore(cursor)
                self._demonstrations = self._new_demonstrations(draws, ticket)
                counts = state.get("counts")
                if isinstance(counts, dict):
                    for name, value in counts.items():
                        setattr(self._pump.counts, name, value)
        self._board.phase("warmstart" if self._config.metarl.warmstart.steps else "starting")

    async def next_groups(self, phase: Phase, step: int) -> Delivery:
        if self._stopping:
            return Delivery(())
        if phase is Phase.SFT:
            return Delivery(self._demonstrate(), self._state())
        self._start_pump.set()
        self._pump.wake()
        async with self._pump.changed:
            while (groups := self._queue.take(step)) is None:
                self._waiting = self._queue.waiting_for(step)
                await self._pump.changed.wait()
                if self._stopping:
                    return Delivery(())
        self._parts.events.instant("delivered", step=step, ready=self._queue.num_ready, in_flight=self._queue.num_in_flight)
        return Delivery(groups, self._state())

    async def evaluate(self, label: str, version: int) -> Mapping[str, Json]:
        self._board.phase("evaluate", f"held-out problems, {label}")
        async with self._pump.changed:
            while self._queue.live_version < version:
                self._waiting = self._parts.keeper.waiting_for()
                await self._pump.changed.wait()
        self._waiting = f"the evaluation {label!r}"
        with self._parts.events.span("evaluate", label=label):
            rows, attempts = await self._evaluator.full(label, self._queue.step, version)
        for row in rows:
            self._board.evaluation(row)
        self._board.readable(label, self._queue.step, attempts)
        return {row["mode"]: row["accuracy"]["mean"] for row in rows}

    async def report(self, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        self._board.step(phase, step, metrics)

    async def published(self, version: int) -> None:
        self._parts.keeper.promise(version)

    async def done(self, reason: str) -> None:
        self._board.phase("report", reason)

    def waiting_for(self) -> str:
        return self._waiting

    # events

    def _on_live(self, version: int) -> None:
        self._queue.set_live(version)
        self._pump.wake()
        task = asyncio.create_task(self._notify())
        self._keep(task)
        every = self._config.metarl.evaluation.every_steps
        if every and version and version % every == 0 and version < self._config.neox.train_iters:
            self._keep(asyncio.create_task(self._small_evaluation(version)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        """A task that nobody awaits would be collected, and its failure never heard of."""
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _small_evaluation(self, version: int) -> None:
        self._board.evaluation(await self._evaluator.small(f"step {version}", version, version))

    def _on_group(self, group: Group, problem: Problem) -> None:
        if self._board.wants(group.ticket):
            self._board.group(as_attempt(problem, group.traces[0], self._parts.attempts))

    def _demonstrate(self) -> Sequence[Group]:
        groups: list[Group] = []
        tokens = 0
        with self._parts.events.span("demonstrate"):
            while tokens < self._config.metarl.warmstart.tokens_per_step:
                trace = next(self._demonstrations)
                groups.append(Group(self._demonstrations.ticket - 1, trace.problem_id, (trace,)))
                tokens += trace.num_tokens
        return groups

    def _state(self) -> dict[str, Json]:
        counts = self._pump.counts
        return {
            "queue": self._queue.snapshot(),
            "cursor": self._cursor.state(),
            "draws": self._demonstrations.draws,
            "ticket": self._demonstrations.ticket,
            "counts": {name: getattr(counts, name) for name in counts.__dataclass_fields__},
        }


async def serve(config: RunConfig, paths: RunPaths) -> None:
    """Builds the parts, binds the socket, serves one trainer."""
    async with AsyncExitStack() as stack:
        parts = await build_parts(config, paths, stack)
        server = ExperienceServer(config.metarl.network.bind_host, parts.endpoints.experience_port)
        stack.callback(server.close)
        orchestrator = Orchestrator(config, paths, parts, MetricsWriter(paths, config.metarl.logging))
        stack.callback(orchestrator.close)
        loop, serving = asyncio.get_running_loop(), asyncio.current_task()
        assert serving is not None
        loop.add_signal_handler(signal.SIGINT, orchestrator.stop)
        loop.add_signal_handler(signal.SIGTERM, serving.cancel)
        reason = await orchestrator.run(server)
        logger.info("the trainer is done: %s", reason)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.run.orchestrator", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run-dir", required=True, type=Path)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    paths = RunPaths.of(args.run_dir)
    failures: list[BaseException] = []
    try:
        asyncio.run(serve(load_resolved(paths.config), paths))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    except BaseExceptionGroup as group:
        ours, others = group.split(NeoxRLError)
        if others is not None or ours is None:
            raise
        failures.extend(leaves(ours))
    except NeoxRLError as error:
        failures.append(error)
    for failure in failures:
        logger.error("%s: %s", type(failure).__name__, failure)
    return 1 if failures else 0


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The single errors of nested task groups."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


if __name__ == "__main__":
    raise SystemExit(main())
