"""The intervals: do they cover, do they respect clusters, does pairing help?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from neox_rl.telemetry.stats import cluster_mean_ci, paired_difference_ci, t975


def population(rng: np.random.Generator, clusters: int) -> tuple[list[float], list[int]]:
    """Clusters drawn from an endless population with mean ease exactly 0.5 (uniform 0.1 to 0.9), sizes independent of ease."""
    sizes, ease = rng.integers(4, 17, clusters), rng.uniform(0.1, 0.9, clusters)
    labels = [c for c, size in enumerate(sizes) for _ in range(size)]
    return [float(rng.random() < ease[c]) for c in labels], labels


@pytest.mark.parametrize("clusters", [12, 36])
def test_the_interval_covers_the_truth_95_times_in_100(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    hits = 0
    for _ in range(2000):
        found = cluster_mean_ci(*population(rng, clusters))
        hits += found.low <= 0.5 <= found.high
    assert 0.925 <= hits / 2000 <= 0.97


def test_treating_problems_of_a_cluster_as_independent_would_cover_too_little() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        values, _labels = population(rng, 36)
        found = cluster_mean_ci(values, list(range(len(values))))
        hits += found.low <= 0.5 <= found.high
    assert hits / 1000 < 0.85


def test_the_mean_is_over_problems_and_n_counts_them() -> None:
    found = cluster_mean_ci([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert found.mean == 0.75
    assert found.n == 4
    assert found.row() == {"mean": 0.75, "ci95_low": found.low, "ci95_high": found.high, "n": 4}


def test_equal_clusters_give_the_plain_t_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    found = cluster_mean_ci(values, range(8))
    error = np.std(values, ddof=1) / math.sqrt(8)
    assert found.high - found.mean == pytest.approx(min(1 - found.mean, 2.364624 * error), rel=1e-4)
    assert found.mean - found.low == pytest.approx(2.364624 * error, rel=1e-4)


def test_one_cluster_tells_nothing_about_the_spread_between_clusters() -> None:
    assert cluster_mean_ci([1, 0, 1], ["a", "a", "a"])[1:3] == (0.0, 1.0)


def test_all_correct_is_not_certainty() -> None:
    found = cluster_mean_ci([1.0] * 30, list(range(30)))
    assert found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 30))


def test_intervals_stay_within_the_bounds() -> None:
    found = cluster_mean_ci([0, 0, 0, 1], list("abcd"))
    assert found.low == 0.0
    assert found.high <= 1.0


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([], [], "at least one value"), ([1.0], ["a", "b"], "one cluster a value"), ([0.5, 2.0], ["a", "b"], "outside the bounds")],
)
def test_input_that_makes_no_sense_is_refused(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_mean_ci(values, clusters)


def test_pairing_finds_a_gain_that_two_separate_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    ease = rng.uniform(0.0, 1.0, 30)
    rows = [(f"p{c}-{k}", f"c{c}", float(k / 10 < ease[c])) for c in range(30) for k in range(10)]
    solved = [(p, c, 1.0 if value or rng.random() < 0.12 else 0.0) for p, c, value in rows]
    before, after = (cluster_mean_ci([value for _, _, value in found], [c for _, c, _ in found]) for found in (rows, solved))
    gain = paired_difference_ci(rows, solved)
    assert before.high > after.low
    assert gain.low > 0
    assert gain.mean == pytest.approx(after.mean - before.mean)


def test_only_shared_problems_are_compared_and_attempts_at_one_problem_count_as_their_mean() -> None:
    before = [("a", "x", 0, 10), ("b", "y", 1, 10), ("gone", "y", 1, 10)]
    after = [("a", "x", 1, 10), ("a", "x", 0, 10), ("b", "y", 1, 10), ("new", "z", 0, 10)]
    gain = paired_difference_ci(before, after)
    assert gain.mean == 0.25
    assert gain.n == 2


@pytest.mark.parametrize("difference", [-1.0, 0.0, 0.5, 1.0])
def test_no_change_in_any_problem_is_no_certainty_that_there_is_none(difference: float) -> None:
    before = [(f"p{i}", f"c{i}", max(0.0, -difference)) for i in range(80)]
    gain = paired_difference_ci(before, [(p, c, value + difference) for p, c, value in before])
    share = 1 - 0.025 ** (1 / 80)
    expected = (difference, difference - share * (difference + 1), difference + share * (1 - difference), 80)
    assert gain == pytest.approx(expected)
    assert gain.low < 0 < gain.high or difference


def test_evaluations_without_a_shared_problem_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="share no problem"):
        paired_difference_ci([("a", "x", 1)], [("b", "x", 1)])


@pytest.mark.parametrize(
    ("df", "value"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (35, 2.03011), (1000, 1.96234)]
)
def test_t_quantiles_are_those_of_the_tables(df: int, value: float) -> None:
    assert t975(df) == pytest.approx(value, rel=4e-3 if df == 3 else 5e-4)
