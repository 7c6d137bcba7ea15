"""Pairs of a better and a worse step: which a search gives, how they are packed, and their loss against a plain computation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import MicroBatch, StepBatch
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.loss.metrics import finalize
from neox_rl.loss.policy import make_loss_fn
from neox_rl.search.rollouts import Sample, pair_traces, preferences
from neox_rl.types import Finish, Group, Node, Problem, Reason, Role, Segment, Trace, Tree, Verdict, VersionSpan
from tests.unit.test_prefixes import context

STEP, BETA = 5, 0.7
OBJECTIVE = ObjectiveConfig(loss="dpo", beta=BETA, aggregation="sequence_mean", baseline="none")
STALENESS = StalenessConfig(admission_slack=1, delivery_slack=1)
VERDICT = Verdict(True, "26", Reason.MATCH, 0.1)
LAYOUTS = st.sampled_from([(256, 1, 1), (48, 2, 1), (64, 1, 4), (48, 2, 3)])


def trace(context: tuple[int, ...], step: tuple[int, ...], advantage: float, version: int = 4) -> Trace:
    segments = [Segment((1, 2), Role.PROMPT), Segment(context, Role.THINK)]
    if step:
        segments.append(Segment(step, Role.THINK, (-1.0,) * len(step), version, 1.0, 0, advantage))
    return Trace("", "p", tuple(segments), 1.0, Finish.STOP, VERDICT)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Pairs in places that share much, over few tokens; some of searches that had none to give, some too old."""
    step = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
    found = []
    for ticket in range(draw(st.integers(1, 3))):
        pairs = list[Trace]()
        for _ in range(draw(st.integers(1, 6))):
            place, gap = draw(st.lists(st.integers(1, 3), max_size=6).map(tuple)), draw(st.sampled_from([0.25, 1.0]))
            better, worse = draw(st.one_of(st.tuples(step, step), st.just(((), ()))))
            pairs += [trace(place, better, gap, draw(st.integers(1, 4))), trace(place, worse, -gap, draw(st.integers(1, 4)))]
        found.append(Group(ticket, "p", tuple(replace(t, id=f"g{ticket:06d}/r{i}") for i, t in enumerate(pairs))))
    return found


def pack(given: list[Group], share: bool = False, layout: tuple[int, int, int] = (256, 1, 1)) -> StepBatch:
    tokens, ranks, least = layout
    laid = Layout(tokens, ranks, 1, least, share_prefixes=share)
    return pack_rl(given, STEP, staleness=STALENESS, objective=OBJECTIVE, max_new_tokens=10, layout=laid)


def every(batch: StepBatch) -> list[MicroBatch]:
    return [micro for rank in batch.microbatches for micro in rank]


@lru_cache(None)
def entry(seed: int, seen: tuple[int, ...], target: int) -> float:
    """log pi(target | seen) of a policy that is a table; the reference policy's is another seed's."""
    return -float(np.random.default_rng([seed, *seen, target]).uniform(0.1, 2.0))


def by_microbatches(batch: StepBatch) -> tuple[float, Counter[tuple[object, ...]], dict[str, float]]:
    """What the engines compute: the sum of the losses, the gradient of each entry, and the metrics."""
    loss_fn, total = make_loss_fn(OBJECTIVE, STEP - 1), 0.0
    gradient, sums = Counter[tuple[object, ...]](), Counter[str]()
    for micro in every(batch):
        keys = [(context(micro, int(row)), int(target)) for row, target in zip(micro.rows, micro.targets, strict=True)]
        table = torch.tensor([entry(0, *key) for key in keys], dtype=torch.float64, requires_grad=True)
        reference = np.array([entry(1, *key) for key in keys], np.float64)[micro.terms]
        terms, against = table[torch.from_numpy(micro.terms)], replace(micro, reference_logprobs=reference)
        value, found = loss_fn(terms, torch.zeros(len(terms)), against)
        value.backward()
        total += value.item()
        assert table.grad is not None
        for key, part in zip(keys, table.grad.tolist(), strict=True):
            gradient[key] += part  # type: ignore[assignment]  # a sum of floats
        for name, metric in found.items():
            sums[name] += metric.item()  # type: ignore[assignment]
    return total, gradient, finalize(sums)


def by_hand(given: list[Group]) -> tuple[float, Counter[tuple[object, ...]], int]:
    """Equation 7 over the pairs, one by one, nothing packed: the mean over all of them of -log sigmoid of the margin. A search
    without a pair is none of them; one that is too old is."""
    entries = dict[tuple[tuple[int, ...], int], torch.Tensor]()
    losses, trained = [], 0
    pairs = [pair for group in given for pair in zip(group.traces[::2], group.traces[1::2], strict=True) if pair[0].segments[2:]]
    for pair in pairs:
        if any(s.version < STEP - 3 for t in pair for s in t.segments if s.mask):
            continue
        margin = torch.zeros((), dtype=torch.float64)
        for sign, t in zip((1, -1), pair, strict=True):
            ids = [i for s in t.segments for i in s.ids]
            for at in range(len(ids) - len(t.segments[2].ids), len(ids)):
                key = (tuple(ids[:at]), ids[at])
                now = entries.setdefault(key, torch.tensor(entry(0, *key), dtype=torch.float64, requires_grad=True))
                margin = margin + sign * (now - entry(1, *key))
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * margin))))
        trained += 1
    total = torch.stack(losses).sum() / len(pairs) if losses else torch.zeros(())
    if losses:
        total.backward()
    return total.item(), Counter({key: e.grad.item() for key, e in entries.items() if e.grad is not None}), trained  # type: ignore[arg-type]


@settings(max_examples=40)
@given(groups(), st.booleans(), LAYOUTS)
def test_every_split_has_the_loss_and_the_gradient_of_the_pairs_one_by_one(
    given: list[Group], share: bool, layout: tuple[int, int, int]
) -> None:
    loss, gradient, metrics = by_microbatches(pack(given, share, layout))
    expected, gradient_by_hand, trained = by_hand(given)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-9) and metrics.get("pairs", 0.0) == trained
    for key in {*(k for k, value in gradient.items() if value), *gradient_by_hand}:
        assert gradient[key] == pytest.approx(gradient_by_hand[key], rel=1e-5, abs=1e-9)


@settings(max_examples=40)
@given(groups(), st.booleans(), LAYOUTS)
def test_a_pair_is_never_parted_and_trained_whole_or_not_at_all(given: list[Group], share: bool, layout: tuple[int, int, int]) -> None:
    batch = pack(given, share, layout)
    homes = Counter[int]()
    for micro in every(batch):
        homes.update({int(i) // 2 for i, weight in zip(micro.sequence_index, micro.loss_weight, strict=True) if weight})
        trained = {int(i) for i, weight in zip(micro.sequence_index, micro.loss_weight, strict=True) if weight}
        assert {i ^ 1 for i in trained} == trained
    assert all(count == 1 for count in homes.values())
    assert max(batch.stats.trained_staleness, default=0) <= 2
    assert batch.stats.masked_tokens >= batch.stats.stale_tokens


def test_half_of_the_pairs_metrics_is_what_the_policy_prefers() -> None:
    """At the reference policy itself the loss is log 2 and nothing is preferred yet; the gradient raises w as much as it lowers l."""
    (micro,) = every(pack([Group(0, "p", (trace((3,), (5, 6), 0.5), trace((3,), (7,), -0.5)))]))
    logprobs = torch.from_numpy(micro.reference_logprobs).double().requires_grad_()
    loss, sums = make_loss_fn(OBJECTIVE, STEP - 1)(logprobs, torch.zeros(len(micro)), micro)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logprobs.grad is not None
    found = finalize({name: value.item() for name, value in sums.items()})
    assert (found["pairs"], found["preferred_frac"], found["preferred_margin"]) == (1, 0, 0)
    by_target = {int(t): g for t, g, w in zip(micro.targets, logprobs.grad.tolist(), micro.loss_weight, strict=True) if w}
    assert by_target == pytest.approx({5: -BETA / 2, 6: -BETA / 2, 7: BETA / 2})


@pytest.mark.parametrize(
    "traces",
    [
        (trace((3,), (5,), 0.5),),
        (trace((3,), (5,), 0.5), trace((4,), (6,), -0.5)),
        (trace((3,), (5,), 0.5), trace((3,), (6,), 0.5)),
        (trace((3,), (5,), -0.5), trace((3,), (6,), 0.5)),
        (trace((3,), (5,), 0.5), trace((3,), (), 0.0)),
        (trace((3,), (5,), 0.0), trace((3,), (6,), 0.0)),
    ],
    ids=["one", "two places", "both better", "worse first", "half", "equal"],
)
def test_what_is_no_pair_is_refused(traces: tuple[Trace, ...]) -> None:
    with pytest.raises(ValueError, match=r"pair|better and worse"):
        pack([Group(0, "p", traces)])


# What a search prefers


def sample(parent: int, value: float, token: int, node: int = -1) -> Sample:
    return Sample(parent, node, value, (token,), (-1.0,), (VersionSpan(token % 4, 0, 1),))


def test_of_the_steps_of_a_place_the_best_is_preferred_to_the_worst_where_they_differ_enough() -> None:
    first, second = sample(0, 0.9, 11, 1), sample(0, 0.9, 12, 2)
    refused, other = sample(0, 0.0, 13), sample(0, 0.0, 14)
    close = [sample(1, 0.5, 15, 3), sample(1, 0.4, 16, 4)]
    found = preferences([first, second, refused, other, *close, sample(2, 0.9, 17, 5)], margin=0.2)
    assert found == [(first, refused)], "ties go to the first; close values and a step alone prefer nothing"
    assert preferences(close, margin=0.05) == [tuple(close)] and preferences([first, second], margin=1e-6) == []


def test_a_pair_is_two_traces_with_one_context_and_a_search_without_one_its_prompt_twice() -> None:
    nodes = (Node(0, -1, "", 0), Node(1, 0, "a", 1, (11,)), Node(2, 1, "b", 2, (12,), verdict=VERDICT))
    tree, problem = Tree("p", nodes, answer=2), Problem("p", "math", "", "", "")
    pair = preferences([sample(1, 1.0, 12, 2), sample(1, 0.25, 13)], margin=0.2)
    better, worse = pair_traces(tree, problem, (1, 2), pair, lambda verdict, text, num_tokens: 10.0 * verdict.correct + num_tokens)
    assert [[s.ids for s in t.segments] for t in (better, worse)] == [[(1, 2), (11,), (12,)], [(1, 2), (11,), (13,)]]
    assert [(t.segments[-1].advantage, t.segments[-1].version) for t in (better, worse)] == [(0.75, 0), (-0.75, 1)]
    assert [sum(s.mask > 0 for s in t.segments) for t in (better, worse)] == [1, 1]
    alone = list(pair_traces(tree, problem, (1, 2), [], lambda verdict, text, num_tokens: 10.0 * verdict.correct + num_tokens))
    assert len(alone) == 2 and all([s.ids for s in t.segments] == [(1, 2)] for t in alone)
    assert {(t.reward, t.verdict) for t in (better, worse, *alone)} == {(12.0, VERDICT)}, "those of the search's answer"
    pack([Group(0, "p", (better, worse, *alone))])
