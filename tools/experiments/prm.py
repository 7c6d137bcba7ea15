"""A process reward model from trees to the value of a search, against the exact solver's labels on steps of held-out problems.

``python tools/experiments/prm.py``: rows of a config's problems -> breadth-first searches over legal steps, valued by Monte-Carlo play (11)
or by the oracle -> ``configs/prm.yml`` trained on those values -> the HF checkpoint served by vLLM -> its values of held-out steps, by one
token's log-probs. Ranking (AUC) and accuracy against whether the step can still be continued to a right end. ``--sees-earlier`` trains
meta-critics (8.3.4) beside them, which are told what the search did before, and compares the two on the steps that came after others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from common import COLORS, CORES, MODEL, QUIET, ROOT, Job, arguments, contents, digest, panels, parser, run_jobs, save, served, table

from neox_rl.config.derived import shares_prefixes
from neox_rl.config.load import load_config
from neox_rl.problems.make_rows import write_rows
from neox_rl.problems.sources import load_problems
from neox_rl.problems.tokenizer import DirectoryTokenizer, load_tokenizer
from neox_rl.rollout.vllm_completions import CompletionsGenerator
from neox_rl.search import demonstrations
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.credit import before
from neox_rl.search.domain import Rejection
from neox_rl.search.earlier import earlier_of
from neox_rl.search.proposers import Position
from neox_rl.search.reward_model import WordValue
from neox_rl.search.trees import read_trees
from neox_rl.telemetry.stats import cluster_mean_ci
from neox_rl.types import Problem

LABELS = ("monte-carlo", "oracle")
FROM_POLICY = ("metarl.warmstart.from_checkpoint=true", "metarl.warmstart.lr=1.0e-3")
SEES_EARLIER = "metarl.warmstart.sees_earlier=true"
BATCH = 256
SHOWN = 8
"""Trees that are told for the name of a run."""


@dataclass(frozen=True)
class Setting:
    """What is searched, and how a model of it is trained: ``nodes`` of a tree, ``context`` tokens that the model reads at most, its word
    included, ``tokens`` of a step."""

    numbers: int
    strategy: str
    nodes: int
    context: int
    tokens: int

    @property
    def problems(self) -> str:
        return f"metarl.problems.num_numbers={self.numbers}"


PLAIN = Setting(numbers=3, strategy="bfs", nodes=25, context=64, tokens=1024)
EARLIER = Setting(numbers=4, strategy="dfs", nodes=60, context=160, tokens=4096)
"""Of three numbers every step before an end is made in the first round, when nothing was tried yet; and it takes a search that comes to
ends before it goes on elsewhere."""


@dataclass(frozen=True)
class Step:
    """A step of a held-out search: where it leads, whether that can be won, what the search's own value said, and how many nodes there were
    before the round that made it."""

    position: Position
    solvable: bool
    searched: float
    seen: int

    @property
    def told(self) -> bool:
        """Whether the search had tried anything before."""
        return bool(earlier_of(self.position).texts)


def trees(args: argparse.Namespace, label: str, part: str, problems: Sequence[Problem]) -> Path:
    """The searches of ``problems``, made once."""
    how = ["--strategy", args.setting.strategy, "--value", label, "--playouts", str(args.playouts)]
    how += ["--prune", "-1", "--width", "5", "--budget-nodes", str(args.setting.nodes)]
    key = digest(*how, *(problem.id for problem in problems))
    rows, path = (Path(args.work, f"prm-{part}-{label}-{key}.{end}") for end in ("rows.jsonl", "trees.jsonl"))
    if not path.is_file():
        write_rows(rows, problems)
        argv = [sys.executable, "-m", "neox_rl.search", *how, "--problems", str(rows), "--trees", str(path) + ".partial"]
        subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        Path(str(path) + ".partial").rename(path)
    return path


def shown(settings: Sequence[str], path: Path, problems: Sequence[Problem]) -> str:
    """A digest of a step that the warm start makes of the first trees: a model that was shown them in another form is another model."""
    config, known = load_config([ROOT / "configs/prm.yml"], settings), {p.id: p for p in problems}
    metarl = config.metarl
    first = [(tree, known[tree.problem_id]) for tree in islice(read_trees(path), SHOWN)]
    tokenizer, sees = load_tokenizer(metarl.tokenizer, metarl.problems), metarl.warmstart.sees_earlier
    told = demonstrations.values(first, tokenizer, sees, config.neox.seq_length)
    per_step, shared = metarl.warmstart.tokens_per_step, shares_prefixes(config)
    made = demonstrations.Demonstrations(told, metarl.seed, config.neox.seq_length, step_tokens=per_step, shared=shared)
    return digest(*made.step())


def job(args: argparse.Namespace, label: str, path: Path, problems: Sequence[Problem], sees_earlier: bool = False) -> Job:
    size = MODEL if args.policy is None else (*FROM_POLICY, f"metarl.warmstart.hf_checkpoint={args.policy.resolve()}")
    shape = [f"metarl.warmstart.steps={args.steps}", f"metarl.warmstart.tokens_per_step={args.setting.tokens}"]
    if args.setting != PLAIN:
        shape += [args.setting.problems, f"seq_length={args.setting.context}"]
    settings = (*size, *QUIET, f"metarl.warmstart.path={path}", *shape, *((SEES_EARLIER,) if sees_earlier else ()))
    data = shown(settings, path, problems)
    if args.policy is not None:
        data = digest(data, contents(args.policy / "model.safetensors"))
    return Job(f"{'meta-critic' if sees_earlier else 'prm'}-{label}-{args.steps}", settings, "prm", data)


def steps_of(path: Path, problems: Sequence[Problem]) -> list[Step]:
    known, found = {p.id: p for p in problems}, []
    for tree in read_trees(path):
        problem = known[tree.problem_id]
        domain = ArithmeticDomain(problem)
        for node in tree.nodes[1:]:
            if node.verdict is not None or node.value is None:
                continue  # an end needs no model
            texts, state = tuple(n.text for n in tree.path(node.id)), domain.root
            for text in texts:
                after = domain.step(state, text, False)
                assert not isinstance(after, Rejection)
                state = after.state
            position = Position(problem, domain, state, texts, (), 0, visited=partial(before, tree, node, verdicts=True))
            found.append(Step(position, bool(domain.solved_value(state)), node.value, node.seen))
    return found


async def all_judged(args: argparse.Namespace, jobs: Sequence[Job], steps: Sequence[Step]) -> list[list[float]]:
    """One server each, side by side."""
    return await asyncio.gather(*(judged(args, job, steps, CORES[i % len(CORES)]) for i, job in enumerate(jobs)))


async def judged(args: argparse.Namespace, job: Job, steps: Sequence[Step], core: int) -> list[float]:
    model, log, sees_earlier = args.work / job.name / "model", args.work / f"{job.name}-server.log", SEES_EARLIER in job.settings
    context = args.setting.context
    async with served(model, context, log, core) as address, CompletionsGenerator(address) as generator:
        value, found = WordValue(generator, DirectoryTokenizer(model), sees_earlier, context), list[float]()
        for at in range(0, len(steps), BATCH):
            found += (await value.score([s.position for s in steps[at : at + BATCH]], None)).values
    return found


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The chance that a right step is scored above a wrong one, ties counted half."""
    order = np.argsort(np.asarray(scores), kind="stable")
    ranks = np.empty(len(scores))
    values = np.asarray(scores)[order]
    for value in np.unique(values):
        ranks[order[values == value]] = np.flatnonzero(values == value).mean() + 1
    right = np.asarray(labels)
    positives, negatives = right.sum(), (~right).sum()
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def interval(scores: Sequence[float], steps: Sequence[Step], less: Sequence[float] | None = None, draws: int = 200) -> tuple[float, float]:
    """95 % of the AUC, or of what it has above that of ``less``, over problems drawn again (bootstrap by number multiset: steps of one are
    alike)."""
    rng, by = np.random.default_rng(1), dict[str, list[int]]()
    for i, step in enumerate(steps):
        by.setdefault(step.position.problem.cluster, []).append(i)
    clusters, found = list(by.values()), list[float]()
    for _ in range(draws):
        chosen = [i for at in rng.integers(len(clusters), size=len(clusters)) for i in clusters[at]]
        ours, theirs = (
            0.0 if each is None else auc([each[i] for i in chosen], [steps[i].solvable for i in chosen]) for each in (scores, less)
        )
        found.append(ours - theirs)
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def best_accuracy(scores: Sequence[float], labels: Sequence[bool]) -> tuple[float, float]:
    """(accuracy, cut) of the cut that is best on these very steps: what the ranking allows. Scores from the cut on are called right; equal
    ones fall on one side of it. The cut is infinite where it is best to call none right."""
    order = np.argsort(scores)
    values, right = np.asarray(scores, dtype=float)[order], np.asarray(labels)[order]
    correct = np.concatenate([[right.sum()], right.sum() + np.cumsum(1 - 2 * right.astype(int))])
    places = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]])
    at = int(places[correct[places].argmax()])
    return float(correct[at] / len(right)), float(np.append(values, np.inf)[at])


def main() -> None:
    p = parser(__doc__, "prm")
    p.add_argument("--steps", type=int, default=400, help="optimizer steps of 1,024 tokens")
    p.add_argument(
        "--policy", type=Path, metavar="DIR", help="an HF directory of the main job to begin from (runs/metarl/model), not random weights"
    )
    p.add_argument("--train", type=int, default=900, help="training problems that are searched")
    p.add_argument("--heldout", type=int, default=120)
    p.add_argument("--playouts", type=int, default=8)
    p.add_argument(
        "--sees-earlier", action="store_true", help="train and compare meta-critics too, which are told what the search did before"
    )
    args = arguments(p)
    if args.quick:
        args.steps, args.train, args.heldout = 10, 40, 20
    args.setting = EARLIER if args.sees_earlier else PLAIN
    config = load_config([ROOT / "configs/metarl.yml"], [args.setting.problems]).metarl
    problems = load_problems(config.problems, config.seed)
    train = problems.train[:: max(1, len(problems.train) // args.train)][: args.train]
    paths = {label: trees(args, label, "train", train) for label in LABELS}
    jobs = {f"PRM of {label} values": job(args, label, path, train) for label, path in paths.items()}
    if args.sees_earlier:
        jobs |= {f"meta-critic of {label} values": job(args, label, path, train, sees_earlier=True) for label, path in paths.items()}
    heldout = trees(args, "monte-carlo", "heldout", problems.heldout[: args.heldout])
    run_jobs(list(jobs.values()), args)
    steps = steps_of(heldout, problems.heldout)
    labels = [step.solvable for step in steps]
    scores = {f"Monte-Carlo play, {args.playouts}": [step.searched for step in steps]}
    scores["heuristic"] = [step.position.domain.guess(step.position.state) for step in steps]
    scores |= dict(zip(jobs, asyncio.run(all_judged(args, list(jobs.values()), steps)), strict=True))
    rows = []
    for name, found in scores.items():
        low, high = interval(found, steps)
        accuracy, cut = best_accuracy(found, labels)
        half = np.mean([(value >= 0.5) == right for value, right in zip(found, labels, strict=True)])
        at = f"{auc(found, labels):.3f} [{low:.3f}, {high:.3f}]"
        rows.append([name, at, f"{100 * accuracy:.1f} (at {cut:.2f})", f"{100 * half:.1f}"])
    print(f"{len(steps)} steps of {args.heldout} held-out problems, {100 * np.mean(labels):.1f} % of them can still be won\n")
    table(["value", "AUC", "accuracy at the best cut, %", "accuracy at 0.5, %"], rows)
    if args.sees_earlier:
        _compare(scores, steps)
    print(*(f"{name}: {args.work / each.name / 'model'}" for name, each in jobs.items()), sep="\n")
    (args.work / "prm.json").write_text(json.dumps({name: [float(v) for v in found] for name, found in scores.items()}))
    _plot(scores, labels, args.picture)


def choices(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """A hopeful and a hopeless step of one round: what a search has to tell apart. What was done before them is the same."""
    rounds: dict[tuple[str, int], list[int]] = {}
    for i, step in enumerate(steps):
        rounds.setdefault((step.position.problem.id, step.seen), []).append(i)
    return [(a, b) for made in rounds.values() for a in made for b in made if steps[a].solvable and not steps[b].solvable]


def preferred(scores: Sequence[float], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """1 for each pair whose first is scored above its second, a half where they are equal."""
    return [0.5 + 0.5 * float(np.sign(scores[a] - scores[b])) for a, b in pairs]


def _compare(scores: dict[str, list[float]], steps: Sequence[Step]) -> None:
    """What a model gains from being told, on the steps where there was something to tell: over all of them, where how long the search has
    gone on says something too, and among those of a round, which alone a search chooses from."""
    told = [i for i, step in enumerate(steps) if step.told]
    after = [steps[i] for i in told]
    labels, pairs = [step.solvable for step in after], choices(after)
    clusters = [after[a].position.problem.cluster for a, _ in pairs]
    early = [-float(step.seen) for step in after]
    low, high = interval(early, after)
    print(
        f"{len(told)} of the steps came after others, {100 * np.mean(labels):.1f} % of these can still be won; AUC there of how few nodes"
    )
    print(
        f"there were: {auc(early, labels):.3f} [{low:.3f}, {high:.3f}]; {len(pairs)} pairs of a hopeful and a hopeless step of one round\n"
    )
    rows = []
    for label in LABELS:
        critic, plain = ([scores[f"{kind} of {label} values"][i] for i in told] for kind in ("meta-critic", "PRM"))
        low, high = interval(critic, after, less=plain)
        ours, theirs = preferred(critic, pairs), preferred(plain, pairs)
        better = cluster_mean_ci([a - b for a, b in zip(ours, theirs, strict=True)], clusters, (-1.0, 1.0))
        between = f"{auc(critic, labels) - auc(plain, labels):.3f} [{low:.3f}, {high:.3f}]"
        found = [f"{auc(critic, labels):.3f}", f"{auc(plain, labels):.3f}", between, *(f"{np.mean(each):.3f}" for each in (ours, theirs))]
        rows.append([label, *found, f"{better.mean:.3f} [{better.low:.3f}, {better.high:.3f}]"])
    kinds = ("meta-critic", "PRM", "difference")
    table(["values", *(f"AUC, {kind}" for kind in kinds), *(f"in a round, {kind}" for kind in kinds)], rows)


def _plot(scores: dict[str, list[float]], labels: Sequence[bool], path: Path) -> None:
    figure, (curve, calibration) = panels(2, 5.0)
    right = np.asarray(labels)
    for color, (name, found) in zip(COLORS, scores.items(), strict=False):
        values = np.asarray(found)
        cuts = np.concatenate([[np.inf], np.sort(np.unique(values))[::-1]])
        hit, false = ([float((values[which] >= cut).mean()) for cut in cuts] for which in (right, ~right))
        curve.plot(false, hit, color=color, label=f"{name}: {auc(found, labels):.2f}")
        edges = np.unique(np.quantile(values, np.linspace(0, 1, 9)))
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
        each = [(values[bins == b].mean(), right[bins == b].mean()) for b in np.unique(bins)]
        calibration.plot(*zip(*each, strict=True), marker="o", color=color, label=name)
    for axes in (curve, calibration):
        axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1)
    curve.set_xlabel("share of hopeless steps above the cut")
    curve.set_ylabel("share of hopeful steps above the cut")
    curve.legend(frameon=False, fontsize=8, loc="lower right", title="area under the curve")
    calibration.set_xlabel("value")
    calibration.set_ylabel("share that can still be won")
    save(figure, path)


if __name__ == "__main__":
    main()
