"""Who generates: the servers of a run, the state of each, and which version is live. Pure: times are passed in, in seconds.

    STARTING --answers--> STAGING --switched--> SERVING <--caught up-- SUSPENDED        any --> LEFT
        ^                                          |--late or silent-->  |
        +-------- started again -------- LOST <----+-- a switch failed, or past its deadline

Only serving members get requests. Live is the newest version that every serving member attests, and it never falls: a member that is late
with a switch by more than one heartbeat after the first one that made it is suspended, and live goes on without it. It serves again once it
attests the live version, and is not waited for again before it was in time once: one that is always late would cost every version a
heartbeat. Whoever is silent for longer than a start may take, or answers but neither comes to a newer version
nor copies one for longer than that may take, is lost: it would be left behind for good, and nobody would hear of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from neox_rl.types import NO_VERSION

START_KEY = "(metarl.servers.start_timeout_s of the run)"
STAGE_KEYS = "(metarl.weights.stage_timeout_s + metarl.weights.switch_timeout_s of the run)"
"""Where the limits are set: who reads of them may have no config, as on the machine of a server that joined."""


class State(StrEnum):
    """What a member is now."""

    STARTING = "starting"
    STAGING = "staging"
    SERVING = "serving"
    SUSPENDED = "suspended"
    LOST = "lost"
    LEFT = "left"


@dataclass(slots=True)
class Member:
    """One server. ``version`` is the last that it attested since it was started, ``digest`` that of its weights; ``since`` is when
    ``state`` began. ``incarnation`` names this life of it, empty before it first answers: what an earlier life staged does not count.
    ``owes_since``: a version newer than its own is offered since then, and it has switched to none; inf where it owes none. ``late``: live
    went on without it, and it was not in time since. ``copied``: the newest version that it held when live was beyond it already;
    ``late_copies``: how many such came in a row."""

    name: str
    address: str
    num_ranks: int
    since: float
    state: State = State.STARTING
    why: str = ""
    version: int = NO_VERSION
    digest: str = ""
    incarnation: str = ""
    owes_since: float = math.inf
    late: bool = False
    copied: int = NO_VERSION
    late_copies: int = 0

    @property
    def workers(self) -> frozenset[str]:
        """The names under which its ranks ack a staged version."""
        return frozenset(f"{self.incarnation}/{rank}" for rank in range(self.num_ranks)) if self.incarnation else frozenset()

    @property
    def here(self) -> bool:
        """Whether it belongs to the run."""
        return self.state is not State.LEFT

    def __str__(self) -> str:
        return f"{self.name} is {self.state}" + (f" ({self.why})" if self.why else "")


class Members:
    """``on_change(member)`` is called after every change of a member's state or version, ``on_live(version)`` when a newer one is live."""

    def __init__(self, heartbeat_s: float, now: float, on_change: Callable[[Member], None], on_live: Callable[[int], None]) -> None:
        self._heartbeat_s, self._on_change, self._on_live, self._since = heartbeat_s, on_change, on_live, now
        self._members: dict[str, Member] = {}
        self._nobody = "no server has joined"
        self._first: dict[int, float] = {}
        self.live = self._offered = NO_VERSION

    @property
    def all(self) -> list[Member]:
        return list(self._members.values())

    @property
    def serving(self) -> list[Member]:
        return [member for member in self._members.values() if member.state is State.SERVING]

    def get(self, name: str) -> Member | None:
        return self._members.get(name)

    def at(self, address: str) -> Member | None:
        return next((member for member in self._members.values() if member.address == address), None)

    def join(self, name: str, address: str, num_ranks: int, now: float) -> Member:
        """A server that is there or will be. Its name and address must be nobody else's."""
        assert self.get(name) is None and self.at(address) is None, f"{name} at {address} is a member already"
        member = self._members[name] = Member(name, address, num_ranks, now)
        self._on_change(member)
        return member

    def begin(self, member: Member, incarnation: str, now: float) -> None:
        """It answers, with weights that are nobody's, and begins to stage under this name."""
        member.incarnation, member.version, member.digest = incarnation, NO_VERSION, ""
        member.late, member.copied, member.late_copies = False, NO_VERSION, 0
        self._owe(member, now)
        self._set(member, State.STAGING, "", now)

    def attested(self, member: Member, version: int, digest: str, now: float) -> None:
        """After a switch: it serves, unless live has gone beyond it meanwhile."""
        member.version, member.digest = version, digest
        self._owe(member, now)
        first, behind = self._first.setdefault(version, now), version < self.live
        member.late = member.late and (behind or now - first > self._heartbeat_s)
        member.late_copies = member.late_copies if behind else 0
        self._set(member, State.STAGING if behind else State.SERVING, f"v{self.live} is live" if behind else "", now)
        self._settle()

    def copied(self, member: Member, version: int, now: float) -> bool:
        """It holds a version that is too old to serve by now. Whether this is the second such one in a row, which is worth a word: a
        server that joins in the midst of a version has its first copy late however fast it is.

        A new start would copy no faster: while one copy after the other comes it is not overdue.
        """
        if version <= member.copied:
            return False
        member.copied, member.owes_since, member.late_copies = version, now, member.late_copies + 1
        fix = ": raise metarl.weights.publish_every, or give it a faster link" if member.late_copies > 1 else ""
        member.why = f"its copy of v{version} came when v{self.live} was live{fix}"
        return member.late_copies == 2

    def answers(self, member: Member, silent_since: float, now: float) -> None:
        """It is there after all. One that was suspended serves again if it has the live version; else it must switch first.

        ``silent_since`` is inf where it answered before. While it was silent it could not stage, so that time does not count; a probe that
        came late takes none, or a server that answers most probes and stages nothing would never be overdue.
        """
        if now - silent_since > self._heartbeat_s:
            member.owes_since += now - silent_since
        if member.state is State.SUSPENDED and member.version != NO_VERSION and member.version >= self.live:
            self._set(member, State.SERVING, "", now)

    def suspend(self, member: Member, why: str, now: float) -> None:
        """It gets no requests until it answers and attests the live version."""
        if member.state in (State.STAGING, State.SERVING):
            self._set(member, State.SUSPENDED, why, now)
        elif member.state is State.STARTING:
            member.why = why
        self._settle()

    def lose(self, member: Member, why: str, now: float) -> None:
        """Its weights cannot be trusted or are gone: nothing but a new start helps."""
        member.version, member.digest, member.incarnation, member.owes_since = NO_VERSION, "", "", math.inf
        self._set(member, State.LOST, why, now)
        self._settle()

    def leave(self, member: Member, why: str, now: float) -> None:
        """Forgotten: its name and address may come again. A second time: nothing."""
        if not member.here:
            return
        del self._members[member.name]
        if not self._members:  # the next one has as long to come as the first had
            self._since, self._nobody = now, f"all servers have left, the last one {member.name} ({why})"
        self._set(member, State.LEFT, why, now)
        self._settle()

    def offer(self, version: int, now: float) -> None:
        """The trainer offers this version. Who owes one already is not given more time by the next."""
        self._offered = version
        for member in self._members.values():
            if member.incarnation and (member.owes_since == math.inf or member.version >= version):
                self._owe(member, now)

    def tick(self, now: float) -> None:
        """Suspends whoever is late: others have attested a newer version for more than a heartbeat, or at all where it was late before."""
        for member in self.serving:
            newer = [(at, version) for version, at in self._first.items() if version > member.version]
            patience_s = 0.0 if member.late else self._heartbeat_s
            if newer and now - min(newer)[0] > patience_s:
                again, member.late = ", late as it was before" if member.late else "", True
                version = min(newer)[1]
                self.suspend(member, f"still at v{member.version}, {patience_s:g} s after the first served v{version}{again}", now)

    def overdue(self, member: Member, silent_since: float, now: float, start_s: float, stage_s: float) -> str:
        """Why no more is to be hoped of this life of ``member``, with the limit; empty while there is hope.

        ``silent_since`` is inf where it answers. ``start_s`` and ``stage_s`` as for ``hopeless``.
        """
        if now - silent_since > start_s:
            if member.state is State.LOST:
                return f"it did not come back in {start_s:g} s {START_KEY}"
            return f"silent for {start_s:g} s {START_KEY}" + (f": {member.why}" if member.why else "")
        if silent_since == math.inf and now - member.owes_since > stage_s:
            has = "no version" if member.version == NO_VERSION else f"v{member.version}"
            return f"it answers, but has {has} and came to no newer one in {stage_s:g} s {STAGE_KEYS}; v{self._offered} is offered"
        return ""

    def hopeless(self, now: float, start_s: float, stage_s: float, offered: int, offered_at: float) -> str:
        """Why no newer version can come to serve: every member is past its deadline, in words. Empty while there is hope.

        ``start_s`` is for a server to start, or to answer again; ``stage_s`` for one that answers to get to the ``offered`` version.
        """
        if not self._members:
            return self._nobody if now - self._since > start_s else ""
        for member in self._members.values():
            if member.state in (State.STAGING, State.SERVING):
                if member.version >= offered or now - max(offered_at, member.since) <= stage_s:
                    return ""
            elif now - member.since <= start_s:
                return ""
        return "; ".join(map(str, self._members.values()))

    def _owe(self, member: Member, now: float) -> None:
        member.owes_since = now if member.version < self._offered else math.inf

    def _set(self, member: Member, state: State, why: str, now: float) -> None:
        if state is not member.state:
            member.since = now
        member.state, member.why = state, why
        self._on_change(member)

    def _settle(self) -> None:
        version = min((member.version for member in self.serving), default=NO_VERSION)
        if version > self.live:
            self.live = version
            self._first = {known: at for known, at in self._first.items() if known >= version}
            self._on_live(version)
