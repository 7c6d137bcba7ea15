"""The padded blocks that a pack is attended in: every row in one slot, little padding, exact gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from neox_rl.engines.packed import BUCKET_FILL, Rotate, ToRows, ToSlots, make_pack, pack_layout, rotary_tables


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_blocks_hold_every_row_once_and_only_its_own_sequence(lengths: list[int]) -> None:
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    blocks, slots, rows = pack_layout(cu)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    assert (slots[rows] == np.arange(cu[-1])).all()
    assert sum(n for n, _ in blocks) == len(lengths)
    at = 0
    for count, longest in blocks:
        block = slots[at : at + count * longest].reshape(count, longest)
        assert (sequence[block] == sequence[block[:, :1]]).all()
        real = np.array([lengths[s] for s in sequence[block[:, 0]]])
        assert (real >= BUCKET_FILL * longest).all() and real.max() == longest
        # Before the padding the rows come in their order, so the causal mask is the sequence's own.
        for row, length in zip(block, real, strict=True):
            assert (row[:length] == row[0] + np.arange(length)).all()
        at += count * longest
    assert at == len(slots) <= cu[-1] / BUCKET_FILL


def test_an_empty_sequence_takes_no_slot() -> None:
    blocks, slots, rows = pack_layout(np.array([0, 3, 3, 5], np.int32))
    assert sorted(blocks, reverse=True) == [(1, 3), (1, 2)]
    assert (slots[rows] == np.arange(5)).all()


def test_moving_rows_and_rotating_have_exact_gradients() -> None:
    pack = make_pack(np.array([0, 3, 7, 9], np.int32), torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1]), 4, 10000, torch.float64)
    x = torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)
    # Only real slots carry gradient in the model, which is what ToSlots relies on: weight the padding with 0.
    real = torch.zeros(len(pack.slots), 1, 1, dtype=torch.float64).index_fill_(0, pack.rows, 1.0)
    assert gradcheck(lambda t: ToSlots.apply(t, pack.slots, pack.rows) * real, (x,))
    slots = torch.randn(len(pack.slots), 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: ToRows.apply(t, pack.rows), (slots,))
    assert gradcheck(lambda t: Rotate.apply(t, pack.cos, pack.sin), (x,))


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
