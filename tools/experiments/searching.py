"""Searches and whole attempts by served checkpoints, measured once and kept: what ``test_time.py`` and ``in_context.py`` look at."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import prm
from common import ROOT, not_done, served
from safetensors.torch import load_file
from torch import Tensor

from neox_rl.config.derived import hf_config
from neox_rl.config.load import load_resolved
from neox_rl.engines.hf_files import write_hf
from neox_rl.engines.hf_mapping import places, unshard
from neox_rl.engines.mcore_state import rank_file
from neox_rl.engines.model_shape import model_shape
from neox_rl.problems.make_rows import write_rows
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import DirectoryTokenizer
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.run.launch import TOKENIZER_FILES
from neox_rl.search.proposers import derived_seed
from neox_rl.search.strategies import STRATEGIES as ALL
from neox_rl.telemetry.rundata import load_run
from neox_rl.telemetry.stats import Interval, cluster_mean_ci
from neox_rl.types import Finish, Problem, SamplingParams
from neox_rl.verify.verifier import ArithmeticVerifier

MAX_TOKENS = 208
SIDE_BY_SIDE = 2
BUDGETS = (8, 16, 32, 64, 128)
ATTEMPT_TOKENS = 6
"""Of an attempt that goes straight to its end: two steps of three words."""
SEED = 1
STRATEGIES = ("dfs", "best-first", "mcts")
VALUES = ("none", "heuristic", "monte-carlo", "oracle")
IN_CONTEXT = "in context"


@dataclass(frozen=True)
class Checkpoint:
    """A policy, and how many tokens it was trained on, generated ones included."""

    name: str
    model: Path
    tokens: float


@dataclass(frozen=True)
class Spent:
    """Of one problem: the tokens that were spent until it was solved, infinite where it was not."""

    problem: str
    cluster: str
    tokens: float


def checkpoints(args: argparse.Namespace) -> list[Checkpoint]:
    """Checkpoints of a finished run of one rank, as HF directories, and its last policy. Raises SystemExit where there is no such run."""
    if not (args.run / "model/model.safetensors").is_file():
        raise SystemExit(f"{args.run} is no finished run: make demo makes one, or give --run")
    run, found = load_run(args.run), list[Checkpoint]()
    rows = [*run.sft, *run.rl]
    for step in (*args.checkpoints, len(rows)):
        kind = f"SFT {step}" if step <= len(run.sft) else f"RL {step - len(run.sft)}"
        model = args.run / "model" if step == len(rows) else _exported(args, step)
        found.append(Checkpoint(kind, model, float(sum(row["tokens_trained"] for row in rows[:step]))))
    return found


def _exported(args: argparse.Namespace, step: int) -> Path:
    """The checkpoint after ``step`` steps, warm start and RL counted together."""
    out, source = Path(args.work, "searching", f"step{step}"), args.run / "checkpoints" / f"step{step:06d}"
    if (out / "model.safetensors").is_file():
        return out
    if not rank_file(source, 0).is_file():
        raise SystemExit(f"{source} is not there; --checkpoints takes those of {source.parent}")
    config = load_resolved(args.run / "config.yml")
    shape = model_shape(config, DirectoryTokenizer(args.run / "model").vocab_size)
    state, tensors = load_file(rank_file(source, 0)), dict[str, Tensor]()
    for place in places(shape, 1):
        full = unshard([state[f"model.{place.local}"]], place.entry.split, shape.vocab)
        tensors |= dict(zip(place.entry.hf, place.entry.unfuse(full), strict=True))
    write_hf(out, tensors, hf_config(config, shape.vocab))
    for name in TOKENIZER_FILES:
        if (args.run / "model" / name).is_file():
            (out / name).write_bytes((args.run / "model" / name).read_bytes())
    return out


def heldout(args: argparse.Namespace) -> tuple[Problem, ...]:
    config = load_resolved(args.run / "config.yml").metarl
    return load_problems(config.problems, config.seed).heldout[: args.problems]


def commands(args: argparse.Namespace, full: bool) -> dict[str, list[str]]:
    """Options of ``python -m neox_rl.search`` by what they are called here. Best-of-n gets as many attempts as its budget pays."""
    values = {f"best-first, {value}": ["--strategy", "best-first", "--value", value] for value in (VALUES if full else ("none", "oracle"))}
    strategies = {f"{name}, prm": ["--strategy", name, "--value", "prm"] for name in (args.strategies if full else ("best-first",))}
    found = {b: ["--strategy", "best-of-n", "--width", str(max(1, b // ATTEMPT_TOKENS)), "--budget-tokens", str(b)] for b in BUDGETS}
    return {**values, **strategies, **{f"best-of-n, {b}": options for b, options in found.items()}}


async def _command(options: Sequence[str], policy: str, critic: str, args: argparse.Namespace, model: Path, out: Path) -> None:
    common = ["--problems", str(args.work / "searching.rows.jsonl"), "--budget-nodes", "1000", "--server", policy, "--model", str(model)]
    common += [
        "--prm-server",
        critic,
        "--prm-model",
        str(critic_model(args)),
        "--playouts",
        "4",
        "--playout-tokens",
        "24",
        "--parallel",
        "48",
    ]
    common += ["--max-step-tokens", "3", "--seed", str(SEED)]
    if "--budget-tokens" not in options:
        common += ["--budget-tokens", str(BUDGETS[-1])]
    partial = out.with_suffix(".partial")
    with partial.open("wb") as file:
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "neox_rl.search", *options, *common, cwd=ROOT, stdout=file)
        if await process.wait():
            raise SystemExit(f"python -m neox_rl.search {' '.join(options)} ended with status {process.returncode}")
    partial.rename(out)


def critic_model(args: argparse.Namespace) -> Path:
    return Path(args.work) / prm.job(argparse.Namespace(steps=10 if args.quick else 400), "monte-carlo", Path()).name / "model"


async def _attempts(policy: str, model: Path, problems: Sequence[Problem], count: int, out: Path) -> None:
    """``count`` sampled attempts at each problem, each a search in one context: whether it was right, and its tokens."""
    tokenizer, verifier = DirectoryTokenizer(model), ArithmeticVerifier()
    async with CompletionsGenerator(policy) as generator:

        async def one(problem: Problem) -> list[tuple[bool, int]]:
            ids = tokenizer.encode(problem.prompt)
            params = SamplingParams(BUDGETS[-1], seed=derived_seed(problem.id, SEED))
            made = await generator.sample(ids, params, count, problem.id)
            right = [c.finish is Finish.STOP and (await verifier.check(problem, tokenizer.decode(c.ids))).correct for c in made]
            return [(good, len(c.ids)) for good, c in zip(right, made, strict=True)]

        found = await asyncio.gather(*(one(problem) for problem in problems))
    out.write_text(json.dumps(dict(zip([p.id for p in problems], found, strict=True))))


async def measure(args: argparse.Namespace, checkpoint: Checkpoint, full: bool) -> dict[str, list[Spent]]:
    """Tokens until solved, by way of searching. What is on the disk is not made again. Raises SystemExit when time is up."""
    home, problems = args.work / "searching" / checkpoint.name.replace(" ", "-").replace(",", ""), heldout(args)
    home.mkdir(parents=True, exist_ok=True)
    write_rows(args.work / "searching.rows.jsonl", problems)
    todo = {name: options for name, options in commands(args, full).items() if not _file(home, name).is_file()}
    if (todo or not _file(home, IN_CONTEXT).is_file()) and monotonic() > args.end:
        raise not_done()
    if todo or not _file(home, IN_CONTEXT).is_file():
        log = args.work / "searching"
        async with (
            served(checkpoint.model, MAX_TOKENS, log / "policy.log", 0) as policy,
            served(critic_model(args), 64, log / "critic.log", 1) as critic,
        ):
            if not _file(home, IN_CONTEXT).is_file():
                await _attempts(policy, checkpoint.model, problems, args.attempts, _file(home, IN_CONTEXT))
            room = asyncio.Semaphore(SIDE_BY_SIDE)

            async def one(name: str, options: Sequence[str]) -> None:
                async with room:
                    if monotonic() < args.end:
                        await _command(options, policy, critic, args, checkpoint.model, _file(home, name))

            await asyncio.gather(*(one(name, options) for name, options in todo.items()))
    if not all(_file(home, name).is_file() for name in todo):
        raise not_done()
    return _read(home, commands(args, full), problems)


def _file(home: Path, name: str) -> Path:
    return home / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"


def _read(home: Path, names: Iterable[str], problems: Sequence[Problem]) -> dict[str, list[Spent]]:
    clusters = {p.id: p.cluster for p in problems}
    found: dict[str, list[Spent]] = {}
    for name in names:
        lines = [json.loads(line) for line in _file(home, name).read_text().splitlines()]
        found[name] = [Spent(x["id"], clusters[x["id"]], float(x["tokens"]) if x["solved"] else np.inf) for x in lines]
    made = json.loads(_file(home, IN_CONTEXT).read_text())
    found[IN_CONTEXT] = [Spent(id, clusters[id], until_right(attempts)) for id, attempts in made.items()]
    return found


def until_right(attempts: Sequence[tuple[bool, int]]) -> float:
    """Tokens of the attempts, one after the other, up to the end of the first right one: answers can be checked, so it stops there."""
    spent = 0
    for right, tokens in attempts:
        spent += tokens
        if right:
            return float(spent)
    return np.inf


def within(spent: Sequence[Spent], budget: float) -> Interval:
    return cluster_mean_ci([float(s.tokens <= budget) for s in spent], [s.cluster for s in spent])


def curve(found: Mapping[str, Sequence[Spent]], name: str) -> list[Interval]:
    """Share solved within each of BUDGETS. Best-of-n has a run for each; any other search is the same up to where a smaller budget ends."""
    if name == "best-of-n":
        return [within(found[f"best-of-n, {budget}"], budget) for budget in BUDGETS]
    return [within(found[name], budget) for budget in BUDGETS]


def at(found: Mapping[str, Sequence[Spent]], name: str, budget: int, keep: set[str]) -> Interval:
    spent = found[f"best-of-n, {budget}" if name == "best-of-n" else name]
    return within([s for s in spent if s.problem in keep], budget)


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", type=Path, default=ROOT / "runs/metarl", help="a finished run, as make demo makes it")
    p.add_argument("--checkpoints", type=int, nargs="*", default=[400, 1200], help="steps of its checkpoints, those before the last policy")
    p.add_argument("--problems", type=int, default=80, help="held-out problems")
    p.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=list(ALL), help="those that are compared with the PRM as value")
    p.add_argument("--attempts", type=int, default=8, help="attempts in context at a problem")
