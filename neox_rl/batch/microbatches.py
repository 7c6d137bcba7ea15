"""Sequences to micro-batches: which rows the model computes, and which loss terms are taken at them. Pure.

sequences -> units of trees (a tree a sequence; with shared prefixes one a group) -> bins -> rows and terms of a MicroBatch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from neox_rl.batch.packing import Layout, Plan, plan
from neox_rl.batch.prefixes import PrefixTree, prefix_trees
from neox_rl.batch.types import PADDING, Floats, Ints, MicroBatch
from neox_rl.framing import Array
from neox_rl.types import NO_VERSION

MAX_CUT_COST = 1.2
"""Rows after trees were cut to fill micro-batches evenly, over those before."""
CUT_STEP = 1.25
"""From one size that trees are cut to, to the next that is tried."""


class TokenSequence(Protocol):
    """Arrays of one length; entry t speaks of predicting ``targets[t]``, the token after ``tokens[t]``."""

    @property
    def tokens(self) -> Ints: ...
    @property
    def targets(self) -> Ints: ...
    @property
    def logprobs(self) -> Floats: ...
    @property
    def versions(self) -> Ints: ...
    @property
    def weight(self) -> Floats: ...
    @property
    def advantages(self) -> Floats: ...


class Unit(NamedTuple):
    """What is packed as one: trees, and the indices of the sequences that are their paths, one tree's after the other's."""

    members: tuple[int, ...]
    trees: tuple[PrefixTree, ...]

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.trees))


def units(sequences: Sequence[TokenSequence], group_sizes: Sequence[int], layout: Layout, paired: bool) -> list[Unit]:
    """A tree a sequence or, with shared prefixes, as few trees as each group of consecutive sequences takes.

    ``paired``: sequences 2i and 2i + 1 are of one group and have a loss in common, so they are never parted. All micro-batches are padded
    to the fullest, so trees are cut where that makes it smaller, as long as the rows stay within MAX_CUT_COST: each cut lays out a path
    again, and trees of the size of a path are sequences one by one. Fewer trees than micro-batches leave some of these empty.
    """
    size = 2 if paired else 1
    if not layout.share_prefixes:
        starts = range(0, len(sequences), size)
        return [Unit(tuple(range(i, i + size)), tuple(_alone(s.tokens) for s in sequences[i : i + size])) for i in starts]
    whole = _trees(sequences, group_sizes, layout.pack_tokens, size)
    best, laid = whole, plan([unit.num_rows for unit in whole], layout)
    limit, largest = MAX_CUT_COST * laid.used, max(unit.num_rows for unit in whole)
    max_rows = math.ceil(laid.used / (layout.data_parallel * layout.min_microbatches))
    while max_rows < min(largest, laid.length):
        cut = _trees(sequences, group_sizes, max_rows, size)
        tried = plan([unit.num_rows for unit in cut], layout)
        if tried.used <= limit and _padded(tried) < _padded(laid):
            best, laid = cut, tried
        max_rows = math.ceil(max_rows * CUT_STEP)
    return best


def _padded(made: Plan) -> int:
    """Rows that each rank computes, padding too."""
    return made.length * len(made.bins[0])


def _trees(sequences: Sequence[TokenSequence], group_sizes: Sequence[int], max_rows: int, together: int) -> list[Unit]:
    found, start = list[Unit](), 0
    for size in group_sizes:
        for members, tree in prefix_trees([s.tokens for s in sequences[start : start + size]], max_rows, together):
            found.append(Unit(tuple(start + i for i in members), (tree,)))
        start += size
    return found


def _alone(tokens: Ints) -> PrefixTree:
    rows = np.arange(len(tokens), dtype=np.int64)
    return PrefixTree(tokens, rows, (rows,))


def lay_out(
    sequences: Sequence[TokenSequence], packed: Sequence[Unit], layout_plan: Plan, share: bool
) -> tuple[tuple[MicroBatch, ...], ...]:
    """The micro-batches of every rank; ``layout_plan`` has bins of indices of ``packed``."""
    # Padding is cut to the longest real sequence, so that no position or attention length appears that the model never meets.
    longest = max(len(s.tokens) for s in sequences)
    return tuple(
        tuple(_microbatch(sequences, [packed[i] for i in members], layout_plan.length, longest, share) for members in rank)
        for rank in layout_plan.bins
    )


def _microbatch(sequences: Sequence[TokenSequence], chosen: Sequence[Unit], length: int, longest: int, share: bool) -> MicroBatch:
    trees = [tree for unit in chosen for tree in unit.trees]
    sizes = [len(tree) for tree in trees]
    padding = [min(longest, length - start) for start in range(sum(sizes), length, longest)]
    tokens = np.concatenate([*(tree.tokens for tree in trees), np.zeros(sum(padding), np.int64)])
    positions = np.concatenate([*(tree.positions for tree in trees), *(np.arange(size, dtype=np.int64) for size in padding)])
    starts = np.cumsum([0, *sizes, *padding])
    members = [i for unit in chosen for i in unit.members]
    paths = [start + path for start, tree in zip(starts[: len(trees)], trees, strict=True) for path in tree.paths]
    # With shared prefixes most rows have a term of several sequences, or none: terms without a weight would only cost.
    kept = [np.flatnonzero(sequences[i].weight) if share else np.arange(len(path)) for i, path in zip(members, paths, strict=True)]
    num_terms = sum(len(k) for k in kept)
    spare = int(num_terms == 0) if share else length - num_terms

    def lay(parts: Sequence[Array], fill: int, dtype: DTypeLike) -> Array:
        taken = [part[k] for part, k in zip(parts, kept, strict=True)]
        flat: Array = np.concatenate([*taken, np.full(spare, fill)]).astype(dtype)
        return flat

    own = [sequences[i] for i in members]
    targets = lay([s.targets for s in own], 0, np.int64)
    rows = terms = np.arange(length, dtype=np.int64)
    if share:
        rows, targets, terms = _predictions(lay(paths, 0, np.int64), lay([_next(path) for path in paths], 0, np.int64), targets)
    behavior = lay([s.logprobs for s in own], 0, np.float32)
    return MicroBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=starts.astype(np.int32),
        rows=rows,
        targets=targets,
        terms=terms,
        loss_weight=lay([s.weight for s in own], 0, np.float32),
        advantages=lay([s.advantages for s in own], 0, np.float32),
        behavior_logprobs=behavior,
        proximal_logprobs=behavior.copy(),
        reference_logprobs=behavior.copy(),
        versions=lay([s.versions for s in own], NO_VERSION, np.int64),
        sequence_index=np.concatenate([*(np.full(len(k), i) for i, k in zip(members, kept, strict=True)), np.full(spare, PADDING)]),
        max_seqlen=int(positions.max()) + 1,
    )


def _next(path: Ints) -> Ints:
    """The row of the token that each row of a path predicts. The last predicts nothing, and is never kept."""
    return np.append(path[1:], path[-1:])


def _predictions(rows: Ints, predicted: Ints, targets: Ints) -> tuple[Ints, Ints, Ints]:
    """``(rows, targets, terms)`` of :class:`MicroBatch`: terms on one and the same row of the tree share its prediction."""
    _, first, terms = np.unique(predicted, return_index=True, return_inverse=True)
    return rows[first], targets[first], terms.astype(np.int64)
