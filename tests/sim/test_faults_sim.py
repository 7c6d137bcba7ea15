"""The queue under crashes of servers and orchestrator, rollbacks, joins, leaves and late switches.

The simulation checks inside: no token with gradient beyond the bound, every ticket trained exactly once in the surviving timeline, every
rollout as long as it was sampled, versions never falling within it, and progress. These tests see that it was put under stress at all.
"""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox_rl.queue.sim.books import Outcome
from neox_rl.queue.sim.faults import FaultyCluster
from neox_rl.queue.sim.scenario import Decoding, Faults, LogNormal, Publishing, Scenario, StepTimes
from neox_rl.queue.state import Mode, TicketQueue

EVERYTHING = Faults(
    server_crash_s=20,
    join_s=60,
    leave_s=80,
    orchestrator_crash_s=50,
    rollback_s=90,
    slow_frac=0.05,
    flush_tokens=16,
    flush_s=0.2,
    same_replay_frac=0.5,
)


def simulate(scenario: Scenario, eta: int, rho: int, mode: Mode) -> Outcome:
    queue = partial(TicketQueue, scenario.groups_per_step, eta, rho, mode, scenario.num_steps)
    return FaultyCluster(scenario, queue, masks=mode is Mode.TOKEN).run()


@pytest.mark.parametrize("mode", list(Mode))
def test_a_million_tokens_under_every_fault(mode: Mode) -> None:
    scenario = Scenario(
        num_steps=1000,
        num_servers=4,
        group_size=2,
        lengths=LogNormal(40, 0.9),
        faults=EVERYTHING,
        refuse_frac=0.05,
        fail_frac=0.02,
        decoding=Decoding(0.02, 0.0002, max_num_seqs=32),
        publishing=Publishing(1, 0.1, 0.05),
        patience_s=200,
    )
    outcome = simulate(scenario, 2, 1, mode)
    assert outcome.tokens_consumed > 1_000_000
    assert outcome.tokens_beyond == 0 and outcome.max_staleness == 3
    stress = ("server crashes", "orchestrator crashes", "rollbacks", "steps undone", "joins", "leaves", "suspensions")
    assert all(outcome.events[fault] >= 10 for fault in stress)
    assert outcome.events["groups from the journal"] > 100 and outcome.events["held tickets handed on"] > 10


def test_a_journal_costs_no_finished_group_and_chunks_save_what_was_underway() -> None:
    faults = Faults(server_crash_s=15, orchestrator_crash_s=25)
    scenario = Scenario(num_steps=200, num_servers=3, lengths=LogNormal(200, 0.9), decoding=Decoding(0.01), faults=faults)
    without = simulate(scenario, 2, 1, Mode.TOKEN)
    chunked = Scenario(num_steps=200, num_servers=3, lengths=LogNormal(200, 0.9), decoding=Decoding(0.01), faults=Faults(
        server_crash_s=15, orchestrator_crash_s=25, flush_tokens=32
    ))  # fmt: skip
    assert simulate(chunked, 2, 1, Mode.TOKEN).tokens_lost < without.tokens_lost / 4


def often(shortest: float, longest: float) -> st.SearchStrategy[float]:
    """Mean seconds between faults; 0: never."""
    return st.one_of(st.just(0.0), st.floats(shortest, longest))


FAULTS = st.builds(
    Faults,
    until_s=st.sampled_from([20.0, 60.0]),
    server_crash_s=often(3, 30),
    server_restart_s=st.sampled_from([0.0, 5.0]),
    join_s=often(10, 40),
    leave_s=often(10, 40),
    orchestrator_crash_s=often(4, 30),
    orchestrator_restart_s=st.sampled_from([0.0, 1.0]),
    rollback_s=often(6, 30),
    trainer_restart_s=st.sampled_from([0.0, 3.0]),
    slow_frac=st.sampled_from([0.0, 0.05, 0.5]),
    slow_s=st.sampled_from([1.0, 5.0]),
    heartbeat_s=st.sampled_from([0.0, 2.0]),
    flush_tokens=st.sampled_from([0, 1, 16, 100]),
    flush_s=st.sampled_from([0.0, 0.2, 3.0]),
    same_replay_frac=st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    faults=FAULTS,
    rule=st.sampled_from([(0, 0), (1, 1), (3, 1), (0, 2), (2, 0), (4, 4)]),
    mode=st.sampled_from(list(Mode)),
    groups_per_step=st.sampled_from([1, 2, 5, 16]),
    servers=st.sampled_from([1, 2, 5]),
    sigma=st.sampled_from([0.3, 1.2]),
    times=st.tuples(st.sampled_from([0.1, 1.0]), st.sampled_from([0.0, 0.1, 2.0]), st.sampled_from([0.0, 0.05, 0.5])),
    fails=st.sampled_from([(0.0, 0.0), (0.2, 0.1)]),
    checkpoint_every=st.sampled_from([1, 3, 10]),
    seed=st.integers(0, 1 << 30),
)
def test_no_combination_of_faults_breaks_the_rule_or_stops_the_run(
    faults: Faults,
    rule: tuple[int, int],
    mode: Mode,
    groups_per_step: int,
    servers: int,
    sigma: float,
    times: tuple[float, float, float],
    fails: tuple[float, float],
    checkpoint_every: int,
    seed: int,
) -> None:
    scenario = Scenario(
        num_steps=20,
        groups_per_step=groups_per_step,
        group_size=2,
        num_servers=servers,
        lengths=LogNormal(30, sigma),
        decoding=Decoding(0.02, 0.0005, 0.01, max_num_seqs=16),
        step=StepTimes(times[0]),
        publishing=Publishing(1 + (rule[0] > 0 and seed % 2), times[1], times[2]),
        faults=faults,
        refuse_frac=fails[0],
        fail_frac=fails[1],
        checkpoint_every=checkpoint_every,
        patience_s=1000,
        seed=seed,
    )
    simulate(scenario, *rule, mode)
