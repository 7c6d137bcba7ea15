"""Searches and whole attempts by served checkpoints, measured once and kept: what ``test_time.py`` and ``in_context.py`` look at."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from common import CORES, ROOT, contents, digest, not_done, served
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
from neox_rl.run.search_cli import parser as search_parser
from neox_rl.run.search_cli import search_file
from neox_rl.search.proposers import derived_seed
from neox_rl.telemetry.rundata import load_run
from neox_rl.telemetry.stats import Interval, cluster_mean_ci, paired_difference_ci
from neox_rl.types import End, Finish, Problem, SamplingParams
from neox_rl.verify.verifier import ArithmeticVerifier

MAX_TOKENS = 208
BUDGETS = (8, 16, 32, 64, 128, 256, 512)
ATTEMPT_TOKENS = 6
"""Of an attempt that goes straight to its end: two steps of three words."""
ANSWER_WORDS = 3
"""Of a written answer, beside its expression: ``goal`` before it, ``solution``, and the end."""
ANSWER_TOKENS = 7 + ANSWER_WORDS
"""Of three numbers, ``( 7 * 3 ) + 5``."""
ONE_CONTEXT = 128
"""Tokens after which a search in one context is cut off, and another begins."""
REQUEST_S = 900.0
"""One request waits behind those of all other problems."""
SEED = 1
STEPS = ("--max-step-tokens", "3", "--playouts", "4", "--playout-tokens", "24", "--budget-nodes", "1000")
"""What is the same for every search."""
WIDTHS = (4, 8, 16)
"""Steps that are sampled at a node, which a tree asks once."""
WIDTH = 8
"""Of the comparisons of strategies and of values."""
STRATEGIES = ("beam", "bfs", "dfs", "best-first", "astar", "mcts")
VALUES = ("none", "heuristic", "monte-carlo", "oracle")
IN_CONTEXT = "in context"
BEST_OF_N = "best-of-n"


def tree(width: int, value: str) -> str:
    """The name of a best-first search."""
    return f"tree of {width}, {value}"


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
    source = args.run / "checkpoints" / f"step{step:06d}"
    if not rank_file(source, 0).is_file():
        found = (path.parent.name.removeprefix("step") for path in source.parent.glob(f"step*/{rank_file(source, 0).name}"))
        there = sorted(int(name) for name in found if name.isdigit())
        raise SystemExit(
            f"{args.run} has checkpoints of steps {', '.join(map(str, there)) or 'none'}, and not of {step}: give some of these with"
            " --checkpoints, or make a run with --set checkpoint_factor=100"
        )
    out = export_of(args, step, rank_file(source, 0))
    if (out / "model.safetensors").is_file():
        return out
    config = load_resolved(args.run / "config.yml")
    tokenizer = DirectoryTokenizer(args.run / "model")
    shape = model_shape(config, tokenizer.vocab_size)
    state, tensors = load_file(rank_file(source, 0)), dict[str, Tensor]()
    for place in places(shape, 1):
        full = unshard([state[f"model.{place.local}"]], place.entry.split, shape.vocab)
        tensors |= dict(zip(place.entry.hf, place.entry.unfuse(full), strict=True))
    write_hf(out, tensors, hf_config(config, shape.vocab, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id))
    for name in TOKENIZER_FILES:
        if (args.run / "model" / name).is_file():
            (out / name).write_bytes((args.run / "model" / name).read_bytes())
    return out


def export_of(args: argparse.Namespace, step: int, source: Path) -> Path:
    return Path(args.work, "searching", f"step{step}-{digest((args.run / 'config.yml').read_text(), contents(source))}")


def heldout(args: argparse.Namespace) -> tuple[Problem, ...]:
    config = load_resolved(args.run / "config.yml").metarl
    return load_problems(config.problems, config.seed).heldout[: args.problems]


def commands(args: argparse.Namespace, full: bool) -> dict[str, list[str]]:
    """Options of ``python -m neox_rl.search`` by what they are called here. Best-of-n gets as many attempts as its budget pays beside the
    answer that is written at the end."""
    most = ["--budget-tokens", str(BUDGETS[-1])]
    found = {tree(w, v): ["--strategy", "best-first", "--value", v, "--width", str(w), *most] for w in WIDTHS for v in ("none", "oracle")}
    for budget in BUDGETS:
        paid = max(ATTEMPT_TOKENS, budget - ANSWER_TOKENS)
        found[f"{BEST_OF_N}, {budget}"] = [*("--strategy", BEST_OF_N, "--width", str(paid // ATTEMPT_TOKENS), "--budget-tokens", str(paid))]
    if full:
        at = ["--width", str(WIDTH), *most]
        found |= {tree(WIDTH, value): ["--strategy", "best-first", "--value", value, *at] for value in values(args)}
        found |= {name: ["--strategy", name, "--value", "heuristic", *at] for name in args.strategies}
    return found


def values(args: argparse.Namespace) -> tuple[str, ...]:
    return VALUES if args.prm is None else (*VALUES, "prm")


@dataclass(frozen=True)
class Servers:
    """What a command asks: the served policy, and the reward model where there is one."""

    policy: str
    model: Path
    critic: str
    critic_model: Path | None

    def argv(self, rows: Path, chosen: Sequence[str], seed: int) -> list[str]:
        critic = [] if self.critic_model is None else ["--prm-server", self.critic, "--prm-model", str(self.critic_model)]
        where = ["--problems", str(rows), "--server", self.policy, "--model", str(self.model), *critic]
        return [*chosen, *where, *STEPS, "--seed", str(seed), "--parallel", "48", "--timeout-s", str(REQUEST_S)]


async def _searches(servers: Servers, chosen: Sequence[str], problems: Sequence[Problem], again: bool, out: Path) -> None:
    """The lines of all searches of one kind. ``again``: a tree that has asked its last node is followed by one with the next seed, as an
    attempt in context is by another, until the problem is solved or the budget is gone; a narrow tree ends long before it."""
    partial, rows, left, seed = out.with_suffix(".partial"), out.with_suffix(".rows"), list(problems), SEED
    partial.unlink(missing_ok=True)
    while left:
        write_rows(rows, left)
        await _command(servers.argv(rows, chosen, seed), partial)
        made, seed = lines_of(partial), seed + 1
        left = [problem for problem in left if again and unspent(made[problem.id])]
    rows.unlink()
    partial.rename(out)


async def _command(argv: Sequence[str], out: Path) -> None:
    """The program itself, in this process: to start it anew would cost more than most of these searches. Its lines are appended."""
    with out.open("a") as file, redirect_stdout(file), redirect_stderr(StringIO()):
        failed = await search_file(search_parser().parse_args(argv))
    if failed:
        raise SystemExit(f"python -m neox_rl.search {' '.join(argv)} ended with status {failed}")


def lines_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Of each problem, in the order in which it was searched."""
    found = dict[str, list[dict[str, Any]]]()
    for line in map(json.loads, file.read_text().splitlines()):
        found.setdefault(line["id"], []).append(line)
    return found


def unspent(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one more tree may be paid: the last one ended for want of nodes to ask, not of tokens. One that cost nothing never would."""
    last = lines[-1]
    return last["end"] == End.EXHAUSTED and last["tokens"] > 0 and sum(int(line["tokens"]) for line in lines) < BUDGETS[-1]


def cost(line: Mapping[str, Any]) -> int:
    """Tokens of a search, and of its answer: an explicit search has it put together, and in context the policy writes it."""
    return int(line["tokens"]) + (len(line["answer"].split()) + ANSWER_WORDS if line["solved"] else 0)


async def _attempts(policy: str, model: Path, problems: Sequence[Problem], count: int, out: Path) -> None:
    """``count`` sampled attempts at each problem, each a search in one context: whether it was right, and its tokens."""
    tokenizer, verifier = DirectoryTokenizer(model), ArithmeticVerifier()
    async with CompletionsGenerator(policy, request_timeout_s=REQUEST_S) as generator:

        async def one(problem: Problem) -> list[tuple[bool, int]]:
            ids = tokenizer.encode(problem.prompt)
            params = SamplingParams(ONE_CONTEXT, seed=derived_seed(problem.id, SEED))
            made = await generator.sample(ids, params, count, problem.id)
            right = [c.finish is Finish.STOP and (await verifier.check(problem, tokenizer.decode(c.ids))).correct for c in made]
            return [(good, len(c.ids)) for good, c in zip(right, made, strict=True)]

        found = await asyncio.gather(*(one(problem) for problem in problems))
    out.write_text(json.dumps(dict(zip([p.id for p in problems], found, strict=True))))


def kept(
    args: argparse.Namespace, checkpoint: Checkpoint, problems: Sequence[Problem], wanted: Mapping[str, Sequence[str]]
) -> tuple[Path, dict[str, Path]]:
    """Where the measurements of a checkpoint are, and the file of each search: by the weights that were served, and by what was asked."""
    facts = (contents(checkpoint.model / "model.safetensors"), [p.id for p in problems], MAX_TOKENS, STEPS, SEED)
    home = args.work / "searching" / f"{checkpoint.name.replace(' ', '-')}-{digest(*facts)}"
    critic = (contents(args.prm / "model.safetensors"),) if any("prm" in chosen for chosen in wanted.values()) else ()
    facts_of = {name: (*chosen, *(critic if "prm" in chosen else ())) for name, chosen in wanted.items()}
    return home, {name: home / f"{name.replace(', ', '-').replace(' ', '-')}-{digest(*facts)}.jsonl" for name, facts in facts_of.items()}


async def measure(args: argparse.Namespace, checkpoint: Checkpoint, full: bool) -> dict[str, list[Spent]]:
    """Tokens until solved, by way of searching. What is on the disk is not made again. Raises SystemExit when time is up."""
    problems, wanted = heldout(args), commands(args, full)
    home, files = kept(args, checkpoint, problems, wanted)
    home.mkdir(parents=True, exist_ok=True)
    context = home / f"in-context-{args.attempts}-{ONE_CONTEXT}.json"
    todo = [name for name, file in files.items() if not file.is_file()]
    if todo or not context.is_file():
        if monotonic() > args.end:
            raise not_done()
        async with AsyncExitStack() as stack:
            policy = await stack.enter_async_context(served(checkpoint.model, MAX_TOKENS, home / "policy.log", CORES[0]))
            asks_critic = any("prm" in wanted[name] for name in todo)
            critic = await stack.enter_async_context(served(args.prm, 64, home / "critic.log", CORES[-1])) if asks_critic else ""
            if not context.is_file():
                await _attempts(policy, checkpoint.model, problems, args.attempts, context)
            servers = Servers(policy, checkpoint.model, critic, args.prm if asks_critic else None)
            for name in todo:
                if monotonic() > args.end:
                    raise not_done()
                await _searches(servers, wanted[name], problems, not name.startswith(BEST_OF_N), files[name])
    return _read(files, context, problems)


def _read(files: Mapping[str, Path], context: Path, problems: Sequence[Problem]) -> dict[str, list[Spent]]:
    made = {name: {id: [(x["solved"], cost(x)) for x in lines] for id, lines in lines_of(file).items()} for name, file in files.items()}
    made[IN_CONTEXT] = json.loads(context.read_text())
    return {name: [Spent(p.id, p.cluster, until_right(tried[p.id])) for p in problems] for name, tried in made.items()}


def until_right(attempts: Sequence[tuple[bool, int]]) -> float:
    """Tokens of attempts or trees, one after the other, up to the end of the first right one: answers can be checked, so it stops there."""
    spent = 0
    for right, tokens in attempts:
        spent += tokens
        if right:
            return float(spent)
    return np.inf


def within(spent: Sequence[Spent], budget: float) -> Interval:
    return cluster_mean_ci([float(s.tokens <= budget) for s in spent], [s.cluster for s in spent])


def run_of(found: Mapping[str, Sequence[Spent]], name: str, budget: int) -> Sequence[Spent]:
    """Best-of-n has a run for each of BUDGETS; any other search is the same up to where a smaller budget ends, or, with Monte-Carlo play,
    up to its last rounds, whose playouts are cut to what is left of the budget: there it is what the large budget's search had found."""
    return found[f"{BEST_OF_N}, {budget}" if name == BEST_OF_N else name]


def curve(found: Mapping[str, Sequence[Spent]], name: str) -> list[Interval]:
    """Share solved within each of BUDGETS."""
    return [within(run_of(found, name, budget), budget) for budget in BUDGETS]


def at(found: Mapping[str, Sequence[Spent]], name: str, budget: int, keep: set[str]) -> Interval:
    return within([s for s in run_of(found, name, budget) if s.problem in keep], budget)


def paired(one: Sequence[Spent], other: Sequence[Spent], budget: float) -> Interval:
    """Solved by ``one`` within the budget minus solved by ``other``, problem by problem over those of ``one``."""
    ours, theirs = ([[s.problem, s.cluster, s.tokens <= budget] for s in spent] for spent in (one, other))
    return paired_difference_ci(theirs, ours)


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", type=Path, default=ROOT / "runs/metarl", help="a finished run of one rank with checkpoints")
    p.add_argument(
        "--checkpoints",
        type=int,
        nargs="*",
        default=[400, 800, 1300, 1400],
        help="those before the last policy, by step (checkpoint_factor: 100)",
    )
    p.add_argument("--problems", type=int, default=80, help="held-out problems")
    p.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES, help="trees that are compared, by the heuristic")
    p.add_argument("--attempts", type=int, default=16, help="attempts in context at a problem")
    p.add_argument("--prm", type=Path, metavar="DIR", help="a reward model as prm.py leaves it (its HF directory), as one more value")


def quick(args: argparse.Namespace) -> None:
    """A few problems, and two of the run's policies."""
    if args.quick:
        args.problems, args.attempts, args.strategies, args.checkpoints = 6, 2, ("dfs",), args.checkpoints[:1]
