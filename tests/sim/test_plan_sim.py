"""The planner: a cluster in small predicts the whole, the search finds what is enough, the fit finds a server's speed."""

from __future__ import annotations

import numpy as np
import pytest

from neox_rl.queue.sim.measured import non_negative_fit
from neox_rl.queue.sim.plan import Rule, demand, fewest_servers, predict, smallest_bound
from neox_rl.queue.sim.scenario import Decoding, LogNormal, Scenario, StepTimes

CLUSTER = Scenario(
    num_steps=30,
    groups_per_step=512,
    group_size=4,
    num_servers=32,
    lengths=LogNormal(200, 0.6),
    decoding=Decoding(0.01, 0.0002, max_num_seqs=64),
    step=StepTimes(8.0),
)
RULE = Rule(1, 1)


def test_a_cluster_in_small_predicts_the_whole() -> None:
    whole = predict(CLUSTER, RULE, max_servers=32)[1]
    small = predict(CLUSTER, RULE, max_servers=16)[1]
    assert small.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.03)
    assert small.staleness == pytest.approx(whole.staleness, abs=0.05)
    assert small.idle_frac == pytest.approx(whole.idle_frac, abs=0.03)


def test_the_search_finds_servers_that_are_enough_and_not_many_more() -> None:
    found = fewest_servers(CLUSTER, Rule(3, 1), idle_frac=0.05, limit=200, max_servers=8)
    assert found is not None and demand(CLUSTER) * 0.9 < found < demand(CLUSTER) * 3


def test_a_larger_bound_is_needed_where_rollouts_are_longer_than_steps() -> None:
    long = Scenario(num_steps=40, lengths=LogNormal(120, 0.5))  # three steps on average
    bound = smallest_bound(long, RULE, idle_frac=0.1, limit=12)
    assert bound is not None and bound > 2


def test_the_fit_finds_coefficients_and_no_negative_ones() -> None:
    rng = np.random.default_rng(0)
    columns = rng.uniform(0, 10, (200, 3))
    assert non_negative_fit(columns, columns @ np.array([0.5, 0.0, 2.0])) == pytest.approx((0.5, 0.0, 2.0), abs=1e-9)
    assert min(non_negative_fit(columns, columns @ np.array([0.5, -1.0, 2.0]))) >= 0
