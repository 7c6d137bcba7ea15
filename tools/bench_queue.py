"""The queue against what it is made of: batches a second against raw ZeroMQ, groups a second on the disk against bare fsync, recovery.

    .venv/bin/python tools/bench_queue.py            a minute, two cores; --quick: does it run?

Raw ZeroMQ: a DEALER asks, a ROUTER in another process answers, one request at a time, with the very bytes of the queue's own messages, made
beforehand; nobody looks at them, or, decoded, they are only made into ``Group`` objects. Each: the same groups, one a message, sixteen
messages a request. The queue: the real socket, with tickets, order, digests and session checked; the groups are encoded already, as the
orchestrator has them from writing them down, and become ready while the trainer has the last batch, as in a run. Bare fsync: one write and
one fdatasync a group, equally large, on the same file system. The sides run in turn, several times; the median of their ratios counts.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import zmq

from neox_rl.codec import decode_batch, encode_group, joined
from neox_rl.framing import Frame, pack
from neox_rl.queue.book import Book
from neox_rl.queue.consumption import TrainedOnce
from neox_rl.queue.history import fold
from neox_rl.queue.journal import read_journal
from neox_rl.queue.records import payload_of
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.queue.wire import Delivery, ExperienceServer
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.queue.wire_messages import Phase
from neox_rl.types import Finish, Group, Json, Reason, Role, Segment, Trace, Verdict

B, ROLLOUTS, IN_FLIGHT = 16, 8, 256
DISTINCT = 16 * B


def make_group(ticket: int, tokens: int) -> Group:
    ids, logprobs = tuple(range(tokens)), (-0.5,) * tokens
    verdict = Verdict(True, "42", Reason.MATCH, 0.1)
    segments = (Segment((1, 2, 3, 4, 5, 6), Role.PROMPT), Segment(ids, Role.THINK, logprobs, 0, 1.0))
    traces = [Trace(f"g{ticket:06d}/r{i}", "p", segments, 1.0, Finish.STOP, verdict) for i in range(ROLLOUTS)]
    return Group(ticket, "p", tuple(traces))


class Handler:
    """Hands out batches of groups that are always ready; ``book`` writes them down where there is one."""

    def __init__(self, tokens: int, book: Book | None) -> None:
        self._queue = TicketQueue(B, 1 << 20, 0, Mode.TOKEN, 1 << 20)
        self._queue.set_live(0)
        self._groups, self._book = [make_group(ticket, tokens) for ticket in range(DISTINCT)], book
        self._bodies = [encode_group(group) for group in self._groups]
        self._produce()

    def _produce(self) -> None:
        for _ in range(B):
            ticket = self._queue.next_ticket()
            assert ticket is not None
            self._queue.deliver(Group(ticket, "p", self._groups[ticket % DISTINCT].traces))
            if self._book is not None:
                meta: dict[str, Json] = {"ticket": ticket, "digests": {}, "tokens": 0, "rollouts": ROLLOUTS}
                self._book.journal.append(payload_of("group", meta, self._bodies[ticket % DISTINCT]))

    async def hello(self, session: str, world: int, pid: int, attempt: int, state: Mapping[str, Json]) -> None: ...

    async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery:
        batch = self._queue.take(step)
        assert batch is not None
        if self._book is not None:
            self._book.journal.append(payload_of("taken", {"step": step, "tickets": [g.ticket for g in batch]}))
        asyncio.get_running_loop().call_soon(self._produce)
        return Delivery([self._bodies[group.ticket % DISTINCT] for group in batch], {"step": step})

    async def durable(self) -> None:
        if self._book is not None:
            await self._book.durable()

    async def evaluate(self, id: int, label: str, version: int) -> Mapping[str, Json]:
        return {}

    async def report(self, id: int, phase: Phase, step: int, metrics: Mapping[str, Json]) -> None: ...

    async def published(self, id: int, version: int, digest: str) -> None: ...

    async def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None: ...

    async def done(self, reason: str) -> None: ...

    def waiting_for(self) -> str:
        return "nothing"


def serve_queue(port: Connection, tokens: int, journal: str) -> None:
    async def main() -> None:
        book = Book.open(Path(journal), 0, 0.1, 60.0) if journal else None
        server = ExperienceServer("127.0.0.1", 0)
        port.send(server.port)
        await server.serve(Handler(tokens, book))
        server.close()
        if book is not None:
            book.close()

    asyncio.run(main())


def request(step: int) -> list[Frame]:
    return pack("next", {"session": "0" * 32, "id": step, "since": step, "phase": "rl", "step": step}, {})


def serve_raw(port: Connection, tokens: int, _: str, each: bool = False) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    port.send(socket.bind_to_random_port("tcp://127.0.0.1"))
    bodies = [encode_group(make_group(t, tokens)) for t in range(B)]
    body: dict[str, Json] = {"id": 1, "acked": 1, "state": {"step": 1}}
    answers = [pack("batch", body, joined(some)) for some in ([[one] for one in bodies] if each else [bodies])]
    while True:
        peer, asked = socket.recv_multipart()
        for answer in answers:
            socket.send_multipart([peer, *answer], copy=False)
        if asked == b"done":
            break
    socket.close(linger=1000)


def ask_raw(port: int, decode: bool = False, messages: int = 1) -> float:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{port}")
    words = request(1)

    def ask(frames: Sequence[Frame]) -> None:
        socket.send_multipart(frames)
        for _ in range(messages):
            _, groups = socket.recv_multipart(copy=False)
            if decode:
                decode_batch(groups.buffer)

    rate = rate_of(lambda: ask(words))
    ask([b"done"])
    socket.close(linger=0)
    return rate


def ask_queue(port: int, decode: bool = False) -> float:
    client = ExperienceClient(f"tcp://127.0.0.1:{port}", 60.0)
    client.hello(1)
    step = 0

    def ask() -> None:
        nonlocal step
        step += 1
        if step * B % DISTINCT < B:
            client._trained = TrainedOnce()  # the same groups come again
        if decode:
            client.next_groups(Phase.RL, step)
        else:
            client._request("batch", "a batch", "next", phase="rl", step=step)

    rate = rate_of(ask)
    client.done("measured")
    client.close()
    return rate


@dataclass
class Effort:
    """How long and how often each side is measured, and the groups of the journal that is recovered."""

    rounds: int = 5
    seconds: float = 1.0
    recovered: int = 10_000


EFFORT = Effort()


def rate_of(work: Callable[[], object]) -> float:
    """Calls a second, after a few that do not count."""
    for _ in range(3):
        work()
    begin, count = time.perf_counter(), 0
    while (took := time.perf_counter() - begin) < EFFORT.seconds:
        work()
        count += 1
    return count / took


def measure(serve: Callable[[Connection, int, str], None], ask: Callable[[int], float], tokens: int, journal: str = "") -> float:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, tokens, journal))
    process.start()
    try:
        return ask(int(here.recv()))
    finally:
        process.join(10.0)
        if process.is_alive():
            process.kill()


def journal_rate(directory: Path, body: bytes) -> float:
    """Groups a second, each awaited by one of ``IN_FLIGHT`` writers."""

    async def main() -> float:
        book = Book.open(directory, 0, 0.1, 60.0)
        payload, end, written = payload_of("group", {"ticket": 0, "digests": {}, "tokens": 0, "rollouts": 8}, body), 0.0, 0

        async def writer() -> None:
            nonlocal written
            while time.perf_counter() < end:
                book.journal.append(payload)
                await book.durable()
                written += 1

        begin = time.perf_counter()
        end = begin + EFFORT.seconds
        await asyncio.gather(*(writer() for _ in range(IN_FLIGHT)))
        took = time.perf_counter() - begin
        book.close()
        return written / took

    return asyncio.run(main())


def fsync_rate(directory: Path, body: bytes) -> float:
    """Bare: one write and one fdatasync a group."""
    file = os.open(directory / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def one() -> None:
        os.write(file, body)
        os.fdatasync(file)

    try:
        return rate_of(one)
    finally:
        os.close(file)


def recovery_s(directory: Path) -> tuple[float, float]:
    """(seconds to read and add up a journal of ``EFFORT.recovered`` groups, its MiB)."""
    group = make_group(0, 40)

    async def main() -> None:
        book = Book.open(directory, 0, 0.1, 60.0)
        body = encode_group(group)
        for ticket in range(EFFORT.recovered):
            book.add("issued", ticket=ticket, position=ticket, live=0)
            book.add("group", body, ticket=ticket, digests={"0": "d"}, tokens=8 * 40, rollouts=8)
        await book.durable()
        book.close()

    asyncio.run(main())
    begin = time.perf_counter()
    history = fold(read_journal(directory).records)
    took = time.perf_counter() - begin
    assert len(history.groups) == EFFORT.recovered
    return took, sum(path.stat().st_size for path in directory.iterdir()) / 2**20


def rounds_of(*sides: Callable[[], float]) -> list[tuple[float, ...]]:
    """Of each side, its rate in every round; the sides in turn."""
    return list(zip(*([side() for side in sides] for _ in range(EFFORT.rounds)), strict=True))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> str:
    each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def median(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):,.0f}"


def report_wire(tokens: int, directory: Callable[[], Path]) -> list[str]:
    raw, each, queue, decoded, groups, kept = rounds_of(
        lambda: B * measure(serve_raw, ask_raw, tokens),
        lambda: B * measure(partial(serve_raw, each=True), partial(ask_raw, messages=B), tokens),
        lambda: B * measure(serve_queue, ask_queue, tokens),
        lambda: B * measure(serve_raw, partial(ask_raw, decode=True), tokens),
        lambda: B * measure(serve_queue, partial(ask_queue, decode=True), tokens),
        lambda: B * measure(serve_queue, partial(ask_queue, decode=True), tokens, str(directory())),
    )
    size = B * len(encode_group(make_group(0, tokens))) / 1024
    rates = (median(raw), median(each), median(queue), spread(queue, raw), spread(queue, each))
    return [str(tokens), f"{size:.0f}", *rates, median(decoded), median(groups), spread(groups, decoded), median(kept)]


def report_journal(tokens: int, directory: Callable[[], Path]) -> list[str]:
    body = encode_group(make_group(0, tokens))
    bare, grouped = rounds_of(lambda: fsync_rate(directory(), body), lambda: journal_rate(directory(), body))
    return [str(tokens), median(bare), median(grouped), spread(grouped, bare)]


def main() -> int:
    from benching import describe_machine, table  # here: the other processes, which import this file, need no torch

    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("work", type=Path, nargs="?", default=Path.cwd() / "runs", help="directory on the disk that is measured")
    options.add_argument("--quick", action="store_true", help="a smoke test: short, figures without meaning")
    args = options.parse_args()
    if args.quick:
        EFFORT.rounds, EFFORT.seconds, EFFORT.recovered = 1, 0.1, 200
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    describe_machine("pyzmq", "xxhash")
    with tempfile.TemporaryDirectory(dir=work) as name:
        fresh = iter(range(1 << 20))

        def directory() -> Path:
            path = Path(name) / str(next(fresh))
            path.mkdir()
            return path

        print(f"{B} groups a batch, {ROLLOUTS} rollouts a group, groups/s, medians of {EFFORT.rounds} rounds; ratios round by round\n")
        header = ["tokens a rollout", "KiB a batch", "raw", "raw, each", "queue", "to raw", "to raw, each"]
        table(
            [*header, "raw, decoded", "queue, decoded", "ratio", "with journal"], [report_wire(tokens, directory) for tokens in (40, 512)]
        )
        table(["tokens a rollout", "bare fsync", "journal", "ratio"], [report_journal(tokens, directory) for tokens in (40, 512)])
        took, size = recovery_s(directory())
        print(f"Recovery of a journal of {EFFORT.recovered} groups, {size:.0f} MiB: {took:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
