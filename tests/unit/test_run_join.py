"""Servers that join a run and leave it: the agent's process, its scripted server, a run's desk over real sockets; who is refused."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import zmq

from neox_rl.config.dump import dump
from neox_rl.config.machine import Machine
from neox_rl.errors import ConfigError, DeadlineError, ProcessDiedError, WireError
from neox_rl.framing import PROTOCOL, pack
from neox_rl.guard import guarded_popen, stop
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run.endpoints import choose_endpoints, free_port, server_specs
from neox_rl.run.join_wire import BEAT, BEATEN, GONE, JOIN, LEAVE, REFUSED, WELCOME, JoinClient, JoinSocket, Message, message, read_message
from neox_rl.run.joining import JoinDesk, Offer
from neox_rl.run.members import State
from neox_rl.run.recovery import HEALTHY_S
from neox_rl.run.serve import Agent, _check_gpus, main
from tests.unit.small_run import scripted_server, small_paths
from tests.unit.test_run_versions import LIMITS, Run, story, until

SOON_S = 60.0
"""For processes to start and end, on a loaded machine."""


class Host:
    """A run with one server of its own and a desk. ``agent`` starts the real program."""

    def __init__(self, run: Run, stack: AsyncExitStack, silence_s: float) -> None:
        self.run, self.stack, self.silence_s = run, stack, silence_s
        self.paths = small_paths(run.config)
        self.paths.config.write_text(dump(run.config))
        self.endpoints = choose_endpoints(run.config, 99)
        self.log = self.paths.root / "agent.log"

    async def open(self) -> None:
        """As a new orchestrator does."""
        (spec,) = server_specs(self.run.config, self.endpoints, self.paths.root / "model", Machine((0,)))
        self.socket = JoinSocket("127.0.0.1", self.endpoints.join_port)
        offer = Offer.of(self.run.config, self.paths, self.endpoints, spec)
        await self.run.start(spec)
        ours = Offer(offer.generator, self.run.publisher.address, 5.0, spec, offer.files)
        self.desk = JoinDesk(self.socket, self.run.keeper, ours, self.silence_s)
        self.desking = asyncio.create_task(self.desk.run())

    async def close(self) -> None:
        self.desking.cancel()
        await asyncio.gather(self.desking, return_exceptions=True)
        self.socket.close()
        await self.run.end()

    async def agent(self, *arguments: str) -> asyncio.subprocess.Process:
        argv = ["-m", "neox_rl.run.serve", "--join", self.endpoints.join, "--log-dir", str(self.paths.logs), *arguments]
        with self.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(sys.executable, *argv, stdout=log, stderr=log)

        async def end() -> None:
            if process.returncode is None:
                process.kill()
                await process.wait()

        self.stack.push_async_callback(end)
        return process

    def server_of(self, agent: asyncio.subprocess.Process) -> psutil.Process:
        found = []
        for process in psutil.Process(agent.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that ends meanwhile
                found += [process] * ("neox_rl.run.scripted_server" in process.cmdline())
        return max(found, key=lambda p: (p.create_time(), p.pid))  # its guardian has the same words


@asynccontextmanager
async def host(run: Run, silence_s: float = SOON_S) -> AsyncIterator[Host]:
    async with AsyncExitStack() as stack:
        it = Host(run, stack, silence_s)
        await stack.enter_async_context(scripted_server(run.config, it.endpoints.servers[0]))
        await it.open()
        try:
            yield it
        finally:
            await it.close()


class DyingServer(Agent):
    """Its server ends at once, whenever it is started: at ``starts``, on a clock that the test sets."""

    log: Path
    starts: list[float]
    now = 0.0

    def start(self) -> None:
        self.restarts.started = self.now
        self.process = guarded_popen(["false"], {"PATH": "/bin:/usr/bin"}, self.log)
        self.process.wait(SOON_S)

    def _start(self, spec: object, welcome: object) -> None:
        self.starts.append(self.now)
        self.start()

    def look(self, now: float) -> None:
        self.now = now
        self._keep_up(None, None, now)  # type: ignore[arg-type]  # nothing of them is used here


def test_a_server_that_dies_is_started_again_by_the_rule_of_the_runs_own(tmp_path: Path) -> None:
    agent = DyingServer(argparse.Namespace())
    agent.log, agent.starts = tmp_path / "guest.log", []
    agent.start()
    for now in (1.0, 2.0, 2.9, 3.0, 4.0, 5.9, 6.0):
        agent.look(now)
    assert agent.starts == [1.0, 3.0, 6.0], "the first at once, then each later"
    agent.look(HEALTHY_S + 6.0)
    assert agent.starts[3:] == [HEALTHY_S + 6.0], "forgiven after a while of health"
    with pytest.raises(ProcessDiedError, match="started again 3 times"):
        for later in range(100):
            agent.look(HEALTHY_S + 7.0 + later)
    assert len(agent.starts) == 6


def test_a_server_joins_serves_is_healed_outlives_an_orchestrator_and_leaves(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        async with host(run) as it:
            run.publish(3)
            await run.until_live(3)
            agent = await it.agent("--name", "guest")
            await until(lambda: run.states().get("guest") == State.SERVING, "the guest to serve", SOON_S)
            member = run.keeper.members.get("guest")
            assert member is not None and (member.version, member.address in run.generator.inflight) == (3, True)

            first, life = it.server_of(agent), member.incarnation
            first.kill()
            await until(lambda: member.incarnation != life, "its agent to start it again", SOON_S)
            await until(lambda: run.states()["guest"] == State.SERVING, "the guest to serve again", SOON_S)
            second = it.server_of(agent)
            assert second.pid != first.pid

            await it.close()
            await it.open()
            await until(lambda: run.states().get("guest") == State.SERVING, "it to join the new orchestrator", SOON_S)
            assert it.server_of(agent).pid == second.pid, "the server stays as it is"

            agent.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(agent.wait(), SOON_S) == 0
            assert "guest" not in run.states() and not second.is_running()
            assert "joins as guest" in it.log.read_text() and "leaves: asked to" in it.log.read_text()

    story(told, tmp_path)


def test_when_the_run_is_over_the_agents_end_their_servers(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        async with host(run, silence_s=8.0) as it:
            agent = await it.agent()
            await until(lambda: run.states().get("joined-0") == State.STAGING, "its server to answer", SOON_S)
            server = it.server_of(agent)
            await it.desk.over("finished")
            assert await asyncio.wait_for(agent.wait(), SOON_S) == 0
            assert not server.is_running() and "the run is over: finished" in it.log.read_text()
            await until(lambda: "joined-0" not in run.states(), "its silence to be noticed")

    story(told, tmp_path)


class Silence:
    """A client in time of its own: each wait for an answer passes at once, and in ``answers`` of them there is one."""

    address = "tcp://run:1"
    handshakes = SimpleNamespace(check=lambda: None)

    def __init__(self, answers: int) -> None:
        self.now, self.answers, self.sent = 0.0, answers, 0

    async def send(self, frames: object) -> None:
        self.sent += 1

    async def receive(self, timeout_s: float, kinds: object) -> Message | None:
        self.now += timeout_s
        self.answers -= 1
        return Message(BEATEN, {"state": "serving", "version": 3, "restarts": 0}, {}) if self.answers >= 0 else None


def test_an_agent_that_hears_nothing_more_ends_with_a_word(tmp_path: Path) -> None:
    agent = DyingServer(argparse.Namespace(patience=60.0))
    agent.process = guarded_popen(["sleep", "60"], {"PATH": "/bin:/usr/bin"}, tmp_path / "guest.log")
    silence = Silence(answers=50)
    agent.client, agent.clock = silence, lambda: silence.now  # type: ignore[assignment]  # no socket
    with pytest.raises(DeadlineError, match=r"waited 6\d\.\d s for a word from the run at tcp://run:1.*it has ended, or cannot be reached"):
        asyncio.run(agent._serve(None, None, "h", 1))  # type: ignore[arg-type]  # nothing of them is used here
    assert 70.0 <= silence.now <= 73.0 and silence.sent in (70, 71, 72), "10 s with answers, 60 without, a beat each second"
    stop(agent.process, 0.0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--cores", "0-x"), r"--cores '0-x': must be as in 0-3,5"),
        (("--cores", "4000"), r"--cores 4000: this process may not use core 4000; it has \["),
        (("--gpus", "a"), r"--gpus 'a': must be ids with commas between, as in 0,1"),
        (("--gpus", "1,1"), r"--gpus 1,1: names a GPU twice"),
        (("--host", "http://n3", "--port", "8000"), r"--host 'http://n3': must be an IPv4 address or a host name"),
        (("--host", "fd00::1", "--port", "8000"), r"--host 'fd00::1': must be an IPv4 address or a host name"),
        (("--host", "10.0.0.5/24"), r"--host '10.0.0.5/24': must be an IPv4 address or a host name"),
        (("--port", "99999"), r"--port 99999: must be a port"),
        (("--port", "-5"), r"--port -5: must be a port"),
        (("--timeout", "nan"), r"--timeout nan: must be seconds"),
        (("--patience", "0"), r"--patience 0: must be seconds"),
    ],
)
def test_places_that_there_are_not_are_refused_before_anything_joins(
    flags: tuple[str, ...], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["--join", "tcp://127.0.0.1:1", *flags]) == 2
    assert re.search(complaint, caplog.text)


@pytest.mark.parametrize(
    ("gpus", "tp", "there", "fits"),
    [("", 1, 0, True), ("4", 1, 8, True), ("", 1, 8, False), ("4", 2, 8, False), ("0,1", 1, 8, False), ("0", 2, 0, False)],
)
def test_where_there_are_gpus_a_server_is_told_which(gpus: str, tp: int, there: int, fits: bool) -> None:
    spec = ServerSpec("a", Path("m"), "h", 1, "float32", 8, tensor_parallel_size=tp, gpus=gpus)
    _check_gpus(spec, "scripted", there)
    said = rf"--gpus '{gpus}': .* {tp} TP ranks .* shows {there} GPUs; name {tp}, as in --gpus 0"
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=said):
        _check_gpus(spec, "vllm", there)


def test_a_joined_server_that_never_comes_to_serve_is_dropped_with_a_word(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        async with host(run) as it:
            run.publish(0)
            await run.until_live(0)
            with contextlib.closing(JoinClient(it.endpoints.join)) as agent:
                await agent.send(message(JOIN, token="t", name="guest", host="127.0.0.1", port=free_port("127.0.0.1")))
                heard: list[Message] = []

                async def beat() -> bool:
                    again = any(got.kind == BEATEN and got.fields["restarts"] for got in heard)
                    if run.states().get("guest") == (State.LOST if again else State.STARTING):  # its time goes by, and no other's
                        run.keeper._tended["guest"].silent_since -= 90.0
                    await agent.send(message(BEAT, token="t", name="guest"))
                    if (got := await agent.receive(0.2, (WELCOME, BEATEN, REFUSED))) is not None:
                        heard.append(got)
                    return bool(heard) and heard[-1].kind == REFUSED

                end = time.monotonic() + SOON_S
                while not await beat():
                    assert time.monotonic() < end
            assert (
                "guest, started again, did not come to serve: it did not come back in 90 s (metarl.servers.start_timeout_s of the run)"
                in heard[-1].fields["message"]
            )
            assert max(got.fields["restarts"] for got in heard if got.kind == BEATEN) == 1, "once it is to be started again"
            assert "guest" not in run.states()

    story(told, tmp_path, replace(LIMITS, servers_s=90.0))


def test_names_of_the_runs_own_and_of_others_are_refused(tmp_path: Path) -> None:
    async def told(run: Run) -> None:
        async with host(run) as it:
            for name in ("server-0", "orchestrator"):
                agent = await it.agent("--name", name)
                assert await asyncio.wait_for(agent.wait(), SOON_S) == 2
                assert f"--name {name}: names that begin with" in it.log.read_text()
            assert await asyncio.wait_for((await it.agent("--port", it.endpoints.servers[0].rpartition(":")[2])).wait(), SOON_S) == 2
            assert re.search(r"cannot bind|another server's", it.log.read_text())

    story(told, tmp_path)


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("tcp://127.0.0.1:{free}", r"waited 1\.0 s for a run to answer at tcp://127\.0\.0\.1:\d+.*is it the join address"),
        ("tcp://127.0.0.1:{other}", r"is not the join socket of a run of this release: .*kind 'error'"),
        ("http://127.0.0.1:80", "is no address to join: .*give tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "is no address to join: .*give tcp://HOST:PORT"),
    ],
)
def test_what_is_no_run_is_said_so_in_bounded_time(address: str, complaint: str, caplog: pytest.LogCaptureFixture) -> None:
    begin, answered = time.monotonic(), "{other}" in address
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        other.linger = 0
        filled = address.format(free=free_port("127.0.0.1"), other=other.bind_to_random_port("tcp://127.0.0.1"))
        answering = threading.Thread(target=_answer_once, args=(other,), daemon=True)
        if answered:
            answering.start()
        assert main(["--join", filled, "--timeout", f"{SOON_S if answered else 1.0:g}"]) in (1, 2)
        if answered:
            answering.join()
    assert re.search(complaint, caplog.text) and time.monotonic() - begin < SOON_S


def _answer_once(socket: zmq.SyncSocket) -> None:
    """As an experience socket answers what is not its own."""
    if socket.poll(int(SOON_S * 1000)):
        peer, *_ = socket.recv_multipart()
        socket.send_multipart([peer, *pack("error", {"id": 0, "acked": 0, "message": "malformed message"}, {})])


def test_messages_are_read_exactly() -> None:
    server = {
        "dtype": "float32",
        "max_model_len": 8,
        "max_num_seqs": 2,
        "tensor_parallel_size": 1,
        "enforce_eager": True,
        "seed": 0,
        "kv_cache_gib": 1.0,
        "gpu_memory_frac": 0.9,
        "stats": False,
    }
    fields = {"name": "a", "generator": "vllm", "publisher": "tcp://h:1", "drain_s": 1.0}
    good = message(WELCOME, {"config.json": b"{}"}, server=server, **fields)  # type: ignore[arg-type]
    assert read_message(good, (WELCOME,)).files == {"config.json": b"{}"}
    for bad in (
        message(WELCOME, {"../x": b""}, server=server, **fields),  # type: ignore[arg-type]
        message(WELCOME, {"x": b""}, server=server | {"dtype": "int4; rm"}, **fields),  # type: ignore[arg-type]
        message(WELCOME, {"x": b""}, server=server | {"max_model_len": 0}, **fields),  # type: ignore[arg-type]
        message(WELCOME, {f"f{i}": b"" for i in range(17)}, server=server, **fields),  # type: ignore[arg-type]
        message(JOIN, token="t", name="a/b", host="h", port=1),
        message(JOIN, token="t", name="a", host="h", port=0),
        message(JOIN, token="t", name="a", host="h\n", port=1),
        *(message(JOIN, token="t", name="a", host=host, port=1) for host in ("::1", "[", "#", "a/b", "http://n3", "10.0.0.5/24")),
        message(JOIN, token="t", name="a", host="h", port=True),
        message(BEAT, token="t"),
        message(BEAT, {"x": b""}, token="t", name="a"),
        message(GONE),
        [],
        [b"GET / HTTP/1.1"],
    ):
        with pytest.raises(WireError):
            read_message([bytes(frame) for frame in bad], (WELCOME, JOIN, BEAT, LEAVE, BEATEN))
    other = bytes(message(GONE)[0])
    with pytest.raises(WireError, match="run one release on both sides"):
        read_message([other[:3] + bytes([PROTOCOL + 1]) + other[4:]], (GONE,))
