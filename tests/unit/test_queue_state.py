"""The staleness rule and the ticket queue: what may start, what a step takes, and what no order of events can break."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neox_rl.batch.pack import pack_rl
from neox_rl.batch.packing import Layout
from neox_rl.batch.types import BatchStats
from neox_rl.config.schema import ObjectiveConfig, StalenessConfig
from neox_rl.errors import ConfigError, StalenessError
from neox_rl.queue import staleness
from neox_rl.queue.consumption import TrainedOnce
from neox_rl.queue.state import Mode, TicketQueue
from neox_rl.types import Finish, Group, Reason, Role, Segment, Trace, Verdict

VERDICT = Verdict(True, "1", Reason.MATCH, 0.1)


def make_group(ticket: int, versions: Sequence[int], tokens_each: int = 3) -> Group:
    prompt = Segment((1, 2), Role.PROMPT)
    sampled = tuple(Segment((7,) * tokens_each, Role.THINK, (-0.5,) * tokens_each, version, 1.0) for version in versions)
    return Group(ticket, "p", (Trace(f"g{ticket:06d}/r0", "p", (prompt, *sampled), 1.0, Finish.STOP, VERDICT),))


def make_queue(B: int = 2, eta: int = 1, rho: int = 1, mode: str = "strict", steps: int = 10) -> TicketQueue:
    return TicketQueue(B, eta, rho, mode, steps)


def issue_all(queue: TicketQueue) -> list[int]:
    return list(iter(queue.next_ticket, None))


# The rule


def test_a_ticket_is_admitted_eta_versions_before_its_step_and_never_before_v0_is_live() -> None:
    assert [staleness.admissible(k, 0, groups_per_step=2, admission_slack=1) for k in range(5)] == [True] * 4 + [False]
    assert not staleness.admissible(0, -1, groups_per_step=2, admission_slack=5)
    assert staleness.num_due(step=1, groups_per_step=2, delivery_slack=4) == 0


@given(st.integers(1, 9), st.integers(0, 4), st.integers(-1, 50))
def test_open_tickets_never_exceed_the_bound(B: int, eta: int, live: int) -> None:
    admitted = sum(staleness.admissible(k, live, B, eta) for k in range(B * 60))
    assert admitted == (B * (live + eta + 1) if live >= 0 else 0)
    assert admitted - B * max(live, 0) <= B * (eta + 1)


# The state machine


def test_synchronous_is_bound_zero_each_step_trains_its_own_tickets() -> None:
    queue = make_queue(eta=0, rho=0, steps=3)
    for step in range(1, 4):
        queue.set_live(step - 1)
        tickets = issue_all(queue)
        assert tickets == [2 * step - 2, 2 * step - 1]
        for ticket in reversed(tickets):
            assert queue.take(step) is None
            queue.deliver(make_group(ticket, [step - 1]))
        assert [g.ticket for g in queue.take(step) or ()] == tickets
    queue.set_live(3)
    assert queue.next_ticket() is None, "nothing is generated for a step that does not come"


def test_strict_waits_for_a_late_ticket_only_at_its_deadline_and_names_it() -> None:
    queue = make_queue(B=2, eta=1, rho=1)
    queue.set_live(0)
    assert issue_all(queue) == [0, 1, 2, 3]
    for ticket in (1, 2, 3):
        queue.deliver(make_group(ticket, [0]))
    assert [g.ticket for g in queue.take(1) or ()] == [1, 2], "ticket 0 may come one step late"
    queue.set_live(1)
    assert issue_all(queue) == [4, 5]
    queue.deliver(make_group(4, [1]))
    assert queue.take(2) is None
    assert queue.waiting_for(2) == "g000000, due by step 2"
    queue.deliver(make_group(0, [0, 1]))
    assert [g.ticket for g in queue.take(2) or ()] == [0, 3], "earliest deadline first"


def test_token_mode_never_waits_beyond_ready_groups() -> None:
    queue = make_queue(mode="token")
    queue.set_live(0)
    issue_all(queue)
    for step in range(1, 5):
        for ticket in (2 * step, 2 * step + 1):
            queue.deliver(make_group(ticket, [step - 1]))
        assert len(queue.take(step) or ()) == 2, "tickets 0 and 1 stay in flight without holding anyone up"
        queue.set_live(step)
        issue_all(queue)
    assert queue.waiting_for(5).startswith("2 of 2 groups; in flight: g000000, g000001")


def test_a_wait_for_weights_says_so() -> None:
    queue = make_queue()
    assert queue.waiting_for(1) == "2 of 2 groups; in flight: none; the servers must first serve v0 (live: none)"


def test_a_refused_or_failed_ticket_is_handed_on_first() -> None:
    queue = make_queue()
    queue.set_live(0)
    assert issue_all(queue) == [0, 1, 2, 3]
    queue.refuse(2)
    queue.fail(1)
    assert (queue.refusals(2), queue.failures(1)) == (1, 1)
    assert issue_all(queue) == [1, 2]
    assert (queue.counts.issued, queue.groups_dropped, queue.groups_trained_twice) == (6, 0, 0)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (lambda q: q.deliver(make_group(3, [0])), "not issued yet"),
        (lambda q: q.deliver(make_group(1, [0])), "ready already"),
        (lambda q: q.refuse(1), "ready already"),
        (lambda q: q.fail(7), "not issued yet"),
        (lambda q: q.fail(-1), "not issued yet"),
        (lambda q: q.fail(2), "handed on"),
        (lambda q: q.set_live(-1), "fell"),
        (lambda q: q.set_live(1), "only 0 steps"),
        (lambda q: q.take(2), "the next is step 1"),
        (lambda q: q.deliver(make_group(0, [1])), "not live"),
        (lambda q: q.restore(q.snapshot()), "before its first ticket"),
    ],
)
def test_every_illegal_event_is_an_error_that_says_why(event: object, message: str) -> None:
    queue = make_queue()
    queue.set_live(0)
    assert [queue.next_ticket() for _ in range(3)] == [0, 1, 2]
    queue.deliver(make_group(1, [0]))
    queue.fail(2)
    assert callable(event)
    with pytest.raises(StalenessError, match=message):
        event(queue)


def test_tokens_older_than_the_admission_are_an_error_of_the_servers() -> None:
    queue = make_queue(eta=0, rho=3, mode="token")
    queue.set_live(0)
    for ticket in issue_all(queue):
        queue.deliver(make_group(ticket, [0]))
    queue.take(1)
    queue.set_live(1)
    assert queue.next_ticket() == 2
    with pytest.raises(StalenessError, match="v0 to v0; it was admitted at v1"):
        queue.deliver(make_group(2, [0]))


def test_a_batch_is_never_taken_twice() -> None:
    queue = make_queue()
    queue.set_live(0)
    for ticket in issue_all(queue):
        queue.deliver(make_group(ticket, [0]))
    queue.take(1)
    with pytest.raises(StalenessError, match="step 1 asks for a batch, but the next is step 2"):
        queue.take(1)
    with pytest.raises(StalenessError, match="trained already"):
        queue.deliver(make_group(0, [0]))


def test_a_checkpoint_issues_open_tickets_again() -> None:
    queue = make_queue(eta=2)
    queue.set_live(0)
    issue_all(queue)
    for ticket in (1, 3, 5):
        queue.deliver(make_group(ticket, [0]))
    queue.take(1)
    saved = json.loads(json.dumps(queue.snapshot()))
    again = make_queue(eta=2)
    again.restore(saved)
    assert (again.step, again.next_ticket()) == (1, None), "nothing starts before the servers attest the restored version"
    again.set_live(1)
    assert issue_all(again) == [0, 2, 4, 5, 6, 7]
    assert (again.groups_dropped, again.groups_trained_twice) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups_per_step": 3}, "set it back to 3"),
        ({"step": 2}, "does not add up"),
        ({"open": [0, 0, 1, 9]}, "does not add up"),
        ({"fresh": "6"}, "not a snapshot"),
    ],
)
def test_a_checkpoint_that_does_not_add_up_is_refused(change: dict[str, object], message: str) -> None:
    queue = make_queue(eta=2)
    queue.set_live(0)
    for ticket in issue_all(queue):
        queue.deliver(make_group(ticket, [0]))
    queue.take(1)
    with pytest.raises(ConfigError, match=message):
        make_queue().restore({**queue.snapshot(), **change})  # type: ignore[dict-item]


# Consumption


def test_a_ticket_that_comes_again_stops_the_run() -> None:
    guard = TrainedOnce()
    guard.add([make_group(4, [0])], step=1)
    with pytest.raises(StalenessError, match="g000004 was trained by step 1"):
        guard.add([make_group(4, [0])], step=2)
    with pytest.raises(StalenessError, match="comes again at step 3"):
        guard.add([make_group(5, [0]), make_group(5, [0])], step=3)


# Any order of events


def pack_as_the_trainer_does(queue: TicketQueue, batch: Sequence[Group], step: int) -> BatchStats:
    """Raises StalenessError where the trainer would stop the run."""
    slack = StalenessConfig(mode=queue.mode, admission_slack=queue.admission_slack, delivery_slack=queue.delivery_slack)
    return pack_rl(batch, step, staleness=slack, objective=ObjectiveConfig(), max_new_tokens=8, layout=Layout(pack_tokens=64)).stats


class QueueMachine(RuleBasedStateMachine):
    """Servers, a trainer and a publisher act in any order; a rollout's version is whatever is live when it starts."""

    @initialize(B=st.integers(1, 4), eta=st.integers(0, 3), rho=st.integers(0, 3), mode=st.sampled_from(Mode), every=st.integers(1, 4))
    def start(self, B: int, eta: int, rho: int, mode: Mode, every: int) -> None:
        self.every = min(every, eta + 1)
        self.make = lambda: TicketQueue(B, eta, rho, mode, num_steps=12)
        self.queue = self.make()
        self.started: dict[int, int] = {}
        self.trained: list[int] = []

    @property
    def published(self) -> int:
        return self.queue.step // self.every * self.every

    @rule(data=st.data())
    def go_live(self, data: st.DataObject) -> None:
        if self.queue.live_version < self.published:
            self.queue.set_live(data.draw(st.integers(max(0, self.queue.live_version), self.published)))

    @rule(most=st.integers(1, 6))
    def admit(self, most: int) -> None:
        for _ in range(most):
            if (ticket := self.queue.next_ticket()) is None:
                return
            assert self.queue.live_version >= ticket // self.queue.groups_per_step - self.queue.admission_slack
            self.started[ticket] = self.queue.live_version

    @precondition(lambda self: self.started)
    @rule(data=st.data(), how=st.sampled_from(["deliver"] * 4 + ["refuse", "fail"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.started)))
        version = self.started.pop(ticket)
        if how == "deliver":
            self.queue.deliver(make_group(ticket, sorted({version, self.queue.live_version}), tokens_each=1))
        else:
            getattr(self.queue, how)(ticket)

    @rule()
    def take(self) -> None:
        step = self.queue.step + 1
        if step > self.queue.num_steps:
            return
        batch = self.queue.take(step)
        assert (batch is None) == (self.queue.step < step)
        if batch is not None:
            assert len(batch) == self.queue.groups_per_step
            self.trained += [g.ticket for g in batch]
            stats = pack_as_the_trainer_does(self.queue, batch, step)
            assert max(stats.trained_staleness, default=0) <= self.queue.bound
            assert self.queue.mode is Mode.TOKEN or stats.masked_tokens == 0
        else:
            assert self.queue.waiting_for(step) != "nothing"

    @rule()
    def crash_and_resume(self) -> None:
        saved = json.loads(json.dumps(self.queue.snapshot()))
        self.queue = self.make()
        self.queue.restore(saved)
        self.started.clear()

    @invariant()
    def books_are_right(self) -> None:
        queue = self.queue
        assert len(self.trained) == len(set(self.trained)) == queue.counts.trained
        assert (queue.groups_dropped, queue.groups_trained_twice) == (0, 0)
        assert queue.num_in_flight == len(self.started)
        assert queue.num_in_flight + queue.num_ready <= queue.groups_per_step * (queue.admission_slack + 1)

    def teardown(self) -> None:
        """No deadlock: whatever came before, once servers and trainer go on, the run ends with every ticket trained."""
        if not hasattr(self, "queue"):
            return
        while self.queue.step < self.queue.num_steps:
            before = self.queue.step
            if self.published > self.queue.live_version:
                self.queue.set_live(self.published)
            self.admit(10**6)
            for ticket in sorted(self.started, reverse=True):
                self.queue.deliver(make_group(ticket, [self.started.pop(ticket)], tokens_each=1))
            self.take()
            assert self.queue.step == before + 1, f"deadlock: {self.queue.waiting_for(before + 1)}"
        assert sorted(self.trained) == list(range(self.queue.groups_per_step * self.queue.num_steps))
        assert self.queue.num_in_flight + self.queue.num_ready == 0, "something was generated for nothing"


QueueMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestAnyOrderOfEvents = QueueMachine.TestCase
