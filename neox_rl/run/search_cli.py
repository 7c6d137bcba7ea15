"""``python -m neox_rl.search --strategy S --value V --problems FILE.jsonl --budget-nodes N [--server URL --model DIR]``.

Searches every problem of a file and prints one JSON line each, in the file's order: ``id``, ``solved``, ``answer``, ``nodes``,
``tokens``, ``end`` (why the search ended) and ``counts`` (what was refused). Rows are ``{numbers, target}``, target 24 unless given
(``max_value`` restricts to integers within it, as in training), ``{problem, answer}``, or ``{prompt, answer}``, which is asked as it
stands. A row without a problem gets the end ``malformed`` and an ``error``. A summary goes to stderr.

With ``--server`` the steps are sampled from the policy that a vLLM server serves, whose tokenizer is in ``--model``; without it they
are all legal steps of the problem's rules (the exhaustive proposer), which needs no model. Exit status: 0; 1 when a search failed
since the server did; 2 when the arguments or the file cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from neox_rl.arithmetic import ARITHMETIC_TASKS
from neox_rl.config.schema import VerifyConfig
from neox_rl.errors import ConfigError, NeoxRLError
from neox_rl.run.search_parts import domain_of, own_value, prm_value
from neox_rl.run.search_rows import Asking, Row, error_line, read_rows, result_line
from neox_rl.run.search_server import Policy, cache_counters, connect
from neox_rl.search.domain import Domain
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import ExhaustiveProposer, Proposer
from neox_rl.search.search import Search, run_all
from neox_rl.search.strategies import STRATEGIES, make_strategy
from neox_rl.search.strategy import Options
from neox_rl.search.trees import tree_line
from neox_rl.search.values import Value
from neox_rl.types import End, Json, Problem, Tree, Verdict
from neox_rl.verify.verifier import TaskVerifier, make_verifier

VALUES = ("none", "oracle", "heuristic", "monte-carlo", "prm", "judge")
ALL_LEGAL, ATTEMPTS, SAMPLES = 1 << 20, 16, 4


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m neox_rl.search", description="Searches the problems of a file; one JSON line each.")
    p.add_argument("--strategy", required=True, help=f"{', '.join(STRATEGIES)}, or package.module:name of your own")
    p.add_argument(
        "--value",
        default="none",
        choices=VALUES,
        help="monte-carlo on rows {problem, answer} asks whether playouts come to that answer: its solved rows are no measure of test-time"
        " search, and the summary counts them as values_from_gold",
    )
    p.add_argument("--problems", required=True, type=Path, metavar="FILE.jsonl")
    p.add_argument("--budget-nodes", required=True, type=int, help="most nodes of a tree, its root left out")
    p.add_argument("--budget-tokens", type=int, help="most tokens of a search, those of its value included")
    p.add_argument("--server", default="", metavar="URL", help="a vLLM server that serves the policy")
    p.add_argument("--model", type=Path, metavar="DIR", help="directory with the policy's tokenizer.json")
    p.add_argument("--prm-server", default="", metavar="URL", help="a vLLM server that serves the process reward model")
    p.add_argument(
        "--prm-model",
        default="",
        metavar="DIR|NAME",
        help="directory with the tokenizer.json of a reward model of this project (configs/prm.yml); or the name under which a sequence"
        " classifier is served (/classify)",
    )
    p.add_argument(
        "--sees-earlier",
        action="store_true",
        help="the value sees what the search did before: a judge or reward model is told it (the meta-critic, 8.3.4)",
    )
    p.add_argument(
        "--width", type=int, help="steps proposed at a node; best-of-n: attempts (default: 4, best-of-n 16, all without a server)"
    )
    p.add_argument("--beam", type=int, default=Options().beam, help="nodes that beam keeps at a level")
    p.add_argument("--batch", type=int, default=1, help="nodes expanded together; mcts spreads them by virtual loss")
    p.add_argument("--prune", type=float, help="leave nodes of at most this value (default: 0 with the oracle, else none is left)")
    p.add_argument("--step-cost", type=float, default=Options().step_cost, help="what A* charges a step")
    p.add_argument("--exploration", type=float, default=Options().exploration, help="c of UCT")
    p.add_argument("--playouts", type=int, default=8, help="completions of a Monte-Carlo value")
    p.add_argument("--playout-tokens", type=int, default=128, help="most tokens of one of them")
    p.add_argument("--votes", type=int, default=3, help="votes of the judge")
    p.add_argument("--max-step-tokens", type=int, default=64)
    p.add_argument(
        "--cut-steps",
        action="store_true",
        help="a step without an end within --max-step-tokens ends there, for text: not for trees to imitate",
    )
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="prompt with {numbers} and {target}, or {problem}, in it; special tokens around what is filled in are taken as such",
    )
    p.add_argument("--parallel", type=int, default=16, help="searches at a time")
    p.add_argument("--timeout-s", type=float, default=120.0, help="deadline of one request to a server")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--trees", type=Path, metavar="OUT.jsonl", help="write every tree, each step with its value; see tools/view_tree.py")
    return p


@dataclass
class Tally:
    """Sums over all problems, for the summary. ``values_from_gold``: those whose value knew the answer, which chose what is solved."""

    problems: int = 0
    malformed: int = 0
    solved: int = 0
    values_from_gold: int = 0
    failed: int = 0
    nodes: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, line: dict[str, Any]) -> None:
        self.problems += 1
        self.malformed += line["end"] == "malformed"
        self.failed += line["end"] == End.FAILED
        self.solved += line["solved"]
        self.nodes += line["nodes"]
        self.tokens += line["tokens"]

    def summary(self) -> dict[str, Json]:
        wall_s = time.perf_counter() - self.started
        names = ("problems", "malformed", "solved", "values_from_gold", "failed", "nodes", "tokens")
        counts: dict[str, Json] = {name: getattr(self, name) for name in names}
        return {**counts, "wall_s": round(wall_s, 3), "tokens_per_s": round(self.tokens / wall_s, 1)}


class Verifiers:
    """``ports.Verifier`` over all tasks; each one's is made when a problem needs it: that of mathematics starts processes."""

    def __init__(self) -> None:
        self._made: dict[str, TaskVerifier] = {}

    def of(self, task: str) -> TaskVerifier:
        if task not in self._made:
            self._made[task] = make_verifier(VerifyConfig(), task)
        return self._made[task]

    async def check(self, problem: Problem, text: str) -> Verdict:
        return await self.of(problem.task).check(problem, text)

    def domain(self, problem: Problem) -> Domain:
        return domain_of(problem, self)

    def close(self) -> None:
        for verifier in self._made.values():
            verifier.close()


async def make_value(args: argparse.Namespace, template: str, policy: Policy | None, verifiers: Verifiers, stack: AsyncExitStack) -> Value:
    """The value of ``--value``. Raises ConfigError when it needs a server that was not given."""
    if args.value != "prm":
        proposer = policy.proposer if policy else None
        return own_value(args.value, proposer, verifiers, args.playouts, args.playout_tokens, args.votes, args.sees_earlier)
    if not args.prm_server or not args.prm_model:
        raise ConfigError("--value prm needs --prm-server URL and --prm-model DIR or NAME: the served process reward model")
    return await prm_value(args.prm_server, args.prm_model, args.timeout_s, stack, args.sees_earlier, template)()


def make_options(args: argparse.Namespace) -> Options:
    width = args.width
    if width is None:
        width = ATTEMPTS if args.strategy == "best-of-n" else SAMPLES if args.server else ALL_LEGAL
    prune = 0.0 if args.prune is None and args.value == "oracle" else args.prune
    return Options(width, args.batch, args.beam, prune, args.step_cost, args.exploration)


@dataclass
class Program:
    """One call of the command. Lines go to stdout as soon as every line before them is there."""

    args: argparse.Namespace
    search: Search
    budget: Budget
    proposer: Proposer
    value: Value
    verifiers: Verifiers
    tally: Tally = field(default_factory=Tally)

    async def run(self, rows: list[Row], trees: BinaryIO | None) -> None:
        async for line, tree in run_all([partial(self.one, row) for row in rows], self.args.parallel):
            print(json.dumps(line, ensure_ascii=False), flush=True)
            self.tally.add(line)
            if trees is not None and tree is not None:
                trees.write(tree_line(tree) + b"\n")

    async def one(self, row: Row) -> tuple[dict[str, Json], Tree | None]:
        if row.problem is None:
            return error_line(row, row.error), None
        try:
            domain = self.verifiers.domain(row.problem)
            tree = await self.search.run(row.problem, self.proposer, self.value, self.budget)
        except ConfigError as error:
            return error_line(row, str(error)), None
        self.tally.values_from_gold += self.args.value == "monte-carlo" and not domain.checkable
        return result_line(row, tree, domain), tree


async def search_file(args: argparse.Namespace) -> int:
    """Raises ConfigError for arguments or a file that cannot be used."""
    if args.trees:
        _check_writable(args)
    verifiers = Verifiers()
    async with AsyncExitStack() as stack:
        stack.callback(verifiers.close)
        asking = _asking(args.template)
        budget, options = Budget(args.budget_nodes, args.budget_tokens), make_options(args)
        make_strategy(args.strategy, options)  # else each row would be told apart that there is none
        policy = await connect(args, asking.frame, stack) if args.server else None
        rows = read_rows(args.problems, policy is None or policy.writes_words, asking)
        _check_suits(args, rows)
        value = await make_value(args, asking.frame, policy, verifiers, stack)
        proposer: Proposer = policy.proposer if policy else ExhaustiveProposer()
        search = Search(args.strategy, verifiers.domain, options, args.seed, every_value=args.trees is not None)
        trees = stack.enter_context(args.trees.open("wb")) if args.trees else None
        program = Program(args, search, budget, proposer, value, verifiers)
        before = await cache_counters(args.server) if policy else None
        await program.run(rows, trees)
        summary = program.tally.summary()
        if policy:
            after = await cache_counters(args.server)
            asked = after.queries - before.queries if before and after else 0
            summary["prefix_cache_hit_rate"] = round((after.hits - before.hits) / asked, 4) if before and after and asked else None
        print(json.dumps({"summary": summary}), file=sys.stderr)
        return 1 if program.tally.failed else 0


def _check_writable(args: argparse.Namespace) -> None:
    """Before a server is asked for anything. What the file holds is kept until the search begins, and what is read is not written over.
    Raises ConfigError."""
    path: Path = args.trees
    try:
        with path.open("ab"):
            pass
        for name in ("problems", "template"):
            read: Path | None = getattr(args, name)
            if read and read.exists() and path.samefile(read):
                raise ConfigError(f"--trees {path}: is the file of --{name}, which it would replace; give another")
    except OSError as error:
        raise ConfigError(f"--trees {path}: {error.strerror}; give a file that can be written") from error


def _check_suits(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """A row that the arguments do not suit is malformed; where that is every problem, they cannot be used. Raises ConfigError."""
    tasks = {row.problem.task for row in rows if row.problem}
    if not tasks or not tasks.isdisjoint(ARITHMETIC_TASKS):
        return
    what = f"--problems {args.problems}: holds texts alone"
    if not args.server:
        raise ConfigError(f"{what}, whose steps cannot be enumerated; give --server, whose policy proposes them")
    if args.value in ("oracle", "heuristic"):
        raise ConfigError(f"{what}, and --value {args.value} knows arithmetic problems only; give --value monte-carlo, prm or judge")


def _asking(path: Path | None) -> Asking:
    if path is None:
        return Asking()
    try:
        return Asking.of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template {path}: {error}; give a text file") from error


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    for name in ("parallel", "playouts", "playout_tokens", "votes", "max_step_tokens"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not args.timeout_s > 0 or not args.temperature >= 0 or not 0 < args.top_p <= 1:
        p.error("--timeout-s must be above 0, --temperature at least 0, --top-p within (0, 1]")
    try:
        return asyncio.run(search_file(args))
    except NeoxRLError as error:
        p.error(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read the lines has seen enough
        return 1
    except OSError as error:
        p.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
