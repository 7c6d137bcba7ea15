"""The orchestrator process: problems in, verified groups out, versions switched, everything counted.

    trainer --next--> handler -- sft: demonstrations
                              -- rl:  queue.take <- deliver <- pump <- (generator, verifier) <- next_ticket
    trainer --published--> keeper -> servers switch -> live -> queue.set_live -> pump

One event loop owns all state, and what must not be forgotten is in the journal before anybody hears of it: this process may be killed at
any point, and the next one goes on (``comeback.py``). A background task that fails ends the process with its error; the launcher
names it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from neox_rl.codec import encode_group
from neox_rl.config.derived import shares_prefixes
from neox_rl.config.load import load_resolved
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, JournalError, NeoxRLError, exit_status, leaves
from neox_rl.problems.sources import ProblemCursor
from neox_rl.queue.book import Book
from neox_rl.queue.state import TicketQueue, name
from neox_rl.queue.wire import Delivery, ExperienceServer, Phase
from neox_rl.queue.wire_messages import attempt_of
from neox_rl.run.comeback import Comeback, lost_batch, open_book
from neox_rl.run.demonstrating import demonstration_source
from neox_rl.run.evaluation import Evaluator
from neox_rl.run.live_audit import LiveAudit
from neox_rl.run.members import Member, State
from neox_rl.run.parts import Parts, build_parts, signs_of_life
from neox_rl.run.pump import RolloutPump
from neox_rl.run.scoreboard import Scoreboard
from neox_rl.search.demonstrations import Demonstrations
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.rewind import SMALL, lacks_row, rewind, settle
from neox_rl.types import NO_VERSION, Group, Json, SamplingParams

logger = logging.getLogger(__name__)
MAX_ERRORS = 3
"""Errors in the log: a server that is gone fails every ticket in flight."""
DISK_S = 0.5
"""Between two looks at whether the journal can be written."""
T = TypeVar("T")


class Orchestrator:
    """The ``ExperienceHandler`` of a run. ``attempt``: of the trainer that it serves, or of the one whose session it continues."""

    def __init__(self, config: RunConfig, paths: RunPaths, parts: Parts, writer: MetricsWriter, book: Book, attempt: int) -> None:
        metarl = config.metarl
        self._config, self._paths, self._parts, self._book, self._attempt = config, paths, parts, book, attempt
        self._stopping = asyncio.Event()
        self._waiting = ""
        staleness = metarl.staleness
        self._queue = TicketQueue(
            metarl.rollout.groups_per_step, staleness.admission_slack, staleness.delivery_slack, staleness.mode, config.neox.train_iters
        )
        self._cursor = ProblemCursor(parts.problems.train, metarl.seed)
        params = SamplingParams(
            metarl.rollout.max_new_tokens, metarl.rollout.temperature, metarl.rollout.top_p, (parts.attempts.tokenizer.eos_id,)
        )
        self._board = Scoreboard(config, paths, writer, self._queue, book.history.tally, parts.attempts.tokenizer, parts.events)
        self._pump = RolloutPump(config, book, self._queue, self._cursor, parts.maker, params, parts.events, self._board.group)
        self._audit = LiveAudit(config, book, parts.events)
        self._comeback = Comeback(book, self._queue, self._cursor, self._pump, self._on_load)
        self._evaluator = Evaluator(config, parts.problems.heldout, parts.evaluated, params)
        self._shown = demonstration_source(config, parts.problems.train, parts.attempts.tokenizer)
        self._demonstrations = self._new_demonstrations(0, 0)
        self._tasks: asyncio.TaskGroup | None = None
        self._background: dict[str, asyncio.Task[None]] = {}
        self._evaluated = 0

    def _new_demonstrations(self, draws: int, ticket: int) -> Demonstrations:
        metarl, seq = self._config.metarl, self._config.neox.seq_length
        per_step, shared = metarl.warmstart.tokens_per_step, shares_prefixes(self._config)
        return Demonstrations(self._shown, metarl.seed, seq, draws, ticket, per_step, shared)

    def stop(self) -> None:
        """The user asks to end: whatever the trainer waits for ends now, and it saves and ends after its step."""
        self._stopping.set()
        self._pump.changed.fire()
        self._board.say("stopping: the trainer saves after this step")

    async def run(self, server: ExperienceServer) -> str:
        """Serves the trainer until it is done. Raises, in an ExceptionGroup, what a background task raises."""
        for word in self._book.damage:
            self._parts.events.instant("journal", message=word)
        async with asyncio.TaskGroup() as self._tasks:
            self._take_over(server)
            self._start("disk", self._watch_disk())
            self._parts.keeper.on_states = self._board.servers
            self._parts.keeper.on_member = self._on_member
            self._start("versions", self._parts.keeper.run(self._on_live))
            self._start("activity", self._parts.activity.run())
            self._start("prefix hits", self._parts.hits.run())
            try:
                return await server.serve(self)
            finally:
                for task in self._background.values():
                    task.cancel()

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        self._background[name] = self._tasks.create_task(work, name=name)

    def close(self) -> None:
        self._board.close()

    def _take_over(self, server: ExperienceServer) -> None:
        """The journal of a session that nobody ended: its trainer lives and goes on, unless one of a later attempt was started."""
        history = self._book.history
        if not history.session:
            return
        if self._attempt > history.attempt:
            server.take_over("", history.attempt, 0)
            return
        server.take_over(history.session, history.attempt, history.last, lost := lost_batch(history))
        if lost:
            self._parts.events.instant("journal", message=lost)
            return
        in_rl = history.published >= 0 or history.steps["rl"] or history.evaluated
        warm = self._config.metarl.warmstart.steps if in_rl else history.reported["sft"]
        settle(self._paths, warm, history.reported["rl"], history.evaluated.keys())
        small = [row["step"] for row in read_jsonl(self._paths.evaluations) if row["label"].startswith(SMALL)]
        self._evaluated = max(small, default=0)
        self._restore("a new orchestrator goes on")
        if history.stopped:
            self._stopping.set()
        if history.published >= 0:
            self._parts.keeper.promise(history.published)
        if history.steps["rl"]:
            self._start("rollouts", self._pump.run())

    def _restore(self, message: str) -> None:
        found, history = self._comeback.restore(), self._book.history
        match history.state:
            case {"draws": int() as draws, "ticket": int() as ticket}:
                self._demonstrations = self._new_demonstrations(draws, ticket)
        for _ in range(0 if history.steps["rl"] else history.reported["sft"] - history.steps["sft"]):
            self._batch(self._demonstrations)  # of a step whose record is lost: shown already
        self._parts.events.instant("recovered", message=message, sft_step=history.steps["sft"], rl_step=history.steps["rl"], **found)
        message = "; ".join(filter(None, (message, self._book.warning)))
        warm = history.steps["sft"] < self._config.metarl.warmstart.steps
        self._board.phase("warmstart" if warm else "rl", message)

    async def _watch_disk(self) -> None:
        """Says when the journal cannot be written, and when it can again."""
        told, journal = (False, False), self._book.journal
        while True:
            journal.check()
            trouble = journal.trouble
            if (kind := (bool(trouble), bool(journal.full))) != told:
                self._parts.events.instant("journal", message=trouble or "the disk takes the journal again")
                self._board.say(f"waits for {trouble}" if trouble else "")
                self._pump.changed.fire()
            told = kind
            await asyncio.sleep(DISK_S)

    # ExperienceHandler

    async def durable(self) -> None:
        await self._book.durable()

    async def hello(self, session: str, world: int, pid: int, attempt: int, state: Mapping[str, Json]) -> None:
        logger.info("trainer with %d ranks, rank 0 is pid %d", world, pid)
        if session == self._book.history.session:  # its answer went out with the orchestrator before this one
            return await self._hear_again(state.get("report"))
        match state:
            case {"sft_step": int() as sft_step, "rl_step": int() as rl_step}:
                rewind(self._paths, sft_step, rl_step)
            case _:
                raise ConfigError(f"the trainer does not say which steps it has done: {str(state)[:200]}")
        self._book.session(session, attempt, sft_step, rl_step, state)
        self._evaluated = rl_step
        self._restore("" if sft_step + rl_step == 0 else f"continues after step {rl_step or sft_step}")
        await self._hear_again(state.get("report"))

    async def _hear_again(self, report: Json) -> None:
        """Of the last step before the trainer's checkpoint: it may have been said when no orchestrator was there to hear it."""
        match report:
            case {"phase": str() as phase, "step": int() as step, "metrics": dict() as metrics} if lacks_row(self._paths, phase, step):
                await self._board.step(Phase(phase), step, metrics)

    async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery:
        if id <= self._book.history.last and self._book.history.stopped:
            return Delivery(())  # so the orchestrator before this one answered
        if phase is Phase.SFT:
            return self._demonstrate(id, step)
        if "rollouts" not in self._background:
            self._start("rollouts", self._pump.run())
        if id <= self._book.history.last:
            return self._again(step)
        groups: Sequence[Group] | None = None
        before = self._comeback.batch_of(step)
        while not self._stopping.is_set() and (groups := self._queue.take(step, before)) is None:
            self._waiting = self._queue.waiting_for(step)
            if self._queue.num_in_flight == 0:
                self._waiting += f"; {self._parts.keeper.waiting_for()}"
            await self._pump.changed.wait()
        if not groups:
            self._book.add("stopped", id=id)
            return Delivery(())
        self._parts.events.instant("delivered", step=step, ready=self._queue.num_ready, in_flight=self._queue.num_in_flight)
        self._board.delivered(groups, self._parts.hits.rate)
        positions = self._pump.taken(groups)
        bodies, state = self._book.bodies(groups), self._state()
        self._book.taken(id, step, groups, positions, state)
        self._book.history.release(group.ticket for group in groups)
        return Delivery(bodies, state)

    def _again(self, step: int) -> Delivery:
        """The batch that the orchestrator before this one had handed out when it died."""
        history = self._book.history
        tickets = history.taken.get(step, ())
        if not tickets or not history.groups.keys() >= set(tickets):
            lost = ", ".join(name(ticket) for ticket in tickets if ticket not in history.groups) or "what it was"
            raise JournalError(
                f"the batch of step {step} was handed out, but the journal lost {lost}: go on from the checkpoint (--resume)"
            )
        return Delivery([history.groups[ticket].body for ticket in tickets], history.state)

    def _demonstrate(self, id: int, step: int) -> Delivery:
        history = self._book.history
        if id > history.last and self._stopping.is_set():
            self._book.add("stopped", id=id)
            return Delivery(())
        if id <= history.last:
            before = self._new_demonstrations(history.sft["draws"], history.sft["ticket"])
            return Delivery([encode_group(group) for group in self._batch(before)], history.state)
        draws, ticket = self._demonstrations.draws, self._demonstrations.ticket
        groups = self._batch(self._demonstrations)
        state = self._state()
        self._book.add("taken", id=id, phase="sft", step=step, draws=draws, ticket=ticket, state=state)
        return Delivery([encode_group(group) for group in groups], state)

    def _batch(self, demonstrations: Demonstrations) -> Sequence[Group]:
        with self._parts.events.span("demonstrate"):
            return demonstrations.step()

    async def evaluate(self, id: int, label: str, version: int) -> Mapping[str, Json]:
        """Accuracy by mode; nothing where the user asked to stop before it was known."""
        known = self._book.history.evaluated.get(label)
        if id <= self._book.history.last and isinstance(known, dict):
            return known
        self._board.phase("evaluate", f"held-out problems, {label}")
        while self._queue.live_version < version and not self._stopping.is_set():
            self._waiting = self._parts.keeper.waiting_for()
            await self._pump.changed.wait()
        self._waiting = f"the evaluation {label!r}"
        with self._parts.events.span("evaluate", label=label):
            found = await self._unless_stopped(self._evaluator.full(label, self._queue.step, version))
        if found is None:
            self._book.add("stopped", id=id)
            return {}
        rows, attempts = found
        for row in rows:
            await self._board.evaluation(row)
        self._board.evaluated(label, attempts, sum(row["seconds"] for row in rows))
        metrics: dict[str, Json] = {row["mode"]: row["accuracy"]["mean"] for row in rows}
        self._book.add("evaluated", id=id, label=label, version=version, metrics=metrics)
        return metrics

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result, or None once the user asks to stop: the work is abandoned."""
        working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            stopping.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def report(self, id: int, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None:
        await self._board.step(phase, step, metrics)  # first: a row without a record is cut and told again, but not the other way round
        self._book.add("reported", id=id, phase=phase.value, step=step)
        if phase is Phase.RL:
            self._audit.reported(step, metrics)
        self._book.tidy()  # last: the audit forgets the step with it

    async def published(self, id: int, version: int, digest: str) -> None:
        self._book.add("published", id=id, version=version, digest=digest)
        self._comeback.published()
        self._pump.changed.fire()
        self._parts.keeper.promise(version)

    async def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None:
        self._book.checkpoint(id, sft_step, rl_step)

    async def done(self, reason: str) -> None:
        self._board.phase("report", reason)

    def waiting_for(self) -> str:
        return self._book.journal.trouble or self._board.trouble or self._waiting

    # events

    def _on_member(self, member: Member) -> None:
        self._audit.member(member)
        if member.state is State.SERVING and member.version != NO_VERSION and member.digest:
            self._book.attested(member.version, member.digest)

    def _on_live(self, version: int) -> None:
        if version > self._queue.step and self._book.has_holes:
            return  # the record of the step that made it is lost: the trainer is told at its next word
        self._comeback.live(version)
        self._book.add("live", version=version, digest=self._book.history.digests.get(version))
        self._pump.changed.fire()
        every = self._config.metarl.evaluation.every_steps
        # Not version % every: a version that was superseded while it was staged is never live.
        due = every and version // every > self._evaluated // every and version < self._config.neox.train_iters
        running = self._background.get("evaluation")
        if due and (running is None or running.done()):
            self._evaluated = version
            self._start("evaluation", self._small_evaluation(version))

    async def _small_evaluation(self, version: int) -> None:
        """Beside training: its last tokens may be those of later versions, as the row says."""
        await self._board.evaluation(await self._evaluator.small(f"step {version}", version, version))

    def _on_load(self, group: Group) -> None:
        if (problem := self._pump.problem(group.ticket)) is not None:
            self._board.recovered(group, problem)

    def _state(self) -> dict[str, Json]:
        return {
            "queue": self._queue.snapshot(),
            "cursor": self._cursor.state(),
            "problems": {**self._pump.open_problems()},
            "draws": self._demonstrations.draws,
            "ticket": self._demonstrations.ticket,
            "counts": asdict(self._book.history.tally),
        }


async def serve(config: RunConfig, paths: RunPaths) -> None:
    """Builds the parts, binds the socket, serves one trainer."""
    async with AsyncExitStack() as stack:
        events, heartbeat = signs_of_life(config, paths, stack)
        with events.span("prepare"):
            await asyncio.sleep(0)  # for the first beat: what follows may hold the event loop for long
            parts = await build_parts(config, paths, events, stack)
            server = ExperienceServer(config.metarl.network.bind_host, parts.endpoints.experience_port, keys=parts.keys)
            stack.callback(server.close)
            attempt = attempt_of(os.environ)
            book = stack.enter_context(closing(open_book(config, paths, attempt)))
            orchestrator = Orchestrator(config, paths, parts, MetricsWriter(paths, config.metarl.logging, asdict(config)), book, attempt)
            stack.callback(orchestrator.close)
        heartbeat.now()  # who started it again waits to hear that it is up
        loop, serving = asyncio.get_running_loop(), asyncio.current_task()
        assert serving is not None
        loop.add_signal_handler(signal.SIGINT, orchestrator.stop)
        loop.add_signal_handler(signal.SIGTERM, serving.cancel)
        reason = await orchestrator.run(server)
        await parts.joins.over(reason)
        logger.info("the trainer is done: %s", reason)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.run.orchestrator", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--run-dir", required=True, type=Path)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    paths = RunPaths.of(args.run_dir)
    failures: list[BaseException] = []
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(load_resolved(paths.config), paths))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    except BaseExceptionGroup as group:
        ours, others = group.split(NeoxRLError)
        if others is not None or ours is None:
            raise
        failures.extend(leaves(ours))
    except NeoxRLError as error:
        failures.append(error)
    for failure in failures[:MAX_ERRORS]:
        logger.error("%s: %s", type(failure).__name__, failure)
    if len(failures) > MAX_ERRORS:
        logger.error("and %d more like these", len(failures) - MAX_ERRORS)
    return max((exit_status(failure) for failure in failures if isinstance(failure, NeoxRLError)), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
