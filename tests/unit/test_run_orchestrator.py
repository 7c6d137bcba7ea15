"""The orchestrator in this process, over its real sockets, with a scripted server: who waits, who stops, who fails."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from neox_rl.config.dump import dump
from neox_rl.config.run import RunConfig
from neox_rl.errors import NeoxRLError
from neox_rl.problems.sources import ProblemCursor
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.queue import journal
from neox_rl.queue.book import Book
from neox_rl.queue.wire import ExperienceServer, Phase
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.run.comeback import open_book
from neox_rl.run.endpoints import choose_endpoints, write_endpoints
from neox_rl.run.orchestrator import Orchestrator, leaves
from neox_rl.run.parts import build_parts, signs_of_life
from neox_rl.telemetry.jsonl import read_jsonl
from neox_rl.telemetry.metrics import MetricsWriter
from neox_rl.telemetry.status import read_status
from neox_rl.types import Json
from neox_rl.weights.publisher import Publisher
from tests.unit.small_run import scripted_server, small_config, small_paths, small_snapshot

FRESH: dict[str, Json] = {"sft_step": 0, "rl_step": 0}
METRICS: dict[str, Json] = {"loss": 0.5, "tokens_trained": 10, "reward_mean": 0.5, "staleness_max": 0}


class Run:
    """The orchestrator on a thread of its own; ``failure`` is what ended it, None when the trainer did."""

    def __init__(self, config: RunConfig, attempt: int = 0) -> None:
        self.attempt = attempt
        self.config, self.paths = config, small_paths(config)
        self.paths.config.write_text(dump(config))
        self.endpoints = choose_endpoints(config, load_tokenizer(config.metarl.tokenizer, config.metarl.problems).vocab_size)
        write_endpoints(self.paths, self.endpoints)
        self.publisher = Publisher(port=self.endpoints.weights_port)
        self.up = threading.Event()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        assert self.up.wait(60.0)

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.failure = error
        finally:
            self.up.set()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(scripted_server(self.config, self.endpoints.servers[0]))
            parts = await build_parts(self.config, self.paths, signs_of_life(self.config, self.paths, stack)[0], stack)
            server = ExperienceServer("127.0.0.1", self.endpoints.experience_port)
            stack.callback(server.close)
            book = Book.open(self.paths.journal, self.attempt, 0.02, 60.0)
            stack.callback(book.close)
            self.it = Orchestrator(
                self.config, self.paths, parts, MetricsWriter(self.paths, self.config.metarl.logging), book, self.attempt
            )
            stack.callback(self.it.close)
            self.parts, self.loop = parts, asyncio.get_running_loop()
            self.up.set()
            await self.it.run(server)

    def publish(self, client: ExperienceClient, version: int) -> None:
        """As the trainer does. Returns when the version is live, so that none is superseded."""
        snapshot = small_snapshot(version)
        self.publisher.offer(snapshot)
        client.published(version, snapshot.digest)
        end = time.monotonic() + 60.0
        while self.parts.keeper.members.live < version:
            assert time.monotonic() < end
            time.sleep(0.005)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def ended(self) -> list[BaseException]:
        self.publisher.close()
        self.thread.join(60.0)
        assert not self.thread.is_alive()
        if self.failure is None:
            return []
        return list(leaves(self.failure)) if isinstance(self.failure, BaseExceptionGroup) else [self.failure]


@contextmanager
def client_of(run: Run) -> Iterator[ExperienceClient]:
    client = ExperienceClient(run.endpoints.experience, 60.0, attempt=run.attempt)
    try:
        yield client
    finally:
        client.close()


def test_a_whole_run_with_its_files(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, train_iters=3, evaluation={"every_steps": 1}))
    with client_of(run) as client:
        client.hello(1, FRESH)
        assert sum(t.num_tokens for g in client.next_groups(Phase.SFT, 1) for t in g.traces) >= 128
        client.report(Phase.SFT, 1, METRICS)
        run.publish(client, 0)
        assert set(client.evaluate("warmstart", 0)) == {"greedy", "sampled"}
        for step in (1, 2, 3):
            assert len(client.next_groups(Phase.RL, step)) == 2
            run.publish(client, step)
            client.report(Phase.RL, step, METRICS)
        client.evaluate("final", 3)
        client.done("finished")
    assert run.ended() == []
    rows = read_jsonl(run.paths.metrics)
    assert [(row["phase"], row["step"]) for row in rows] == [("sft", 1), ("rl", 1), ("rl", 2), ("rl", 3)]
    last = rows[-1]
    assert (last["rollouts_generated"], last["rollouts_dropped"], last["rollouts_trained_twice"], last["staleness_bound"]) == (12, 0, 0, 2)
    assert last["search"]["outputs"] == 4.0 and last["tokens_generated"] > 0
    labels = [(row["label"], row["mode"]) for row in read_jsonl(run.paths.evaluations)]
    assert labels[:2] == [("warmstart", "greedy"), ("warmstart", "sampled")] and ("final", "sampled") in labels
    status = read_status(run.paths.status)
    assert (status.phase, status.message, status.version, status.step, status.total_steps) == ("report", "finished", 3, 3, 3)
    names = {row["name"] for row in read_jsonl(run.paths.event_log("orchestrator"))}
    assert {"phase", "admitted", "generate", "delivered", "evaluate", "queue", "tokens"} <= names


def test_a_report_that_nobody_heard_before_the_checkpoint_is_heard_once(tmp_path: Path) -> None:
    """The orchestrator was dead when the trainer reported step 2 of the warm start and saved; then the ranks died too."""
    config = small_config(tmp_path)
    run = Run(config)
    with client_of(run) as client:
        client.hello(1, FRESH)
        client.next_groups(Phase.SFT, 1)
        client.report(Phase.SFT, 1, METRICS)
        client.next_groups(Phase.SFT, 2)
        client.done("dies")
    assert run.ended() == []
    for attempt, loss in ((1, 0.25), (2, 0.75)):
        run = Run(config, attempt)
        with client_of(run) as client:
            report: dict[str, Json] = {"phase": "sft", "step": 2, "metrics": {**METRICS, "loss": loss}}
            client.hello(1, {"sft_step": 2, "rl_step": 0, "report": report})
            client.done("stopped")
        assert run.ended() == []
    assert [(row["phase"], row["step"], row["loss"]) for row in read_jsonl(run.paths.metrics)] == [("sft", 1, 0.5), ("sft", 2, 0.25)]


def test_the_small_evaluation_says_which_versions_it_saw(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path, train_iters=4, evaluation={"every_steps": 2}))
    with client_of(run) as client:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        run.publish(client, 0)
        for step in (1, 2, 3):
            client.next_groups(Phase.RL, step)
            run.publish(client, step)
        client.evaluate("other", 3)
        client.done("stopped")
    small = [row for row in read_jsonl(run.paths.evaluations) if row["label"].startswith("step")]
    assert run.ended() == [] and [(row["label"], row["mode"]) for row in small] == [("step 2", "greedy")]
    assert small[0]["versions"][0] == 2 and len(small[0]["per_problem"]) == 2


@pytest.mark.parametrize("waits_for", ["a version", "rollouts"])
def test_stop_ends_whatever_the_trainer_waits_for(tmp_path: Path, waits_for: str) -> None:
    run = Run(small_config(tmp_path))
    with client_of(run) as client:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        threading.Timer(0.3, run.call, [run.it.stop]).start()
        if waits_for == "a version":  # that is never published
            assert client.evaluate("warmstart", 0) == {}
        assert client.next_groups(Phase.RL, 1) == () and client.next_groups(Phase.SFT, 1) == ()
        assert client.state == {"sft_step": 2, "rl_step": 0}, "the state of the last batch stays"
        client.done("stopped")
    assert run.ended() == []


def test_a_background_task_that_fails_ends_the_run_with_its_error(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))

    async def breaks(*args: Any) -> None:
        raise NeoxRLError("the servers are gone")

    run.parts.attempts.generator.sample = breaks  # type: ignore[method-assign]
    with client_of(run) as client:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        run.publish(client, 0)
        threading.Thread(target=lambda: _silently(client), daemon=True).start()
        failures = run.ended()
    assert "the servers are gone" in map(str, failures)


def _silently(client: ExperienceClient) -> None:
    try:
        client.next_groups(Phase.RL, 1)
    except Exception:
        return  # it hears of the failure or of silence; this test is about the orchestrator


def test_a_resumed_run_goes_on_with_tickets_problems_and_counts(tmp_path: Path) -> None:
    config = small_config(tmp_path, train_iters=4)
    run = Run(config)
    with client_of(run) as client:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        run.publish(client, 0)
        groups = list(client.next_groups(Phase.RL, 1))
        state = json.loads(json.dumps(client.state))
        client.report(Phase.RL, 1, METRICS)
        run.publish(client, 1)
        client.next_groups(Phase.RL, 2)
        client.report(Phase.RL, 2, METRICS)
        client.done("stopped")
    assert run.ended() == []
    run = Run(config, attempt=1)
    with client_of(run) as client:
        client.hello(1, state | {"sft_step": 2, "rl_step": 1})
        assert [(row["phase"], row["step"]) for row in read_jsonl(run.paths.metrics)] == [("rl", 1)], "step 2 is done again"
        run.publish(client, 1)
        for step in (2, 3, 4):
            groups += client.next_groups(Phase.RL, step)
            run.publish(client, step)
            client.report(Phase.RL, step, METRICS)
        client.done("finished")
    assert run.ended() == [] and sorted(group.ticket for group in groups) == list(range(8))
    cursor = ProblemCursor(run.parts.problems.train, config.metarl.seed)
    assert {group.problem_id for group in groups} == {cursor.next().id for _ in range(8)}, "no problem is passed over"
    last = read_jsonl(run.paths.metrics)[-1]
    assert (last["rollouts_dropped"], last["rollouts_trained_twice"]) == (0, 0) and last["rollouts_generated"] >= 16


def test_another_seed_on_resume_is_refused_and_the_trainer_is_told(tmp_path: Path) -> None:
    run = Run(small_config(tmp_path))
    with client_of(run) as client:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        run.publish(client, 0)
        client.next_groups(Phase.RL, 1)
        state = dict(client.state)
        client.done("stopped")
    assert run.ended() == []
    run = Run(small_config(tmp_path, problems={"max_number": 7}), attempt=1)
    with client_of(run) as client, pytest.raises(NeoxRLError, match="does not fit seed"):
        client.hello(1, state | {"sft_step": 2, "rl_step": 1})
    assert "does not fit seed" in str(run.ended()[0])


def test_a_full_disk_holds_batches_back_and_says_so_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, write = threading.Event(), journal._Segment.write

    def full(segment: Any, items: Any) -> None:
        if not room.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(segment, items)

    monkeypatch.setattr(journal, "RETRY_S", 0.02)
    run = Run(small_config(tmp_path))
    with client_of(run) as client, ThreadPoolExecutor(1) as pool:
        client.hello(1, {"sft_step": 2, "rl_step": 0})
        run.publish(client, 0)
        monkeypatch.setattr(journal._Segment, "write", full)
        batch = pool.submit(client.next_groups, Phase.RL, 1)
        try:
            end = time.monotonic() + 60.0
            while "bytes free" not in read_status(run.paths.status).message:
                assert time.monotonic() < end
                time.sleep(0.02)
            assert str(run.paths.journal) in run.it.waiting_for() and not batch.done()
        finally:
            room.set()
        assert len(batch.result(60.0)) == 2
        written = threading.Event()
        monkeypatch.setattr(MetricsWriter, "written", lambda _: written.is_set())
        client.report(Phase.RL, 1, METRICS)
        while str(run.paths.metrics) not in run.it.waiting_for():
            assert time.monotonic() < end
            time.sleep(0.02)
        written.set()
        client.done("stopped")
    assert run.ended() == []


def test_the_journal_of_an_orchestrator_that_ends_slowly_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor, of a run that is resumed at once, would else give up before it was killed."""
    config = small_config(tmp_path, deadlines={"shutdown_s": 45.0})
    waits: list[float] = []
    monkeypatch.setattr("neox_rl.queue.book.open_journal", lambda *args: waits.append(args[3]) or journal.open_journal(*args))
    open_book(config, small_paths(config), 1).close()
    assert waits[0] > 45.0
