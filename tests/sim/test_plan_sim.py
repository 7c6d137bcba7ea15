"""The planner: a cluster in small predicts the whole, the search finds what is enough, the fit finds a server's speed."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import pytest

from neox_rl.queue.sim.cluster import Cluster
from neox_rl.queue.sim.measured import non_negative_fit, publishing_of, running_of
from neox_rl.queue.sim.plan import Rule, demand, fewest_servers, predict, smallest_bound
from neox_rl.queue.sim.scenario import Decoding, LogNormal, Publishing, Recorded, Scenario, StepTimes
from neox_rl.queue.sim.servers import Server
from neox_rl.queue.state import TicketQueue
from neox_rl.telemetry.events import Event

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


class Recording(Cluster):
    """Notes when steps end, when a pause begins, and when a version is live."""

    def __init__(self, scenario: Scenario, rule: Rule) -> None:
        queue = partial(TicketQueue, scenario.groups_per_step, rule.admission_slack, rule.delivery_slack, rule.mode, scenario.num_steps)
        super().__init__(scenario, queue, masks=True)
        self.told: list[tuple[str, int, float]] = []

    def _trained(self, step: int) -> None:
        self.told.append(("trained", step, self.now))
        super()._trained(step)

    def begin_switch(self, server: Server) -> None:
        self.told.append(("pause", self.target, self.now))
        super().begin_switch(server)

    def live(self, version: int) -> None:
        self.told.append(("live", version, self.now))
        super().live(version)


def test_versions_are_staged_one_at_a_time_and_a_server_pauses_once_for_each() -> None:
    """Steps are shorter than a switch: a version waits for the one before it, and some are skipped."""
    scenario = Scenario(num_steps=20, step=StepTimes(0.01), publishing=Publishing(stage_s=0.5, pause_s=0.25, attest_s=0.125))
    cluster = Recording(scenario, Rule(3, 0))
    cluster.run()
    ended = {step: at for what, step, at in cluster.told if what == "trained"}
    pauses = [(version, at) for what, version, at in cluster.told if what == "pause"]
    live = [(version, at) for what, version, at in cluster.told if what == "live"]
    assert [version for version, _ in pauses] == sorted({version for version, _ in live}) == [version for version, _ in live]
    waited = 0
    for (version, begun), (_, done), (_, before) in zip(pauses[1:], live[1:], live, strict=False):
        assert done == pytest.approx(begun + 0.25 + 0.125)
        assert begun >= before + 0.5 - 1e-9, "staged beside the switch before it"
        waited += ended[version] < before
    assert waited, "none had to wait"


def test_each_part_of_a_switch_takes_longer_for_what_the_server_runs() -> None:
    """Two steps are admitted at once, and the server has room for one: while the first trains, the second runs."""
    parts = Publishing(stage_s=0.5, pause_s=0.25, attest_s=0.125, stage_seq_s=0.02, pause_seq_s=0.01, attest_seq_s=0.03)
    decoding, lengths = Decoding(max_num_seqs=8), Recorded([[1000]])
    scenario = Scenario(num_steps=2, groups_per_step=8, lengths=lengths, decoding=decoding, step=StepTimes(0.1), publishing=parts)
    cluster = Recording(scenario, Rule(1, 0))
    cluster.run()
    ended, begun, live = (next(at for what, v, at in cluster.told if (what, v) == (name, 1)) for name in ("trained", "pause", "live"))
    assert begun - ended == pytest.approx(0.5 + 0.02 * 8)
    assert live - begun == pytest.approx(0.25 + 0.125 + (0.01 + 0.03) * 8)


def span(name: str, start: float, end: float, **told: Any) -> Event:
    return Event("orchestrator", "span", name, round(start * 1e9), round((end - start) * 1e9), told)


def test_a_run_tells_what_each_part_of_its_switches_takes() -> None:
    """A server with 4 or 0 sequences; every other version finds the one before it not yet live, and its wait is no part of its staging."""
    made = Publishing(1, 0.5, 0.25, 0.125, 0.02, 0.01, 0.03)
    events: list[Event] = []
    groups: list[Event] = []
    live = 100.0
    for version in range(1, 13):
        count = 4 * (version // 2 % 2)
        ended = live + (5.0 if version % 2 else -0.25)
        begun = max(ended, live) + made.stage_s + made.stage_seq_s * count
        done = begun + made.pause_s + made.pause_seq_s * count
        groups += [span("generate", max(ended, live) - 0.001, done, lengths=[7] * count)] if count else []
        events += [span("train_step", ended - 0.1, ended, phase="rl", step=version), span("paused", begun, done, version=version)]
        live = done + made.attest_s + made.attest_seq_s * count
        events.append(Event("orchestrator", "instant", "live", round(live * 1e9), fields={"version": version}))
    found = publishing_of(events, running_of(groups), servers=1, every=1)
    assert astuple(found) == pytest.approx(astuple(made), abs=1e-6)
