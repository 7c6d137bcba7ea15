"""Searches and whole attempts by served checkpoints, measured once and kept: what ``test_time.py`` and ``in_context.py`` look at."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import prm
import rl_after
import sft_traces
from common import COUNTDOWN, ROOT, not_done, served

from neox_rl.config.load import load_config
from neox_rl.problems.make_rows import write_rows
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import DirectoryTokenizer
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.search.proposers import derived_seed
from neox_rl.telemetry.rundata import load_run
from neox_rl.telemetry.stats import Interval, cluster_mean_ci
from neox_rl.types import Finish, Problem, SamplingParams
from neox_rl.verify.verifier import ArithmeticVerifier

MAX_TOKENS = 208
BUDGETS = (4, 8, 16, 32, 64, 128, 192)
ATTEMPT_TOKENS = 6
"""Of an attempt that goes straight to its end: two steps of three words."""
SEED = 1
STRATEGIES = ("dfs", "bfs", "beam", "best-first", "astar", "mcts")
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
    """Of ``sft_traces.py`` and ``rl_after.py`` with their defaults. Raises SystemExit where they have not run."""
    steps = {"SFT short": 600, "SFT": sft_traces.LONG} if not args.quick else {"SFT": 20}
    found = {name: args.work / sft_traces.job("countdown", "search", n, SEED).name for name, n in steps.items()}
    if not args.quick:
        found["SFT, then RL"] = args.work / rl_after.job("search", sft_traces.LONG, rl_after.ITERATIONS, SEED, args.work).name
    missing = [path for path in found.values() if not (path / "model/model.safetensors").is_file()]
    if missing:
        raise SystemExit(f"{missing[0]} is not there: run sft_traces.py and rl_after.py first, with the same --work")
    return [Checkpoint(name, path / "model", _tokens(found, name)) for name, path in found.items()]


def _tokens(runs: Mapping[str, Path], name: str) -> float:
    run = load_run(runs[name])
    before = _tokens(runs, "SFT") if name == "SFT, then RL" else 0.0
    return before + float(sum(row["tokens_trained"] for row in (*run.sft, *run.rl)))


def heldout(args: argparse.Namespace) -> tuple[Problem, ...]:
    config = load_config([ROOT / "configs/metarl.yml"], [*COUNTDOWN, f"metarl.seed={SEED}"])
    return load_problems(config.metarl.problems, SEED).heldout[: args.problems]


def commands(checkpoint: Checkpoint, full: bool) -> dict[str, list[str]]:
    """Options of ``python -m neox_rl.search`` by what they are called here. Best-of-n gets as many attempts as its budget pays."""
    found = {
        f"best-of-n, {b}": ["--strategy", "best-of-n", "--width", str(max(1, b // ATTEMPT_TOKENS)), "--budget-tokens", str(b)]
        for b in BUDGETS
    }
    values = {f"best-first, {value}": ["--strategy", "best-first", "--value", value] for value in (VALUES if full else ("none", "oracle"))}
    strategies = {f"{name}, prm": ["--strategy", name, "--value", "prm"] for name in (STRATEGIES if full else ("best-first",))}
    return {**found, **values, **strategies}


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
    todo = {name: options for name, options in commands(checkpoint, full).items() if not _file(home, name).is_file()}
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
            for name, options in todo.items():
                if monotonic() > args.end:
                    raise not_done()
                await _command(options, policy, critic, args, checkpoint.model, _file(home, name))
    return _read(home, checkpoint, full, problems)


def _file(home: Path, name: str) -> Path:
    return home / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"


def _read(home: Path, checkpoint: Checkpoint, full: bool, problems: Sequence[Problem]) -> dict[str, list[Spent]]:
    clusters = {p.id: p.cluster for p in problems}
    found: dict[str, list[Spent]] = {}
    for name in commands(checkpoint, full):
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
    p.add_argument("--problems", type=int, default=120, help="held-out problems")
    p.add_argument("--attempts", type=int, default=8, help="attempts in context at a problem")
