"""Fires hostile messages at everything that reads messages: ``python tools/fuzz.py --frames 100000 --seed 7 --live 3000``.

``--frames`` messages, damaged and forged (``fuzzing.py``), go to the readers as function calls; ``--live`` messages to each of four
sockets over real ZeroMQ: the experience socket with a trainer on it, the publisher with a server on it, a server's stager whose
publisher is false, the join socket with a server that has joined. The sockets have no keys here: this is what a peer can do that gets
in. Afterwards nothing must have changed, and valid peers are served.

Exit status 1 and the finding; the same seed repeats it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import zmq
from fuzz_targets import example_controls, example_groups, example_joins, example_requests, targets
from fuzzing import Finding, Message, damaged, forged, fuzz

from neox_rl.codec import encode_group
from neox_rl.errors import NeoxRLError
from neox_rl.framing import pack
from neox_rl.queue.wire import Delivery, ExperienceServer, Phase
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.rollout.vllm_client import VllmGenerator
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run import join_wire
from neox_rl.run.joining import JoinDesk, Offer
from neox_rl.run.versions import Deadlines, ServerKeeper
from neox_rl.telemetry.events import EventLog
from neox_rl.weights.manifest import verify
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import Snapshot, make_snapshot
from neox_rl.weights.stager import Stager
from neox_rl.weights.wire import FETCH, OFFERED, STAGED, WATCH, control, read_control

LIVE_S = 60.0
"""Until a service must have answered, hostile messages before or not."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frames", type=int, default=100_000, help="messages to the readers, all together")
    parser.add_argument("--live", type=int, default=0, help="messages to each live socket")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    begin = time.process_time()
    try:
        tally = fuzz(targets(), args.frames, args.seed)
        for name, counts in tally.counts.items():
            print(f"{name:22s} " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
        print(f"{tally.total()} messages in {time.process_time() - begin:.1f} s of processor time, no finding")
        for live in (experience, publisher, stager, join) if args.live else ():
            begin = time.monotonic()
            said = live(args.live, args.seed)
            print(f"{live.__name__:22s} {args.live} messages over ZeroMQ in {time.monotonic() - begin:.1f} s: {said}")
    except Finding as finding:
        print(f"FINDING (seed {args.seed}): {finding}")
        return 1
    return 0


class Handler:
    """Of an orchestrator: writes down what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def hello(self, *args: Any, **body: Any) -> None:
        self.calls.append("hello")

    async def next_groups(self, *args: Any, **body: Any) -> Delivery:
        self.calls.append("next")
        return Delivery([encode_group(group) for group in example_groups()], {"draws": 1})

    async def evaluate(self, *args: Any, **body: Any) -> dict[str, Any]:
        self.calls.append("evaluate")
        return {}

    async def report(self, *args: Any, **body: Any) -> None:
        self.calls.append("report")

    async def published(self, *args: Any, **body: Any) -> None:
        self.calls.append("published")

    async def checkpoint(self, *args: Any, **body: Any) -> None:
        self.calls.append("checkpoint")

    async def done(self, *args: Any, **body: Any) -> None:
        self.calls.append("done")

    async def durable(self) -> None:
        return

    def waiting_for(self) -> str:
        return ""


def experience(count: int, seed: int) -> str:
    """The attacker knows the session: he damages the trainer's next messages, and repeats some out of turn; forged ones are of another
    session."""
    return asyncio.run(_experience(count, random.Random(seed)))


async def _experience(count: int, rng: random.Random) -> str:
    handler = Handler()
    with closing(ExperienceServer("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.port}"
        serving = asyncio.create_task(server.serve(handler))
        with closing(ExperienceClient(address, LIVE_S)) as client:
            await asyncio.to_thread(client.hello, 1)
            # Not covered: who knows the session and goes on in it, well-formed and in turn, is the trainer.
            mine, late, others = (example_requests(*which) for which in ((client._session, 2), (client._session, 10**6), ("other", 1)))

            def hostile() -> Iterator[Message]:
                for _ in range(count):
                    sent = rng.choice(mine)
                    broken = damaged(rng, sent, rng.choice(mine))
                    stale = rng.choice(late) if rng.random() < 0.2 else forged(rng, rng.choice(others))
                    yield stale if rng.random() < 0.5 or broken in mine else broken

            def settled() -> bool:
                return server.malformed + server.strangers + server.duplicates + server.out_of_order >= count

            await asyncio.to_thread(attack, address, hostile(), settled)
            expect(handler.calls == ["hello"], f"experience: hostile messages had the handler do {handler.calls[1:]}")
            groups = await served(asyncio.to_thread(client.next_groups, Phase.RL, 1), "the trainer's next batch")
            expect(groups == tuple(example_groups()), "experience: the trainer got other groups than were sent")
            await served(asyncio.to_thread(client.done, "end"), "the answer to done")
        await served(serving, "the experience server to end")
    return f"{server.malformed} malformed, {server.strangers} of strangers, {server.duplicates + server.out_of_order} not in turn"


async def served(work: Any, what: str) -> Any:
    try:
        return await asyncio.wait_for(work, LIVE_S)
    except (NeoxRLError, TimeoutError) as error:
        raise Finding(f"after hostile messages {what} did not come: {error!r}") from error


def attack(address: str, messages: Iterator[Message], settled: Callable[[], bool]) -> None:
    """Sends all of them, throws answers away, and stays until they have had their effect: closing would take back what is on its way."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger, socket.sndtimeo = round(1000 * LIVE_S), round(1000 * LIVE_S)
        socket.connect(address)
        for message in messages:
            try:
                socket.send_multipart(message or [b""])
            except zmq.Again as error:
                raise Finding(f"{address} takes no more messages") from error
            while socket.poll(0):
                socket.recv_multipart()
        end = time.monotonic() + LIVE_S
        while not settled():
            expect(time.monotonic() < end, f"{address}: not all messages are accounted for")
            if socket.poll(20):
                socket.recv_multipart()


def publisher(count: int, seed: int) -> str:
    """Whoever gets in may fetch and watch; what is not of the protocol is counted, and acks of other digests are no acks."""
    rng, controls, every = random.Random(seed), example_controls(), (FETCH, STAGED, WATCH)
    wrong = 0

    def hostile() -> Iterator[Message]:
        nonlocal wrong
        for _ in range(count):
            sent = rng.choice(controls)
            message = forged(rng, sent) if rng.random() < 0.5 else damaged(rng, sent, rng.choice(controls))
            wrong += refused(lambda message=message: read_control(message or [b""], every))  # type: ignore[misc]
            yield message

    with closing(Publisher()) as service, closing(Stager(service.address, "early/0")) as early:
        service.offer(snapshot(1))
        attack(service.address, hostile(), lambda: service.malformed >= wrong)
        service.offer(snapshot(2))
        with closing(Stager(service.address, "late/0")) as late:
            for worker in (early, late):
                taken(worker, snapshot(2))
        expect(set(service._peers.staged) <= {"early/0", "late/0"}, f"publisher: acks of {sorted(service._peers.staged)}")
        return f"{service.malformed} malformed; two servers got the next version"


def stager(count: int, seed: int) -> str:
    """A false publisher: not a byte of what it sends may be held as staged. Then the true snapshot comes."""
    rng, good = random.Random(seed), snapshot(5)
    sent = [bytes(frame) for frame in good.frames]
    others = [*sent, *(bytes(frame) for frame in pack(OFFERED, {"version": 9, "digest": ""}, {}))]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as false:
        false.linger = 0
        false.setsockopt(zmq.SNDHWM, 0)
        address = f"tcp://127.0.0.1:{false.bind_to_random_port('tcp://127.0.0.1')}"
        with closing(Stager(address, "a/0")) as worker:
            expect(bool(false.poll(round(1000 * LIVE_S))), "stager: asks for nothing")
            identity = false.recv_multipart()[0]
            refusals = 0
            while refusals < count:
                message = forged(rng, sent, self_digested=True) if rng.random() < 0.5 else damaged(rng, sent, others)
                if refused(lambda message=message: verify(message)):  # type: ignore[misc]
                    refusals += 1
                    false.send_multipart([identity, *(message or [b""])])
            false.send_multipart([identity, *control(OFFERED, version=7, digest=good.digest)])
            false.send_multipart([identity, *sent])
            taken(worker, good)
            expect(worker._have == 5 and not worker._held, f"stager: holds {sorted(worker._held)} beside what is valid")
    return "none was staged; the true snapshot was"


HOSTS = ("::1", "fd00::1", "[::1]", "[", "]", "#", "a/b", "a@b", "a?b", "a:1", "%", "%zz", "http://n3", "10.0.0.5/24", "-", "xn--")
"""Well-formed words that are no hosts: a URL with one of them is none, or another's."""
UNREACHABLE = ("a..b", "999.1.1.1", "1", "0x7f.1", "xn--0", "a" * 200)
"""Hosts by their letters, where no server can be: whoever joins there is waited for in vain, and nobody else is harmed."""
KEEPS = Deadlines(servers_s=1e4, publish_s=1e4, stage_s=1e4, switch_s=1e4, heartbeat_s=1.0, drain_s=0.0)


def join(count: int, seed: int) -> str:
    """Whoever gets in may join; what is damaged has no one join or leave, and beats of strangers keep nobody."""
    return asyncio.run(_join(count, random.Random(seed)))


async def _join(count: int, rng: random.Random) -> str:
    asked = (join_wire.JOIN, join_wire.BEAT, join_wire.LEAVE)
    every = example_joins()
    mine = [message for message in every if not refused(lambda message=message: join_wire.read_message(message, asked))]  # type: ignore[misc]
    strange = [[bytes(f) for f in join_wire.message(kind, token="other", name="mine", **more)] for kind, more in STRANGE.items()]
    sent = wrong = 0

    def hostile() -> Iterator[Message]:
        nonlocal sent, wrong
        while sent < count:
            good = rng.choice(mine)
            message = forged(rng, good) if rng.random() < 0.4 else damaged(rng, good, rng.choice(every))
            bad = refused(lambda message=message: join_wire.read_message(message or [b""], asked))  # type: ignore[misc]
            message = message if bad else rng.choice(strange)  # not covered: who says what is well-formed, and may
            sent, wrong = sent + 1, wrong + bad
            yield message

    offer = Offer("scripted", "tcp://127.0.0.1:1", 1.0, ServerSpec("x", Path("x"), "127.0.0.1", 1, "float32", 8), {"config.yml": b"{}"})
    async with AsyncExitStack() as stack:
        socket = stack.enter_context(closing(join_wire.JoinSocket("127.0.0.1", 0)))
        log = stack.enter_context(closing(EventLog(Path(stack.enter_context(TemporaryDirectory())) / "events.jsonl", "fuzz")))
        weights = stack.enter_context(closing(Publisher()))
        keeper = ServerKeeper(await stack.enter_async_context(VllmGenerator()), weights.address, KEEPS, log, lambda *_: log)
        desk = JoinDesk(socket, keeper, offer, 10 * LIVE_S)
        keeper.beside(desk.run())
        keeping = asyncio.create_task(keeper.run(lambda _: None))
        address = f"tcp://127.0.0.1:{socket.port}"
        agent = stack.enter_context(closing(join_wire.JoinClient(address)))

        async def said(kind: str, answer: str, name: str = "mine", **fields: Any) -> None:
            await agent.send(join_wire.message(kind, token=f"t-{name}", name=name, **fields))
            got = await served(agent.receive(LIVE_S, (answer,)), f"the answer to {kind}")
            expect(got is not None and not keeping.done(), f"join: no answer to {kind} {name} {fields}, or nothing after it")

        await said(join_wire.JOIN, join_wire.WELCOME, host="127.0.0.1", port=8000)
        for host in HOSTS:
            await said(join_wire.JOIN, join_wire.REFUSED, "strange", host=host, port=8000)
        for i, host in enumerate(UNREACHABLE):
            await said(join_wire.JOIN, join_wire.WELCOME, f"far-{i}", host=host, port=8000)
        before = desk.malformed
        await asyncio.to_thread(attack, address, hostile(), lambda: desk.malformed >= before + wrong)
        await said(join_wire.BEAT, join_wire.BEATEN)
        expect(set(keeper.states()) == {"mine", *(f"far-{i}" for i in range(len(UNREACHABLE)))}, f"join: belong: {keeper.states()}")
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    return f"{desk.malformed} malformed; the server that had joined still belongs to the run"


STRANGE: dict[str, dict[str, Any]] = {join_wire.BEAT: {}, join_wire.LEAVE: {"reason": "x"}}


def snapshot(version: int) -> Snapshot:
    return make_snapshot(version, [("w", torch.full((300,), float(version))), ("b", torch.ones(3))])


def taken(worker: Stager, wanted: Snapshot) -> None:
    try:
        got = worker.take(wanted.version, LIVE_S)
    except NeoxRLError as error:
        raise Finding(f"after hostile messages {worker.who} gets no weights: {error}") from error
    expect(got.digest == wanted.digest, f"{worker.who} staged {got.digest}, published was {wanted.digest}")


def refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except NeoxRLError:
        return True
    return False


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Finding(otherwise)


if __name__ == "__main__":
    raise SystemExit(main())
