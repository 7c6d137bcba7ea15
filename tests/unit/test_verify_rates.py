"""How often the checker is wrong, on pairs that are right or wrong by construction; and that nothing gets a reward without an answer."""

from __future__ import annotations

from collections import Counter

import pytest

from neox_rl.types import Reason
from neox_rl.verify.math import check_math
from tests.unit.answer_hacks import hacks
from tests.unit.answer_pairs import KINDS, Pair, pairs

PAIRS = 12 * len(KINDS)
MAX_FALSE_NEGATIVES = 0.03
MAX_FALSE_POSITIVES = 0.01


def accepted(pair: Pair) -> bool:
    return check_math(pair.gold, pair.pred).reason is Reason.MATCH


def test_the_rates_on_constructed_pairs_are_within_the_targets() -> None:
    drawn = list(pairs(PAIRS, seed=20_000))
    labels = Counter(pair.expected for pair in drawn)
    wrong = [pair for pair in drawn if accepted(pair) is not pair.expected]
    missed, fooled = (sum(pair.expected is label for pair in wrong) for label in (True, False))
    assert min(labels.values()) > PAIRS // 3, "both labels are common"
    assert missed <= MAX_FALSE_NEGATIVES * labels[True] and fooled <= MAX_FALSE_POSITIVES * labels[False], wrong


@pytest.mark.parametrize("seed", [1, 2])
def test_no_hack_is_accepted(seed: int) -> None:
    assert [pair for pair in hacks(seed) if accepted(pair)] == []
