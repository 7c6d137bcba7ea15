"""The padded blocks that a pack is attended in: every row in one slot, little padding, exact gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from neox_rl.batch.prefixes import prefix_trees, visible_until
from neox_rl.engines.packed import BUCKET_FILL, Gather, Rotate, ToRows, ToSlots, make_pack, pack_layout, rotary_tables

TREES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12)
"""Sequences over few tokens: most share a prefix, some are a prefix of another, some are equal."""


def tree_positions(sequences: list[list[int]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    ((_, tree),) = prefix_trees([np.array(s) for s in sequences], 10**6)
    return tree.positions


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_blocks_hold_every_row_once_and_only_its_own_sequence(lengths: list[int]) -> None:
    layout = pack_layout(np.concatenate([np.arange(n) for n in lengths]))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    assert not layout.shared and (layout.queries == layout.keys).all()
    assert (layout.queries[layout.rows] == np.arange(sum(lengths))).all()
    assert sum(count for count, *_ in layout.blocks) == len(lengths)
    at = 0
    for (count, longest, keys), seen in zip(layout.blocks, layout.seen, strict=True):
        assert longest == keys and seen is None
        block = layout.queries[at : at + count * longest].reshape(count, longest)
        assert (sequence[block] == sequence[block[:, :1]]).all()
        real = np.array([lengths[s] for s in sequence[block[:, 0]]])
        assert (real >= BUCKET_FILL * longest).all() and real.max() == longest
        # Before the padding the rows come in their order, so the causal mask is the sequence's own.
        for row, length in zip(block, real, strict=True):
            assert (row[:length] == row[0] + np.arange(length)).all()
        at += count * longest
    assert at == len(layout.queries) <= sum(lengths) / BUCKET_FILL


@given(TREES)
def test_every_row_of_a_tree_sees_itself_and_its_ancestors(sequences: list[list[int]]) -> None:
    positions = tree_positions(sequences)
    layout, until = pack_layout(positions), visible_until(positions)
    rows = np.arange(len(positions))
    wanted = (rows[None, :] <= rows[:, None]) & (rows[:, None] < until[None, :])
    assert (layout.queries[layout.rows] == rows).all()
    q_at, k_at, found = 0, 0, np.zeros_like(wanted)
    for (count, queries, keys), seen in zip(layout.blocks, layout.seen, strict=True):
        for path in range(count):
            visible = np.arange(1, queries + 1) if seen is None else seen[path]
            assert visible.min() >= 1 and visible.max() <= keys
            for query in range(queries):
                slot = q_at + path * queries + query
                row, at = layout.queries[slot], k_at + path * keys
                if layout.rows[row] == slot:
                    assert not found[row].any()
                    found[row, layout.keys[at : at + visible[query]]] = True
        q_at, k_at = q_at + count * queries, k_at + count * keys
    assert (found == wanted).all()


def test_a_path_that_shares_much_attends_with_its_own_rows_alone() -> None:
    layout = pack_layout(tree_positions([[1] * 20, [1] * 18 + [2, 2], [1] * 8 + [3] * 12]))
    assert layout.blocks == ((2, 20, 20), (1, 2, 20)) and layout.shared
    assert layout.seen[0] is None and layout.seen[1] is not None and layout.seen[1].tolist() == [[19, 20]]


def test_moving_rows_and_rotating_have_exact_gradients() -> None:
    pack = make_pack(np.array([0, 1, 2, 0, 1, 2, 3, 0, 1]), 4, 10000, torch.float64, torch.device("cpu"))
    x = torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)
    # Only real slots carry gradient in the model, which is what ToSlots relies on: weight the padding with 0.
    real = torch.zeros(len(pack.queries), 1, 1, dtype=torch.float64).index_fill_(0, pack.rows, 1.0)
    assert gradcheck(lambda t: ToSlots.apply(t, pack.queries, pack.rows) * real, (x,))
    slots = torch.randn(len(pack.queries), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: ToRows.apply(t, pack.rows), (slots,))
    assert gradcheck(lambda t: Rotate.apply(t, pack.cos, pack.sin), (x,))
    assert gradcheck(lambda t: Gather.apply(t, torch.tensor([3, 0, 3, 8, 3])), (x,))


@pytest.mark.parametrize("dim", [4, 6])
def test_rotation_is_that_of_the_paper_on_half_split_dimensions(dim: int) -> None:
    """Dimension i pairs with i + dim / 2; their angle is position / base^(2i / dim). Dimensions beyond dim stay."""
    x, position = torch.randn(1, 1, 6, dtype=torch.float64), 5
    cos, sin = rotary_tables(torch.tensor([position]), dim, 100, torch.float64)
    found = Rotate.apply(x, cos, sin)[0, 0]
    expected = x[0, 0].clone()
    for i in range(dim // 2):
        angle = torch.tensor(position / 100 ** (2 * i / dim))
        a, b = x[0, 0, i], x[0, 0, i + dim // 2]
        expected[i], expected[i + dim // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
