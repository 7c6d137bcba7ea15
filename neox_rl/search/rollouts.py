"""Searches as rollouts to train: every sampled step with its own credit, the better against the worse, or the search told to imitate.

*Steps.* A step was sampled after exactly the prompt and the path that lead to it, so its log-probs are those of the behavior policy, and
each may be of another policy version: a tree outlives an update. Its advantage is v(step) - v(where it was taken) (VinePPO, arXiv
2410.01679; TreeRL, 2506.11902), v as ``credit.worth`` says it. There is a trace for each path to a leaf. Each sampled step is trained in
one trace, the first that holds it, and is context without a loss in the others: what is trained is the flat sum over steps, none counted
twice.

*Preferences.* Of the steps that were sampled in one place, the best and the worst, where their values differ enough (Step-DPO, arXiv
2406.18629; the search tells which is better, not a judge of texts): two traces with the same context, one behind the other.

*Traces.* The search in the words of a Meta-CoT (Meta-STaR, arXiv 2501.04682, (3)). No policy sampled this text in this order, so there is
no behavior policy to correct for and it is imitated where the search found a right end, and else not trained: expert iteration.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from neox_rl.ports import Tokenizer
from neox_rl.search.credit import UNFINISHED, children_of, worth
from neox_rl.search.demonstrations import TraceStyle
from neox_rl.search.domain import Domain, Rejection, State
from neox_rl.search.linearize import glue_of, solution_of
from neox_rl.search.proposers import Attempter, Position, Proposal
from neox_rl.search.search import Grown
from neox_rl.types import NO_NODE, Finish, Node, Problem, Role, Segment, Trace, Tree, Verdict, VersionSpan

Rewarder = Callable[[Verdict, str, int], float]
"""(verdict, a path as text, its tokens) -> reward."""


class Baseline(StrEnum):
    """What the value of a step is compared with: that of the place where it was taken, or the mean of all that were sampled there."""

    PARENT = "parent"
    SIBLINGS = "siblings"


@dataclass
class Remembering(Attempter):
    """Another proposer, and all that it proposed in one search, whatever became of it: ``asked`` holds (position, proposals)."""

    proposer: Attempter
    asked: list[tuple[Position, Sequence[Proposal]]] = field(default_factory=list)

    @property
    def step_tokens(self) -> int:
        return self.proposer.step_tokens

    async def propose(self, position: Position, n: int, max_tokens: int) -> Sequence[Proposal]:
        made = await self.proposer.propose(position, n, max_tokens)
        self.asked.append((position, made))
        return made

    async def attempt(self, position: Position, n: int, max_tokens: int) -> Sequence[Sequence[Proposal]]:
        made = await self.proposer.attempt(position, n, max_tokens)
        for steps in made:
            self._walk(position, steps)
        return made

    def _walk(self, position: Position, steps: Sequence[Proposal]) -> None:
        """Up to the end of the attempt: what is written after an end, or after a step that is refused, is nobody's choice of a step."""
        state, ids = position.state, position.ids
        for step in steps:
            if position.domain.is_end(state):
                return
            self.asked.append((replace(position, state=state, ids=ids), (step,)))
            stepped = position.domain.step(state, step.text, step.ended) if step.complete else Rejection.TOO_LONG
            if isinstance(stepped, Rejection):
                return
            state, ids = stepped.state, (*ids, *step.ids)


class Sample(NamedTuple):
    """A step that a policy sampled at node ``parent``. ``node``: what it became, NO_NODE where it was refused or was there before."""

    parent: int
    node: int
    value: float
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    finish: Finish = Finish.STOP


def node_samples(tree: Tree) -> list[Sample]:
    """Each node of the tree that has a value, once."""
    valued = ((n, worth(n)) for n in tree.nodes[1:] if n.spans)
    return [Sample(n.parent, n.id, value, n.ids, n.logprobs, n.spans) for n, value in valued if value is not None]


def all_samples(grown: Grown, domain: Domain, asked: Sequence[tuple[Position, Sequence[Proposal]]]) -> list[Sample]:
    """Every step as often as the policy sampled it: an unbiased sum over what it does at a node.

    A step that was refused, that gave up or that ``max_step_tokens`` or the context cut leads nowhere: its value is 0. One that was sampled
    again has the value of the node that it leads to. Steps that the budget did not reach or cut short are left out, and those that nobody
    knows the value of.
    """
    tree, states = grown.tree, grown.states
    found = node_samples(tree)
    values = dict[tuple[int, State], float]()
    """Of each state below a node and, under NO_NODE, of the first anywhere."""
    for node, state in zip(tree.nodes[1:], states[1:], strict=True):
        if (value := worth(node)) is not None:
            values.setdefault((node.parent, state), value)
            values.setdefault((NO_NODE, state), value)
    written = [tuple(i for step in tree.path(node.id) for i in step.ids) for node in tree.nodes]
    places = {ids: node for node, ids in reversed(list(enumerate(written)))}
    nodes = Counter((written[n.parent], n.ids) for n in tree.nodes[1:] if n.spans)
    for position, proposals in asked:
        parent = places.get(position.ids, NO_NODE)
        for proposal in proposals:
            nodes[position.ids, proposal.ids] -= 1
            if parent == NO_NODE or nodes[position.ids, proposal.ids] >= 0:
                continue  # it is a node itself
            value = _value(parent, states[parent], proposal, domain, values)
            if value is not None and proposal.spans:
                finish = Finish.STOP if proposal.complete else Finish.LENGTH
                found.append(Sample(parent, NO_NODE, value, proposal.ids, proposal.logprobs, proposal.spans, finish))
    return found


def _value(parent: int, state: State, proposal: Proposal, domain: Domain, values: dict[tuple[int, State], float]) -> float | None:
    if proposal.cut_short:
        return None
    if not proposal.complete or not (proposal.text.strip() or proposal.ended):
        return 0.0
    stepped = domain.step(state, proposal.text, proposal.ended)
    if isinstance(stepped, Rejection):
        return 0.0
    return values.get((parent, stepped.state), values.get((NO_NODE, stepped.state)))


def advantages(tree: Tree, samples: Sequence[Sample], baseline: Baseline) -> list[float]:
    """One a sample. A search does not score its root: its value, like that of any unscored place, is the mean of what was sampled there."""
    below: dict[int, list[float]] = {}
    for sample in samples:
        below.setdefault(sample.parent, []).append(sample.value)
    means = {parent: sum(values) / len(values) for parent, values in below.items()}
    if baseline is Baseline.SIBLINGS:
        return [s.value - means[s.parent] for s in samples]
    scored = {node.id: value for node in tree.nodes[1:] if (value := worth(node)) is not None}
    return [s.value - scored.get(s.parent, means[s.parent]) for s in samples]


def step_traces(
    tree: Tree, problem: Problem, prompt_ids: Sequence[int], samples: Sequence[Sample], credit: Sequence[float], rewarder: Rewarder
) -> Iterator[Trace]:
    """A trace for each path to a leaf, then one for each sample that is no node; without ids. Every sample has its loss in one of them.

    A tree without a step gives its prompt alone. Rewards and verdicts are those of the paths' ends, for the record: the credit is trained.
    """
    prompt = Segment(tuple(prompt_ids), Role.PROMPT)
    fresh = {s.node: tuple(_credited(s, a)) for s, a in zip(samples, credit, strict=True) if s.node != NO_NODE}
    inner = children_of(tree).keys()
    for leaf in (node for node in tree.nodes if node.id not in inner):
        path = tree.path(leaf.id)
        steps = [segment for node in path for segment in fresh.pop(node.id, None) or (_context(node),)]
        yield _trace(problem, (prompt, *steps), path, leaf.verdict or UNFINISHED, Finish.STOP, rewarder)
    for sample, advantage in zip(samples, credit, strict=True):
        if sample.node == NO_NODE:
            path = tree.path(sample.parent)
            steps = [*map(_context, path), *_credited(sample, advantage)]
            yield _trace(problem, (prompt, *steps), path, UNFINISHED, sample.finish, rewarder)


class Pair(NamedTuple):
    """Two steps that were sampled in one place."""

    better: Sample
    worse: Sample


def preferences(samples: Sequence[Sample], margin: float) -> list[Pair]:
    """The best and the worst step of each place, where their values differ by ``margin`` at least, above 0; ties go to the first made."""
    places: dict[int, list[Sample]] = {}
    for sample in samples:
        places.setdefault(sample.parent, []).append(sample)
    pairs = (Pair(max(there, key=_worth), min(there, key=_worth)) for there in places.values())
    return [pair for pair in pairs if pair.better.value - pair.worse.value >= margin]


def _worth(sample: Sample) -> float:
    return sample.value


def pair_traces(tree: Tree, problem: Problem, prompt_ids: Sequence[int], pairs: Sequence[Pair], rewarder: Rewarder) -> Iterator[Trace]:
    """Two traces a pair, the better step's first, without ids: the path to their place as context, then the step, with plus or minus the
    difference of the values as its advantage. A search without a pair gives its prompt alone, twice.

    Rewards and verdicts are those of the search's answer, for the record.
    """
    prompt = Segment(tuple(prompt_ids), Role.PROMPT)
    answer = tree.path(max(tree.answer, 0))
    verdict = (answer[-1].verdict if answer else None) or UNFINISHED
    whole = _trace(problem, (prompt, *map(_context, answer)), answer, verdict, Finish.STOP, rewarder)
    for better, worse in pairs:
        path = [*map(_context, tree.path(better.parent))]
        for sample, advantage in ((better, better.value - worse.value), (worse, worse.value - better.value)):
            yield replace(whole, segments=(prompt, *path, *_credited(sample, advantage)), finish=sample.finish)
    if not pairs:
        yield from (replace(whole, segments=(prompt,)),) * 2


def _credited(sample: Sample, advantage: float) -> Iterator[Segment]:
    for span in sample.spans:
        part = slice(span.start, span.end)
        yield Segment(sample.ids[part], Role.THINK, sample.logprobs[part], span.version, mask=1.0, advantage=advantage)


def _context(node: Node) -> Segment:
    return Segment(node.ids, Role.THINK)


def _trace(
    problem: Problem, segments: tuple[Segment, ...], path: Sequence[Node], verdict: Verdict, finish: Finish, rewarder: Rewarder
) -> Trace:
    text = glue_of(problem).join(node.text for node in path)
    reward = rewarder(verdict, text, sum(len(s.ids) for s in segments[1:]))
    return Trace("", problem.id, segments, reward, finish, verdict)


def told_trace(
    tree: Tree, problem: Problem, style: TraceStyle, tokenizer: Tokenizer, rng: random.Random, max_tokens: int, rewarder: Rewarder
) -> Trace:
    """The search told in ``style``, without an id: a loss on all that the style's mask leaves, where it came to a right end.

    Else, and where the telling is longer than ``max_tokens``, the path of its answer as context alone: nothing of it is trained. What is
    told has the oldest version that made a step of the tree, the one by which its staleness is bounded.
    """
    prompt = Segment(tokenizer.encode_prompt(problem.prompt), Role.PROMPT)
    solution = solution_of(tree)
    if solution:
        told = style.trace(tree, problem, tokenizer, rng, "")
        if told.num_tokens <= max_tokens:
            version = min(span.version for node in tree.nodes for span in node.spans)
            segments = tuple(replace(s, version=version) if s.mask > 0 else s for s in told.segments)
            verdict = solution[-1].verdict or UNFINISHED
            text = tokenizer.decode([i for s in segments[1:] for i in s.ids])
            return replace(told, segments=segments, verdict=verdict, reward=rewarder(verdict, text, told.num_tokens - len(prompt.ids)))
    path = tree.path(max(tree.answer, 0))
    verdict = path[-1].verdict if path and path[-1].verdict is not None else UNFINISHED
    return _trace(problem, (prompt, *map(_context, path)), path, verdict, Finish.STOP, rewarder)
