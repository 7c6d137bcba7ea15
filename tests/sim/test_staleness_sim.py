"""The staleness rule on simulated rollouts with a long tail and mid-flight version switches: the bound, and what other rules would cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from neox_rl.errors import NeoxRLError
from neox_rl.queue.sim.cluster import Cluster
from neox_rl.queue.sim.rules import FirstReady, compare
from neox_rl.queue.sim.scenario import LogNormal, Publishing, Scenario
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.types import Group


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("eta", "rho"), [(0, 0), (3, 1), (1, 3), (4, 0), (0, 2)])
@pytest.mark.parametrize("stage_s", [0.0, 2.5])
def test_no_token_is_trained_beyond_the_bound_and_nothing_deadlocks(mode: Mode, eta: int, rho: int, stage_s: float) -> None:
    lengths = LogNormal(60, 1.2)
    publishing = Publishing(stage_s=stage_s, pause_s=stage_s / 5)
    scenario = Scenario(num_steps=140, lengths=lengths, publishing=publishing, refuse_frac=0.1, fail_frac=0.05, seed=7)
    queue = partial(TicketQueue, scenario.groups_per_step, eta, rho, mode, scenario.num_steps)
    outcome = Cluster(scenario, queue, masks=mode is Mode.TOKEN).run()
    assert outcome.tokens_consumed >= 100_000
    assert outcome.tokens_beyond == 0
    assert outcome.max_staleness <= eta + rho
    assert mode is Mode.TOKEN or outcome.tokens_masked == 0, "strict trains every token"
    assert outcome.tokens_generated == outcome.tokens_consumed + outcome.tokens_refused + outcome.tokens_lost


def test_the_bound_is_reached_so_that_it_is_not_proved_by_idleness() -> None:
    scenario = Scenario(num_steps=120)
    queue = partial(TicketQueue, scenario.groups_per_step, 3, 1, Mode.STRICT, scenario.num_steps)
    assert Cluster(scenario, queue, masks=False).run().max_staleness == 4


def test_what_each_rule_costs_under_one_bound() -> None:
    """S = 4, rollouts of 1.5 steps on average, one in a hundred longer than eight."""
    outcomes = compare(Scenario(num_steps=300), admission_slack=3, delivery_slack=1)
    assert 0.25 < outcomes["admission only"].beyond_frac < 0.45
    assert outcomes["drop stale"].dropped_frac > 0.35
    assert outcomes["drop stale"].long_frac < 0.05, "dropping trains next to nothing of the long rollouts"
    assert outcomes["in order"].idle_frac > 0.3
    assert outcomes["strict"].idle_frac > 0.3, "a strict bound has to wait for the longest rollouts"
    token = outcomes["token"]
    assert (token.tokens_beyond, token.tokens_dropped) == (0, 0)
    assert token.idle_frac < 0.06
    assert token.masked_frac < 0.15
    assert token.long_frac > 0.5
    assert token.tokens_generated == token.tokens_consumed, "a run ends with nothing generated for nothing"


def test_groups_that_the_last_step_throws_away_are_made_again() -> None:
    """Nothing else is going on then: 200 steps of this seed end so."""
    scenario = Scenario(num_steps=200)
    queue = partial(FirstReady, scenario.groups_per_step, 4, scenario.num_steps, drop_beyond=True)
    assert Cluster(scenario, queue, masks=False, guards=False).run().steps == 200


def test_a_lost_group_is_a_deadlock_that_names_its_ticket() -> None:
    class Losing(TicketQueue):
        def deliver(self, group: Group) -> None:
            if group.ticket != 37:
                super().deliver(group)

    scenario = Scenario(num_steps=20)
    with pytest.raises(NeoxRLError, match=r"deadlock at step 4, .*; g000037, due by step 4"):
        Cluster(scenario, partial(Losing, scenario.groups_per_step, 1, 1, Mode.STRICT, scenario.num_steps), masks=False).run()


def test_a_ticket_trained_twice_is_found_by_books_apart_from_the_queues() -> None:
    class Doubling(TicketQueue):
        first: Group | None = None

        def take(self, step: int, tickets: Sequence[int] = ()) -> tuple[Group, ...] | None:
            batch = super().take(step, tickets)
            if batch and step == 4:
                self.first = batch[0]
            return (*batch[:-1], self.first) if batch and self.first and step == 5 else batch

    scenario = Scenario(num_steps=20)
    with pytest.raises(NeoxRLError, match="is trained at step 4 and at step 5"):
        Cluster(scenario, partial(Doubling, scenario.groups_per_step, 1, 1, Mode.TOKEN, scenario.num_steps), masks=True).run()
