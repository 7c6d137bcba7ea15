"""Sequences with common beginnings as one prefix tree: each token of a shared prefix is laid out, and computed, once. Pure.

The rows of a tree are in depth-first order, and ``positions`` (the depth of a row) alone says who attends to whom: the parent of a row is
the last row before it at one position less, and a row sees itself and its ancestors. A sequence on its own is the tree whose positions
count up, so a packed batch of plain sequences is the special case.

Context is shared whatever is trained on it: a hidden state depends on the tokens before it and on nothing else. Loss terms are never
merged: sequences that sampled the same token, at other versions, with other advantages, keep a term each. So the gradient is that of the
sequences laid out one by one, for every objective, those of whole sequences included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from neox_rl.batch.types import Ints


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """``tokens`` and ``positions`` [n]; ``paths[i]`` are the rows of the i-th sequence, from the root on.

    The sequences [5, 6, 7] and [5, 6, 8, 9]::

        tokens     5 6 7 8 9        paths  0 1 2
        positions  0 1 2 2 3               0 1 3 4
    """

    tokens: Ints
    positions: Ints
    paths: tuple[Ints, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def prefix_trees(sequences: Sequence[Ints], max_rows: int, together: int = 1) -> list[tuple[tuple[int, ...], PrefixTree]]:
    """``(members, tree)`` of trees of at most ``max_rows`` rows each, as few as cutting the sorted sequences gives.

    ``tree.paths`` follow ``members``, which are indices of ``sequences``; each sequence is in one tree. One that is longer than
    ``max_rows`` gets a tree of its own. ``together``: as many consecutive sequences are in one tree.
    """
    if together > 1:
        blocks = sorted(range(0, len(sequences), together), key=lambda i: sequences[i].tolist())
        return list(_halved(sequences, [range(i, i + together) for i in blocks], max_rows))
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    common = [_common(a, b) for a, b in _neighbours(sequences, order)]
    cuts, rows = [0], 0
    for place, (i, shared) in enumerate(zip(order, common, strict=True)):
        new = len(sequences[i]) - shared
        if place > cuts[-1] and rows + new > max_rows:
            cuts.append(place)
            new, rows = len(sequences[i]), 0
        rows += new
    trees = []
    for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True):
        members = order[start:end]
        tree = _laid_out([sequences[i] for i in members], range(len(members)), [0, *common[start + 1 : end]])
        trees.append((tuple(members), tree))
    return trees


def _halved(sequences: Sequence[Ints], blocks: Sequence[range], max_rows: int) -> Iterator[tuple[tuple[int, ...], PrefixTree]]:
    """One tree of all the blocks or, where that is too large, those of each half. A step and its rival enclose all that is below the step
    in the order of the sequences: cutting that order would part them."""
    members = sorted((i for block in blocks for i in block), key=lambda i: sequences[i].tolist())
    chosen = [sequences[i] for i in members]
    common = [_common(a, b) for a, b in _neighbours(chosen, range(len(chosen)))]
    if sum(map(len, chosen)) - sum(common) > max_rows and len(blocks) > 1:
        middle = len(blocks) // 2
        yield from _halved(sequences, blocks[:middle], max_rows)
        yield from _halved(sequences, blocks[middle:], max_rows)
        return
    yield tuple(members), _laid_out(chosen, range(len(chosen)), common)


def visible_until(positions: Ints) -> Ints:
    """[n]: where the subtree of each row ends. Row i sees row j exactly when ``j <= i < visible_until[j]``."""
    until = np.full(len(positions), len(positions), dtype=np.int64)
    open_rows: list[int] = []
    for row, position in enumerate(positions.tolist()):
        for closed in open_rows[position:]:
            until[closed] = row
        open_rows[position:] = [row]
    return until


def _neighbours(sequences: Sequence[Ints], order: Sequence[int]) -> Iterator[tuple[Ints, Ints]]:
    previous = np.empty(0, dtype=np.int64)
    for i in order:
        yield previous, sequences[i]
        previous = sequences[i]


def _common(a: Ints, b: Ints) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    differing = a[:shorter] != b[:shorter]
    return int(differing.argmax()) if differing.any() else shorter


def _laid_out(sequences: Sequence[Ints], order: Sequence[int], common: Sequence[int]) -> PrefixTree:
    """Each sequence adds what it does not share with the one before it: in sorted order no earlier one shares more."""
    tokens, positions = [], []
    paths: dict[int, Ints] = {}
    path, size = np.empty(0, dtype=np.int64), 0
    for i, shared in zip(order, common, strict=True):
        new = len(sequences[i]) - shared
        path = np.concatenate([path[:shared], np.arange(size, size + new)])
        tokens.append(sequences[i][shared:])
        positions.append(np.arange(shared, shared + new))
        paths[i], size = path, size + new
    return PrefixTree(np.concatenate(tokens), np.concatenate(positions), tuple(paths[i] for i in range(len(sequences))))
