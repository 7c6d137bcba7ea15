"""Prefix trees: shared context once, and term by term the same loss as the sequences laid out one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_rl.batch.pack import pack_rl, pack_sft
from neox_rl.batch.packing import Layout
from neox_rl.batch.prefixes import prefix_trees, visible_until
from neox_rl.batch.types import PADDING, Ints, MicroBatch, StepBatch
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.loss.policy import make_loss_fn
from neox_rl.types import Finish, Group, Reason, Role, Segment, Trace, Verdict

VERDICT = Verdict(True, "26", Reason.MATCH, 0.1)
STEP = 5
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=1, max_size=10)


@st.composite
def traces(draw: st.DrawFn) -> list[Trace]:
    """Rollouts after one prompt, over few tokens, so that they share much: prompts, sampled steps and feedback of every version."""
    prompt = Segment(tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))), Role.PROMPT)
    found = []
    for index in range(draw(st.integers(1, 6))):
        segments = [prompt]
        for _ in range(draw(st.integers(0, 4))):
            ids = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
            if draw(st.booleans()):
                segments.append(Segment(ids, Role.ENV))
                continue
            logprobs = tuple(draw(st.sampled_from([-0.5, -1.0])) for _ in ids)
            credit = draw(st.sampled_from([None, 0.25]))
            segments.append(Segment(ids, Role.THINK, logprobs, draw(st.integers(1, 4)), draw(st.sampled_from([0.5, 1.0])), 0, credit))
        found.append(Trace(f"g000000/r{index}", "p", tuple(segments), float(draw(st.booleans())), Finish.STOP, VERDICT))
    return found


GROUPS = st.lists(traces(), min_size=1, max_size=3).map(lambda found: [Group(i, "p", tuple(t)) for i, t in enumerate(found)])


def pack(groups: Sequence[Group], share: bool, layout: tuple[int, int, int] = (64, 1, 1), loss: str = "tis", least: int = 1) -> StepBatch:
    """``layout``: pack_tokens, data-parallel and tensor-parallel ranks. ``least``: micro-batches a rank."""
    return pack_rl(
        groups,
        STEP,
        staleness=StalenessConfig(admission_slack=1, delivery_slack=1),
        objective=ObjectiveConfig(baseline="mean", loss=loss),
        max_new_tokens=10,
        layout=Layout(layout[0], layout[1], layout[2], least, share_prefixes=share),
    )


def every(batch: StepBatch) -> list[MicroBatch]:
    return [micro for rank in batch.microbatches for micro in rank]


def context(micro: MicroBatch, row: int) -> tuple[int, ...]:
    """The tokens that a row sees, its own the last."""
    (tree,) = (slice(a, b) for a, b in zip(micro.cu_seqlens, micro.cu_seqlens[1:], strict=False) if a <= row < b)
    at, until = row - tree.start, visible_until(micro.positions[tree])
    return tuple(int(token) for j, token in enumerate(micro.tokens[tree][: at + 1]) if at < until[j])


def trained_terms(batch: StepBatch) -> Counter[tuple[object, ...]]:
    """Everything a loss can see of each term with a weight: its context, its target, and what goes with it."""
    found: Counter[tuple[object, ...]] = Counter()
    for micro in every(batch):
        arrays = (micro.loss_weight, micro.advantages, micro.behavior_logprobs, micro.versions, micro.sequence_index)
        for term in np.flatnonzero(micro.loss_weight):
            prediction = micro.terms[term]
            seen = context(micro, int(micro.rows[prediction])), int(micro.targets[prediction])
            found[(*seen, *(array[term].item() for array in arrays))] += 1
    return found


# The layout


@given(SEQUENCES, st.integers(1, 40))
def test_the_paths_of_the_trees_are_the_sequences(sequences: list[list[int]], max_rows: int) -> None:
    trees = prefix_trees([np.array(s) for s in sequences], max_rows)
    assert sorted(i for members, _ in trees for i in members) == list(range(len(sequences)))
    for members, tree in trees:
        assert len(tree) <= max_rows or len(members) == 1 or len(tree) == max(len(sequences[i]) for i in members)
        until = visible_until(tree.positions)
        for i, path in zip(members, tree.paths, strict=True):
            assert tree.tokens[path].tolist() == sequences[i]
            assert tree.positions[path].tolist() == list(range(len(path)))
            seen = [j for j in range(path[-1] + 1) if path[-1] < until[j]]
            assert seen == path.tolist()


@given(SEQUENCES)
def test_no_prefix_is_laid_out_twice(sequences: list[list[int]]) -> None:
    ((_, tree),) = prefix_trees([np.array(s) for s in sequences], 10**6)
    assert len(tree) == len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})


def test_trees_are_cut_where_they_are_full() -> None:
    sequences = [np.array(s) for s in ([1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9])]
    assert [members for members, _ in prefix_trees(sequences, 6)] == [(0, 1, 2), (3,)]
    assert [len(tree) for _, tree in prefix_trees(sequences, 5)] == [4, 3, 3]
    assert [len(tree) for _, tree in prefix_trees(sequences, 2)] == [3, 3, 3, 3]


def test_a_microbatch_of_trees_looks_like_its_documentation() -> None:
    def trace(index: int, ids: tuple[int, ...]) -> Trace:
        segments = (Segment((5,), Role.PROMPT), Segment(ids, Role.THINK, (-1.0,) * len(ids), 4, 1.0))
        return Trace(f"g000000/r{index}", "p", segments, float(index), Finish.STOP, VERDICT)

    (micro,) = every(pack([Group(0, "p", (trace(0, (6, 7)), trace(1, (9,))))], share=True))
    assert micro.tokens.tolist() == [5, 6, 7, 9, 0, 0, 0, 0] and micro.positions.tolist() == [0, 1, 2, 1, 0, 1, 2, 0]
    assert micro.cu_seqlens.tolist() == [0, 4, 7, 8] and micro.max_seqlen == 3 and micro.shared
    assert micro.rows.tolist() == [0, 1, 0] and micro.targets.tolist() == [6, 7, 9] and micro.terms.tolist() == [0, 1, 2]
    assert micro.sequence_index.tolist() == [0, 0, 1]
    integers = (micro.tokens, micro.positions, micro.rows, micro.targets, micro.terms, micro.versions, micro.sequence_index)
    assert {a.dtype.name for a in integers} == {"int64"}


# Terms


@given(GROUPS, st.sampled_from([(64, 1, 1), (24, 2, 1), (32, 1, 3)]))
def test_the_terms_of_the_trees_are_those_of_the_sequences_one_by_one(groups: list[Group], layout: tuple[int, int, int]) -> None:
    """Contexts, targets, weights, advantages, log-probs, versions, sequences: whatever a loss does with them, it does the same."""
    flat, shared = pack(groups, False, layout), pack(groups, True, layout)
    assert trained_terms(shared) == trained_terms(flat)
    assert shared.stats.trained_staleness == flat.stats.trained_staleness
    assert (shared.stats.num_tokens, shared.stats.trained_tokens) == (flat.stats.num_tokens, flat.stats.trained_tokens)
    assert shared.stats.num_rows <= flat.stats.num_rows == flat.stats.num_tokens
    assert 0 < shared.stats.packing_efficiency <= 1
    assert len({len(rank) for rank in shared.microbatches}) == 1 and len({len(micro) for micro in every(shared)}) == 1


def longer(groups: Sequence[Group], prompt: int) -> list[Group]:
    """The groups with as many tokens more in front of each trace."""
    before = Segment((2,) * prompt, Role.PROMPT)
    return [replace(g, traces=tuple(replace(t, segments=(before, *t.segments)) for t in g.traces)) for g in groups]


@settings(max_examples=60)
@given(GROUPS, st.integers(0, 40), st.integers(1, 8), st.integers(1, 24))
def test_more_microbatches_than_groups_do_not_undo_the_sharing(groups: list[Group], prompt: int, ranks: int, least: int) -> None:
    """Whole trees and empty micro-batches, rather than every path a tree of its own; the loss and its gradient stay the flat sum."""
    groups, layout = longer(groups, prompt), (1024, ranks, 1)
    flat, shared = pack(groups, False), pack(groups, True, layout, least=least)
    paths = [[tuple(i for s in t.segments for i in s.ids) for t in group.traces] for group in groups]
    unique = sum(len({ids[:n] for ids in group for n in range(1, len(ids) + 1)}) for group in paths)
    assert shared.stats.num_rows <= 1.2 * unique
    assert len(shared.microbatches) == ranks and {len(rank) for rank in shared.microbatches} == {least}
    assert len(every(shared)[0]) <= len(every(pack(groups, True, (1024, 1, 1)))[0]), "no micro-batch is fuller than all of them together"
    assert trained_terms(shared) == trained_terms(flat)
    (loss_flat, gradient_flat, _), (loss_shared, gradient_shared, _) = (run(b, ObjectiveConfig(), 0) for b in (flat, shared))
    assert loss_shared == pytest.approx(loss_flat, rel=1e-5, abs=1e-7)
    for key in {*gradient_flat, *gradient_shared}:
        assert gradient_shared[key] == pytest.approx(gradient_flat[key], rel=1e-4, abs=1e-7)


def test_trees_are_cut_where_that_fills_the_microbatches_and_costs_little() -> None:
    """Two groups of 16 rollouts that share a prompt of 10 tokens; with prompts of 100 a cut would lay out too much twice."""

    def trace(ticket: int, index: int, prompt: int) -> Trace:
        ids = (index, ticket, *range(18))
        segments = (Segment((5,) * prompt, Role.PROMPT), Segment(ids, Role.THINK, (-1.0,) * 20, 4, 1.0))
        return Trace(f"g{ticket:06d}/r{index}", "p", segments, float(index), Finish.STOP, VERDICT)

    def rows(prompt: int, ranks: int) -> tuple[int, int]:
        batch = pack([Group(t, "p", tuple(trace(t, i, prompt) for i in range(16))) for t in range(2)], True, (1024, ranks, 1))
        return batch.stats.num_rows, len(every(batch)[0])

    assert rows(10, 1) == (660, 664) and rows(10, 8) == (720, 96)
    assert rows(100, 1) == (840, 840) and rows(100, 2) == rows(100, 4) == (840, 424)


@given(GROUPS)
def test_each_prediction_is_made_once_and_only_where_something_is_trained(groups: list[Group]) -> None:
    for micro in every(pack(groups, True)):
        made = [(context(micro, int(row)), int(target)) for row, target in zip(micro.rows, micro.targets, strict=True)]
        bounds = np.searchsorted(micro.cu_seqlens, micro.rows, side="right")
        assert len({(int(tree), *what) for tree, what in zip(bounds, made, strict=True)}) == len(made)
        assert set(micro.terms.tolist()) == set(range(len(made)))
        assert (micro.loss_weight != 0).all() or (micro.sequence_index == PADDING).all()


@pytest.mark.parametrize("loss", [n for n in ObjectiveConfig.__dataclass_fields__["loss"].metadata["choices"] if n != "dpo"])
@given(groups=GROUPS, seed=st.integers(0, 9))
def test_every_objective_has_the_same_loss_gradient_and_metrics(loss: str, groups: list[Group], seed: int) -> None:
    """A policy that is a table, context x target: the gradient of its entries, from either layout. Pairs: ``test_preferences``."""
    cfg = ObjectiveConfig(loss=loss, ratio_cap=1.4, kl_coef=0.1, entropy_coef=0.1)
    results = [run(pack(groups, share, loss=loss), cfg, seed) for share in (False, True)]
    (loss_flat, gradient_flat, sums_flat), (loss_shared, gradient_shared, sums_shared) = results
    assert loss_shared == pytest.approx(loss_flat, rel=1e-5, abs=1e-7)
    keys = {key for key, value in gradient_flat.items() if value} | {key for key, value in gradient_shared.items() if value}
    for key in keys:
        assert gradient_shared.get(key, 0.0) == pytest.approx(gradient_flat.get(key, 0.0), rel=1e-4, abs=1e-7)
    assert sums_shared == pytest.approx(sums_flat, rel=1e-5, abs=1e-6)


def run(batch: StepBatch, cfg: ObjectiveConfig, seed: int) -> tuple[float, Counter[tuple[object, ...]], dict[str, float]]:
    loss_fn, total = make_loss_fn(cfg, STEP - 1), 0.0
    gradient: Counter[tuple[object, ...]] = Counter()
    sums: Counter[str] = Counter()
    for micro in every(batch):
        keys = [(context(micro, int(row)), int(target)) for row, target in zip(micro.rows, micro.targets, strict=True)]
        table = torch.tensor([-np.random.default_rng([seed, *key[0], key[1]]).uniform(0.1, 2.0) for key in keys], requires_grad=True)
        terms = table[torch.from_numpy(micro.terms)]
        reference = (micro.behavior_logprobs - 0.25).astype(np.float32)
        value, found = loss_fn(terms, -0.5 * terms, micro.with_logprobs(reference=reference))
        value.backward()
        total += value.item()
        assert table.grad is not None
        for key, part in zip(keys, table.grad.tolist(), strict=True):
            gradient[key] += part
        for name, metric in found.items():
            sums[name] = max(sums[name], metric.item()) if name.endswith("_max") else sums[name] + metric.item()
    return total, gradient, dict(sums)


def test_demonstrations_share_their_prefixes_too() -> None:
    def trace(index: int, ids: tuple[int, ...]) -> Trace:
        segments = (Segment((1, 2, 3), Role.PROMPT), Segment(ids, Role.THINK, mask=1.0))
        return Trace(f"g000000/r{index}", "p", segments, 1.0, Finish.STOP, VERDICT)

    groups = [Group(0, "p", (trace(0, (4, 5)), trace(1, (4, 6))))]
    batch = pack_sft(groups, 1, layout=Layout(64, share_prefixes=True))
    (micro,) = every(batch)
    assert (batch.stats.num_tokens, batch.stats.num_rows) == (10, 6)
    assert micro.tokens[:6].tolist() == [1, 2, 3, 4, 5, 6] and micro.targets.tolist() == [4, 5, 6] and micro.terms.tolist() == [0, 1, 0, 2]
    assert micro.loss_weight.tolist() == [0.25] * 4


def test_visible_until_is_the_end_of_the_subtree() -> None:
    positions: Ints = np.array([0, 1, 2, 2, 1, 0])
    assert visible_until(positions).tolist() == [5, 4, 3, 4, 5, 6]
