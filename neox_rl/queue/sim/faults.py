"""Faults and what heals them: the cluster with crashes, joins, leaves, late switches and rollbacks, and a journal beside it.

The journal holds what a real one does (finished groups, whole chunks of unfinished rollouts, which step took which tickets) and loses
what was not flushed. The checkpoint decides, the journal supplies: a rollback reopens the tickets of the steps it undoes, and what the
undone versions sampled is used only once the replayed steps made the same weights again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from neox_rl.queue.sim.cluster import AGAIN_S, Cluster, NewQueue
from neox_rl.queue.sim.scenario import Scenario
from neox_rl.queue.sim.servers import Flight, Member, Server, Work
from neox_rl.types import NO_VERSION, Group, Json


class FaultyCluster(Cluster):
    """``Cluster`` under ``scenario.faults``; the same invariants are checked."""

    def __init__(self, scenario: Scenario, new_queue: NewQueue, masks: bool) -> None:
        super().__init__(scenario, new_queue, masks)
        self.faults = scenario.faults
        self._journal: dict[int, tuple[float, Group]] = {}
        """Finished groups by ticket, with the moment they were written; until a checkpoint holds the step that trained them."""
        self._taken: dict[int, tuple[int, ...]] = {}
        """Tickets of each step of this timeline, back to the first."""
        self._undone: dict[int, tuple[int, ...]] = {}
        """Tickets that a step took before a rollback undid it."""
        self._checkpoint = 0
        self._held: dict[int, int] = {}
        """Tickets whose journaled tokens are of an undone version -> that version; they wait until it is made again."""
        self._same = True
        """Whether the replayed steps make the same weights, so far."""
        self._joined = 0
        for mean, event in (
            (self.faults.server_crash_s, self._crash_one),
            (self.faults.join_s, self._join),
            (self.faults.leave_s, self._leave_one),
            (self.faults.orchestrator_crash_s, self._crash_orchestrator),
            (self.faults.rollback_s, self._roll_back),
        ):
            self._every(mean, event)

    def _every(self, mean: float, event: Callable[[], None]) -> None:
        """``event`` as a Poisson process."""
        if mean > 0:
            self.at(float(self.rng.exponential(mean)), partial(self._again, mean, event))

    def _again(self, mean: float, event: Callable[[], None]) -> None:
        if self.now <= self.faults.until_s:
            event()
            self._every(mean, event)

    # servers

    def _serving(self) -> list[Server]:
        return [s for s in self.servers if s.state in (Member.SERVING, Member.CATCHING_UP)]

    def _crash_one(self) -> None:
        if servers := self._serving():
            server = servers[int(self.rng.integers(len(servers)))]
            self._lose(server)
            self.retire(server)
            self.at(self.faults.server_restart_s, partial(self._restart, server))
            self.outcome.events["server crashes"] += 1

    def _lose(self, server: Server) -> None:
        """Its sequences leave it, and other servers go on with them from their last chunk."""
        server.advance(self.now)
        works, lost = server.take_all(self.faults.flush_tokens)
        self.outcome.tokens_lost += lost
        server.life += 1
        server.paused = False
        self.watch(server)
        self.join_switch(server)
        if self.up:
            self._send([work for work in works if self._wanted(work)])

    def _wanted(self, work: Work) -> bool:
        """Not of a flight that the orchestrator's death ended."""
        flight = work.flight
        return self.flights.get(flight.ticket) is flight or flight.ticket < 0

    def _restart(self, server: Server) -> None:
        server.state = Member.CATCHING_UP
        self.outcome.server_s -= self.now
        self._catch_up(server)

    def _catch_up(self, server: Server) -> None:
        """A server without weights stages the newest version that was published, and then switches to it alone."""
        self.at(max(AGAIN_S, self.scenario.publishing.stage_s), partial(self._staged, server, server.life))

    def _staged(self, server: Server, life: int) -> None:
        if server.life != life or server.state is not Member.CATCHING_UP or server.paused or server in self._switching:
            return
        if self.up and self.target > NO_VERSION and not self._switching:
            self.begin_switch(server)
        else:
            self._catch_up(server)

    def _join(self) -> None:
        self._joined += 1
        self._catch_up(self.add_server(f"joiner-{self._joined}"))
        self.outcome.events["joins"] += 1

    def _leave_one(self) -> None:
        """What it was doing goes to others from its last chunk, as where a drain takes longer than it is given."""
        serving = [s for s in self.servers if s.state is Member.SERVING]
        if len(serving) > 1:
            server = serving[int(self.rng.integers(len(serving)))]
            server.state = Member.LEAVING
            self._lose(server)
            self.retire(server)
            self.outcome.events["leaves"] += 1

    def lateness(self, server: Server) -> float:
        """A server later than a heartbeat is suspended, and its version goes live without it."""
        if self.now > self.faults.until_s or self.rng.random() >= self.faults.slow_frac:
            return 0.0
        late = float(self.rng.exponential(self.faults.slow_s))
        if late > self.faults.heartbeat_s:
            self.at(self.scenario.publishing.pause_s + self.faults.heartbeat_s, partial(self._suspend, server, server.life, self.target))
        return late

    def _suspend(self, server: Server, life: int, version: int) -> None:
        if server.life == life and server.version < version and server.paused and server in self._switching:
            if server.state is Member.SERVING:
                server.state = Member.CATCHING_UP
            self.outcome.events["suspensions"] += 1
            self.join_switch(server)

    # orchestrator and trainer

    def deliver(self, group: Group) -> None:
        super().deliver(group)
        self._journal[group.ticket] = (self.now, group)

    def take(self, step: int) -> tuple[Group, ...] | None:
        """A step that was undone takes the tickets that it took before, where they are all ready: else its weights are others."""
        before = self._undone.get(step, ())
        again = bool(before) and self.queue.are_ready(before)
        batch = self.queue.take(step, before if again else ())
        if batch is not None:
            self._same = self._same and (again or not before)
            self._undone.pop(step, None)
            self._taken[step] = tuple(group.ticket for group in batch)
            for group in batch:
                self._journal[group.ticket] = (-math.inf, group)  # durable before the batch leaves
        return batch

    def _trained(self, step: int) -> None:
        super()._trained(step)
        if step % self.scenario.checkpoint_every == 0:
            for done in range(self._checkpoint + 1, step + 1):
                for ticket in self._taken[done]:
                    del self._journal[ticket]
            self._checkpoint = step

    def in_trainer(self, delay: float, event: Callable[[], None]) -> None:
        incarnation = self.outcome.events["rollbacks"]
        self.at(delay, lambda: event() if incarnation == self.outcome.events["rollbacks"] else None)

    def _crash_orchestrator(self) -> None:
        if self.up and self.trainer_up:
            self.outcome.events["orchestrator crashes"] += 1
            self._orchestrator_down(self.queue.step, self.promised)
            self.in_era(self.faults.orchestrator_restart_s, self._orchestrator_up)

    def _orchestrator_down(self, step: int, made: int) -> None:
        """What is in flight is cut off at its last chunk; a new queue takes up the state after ``step``. ``made``: the newest version."""
        self.era += 1
        self.up = False
        flights = list(self.flights.values())
        self._switching.clear()
        for server in self.servers:
            self._lose(server)
        self.target, self.staging = NO_VERSION, False
        self.stranded.clear()
        self.flights = {f.ticket: f for f in map(self._from_chunks, flights) if f is not None}
        flushed = self.now - self.faults.flush_s
        self._journal = {ticket: entry for ticket, entry in self._journal.items() if entry[0] <= flushed}
        self._recover(step, made)

    def _recover(self, step: int, made: int) -> None:
        """A new queue after ``step``, with what the journal has for its open tickets; ``made`` is the newest version of this timeline."""
        trained = {ticket for s, tickets in self._taken.items() if s <= step for ticket in tickets}
        counts = {**asdict(self.queue.counts), "trained": len(trained)}
        tickets: list[Json] = [t for t in sorted(self.lengths) if t not in trained]
        state: dict[str, Json] = {"groups_per_step": self.scenario.groups_per_step, "step": step, "fresh": len(self.lengths)}
        self.queue = self._new_queue()
        self.queue.restore({**state, "open": tickets, "counts": counts})
        self._held = {}
        self.flights = {t: f for t, f in self.flights.items() if t not in trained and t not in self._journal}
        for ticket, (_, group) in self._journal.items():
            if ticket not in trained:
                self._supply(ticket, _versions(group), partial(_same, group), made)
        for ticket, flight in self.flights.items():
            if (newest := max((v for work in flight.works for v, _ in work.spans), default=NO_VERSION)) > made:
                self.queue.hold(ticket)
                self._held[ticket] = newest

    def _supply(self, ticket: int, versions: set[int], load: Callable[[], Group], made: int) -> None:
        if max(versions) > made:
            self.queue.hold(ticket)
            self._held[ticket] = max(versions)
        else:
            self.queue.preload(ticket, versions, load)
            self.outcome.events["groups from the journal"] += 1

    def _from_chunks(self, flight: Flight) -> Flight | None:
        """A flight of the next orchestrator with the tokens that are safe; the requests of the dead one find nobody who waits."""
        if flight.ticket < 0 or not self.faults.flush_tokens:
            return None
        again = Flight(flight.ticket, [], 0, flight.since)
        again.works = [Work(again, work.length, list(work.spans)) for work in flight.works]
        again.open = sum(not work.finished for work in again.works)
        return again

    def _orchestrator_up(self) -> None:
        """It finds the servers, and brings them all to the newest published version before it admits anything."""
        self.up = True
        for server in self.servers:
            if server.state is Member.SERVING:
                server.state = Member.CATCHING_UP
        self._follow()

    def _roll_back(self) -> None:
        """A rank dies: the ranks end, the orchestrator too, the servers stay; all goes on from the last checkpoint."""
        if not (self.up and self.trainer_up):
            return
        self.outcome.events["rollbacks"] += 1
        self.trainer_up = False
        if self.training:
            self.training, self.idle_since = False, self.now
        back = self._checkpoint
        self.outcome.events["steps undone"] += self.queue.step - back
        self._same = self.rng.random() < self.faults.same_replay_frac and (self._same or not self._undone)
        self._orchestrator_down(back, back)
        self.books.roll_back(back)
        self._undone.update({s: tickets for s, tickets in self._taken.items() if s > back})
        self._taken = {s: tickets for s, tickets in self._taken.items() if s <= back}
        self.promised = NO_VERSION
        self.in_era(self.faults.trainer_restart_s, partial(self._trainer_up, back))

    def _trainer_up(self, step: int) -> None:
        self.trainer_up = True
        self._orchestrator_up()
        self.publish(step)

    def publish(self, version: int) -> None:
        """A version made again with the same weights admits the groups that it sampled; with others, their tickets are handed on."""
        super().publish(version)
        for ticket in [t for t, newest in self._held.items() if newest <= version and t in self._journal]:
            del self._held[ticket]
            if self._same:
                group = self._journal[ticket][1]
                self._supply(ticket, _versions(group), partial(_same, group), version)
            else:
                del self._journal[ticket]
                self._release(ticket)

    def live(self, version: int) -> None:
        """An unfinished rollout goes on once servers serve a version as new as its tokens: within a rollout versions never fall."""
        super().live(version)
        for ticket in [t for t, newest in self._held.items() if newest <= version]:
            del self._held[ticket]
            if not self._same:
                self.flights.pop(ticket, None)
            self._release(ticket)

    def _release(self, ticket: int) -> None:
        self.queue.release(ticket)
        self.outcome.events["held tickets handed on"] += 1


def _versions(group: Group) -> set[int]:
    return {s.version for trace in group.traces for s in trace.segments}


def _same(group: Group) -> Group:
    return group
