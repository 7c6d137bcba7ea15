"""The keeper with scripted servers over HTTP and a real publisher: who serves what, who is waited for, who comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, DeadlineError
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run.endpoints import free_port
from neox_rl.run.members import State
from neox_rl.run.versions import Deadlines, ServerKeeper
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.types import Completion, SamplingParams
from neox_rl.weights.publisher import Publisher
from tests.unit.small_run import scripted_server, small_config, small_snapshot

BEAT_S = 1.6
LIMITS = Deadlines(servers_s=60.0, publish_s=60.0, stage_s=30.0, switch_s=30.0, heartbeat_s=BEAT_S, drain_s=60.0)

SLOW_BEAT_S, TOLERANCE_S = 6.0, 5.0
"""Where delays are compared: a loaded machine may stand still for seconds, and one that is not waited for is told from one that is."""


class Run:
    """A keeper and what it needs. Servers are started and ended by the story."""

    def __init__(self, root: Path, stack: AsyncExitStack, limits: Deadlines = LIMITS) -> None:
        self.root, self.stack, self.limits = root, stack, limits
        self.config: RunConfig = small_config(root, scripted={"token_s": 0.01})
        self.publisher = stack.enter_context(closing(Publisher()))
        self.live: dict[int, float] = {}
        self.restarts: list[tuple[str, str]] = []
        self.logs: dict[str, EventLog] = {}

    async def start(self, *specs: ServerSpec) -> None:
        """A new keeper, as that of a new orchestrator."""
        self.generator = await self.stack.enter_async_context(VllmGenerator((), 20.0))
        events = self._log("orchestrator", "")
        self.keeper = ServerKeeper(self.generator, self.publisher.address, self.limits, events, self._log)
        for spec in specs:
            self.keeper.add(spec, lambda why, name=spec.name: self.restarts.append((name, why)))
        self.running = asyncio.create_task(self.keeper.run(lambda version: self.live.setdefault(version, time.monotonic())))
        self.stack.push_async_callback(self.end)

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    def _log(self, name: str, _: str) -> EventLog:
        if name not in self.logs:
            self.logs[name] = EventLog(self.root / "events" / f"{name}.jsonl", name)
            self.stack.callback(self.logs[name].close)
        return self.logs[name]

    def publish(self, version: int) -> float:
        self.publisher.offer(small_snapshot(version))
        self.keeper.promise(version)
        return time.monotonic()

    async def until_live(self, version: int, *, deadline_s: float = 30.0) -> float:
        await until(lambda: version in self.live or self.running.done(), f"v{version} to be live", deadline_s)
        return self.live[version]

    def states(self) -> dict[str, str]:
        return self.keeper.states()

    async def serving(self, *specs: ServerSpec) -> None:
        """Starts with ``specs`` and v0, which all of them serve then."""
        await self.start(*specs)
        self.publish(0)
        for spec in specs:
            await self.until_state(spec.name, State.SERVING)

    async def until_state(self, name: str, state: State) -> None:
        await until(lambda: self.states().get(name) == state, f"{name} to be {state}")

    def spec(self, name: str) -> ServerSpec:
        return ServerSpec(name, self.root, "127.0.0.1", free_port("127.0.0.1"), "float32", 128)

    async def sample(self, n: int = 2) -> tuple[Completion, ...]:
        problems = load_problems(self.config.metarl.problems, self.config.metarl.seed)
        tokenizer = load_tokenizer(self.config.metarl.tokenizer, self.config.metarl.problems)
        return await self.generator.sample(tokenizer.encode(problems.train[0].prompt), SamplingParams(96), n, "g000000")


async def until(condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        await asyncio.sleep(0.01)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Faults:
    """What is wrong with a server: it answers nothing while ``hold`` is not set; it stages nothing while it is ``deaf``; its switches fail
    while there are words in ``fails``; and it answers ``says``, whatever is asked, where that has words."""

    def __init__(self) -> None:
        self.hold, self.fails, self.says, self.probes = asyncio.Event(), "", "", 0
        self.deaf = False
        self.hold.set()

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        await self.hold.wait()
        if self.says:
            return web.Response(text=self.says, content_type="application/json")
        if self.fails and request.path == "/update_weights":
            return web.json_response({"error": self.fails}, status=500)
        if self.deaf and request.path == "/init_weight_transfer_engine":
            return web.json_response({})
        self.probes += request.path == "/weight_info"
        return await handler(request)


@asynccontextmanager
async def server(run: Run, spec: ServerSpec) -> AsyncIterator[Faults]:
    faults = Faults()

    @web.middleware
    async def faulty(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await faults(request, handler)

    async with scripted_server(run.config, spec.address, spec.name, faulty):
        yield faults


def story(told: Callable[[Run], Awaitable[None]], root: Path, limits: Deadlines = LIMITS) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(150.0), AsyncExitStack() as stack:
            await told(Run(root, stack, limits))

    asyncio.run(bounded())


def test_a_slow_or_dead_server_delays_a_version_by_one_heartbeat_at_most_and_once(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        quick, slow = run.spec("quick"), run.spec("slow")
        async with server(run, quick), AsyncExitStack() as life:
            it = await life.enter_async_context(server(run, slow))
            await run.serving(quick, slow)
            it.hold.clear()
            offered = run.publish(1)
            delay_s = await run.until_live(1) - offered
            assert 1.0 <= delay_s <= SLOW_BEAT_S + TOLERANCE_S, delay_s
            assert run.states() == {"quick": "serving", "slow": "suspended"}
            offered = run.publish(2)
            assert await run.until_live(2) - offered <= TOLERANCE_S, "who was left behind delays nobody again"
            it.hold.set()
            await run.until_state("slow", State.SERVING)
            member = run.keeper.members.get("slow")
            assert member is not None and member.version == 2
            await life.aclose()
            offered = run.publish(3)
            assert await run.until_live(3) - offered <= SLOW_BEAT_S + TOLERANCE_S
            offered = run.publish(4)
            assert await run.until_live(4) - offered <= TOLERANCE_S

    story(told, tmp_path, replace(LIMITS, heartbeat_s=SLOW_BEAT_S))


def test_a_silent_server_gets_no_requests_and_those_it_had_are_made_elsewhere(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        good, mute = run.spec("good"), run.spec("mute")
        async with server(run, good), server(run, mute) as it:
            await run.serving(good, mute)
            seen = it.probes
            await until(lambda: it.probes > seen, "an answered probe: the next one is the longest way off")
            it.hold.clear()
            begin = time.monotonic()
            made = asyncio.gather(*(run.sample() for _ in range(4)))
            await run.until_state("mute", State.SUSPENDED)
            assert time.monotonic() - begin <= SLOW_BEAT_S + TOLERANCE_S, "waiting for a probe and for its answer is one beat"
            assert len(await made) == 4 and time.monotonic() - begin < SLOW_BEAT_S + 10.0
            assert run.states() == {"good": "serving", "mute": "suspended"}
            it.hold.set()
            await run.until_state("mute", State.SERVING)

    story(told, tmp_path, replace(LIMITS, heartbeat_s=SLOW_BEAT_S))


def test_a_server_that_was_started_again_comes_back_at_the_live_version(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        other, victim = run.spec("other"), run.spec("victim")
        async with server(run, other):
            async with server(run, victim):
                await run.start(other, victim)
                run.publish(0)
                await run.until_state("victim", State.SERVING)
                run.publish(1)
                await until(lambda: [member.version for member in run.keeper.members.serving] == [1, 1], "both to serve v1")
            await run.until_state("victim", State.SUSPENDED)
            run.publish(2)
            await run.until_live(2)
            async with server(run, victim):
                await run.until_state("victim", State.SERVING)
                member = run.keeper.members.get("victim")
                assert member is not None and (member.version, member.digest) == (2, small_snapshot(2).digest)
        await run.end()
        for log in run.logs.values():
            log.flush()
        serving = [e for e in read_events(tmp_path / "events") if e.process == "victim" and e.name == "serving"]
        lives = [(e.fields["incarnation"], e.fields["version"], e.fields["digest"]) for e in serving]
        assert len({life for life, _, _ in lives}) == 2 and lives[-1][1:] == (2, small_snapshot(2).digest)
        assert run.restarts == [], "a process that is gone is seen by whoever started it"

    story(told, tmp_path)


def test_a_server_whose_answers_break_the_reader_harms_nobody_else(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        good, bad = run.spec("good"), run.spec("bad")
        async with server(run, good), server(run, bad) as it:
            await run.serving(good, bad)
            it.says = "[" * 200_000  # a RecursionError in the reader of JSON
            await run.until_state("bad", State.SUSPENDED)
            member = run.keeper.members.get("bad")
            assert member is not None and "its answer cannot be read: RecursionError" in member.why
            run.publish(1)
            await run.until_live(1)
            it.says = ""
            await run.until_state("bad", State.SERVING)

    story(told, tmp_path)


def test_what_a_server_answers_nonsense_to_is_made_elsewhere_and_its_log_says_so(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        good, bad = run.spec("good"), run.spec("bad")
        async with server(run, good), server(run, bad) as it:
            await run.serving(good, bad)
            seen = it.probes
            await until(lambda: it.probes > seen, "an answered probe: a request is sooner there than the next one")
            it.says = "{}"
            assert len(await asyncio.gather(*(run.sample() for _ in range(4)))) == 4
            run.logs["bad"].flush()
            words = [str(e.fields["message"]) for e in read_events(tmp_path / "events") if e.process == "bad" and e.name == "error"]
            assert words and all(bad.address in word and "answer not as expected" in word for word in words)

    story(told, tmp_path)


def test_a_server_whose_switch_failed_is_lost_until_another_process_answers(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        spec = run.spec("a")
        async with server(run, spec) as it:
            await run.start(spec)
            run.publish(0)
            await run.until_state("a", State.SERVING)
            it.fails = "half of the layers are new"
            run.publish(1)
            await run.until_state("a", State.LOST)
            it.fails = ""
            await asyncio.sleep(3 * BEAT_S)
            assert run.states() == {"a": "lost"} and len(run.restarts) == 1
            assert run.restarts[0][0] == "a" and "half of the layers are new" in run.restarts[0][1]
            waiting = asyncio.create_task(run.sample())
        async with server(run, spec):
            await run.until_live(1)
            assert {span.version for c in await waiting for span in c.spans} == {1}

    story(told, tmp_path)


def test_a_server_that_answers_but_stages_nothing_more_is_started_again_though_the_others_do_well(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        good, deaf, mute = run.spec("good"), run.spec("deaf"), run.spec("mute")
        async with server(run, good), AsyncExitStack() as life, server(run, mute) as silence:
            it = await life.enter_async_context(server(run, deaf))
            it.deaf = True
            silence.hold.clear()
            await run.start(good, deaf, mute)
            await run.until_state("deaf", State.STAGING)
            member, whys = run.keeper.members.get("deaf"), dict[str, str]()
            for version in range(200):
                if version == 5:  # a minute and a half goes by for them, and none for the good one
                    assert member is not None and run.restarts == []
                    member.owes_since -= 90.0
                    run.keeper._tended["mute"].silent_since -= 90.0
                run.publish(version)
                await run.until_live(version)
                if (whys := dict(run.restarts)).keys() >= {"deaf", "mute"}:
                    break
                await asyncio.sleep(0.2)
            assert "it answers, but has no version and came to no newer one in 90 s (metarl.weights." in whys["deaf"]
            assert "silent for 90 s (metarl.servers.start_timeout_s of the run): waited 0.8 s for http" in whys["mute"]
            assert whys.keys() == {"deaf", "mute"} and {"deaf": "lost", "mute": "lost"}.items() <= run.states().items()
            await life.aclose()  # whoever started it does so again
            await until(lambda: run.keeper._tended["deaf"].gone, "its end to be seen")
            async with server(run, deaf):
                await run.until_state("deaf", State.SERVING)

    story(told, tmp_path, replace(LIMITS, servers_s=90.0, stage_s=60.0, switch_s=30.0))


def test_a_server_that_was_silent_for_less_than_it_may_be_goes_on_when_it_answers_again(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        good, mute = run.spec("good"), run.spec("mute")
        async with server(run, good), server(run, mute) as it:
            await run.start(good, mute)
            run.publish(0)
            await run.until_state("mute", State.SERVING)
            it.hold.clear()
            await run.until_state("mute", State.SUSPENDED)
            run.publish(1)
            await run.until_live(1)
            member = run.keeper.members.get("mute")
            assert member is not None and member.owes_since < time.monotonic()
            # It is silent for longer than it may take to stage and to switch, and for less than to start.
            run.keeper._tended["mute"].silent_since -= 250.0
            member.owes_since -= 250.0
            it.hold.set()
            await run.until_state("mute", State.SERVING)
            assert member.version == 1 and run.restarts == []

    story(told, tmp_path, replace(LIMITS, servers_s=500.0, stage_s=60.0, switch_s=60.0))


def test_a_new_orchestrator_takes_the_servers_over_and_a_rolled_back_trainer_their_versions_back(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        spec = run.spec("a")
        async with server(run, spec):
            await run.start(spec)
            run.publish(7)
            await run.until_live(7)
            await run.end()
            run.live.clear()
            await run.start(spec)
            await run.until_live(7)
            await run.end()
            run.publisher.close()
            run.publisher = run.stack.enter_context(closing(Publisher()))
            await run.start(spec)
            await run.until_state("a", State.STAGING)
            life = run.keeper.members.get("a")
            assert life is not None and (begun := life.incarnation)
            await asyncio.sleep(2.5 * BEAT_S)
            assert life.incarnation == begun, "while there is nothing to stage, it is not told again and again to begin"
            run.publish(4)
            await run.until_live(4)
            assert {span.version for c in await run.sample() for span in c.spans} == {4}

    story(told, tmp_path)


def test_a_server_that_leaves_ends_what_it_has_begun(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        spec = run.spec("a")
        async with server(run, spec):
            await run.start(spec)
            run.publish(0)
            await run.until_live(0)
            with pytest.raises(ConfigError, match="is another server's"):
                run.keeper.add(spec, lambda _: None)
            begun = asyncio.create_task(run.sample(8))
            await until(lambda: run.generator.num_inflight == 8, "the request")
            await run.keeper.remove("a", "asked to", 60.0)
            assert begun.done() and len(begun.result()) == 8 and run.states() == {}
            run.keeper.add(spec, lambda _: None)
            await run.until_state("a", State.SERVING)

    story(told, tmp_path)


def test_what_never_comes_is_named(tmp_path: Path) -> None:
    async def no_server(run: Run) -> None:
        spec = run.spec("absent")
        await run.start(spec)
        (member,) = run.keeper.members.all
        await until(lambda: bool(member.why), "its first probe")
        member.since -= 60.0
        with pytest.raises(ExceptionGroup) as caught:
            await run.running
        assert caught.group_contains(DeadlineError, match=rf"a server to serve v0, .*; absent is starting \(.*{spec.address}")

    async def no_version(run: Run) -> None:
        spec = run.spec("a")
        async with server(run, spec):
            await run.start(spec)
            run.keeper.promise(3)
            with pytest.raises(ExceptionGroup) as caught:
                await run.running
            assert caught.group_contains(DeadlineError, match="for v3 from tcp://")

    story(no_server, tmp_path / "1")
    story(no_version, tmp_path / "2", replace(LIMITS, publish_s=0.5))
