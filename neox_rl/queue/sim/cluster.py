"""One simulated run: servers, orchestrator and trainer around a real TicketQueue, event by event.

    admit -> flight on the least loaded server -> deliver -> take -> train -> publish -> stage -> switch -> live -> admit

Every event ends with ``_go_on``: whatever has become possible happens. Faults are in ``faults.py``, the invariants in ``books.py``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from neox_rl.errors import NeoxRLError
from neox_rl.queue.sim.books import Books, Outcome
from neox_rl.queue.sim.scenario import Scenario
from neox_rl.queue.sim.servers import Flight, Member, Server, Work
from neox_rl.queue.state import TicketQueue
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Role, Segment, Trace, Verdict

NewQueue = Callable[[], TicketQueue]
VERDICT = Verdict(True, "", Reason.MATCH, 0.0)
AGAIN_S = 0.1
"""Between two looks for a server, where none is there."""
EVALUATION = -1
"""The ticket of what belongs to no ticket."""


class Cluster:
    """``run`` simulates to the last step. Raises NeoxRLError on a deadlock, StalenessError on a broken rule, naming what and when."""

    def __init__(self, scenario: Scenario, new_queue: NewQueue, masks: bool, guards: bool = True) -> None:
        self.scenario, self._new_queue = scenario, new_queue
        self.queue = new_queue()
        self.outcome = Outcome()
        self.books = Books(self.queue.bound, masks, guards)
        self.rng = np.random.default_rng(scenario.seed)
        self.now = 0.0
        self.servers: list[Server] = []
        self.flights: dict[int, Flight] = {}
        self.stranded: list[Work] = []
        self.lengths: dict[int, tuple[int, ...]] = {}
        self.up = True
        """Whether the orchestrator is there; ``trainer_up`` likewise. ``era`` counts their deaths: what was scheduled before is void."""
        self.trainer_up = True
        self.era = 0
        self.training = False
        self.idle_since = 0.0
        self.promised = self.target = NO_VERSION
        self.staging = False
        self._switching: set[Server] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def run(self) -> Outcome:
        for i in range(self.scenario.num_servers):
            self.add_server(f"server-{i}")
        self.publish(0)
        while self.queue.step < self.scenario.num_steps or self.training:
            if not self._events:
                raise NeoxRLError(self._stuck("nothing left to happen"))
            self.now, _, event = heapq.heappop(self._events)
            if self.now - self.idle_since > self.scenario.patience_s and not self.training:
                raise NeoxRLError(self._stuck(f"no batch for {self.now - self.idle_since:.0f} s"))
            event()
            self._go_on()
        return self._close()

    def _stuck(self, why: str) -> str:
        step = self.queue.step + 1
        return f"deadlock at step {step}, {self.now:.1f} s: {why}; {self.queue.waiting_for(step)}"

    def _close(self) -> Outcome:
        queue, outcome = self.queue, self.outcome
        counts = (queue.groups_dropped, queue.groups_trained_twice, queue.num_ready, queue.num_in_flight)
        if counts != (0, 0, 0, 0):
            raise NeoxRLError(f"the queue's books at the end: dropped, trained twice, ready, in flight = {counts}")
        for server in self.servers:
            server.advance(self.now)
            outcome.busy_s += server.busy_s
            outcome.sequence_s += server.sequence_s
        outcome.server_s += self.now * sum(s.state is not Member.GONE for s in self.servers)
        outcome.elapsed_s = self.now - outcome.first_batch_s
        dropped = tuple(getattr(queue, "dropped", ()))
        self.books.close(outcome, self.scenario.groups_per_step * self.scenario.num_steps, dropped)
        return outcome

    # the clock

    def at(self, delay: float, event: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self.now + delay, self._serial, event))

    def in_era(self, delay: float, event: Callable[[], None]) -> None:
        """An event of the orchestrator's or trainer's life: it does not happen if either has died by then."""
        era = self.era
        self.at(delay, lambda: event() if era == self.era else None)

    def _go_on(self) -> None:
        if self.up:
            self._admit()
            self._take()
            self._admit()  # again what the take threw away, where the rule does so

    # generation

    def _admit(self) -> None:
        limit = self.scenario.max_inflight_groups or 1 << 60
        while self.queue.num_in_flight < limit and (ticket := self.queue.next_ticket()) is not None:
            self.provide(ticket)

    def provide(self, ticket: int) -> None:
        """A group for an admitted ticket; one that was in flight before a crash goes on from its safe tokens."""
        flight = self.flights.get(ticket)
        if flight is None:
            lengths = [int(n) for n in self.scenario.lengths.group(self.scenario.group_size, self.rng)]
            self.lengths[ticket] = tuple(lengths)
            flight = self.flights[ticket] = Flight(ticket, [], len(lengths), self.now)
            flight.works = [Work(flight, n) for n in lengths]
        self._send([work for work in flight.works if not work.finished])
        if not flight.open:
            self.in_era(0.0, partial(self._landed, flight))

    def evaluate(self) -> None:
        for length in self.scenario.evaluations.lengths:
            flight = Flight(EVALUATION, [], 1)
            flight.works = [Work(flight, int(length))]
            self._send(flight.works)

    def _send(self, works: list[Work]) -> None:
        """To the least loaded server as new as their tokens, all as one request; with none, they wait for one.

        A server that came back early serves a version before it is live: what it began goes on on no older one when it dies.
        """
        newest = max((version for work in works for version, _ in work.spans), default=NO_VERSION)
        serving = [s for s in self.servers if s.state is Member.SERVING and s.version >= newest]
        if not serving or not works:
            self.stranded += works
            return
        server = min(serving, key=lambda s: s.assigned)
        server.advance(self.now)
        server.assigned += len(works)
        self.in_era(self.scenario.decoding.latency_s, partial(self._arrive, server, server.life, works))

    def _arrive(self, server: Server, life: int, works: list[Work]) -> None:
        if server.life != life:
            self._send(works)  # it died with the request on its way
            return
        server.advance(self.now)
        server.submit(works)
        self.watch(server)

    def watch(self, server: Server) -> None:
        """After any change to a server: when its next sequence ends."""
        server.epoch += 1
        end = server.next_end()
        if end < math.inf:
            self.at(max(0.0, end - self.now), partial(self._decoded, server, server.epoch))

    def _decoded(self, server: Server, epoch: int) -> None:
        if epoch != server.epoch:
            return
        server.advance(self.now)
        for work in server.take_finished():
            server.assigned -= 1
            work.flight.open -= 1
            if not work.flight.open:
                self._landed(work.flight)
        self.watch(server)

    def _landed(self, flight: Flight) -> None:
        if flight.ticket == EVALUATION:
            return
        del self.flights[flight.ticket]
        tokens = sum(work.length for work in flight.works)
        self.outcome.tokens_generated += tokens
        self.outcome.num_groups += 1
        self.outcome.groups_s += self.now - flight.since
        draw = self.rng.random()
        if draw < self.scenario.fail_frac:
            self.queue.fail(flight.ticket)
            self.outcome.tokens_lost += tokens
        elif draw < self.scenario.fail_frac + self.scenario.refuse_frac:
            self.queue.refuse(flight.ticket)
            self.outcome.tokens_refused += tokens
        else:
            self.deliver(group_of(flight))

    def deliver(self, group: Group) -> None:
        self.queue.deliver(group)

    # training

    def _take(self) -> None:
        step = self.queue.step + 1
        if self.training or not self.trainer_up or step > self.scenario.num_steps or (batch := self.take(step)) is None:
            return
        self.training = True
        self._count_wait(self.now - self.idle_since + self.scenario.delivery_s)
        tokens = self.books.train(step, batch, self.lengths)
        self.in_trainer(self.scenario.delivery_s + self.scenario.step.draw(tokens, self.rng), partial(self._trained, step))

    def _count_wait(self, waited: float) -> None:
        """The wait for the first batch fills an empty system, and is nobody's idle time: the clocks start after it."""
        outcome = self.outcome
        if outcome.first_batch_s:
            outcome.idle_s += waited
            outcome.longest_wait_s = max(outcome.longest_wait_s, waited)
            return
        outcome.first_batch_s = self.now + self.scenario.delivery_s
        for server in self.servers:
            server.advance(self.now)
            server.busy_s = server.sequence_s = 0.0
        outcome.server_s = -self.now * sum(s.state is not Member.GONE for s in self.servers)

    def in_trainer(self, delay: float, event: Callable[[], None]) -> None:
        """The trainer lives through a crash of the orchestrator."""
        self.in_era(delay, event)

    def take(self, step: int) -> tuple[Group, ...] | None:
        return self.queue.take(step)

    def _trained(self, step: int) -> None:
        self.training, self.idle_since = False, self.now
        if step % self.scenario.publishing.every == 0 and step < self.scenario.num_steps:
            self.publish(step)

    # versions

    def publish(self, version: int) -> None:
        self.promised = version
        self._follow()

    def _follow(self) -> None:
        """Stages the newest version, one at a time: what was superseded meanwhile is skipped."""
        if self.up and not self.staging and not self._switching and self.promised > self.target:
            self.target = self.promised
            publishing, running = self.scenario.publishing, [s.num_running for s in self.servers if s.state is Member.SERVING]
            self._stage(publishing.stage_s + publishing.stage_seq_s * sum(running) / max(1, len(running)))

    def _stage(self, delay: float) -> None:
        self.staging = True
        self.in_era(delay, self._switch_all)

    def _switch_all(self) -> None:
        self.staging, self.target = False, self.promised
        members = [s for s in self.servers if s.state is Member.SERVING or (s.state is Member.CATCHING_UP and not s.paused)]
        self._switching = set(members)
        for server in members:
            self.begin_switch(server)
        if not members:
            self._stage(max(AGAIN_S, self.scenario.publishing.pause_s))

    def begin_switch(self, server: Server) -> None:
        server.advance(self.now)
        server.paused = True
        publishing = self.scenario.publishing
        duration = publishing.pause_s + publishing.pause_seq_s * server.num_running + self.lateness(server)
        self.at(duration, partial(self._switched, server, server.life, self.target, self.era))
        self.watch(server)

    def lateness(self, server: Server) -> float:
        """How much longer than usual its switch takes."""
        return 0.0

    def _switched(self, server: Server, life: int, version: int, era: int) -> None:
        if server.life != life:
            return
        server.advance(self.now)
        server.paused = False
        server.switch(version)
        self.watch(server)
        publishing = self.scenario.publishing
        delay = publishing.attest_s + publishing.attest_seq_s * server.num_running
        self.at(delay, partial(self._attests, server, life, version, era))

    def _attests(self, server: Server, life: int, version: int, era: int) -> None:
        if era != self.era:
            return  # its orchestrator is gone: the next one brings it to the version of then
        if server.life == life and server.version == version and not server.paused:  # else it died, or switches again already
            self.attested(server)

    def attested(self, server: Server) -> None:
        late = server.version < self.target
        self.join_switch(server)  # may begin with the next version, whose staging comes first
        if late:
            self.begin_switch(server)  # the others are further
            return
        if server.state is Member.CATCHING_UP:
            server.state = Member.SERVING
        waiting, self.stranded = self.stranded, []
        for work in waiting:
            self._send([work])

    def join_switch(self, server: Server) -> None:
        """It is done with this switch, or out of it; the last one makes the version live."""
        if server in self._switching:
            self._switching.discard(server)
            if not self._switching:
                self._live()

    def _live(self) -> None:
        version = self.target
        if not any(s.state in (Member.SERVING, Member.CATCHING_UP) and s.version == version for s in self.servers):
            self._stage(AGAIN_S)  # none of them made it
            return
        self.live(version)
        self._follow()

    def live(self, version: int) -> None:
        """Every serving member attests ``version``."""
        self.queue.set_live(version)
        every = self.scenario.evaluations.every
        if every and version and version % every == 0:
            self.evaluate()

    def add_server(self, name: str) -> Server:
        """It has no weights yet: the next switch, or its own, brings them."""
        server = Server(name, self.scenario.decoding, self.now)
        self.servers.append(server)
        self.outcome.server_s -= self.now
        return server

    def retire(self, server: Server) -> None:
        server.state = Member.GONE
        self.outcome.server_s += self.now


@lru_cache(maxsize=1 << 14)
def _tokens(count: int, version: int) -> Segment:
    """As long as its tokens, which nobody reads: a cluster's worth of them would fill the memory."""
    absent: Any = range(count)
    return Segment(absent, Role.THINK, absent, version, 1.0)


def group_of(flight: Flight) -> Group:
    """The finished flight as the trainer gets it."""
    name = f"g{flight.ticket:06d}"
    traces = tuple(
        Trace(f"{name}/r{i}", "p", tuple(_tokens(count, version) for version, count in work.spans), 1.0, Finish.STOP, VERDICT)
        for i, work in enumerate(flight.works)
    )
    return Group(flight.ticket, "p", traces)
