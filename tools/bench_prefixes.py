"""What do shared prefixes save? The engine on the same groups, laid out trace by trace and as prefix trees, in turns.

Plain groups are rollouts of one problem, which share the prompt and the steps that they happen to begin with alike; searches are MCTS
trees over the Game of 24, a trace for each path to a leaf, every step trained once. One thread of one core; the losses must agree.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from bench_train_step import MODELS, Contender, as_rollout, contest
from benching import CONFIG, at_most, be_one_rank, describe_machine, parser, ratio, table

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import StepBatch
from neox_rl.config.load import load_config
from neox_rl.config.run import RunConfig
from neox_rl.engines.port import Engine
from neox_rl.engines.registry import build_engine
from neox_rl.loss.policy import make_loss_fn
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import load_tokenizer
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.demonstrations import TraceStyle, searches
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import ExhaustiveProposer
from neox_rl.search.rollouts import Baseline, advantages, node_samples, step_traces
from neox_rl.search.search import Search
from neox_rl.search.strategy import Options
from neox_rl.search.values import HeuristicValue
from neox_rl.types import Group, Node, Problem, Trace, Tree, VersionSpan

GAME24 = tuple(f"metarl.problems.{key}" for key in ("source=game24", "num_numbers=4", "max_number=13", "max_value=182"))
WIDTH = 4
TOKENS_PER_UNIQUE = 1.2


def plain_groups(config: RunConfig) -> list[Group]:
    """The main job's groups: solver searches of mixed quality, cut at its token budget."""
    metarl = config.metarl
    problems = load_problems(metarl.problems, metarl.seed).train
    tokenizer, rng = load_tokenizer(metarl.tokenizer, metarl.problems), random.Random(metarl.seed)
    found = []
    for ticket in range(metarl.rollout.groups_per_step):
        draw = searches([rng.choice(problems)], "mixed", TraceStyle(), tokenizer)
        traces = (draw(rng, f"g{ticket:06d}")[0] for _ in range(metarl.rollout.group_size))
        members = tuple(as_rollout(trace, metarl.rollout.max_new_tokens, rng) for trace in traces)
        found.append(Group(ticket, members[0].problem_id, members))
    return found


def search_groups(config: RunConfig, nodes: int) -> list[Group]:
    """An MCTS of so many nodes a group, in which every legal step may be proposed; its steps as if a policy had sampled them."""
    metarl = config.metarl
    problems = load_problems(metarl.problems, metarl.seed).train
    tokenizer, rng = load_tokenizer(metarl.tokenizer, metarl.problems), random.Random(metarl.seed)
    search = Search("mcts", ArithmeticDomain, Options(width=WIDTH), metarl.seed)

    def traces(ticket: int, problem: Problem) -> tuple[Trace, ...]:
        tree = asyncio.run(search.run(problem, ExhaustiveProposer(tokenizer), HeuristicValue(), Budget(nodes)))
        tree = replace(tree, nodes=(tree.nodes[0], *(sampled(node, rng) for node in tree.nodes[1:])))
        return traces_of(tree, problem, tokenizer.encode(problem.prompt), ticket)

    chosen = rng.sample(list(problems), metarl.rollout.groups_per_step)
    return [Group(ticket, problem.id, traces(ticket, problem)) for ticket, problem in enumerate(chosen)]


def sampled(node: Node, rng: random.Random) -> Node:
    logprobs = tuple(rng.uniform(-3.0, 0.0) for _ in node.ids)
    return replace(node, logprobs=logprobs, spans=(VersionSpan(0, 0, len(node.ids)),))


def traces_of(tree: Tree, problem: Problem, prompt: Sequence[int], ticket: int) -> tuple[Trace, ...]:
    samples = node_samples(tree)
    credit = advantages(tree, samples, Baseline.PARENT)
    traces = step_traces(tree, problem, prompt, samples, credit, lambda verdict, text, num_tokens: float(verdict.correct))
    return tuple(replace(trace, id=f"g{ticket:06d}/r{i}") for i, trace in enumerate(traces))


def laid_out(config: RunConfig, groups: Sequence[Group], share: bool) -> StepBatch:
    metarl = config.metarl
    layout = Layout(metarl.pack_tokens, share_prefixes=share)
    return pack_rl(groups, 1, staleness=metarl.staleness, objective=metarl.objective, max_new_tokens=40, layout=layout)


def unique_tokens(groups: Sequence[Group]) -> int:
    """Different prefixes of the traces, group by group: what no layout can be smaller than."""
    prefixes = 0
    for group in groups:
        texts = [tuple(i for s in trace.segments for i in s.ids) for trace in group.traces]
        prefixes += len({text[: n + 1] for text in texts for n in range(len(text))})
    return prefixes


def compare(what: str, engine: Engine, config: RunConfig, groups: Sequence[Group], repeats: int, wanted: float) -> list[str]:
    batches = [laid_out(config, groups, share) for share in (False, True)]
    loss_fn = make_loss_fn(config.metarl.objective, 0)

    def stepper(batch: StepBatch) -> Callable[[], float]:
        # With a rate of 0 both train the same weights, however many steps they make.
        return lambda: engine.step(batch.microbatches[0], loss_fn, 0.0).loss

    flat, shared = (Contender(name, stepper(batch), []) for name, batch in zip(("flat", "trees"), batches, strict=True))
    contest([flat, shared], repeats)
    unique = unique_tokens(groups)
    computed = [sum(len(micro) for micro in batch.microbatches[0]) for batch in batches]
    at_most(f"{what}: tokens computed, padding included, for each unique one", computed[1] / unique, TOKENS_PER_UNIQUE, "")
    ratio(f"{what}: steps with shared prefixes against without", flat.seconds, shared.seconds, wanted)
    times = [f"{1e3 * float(np.median(contender.seconds)):.0f}" for contender in (flat, shared)]
    sizes = [str(sum(len(group.traces) for group in groups)), str(batches[0].stats.num_tokens), str(unique)]
    return [what, *sizes, *map(str, computed), *times]


def main() -> int:
    args = parser(__doc__).parse_args()
    be_one_rank()
    describe_machine("torch", "megatron-core")
    repeats = 1 if args.quick else 11
    for name, settings in list(MODELS.items())[: 1 if args.quick else None]:
        print(f"### {name}\n", flush=True)
        rows = []
        config = load_config([CONFIG], settings)
        engine = build_engine(config, load_tokenizer(config.metarl.tokenizer, config.metarl.problems).vocab_size)
        rows.append(compare("plain groups", engine, config, plain_groups(config), repeats, 1.0))
        engine.close()
        config = load_config([CONFIG], [*settings, *GAME24])
        engine = build_engine(config, load_tokenizer(config.metarl.tokenizer, config.metarl.problems).vocab_size)
        for nodes in (30, 100):
            rows.append(compare(f"MCTS of {nodes} nodes", engine, config, search_groups(config, nodes), repeats, 1.5))
        engine.close()
        table(["groups", "traces", "tokens", "unique", "computed flat", "computed as trees", "ms flat", "ms as trees"], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
