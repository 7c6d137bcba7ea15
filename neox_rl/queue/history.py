"""What the journal's records add up to: a pure fold, the same for the orchestrator that lives and for the one that takes over.

    kind        meta                                                    means
    opened      attempt, pid, time, rule                                an orchestrator starts; ``rule`` is what the run keeps to
    session     session, attempt, sft_step, rl_step, anew, time, state  a trainer says hello with the position of its checkpoint: what came
                                                                        after it is undone; anew: and forgotten, refusals too
    issued      ticket, position, live                                  the ticket is in flight, with the cursor's problem at ``position``
    span        ticket, digests; body                                   what a server answered for an unfinished group (``answers``)
    group       ticket, digests, tokens, rollouts; body                 all rollouts of the ticket, verified (``codec.encode_group``)
    refused     ticket, position, tokens, rollouts                      dynamic sampling refused the group, and its problem with it
    failed      ticket                                                  the generation failed; what was answered is kept
    discarded   tickets, parted                                         made by a policy that a rollback undid and that did not come back,
                                                                        or another attempt would fail of it; parted: nor will any other
                                                                        of those steps come back
    lost        positions, holes                                        problems of which no record says what became of them (ranges);
                                                                        holes: the journal is damaged
    taken       id, phase, step, tickets, positions, versions, made,    the batch of a step; positions: of its problems (``packed``);
                state                                                   versions: {version: tokens} a ticket; made: {version: digests of
                                                                        its weights}; for sft instead draws, ticket: where the
                                                                        demonstrations stood before
    published   id, version, digest                                     the trainer offers weights
    live        version, digest                                         every serving server attests it
    evaluated   id, label, version, metrics                             the answer to an evaluation
    stopped     id                                                      the user asked to stop: the answer said so
    reported    id, phase, step                                         the step's metrics are written
    checkpoint  id, sft_step, rl_step                                   the trainer has saved; a new segment begins
    state       (this class), holes                                     first in the segment after a checkpoint, or a full one, before its
                                                                        open groups and answers (copy: true), and once more, as a copy,
                                                                        behind them

``id`` is the number of the trainer's message. ``digests`` is {version: digest of the weights} of the policies that made the tokens: by it
experience of an undone timeline is recognised. A record that was lost makes its ticket open again, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from neox_rl.queue.positions import Range, Ranges, spent_by, unpacked
from neox_rl.queue.records import Record
from neox_rl.types import Json

PHASES = ("sft", "rl")
KEPT_VERSIONS = 256
"""Digests that are kept for rollouts still in flight, beside those of what is in the journal."""
_PLAIN = (
    *("session", "attempt", "last", "steps", "reported", "fresh", "cursor", "published", "evaluated", "state", "sft", "stopped"),
    "forgotten",
)
"""Fields that are JSON as they are."""


class Standing(Enum):
    """Of experience in the present timeline, judged by who made it."""

    USABLE = auto()
    WAITING = auto()
    """For a version of an undone timeline to be published again."""
    FOREIGN = auto()
    """A policy that is not of this timeline made some of it."""


@dataclass(frozen=True, slots=True)
class Made:
    """A group or answer as it lies in the journal: ``body`` is its bytes, ``digests`` who made it. None: not known any more."""

    body: bytes | memoryview
    digests: Mapping[int, str | None]
    meta: Mapping[str, Any]


@dataclass
class Tally:
    """Events over all timelines: what was generated was generated, also where a rollback undid its training."""

    issued: int = 0
    delivered: int = 0
    refused: int = 0
    failed: int = 0
    tokens_generated: int = 0
    rollouts: int = 0
    rollouts_refused: int = 0


@dataclass
class History:
    """``apply`` each record in order. Unknown kinds and tickets that cannot be are passed over: damage must not stop a recovery."""

    session: str = ""
    attempt: int = -1
    last: int = 0
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    reported: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    fresh: int = 0
    cursor: int = 0
    open: set[int] = field(default_factory=set)
    positions: dict[int, int] = field(default_factory=dict)
    spent: Ranges = field(default_factory=Ranges)
    """Positions that no ticket has any more: trained, refused or lost."""
    refusals: dict[int, int] = field(default_factory=dict)
    groups: dict[int, Made] = field(default_factory=dict)
    spans: dict[int, list[Made]] = field(default_factory=dict)
    taken: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """RL step -> tickets, of steps since the last checkpoint."""
    forgotten: int = 0
    """What was trained up to this RL step is not kept, checkpoint or not, or in no record: who goes back before it begins anew."""
    replay: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """RL step -> tickets, of steps that were undone and not done again yet."""
    digests: dict[int, str] = field(default_factory=dict)
    published: int = -1
    evaluated: dict[str, Json] = field(default_factory=dict)
    """Label -> metrics; None: it was, and no record says what came out."""
    state: dict[str, Any] = field(default_factory=dict)
    """What the trainer's checkpoint would hold now: the orchestrator's state after the last batch."""
    sft: dict[str, int] = field(default_factory=dict)
    """Where the demonstrations stood before the last batch of the warm start: draws, ticket."""
    tally: Tally = field(default_factory=Tally)
    stopped: bool = False
    complete: bool = False
    """The state that the segment begins with was read: its copy says nothing new."""

    def apply(self, record: Record) -> None:
        meta = record.meta
        if record.kind in _HANDLERS:
            _HANDLERS[record.kind](self, meta, record.body)
        if isinstance(id := meta.get("id"), int):
            self.last = max(self.last, id)

    def standing(self, digests: Mapping[int, str | None]) -> Standing:
        found = Standing.USABLE
        for version, digest in digests.items():
            if version not in self.digests:
                found = Standing.WAITING
            elif digest != self.digests[version]:
                return Standing.FOREIGN
        return found

    def standing_of(self, ticket: int) -> Standing:
        """Of an open ticket's group, or of the answers for its unfinished one."""
        made = [self.groups[ticket]] if ticket in self.groups else self.spans.get(ticket, [])
        found = [self.standing(m.digests) for m in made]
        return next((s for s in (Standing.FOREIGN, Standing.WAITING) if s in found), Standing.USABLE)

    def queue_state(self, groups_per_step: int) -> dict[str, Json]:
        """For ``TicketQueue.restore``."""
        counts = {name: getattr(self.tally, name) for name in ("issued", "delivered", "refused", "failed")}
        counts["trained"] = groups_per_step * self.steps["rl"]
        opened: list[Json] = [*sorted(self.open)]
        step = self.steps["rl"]
        return {"groups_per_step": groups_per_step, "step": step, "fresh": self.fresh, "open": opened, "counts": {**counts}}

    def lost(self) -> list[Range]:
        """Positions that were handed out, and of which no record says what became of them."""
        known = Ranges(self.spent)
        for ticket in self.open & self.positions.keys():
            known.add(self.positions[ticket], self.positions[ticket] + 1)
        return known.gaps(self.cursor)

    def release(self, tickets: Iterable[int]) -> None:
        """Forgets the bytes of trained groups: a living orchestrator has delivered them, and one that takes over reads the journal."""
        for ticket in tickets:
            self.groups.pop(ticket, None)
            self.spans.pop(ticket, None)

    def forget(self) -> None:
        """Keeps nothing of what was trained, though a rollback may undo it: that will cost its generation, not memory until then."""
        self.forgotten = self.steps["rl"]

    def compact(self) -> Iterator[tuple[str, dict[str, Json], bytes | memoryview]]:
        """``(kind, meta, body)`` of the records that say all this anew, without what was trained."""
        used = {version for ticket in self.open for made in self._made(ticket) for version in made.digests}
        self.digests = {v: d for v, d in self.digests.items() if v in used or v > self.published - KEPT_VERSIONS}
        self.taken = {}
        self._prune()
        meta: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        meta |= {name: _pairs(getattr(self, name)) for name in ("positions", "refusals", "replay", "digests")}
        meta |= {"open": sorted(self.open), "spent": self.spent.json(), "tally": dict(vars(self.tally))}
        yield "state", meta, b""
        for ticket in sorted(self.open):
            for made in self._made(ticket):
                yield ("group" if ticket in self.groups else "span"), {**made.meta, "copy": True}, made.body
        yield "state", meta | {"copy": True}, b""  # one flipped byte in the first must not cost all that it says

    def _made(self, ticket: int) -> Sequence[Made]:
        return [self.groups[ticket]] if ticket in self.groups else self.spans.get(ticket, [])

    def _know(self, ticket: object) -> int | None:
        """A ticket of the journal; those before it whose own records were lost are open too."""
        if type(ticket) is not int or not 0 <= ticket < 1 << 48:
            return None
        if ticket >= self.fresh:
            self.open.update(range(self.fresh, ticket + 1))
            self.fresh = ticket + 1
        return ticket

    def _prune(self) -> None:
        """Nothing is kept of tickets that are closed, but what the steps since the checkpoint trained."""
        undoable = {ticket for tickets in self.taken.values() for ticket in tickets}
        keep = self.open | undoable
        self.groups = {t: m for t, m in self.groups.items() if t in keep}
        self.spans = {t: m for t, m in self.spans.items() if t in self.open}
        self.positions = {t: p for t, p in self.positions.items() if t in keep}
        self.refusals = {t: n for t, n in self.refusals.items() if t in self.open}

    def _heard(self, sft_step: int, rl_step: int) -> None:
        """The trainer's messages are handled in order: one that came says that these were reported, also where damage took that record."""
        self.reported = {"sft": max(self.reported["sft"], sft_step), "rl": max(self.reported["rl"], rl_step)}

    # one method a kind

    def _session(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        if "state" not in meta:
            return  # an entry of the ledger
        self.session, self.attempt, self.last, self.stopped = str(meta["session"]), int(meta["attempt"]), 1, False
        self._rollback(int(meta["sft_step"]), int(meta["rl_step"]), dict(meta["state"]))

    def _rollback(self, sft_step: int, rl_step: int, state: dict[str, Any]) -> None:
        """The checkpoint decides which tickets are open; the journal supplies what it knows of them and of later ones.

        Where it has forgotten or lost some of them it supplies none: problems and tickets follow on the checkpoint's as they did at first.
        """
        unknown = rl_step < self.forgotten or rl_step > self.steps["rl"]
        if rl_step < self.forgotten:
            self.tally.failed += len(self.groups.keys() & self.open)
            self.fresh, self.cursor, self.spent = 0, 0, Ranges()
            for table in (self.groups, self.spans, self.positions, self.refusals, self.replay, self.taken):
                table.clear()
        self.forgotten = rl_step if unknown else self.forgotten  # what is before it is of the checkpoint's word alone
        undone = {step: tickets for step, tickets in self.taken.items() if step > rl_step}
        for position in (self.positions[ticket] for tickets in undone.values() for ticket in tickets if ticket in self.positions):
            self.spent.discard(position, position + 1)
        for spent in spent_by(state) if unknown else ():
            self.spent.add(*spent)
        self.replay |= undone
        self.replay = {step: tickets for step, tickets in self.replay.items() if step > rl_step}
        self.taken = {step: tickets for step, tickets in self.taken.items() if step <= rl_step}
        queue = state.get("queue") or {}
        self.fresh = max(self.fresh, fresh := int(queue.get("fresh", 0)))
        self.open = {int(t) for t in queue.get("open", ())} | set(range(fresh, self.fresh))
        saved = {int(t): int(p) for t, p in (state.get("problems") or {}).items() if p not in self.spent}
        self.positions = saved | self.positions
        self.cursor = max([self.cursor, int((state.get("cursor") or {}).get("position", 0)), *(p + 1 for p in self.positions.values())])
        # v(rl_step) is published again by whoever says hello, and must prove to be the same.
        self.digests = {v: d for v, d in self.digests.items() if v < rl_step}
        self.published = max(self.digests, default=-1)
        self.steps, self.reported = {"sft": sft_step, "rl": rl_step}, {"sft": sft_step, "rl": rl_step}
        self.evaluated = {k: v for k, v in self.evaluated.items() if rl_step > 0 and k != "final"}
        self.state = state
        before = {**(state.get("queue") or {}).get("counts", {}), **(state.get("counts") or {})}
        for name in vars(self.tally):
            setattr(self.tally, name, max(getattr(self.tally, name), int(before.get(name, 0))))
        self._prune()

    def _issued(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        ticket = self._know(meta.get("ticket"))
        if ticket is not None:
            self.tally.issued += 1
            self.positions[ticket] = int(meta["position"])
            self.cursor = max(self.cursor, self.positions[ticket] + 1)

    def _span(self, meta: Mapping[str, Any], body: bytes | memoryview) -> None:
        ticket = self._know(meta.get("ticket"))
        if ticket is not None and ticket in self.open and ticket not in self.groups:
            made = self.spans.setdefault(ticket, [])
            # A search has thousands: their words, which are the same, are kept once.
            same = made[-1] if made and made[-1].meta == meta else None
            made.append(Made(body, same.digests, same.meta) if same else Made(body, _digests(meta), meta))

    def _group(self, meta: Mapping[str, Any], body: bytes | memoryview) -> None:
        ticket = self._know(meta.get("ticket"))
        if ticket is not None and ticket in self.open:
            if not meta.get("copy"):
                self.tally.delivered += 1
                self.tally.tokens_generated += int(meta["tokens"])
                self.tally.rollouts += int(meta["rollouts"])
            self.groups[ticket] = Made(body, _digests(meta), meta)
            self.spans.pop(ticket, None)

    def _refused(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        ticket = self._know(meta.get("ticket"))
        if ticket is not None:
            self.tally.refused += 1
            self.tally.tokens_generated += int(meta["tokens"])
            self.tally.rollouts += int(meta["rollouts"])
            self.tally.rollouts_refused += int(meta["rollouts"])
            self.refusals[ticket] = self.refusals.get(ticket, 0) + 1
            self.positions.pop(ticket, None)
            self.spent.add(int(meta["position"]), int(meta["position"]) + 1)
            self.release((ticket,))

    def _failed(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        self.tally.failed += 1

    def _discarded(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        self.tally.failed += sum(ticket in self.groups for ticket in meta["tickets"])
        self.release(meta["tickets"])
        if meta["parted"]:
            self.replay = {}

    def _lost(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        for start, stop in meta["positions"]:
            self.spent.add(start, stop)

    def _taken(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        phase, step = str(meta["phase"]), int(meta["step"])
        if "state" not in meta:
            return  # an entry of the ledger
        self.steps[phase] = step
        self.state = dict(meta["state"])
        if phase == "sft":
            self._heard(step - 1, 0)
            self.sft = {"draws": int(meta["draws"]), "ticket": int(meta["ticket"])}
            return
        self._heard(self.steps["sft"], step - 1)
        self.evaluated.setdefault("warmstart", None)  # before the first of these, whatever came out
        tickets = tuple(int(t) for t in meta["tickets"])
        same = self.replay.get(step) == tickets
        self.replay = {s: t for s, t in self.replay.items() if s > step} if same else {}
        self.taken[step] = tickets
        # The queue's own word, so that the loss of an earlier record of this kind opens no ticket that was trained.
        queue = self.state["queue"]
        self.open = {int(t) for t in queue["open"]} | set(range(int(queue["fresh"]), self.fresh))
        self.fresh = max(self.fresh, int(queue["fresh"]))
        for ticket, position in zip(tickets, unpacked(tickets, meta["positions"]), strict=True):
            self.refusals.pop(ticket, None)
            if position is not None:
                self.spent.add(position, position + 1)

    def _published(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        self.published = int(meta["version"])
        self.digests[self.published] = str(meta["digest"])
        self._heard(self.steps["sft"], self.published)

    def _stopped(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        self.stopped = True
        self._heard(self.steps["sft"], self.steps["rl"])

    def _evaluated(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        self.evaluated[str(meta["label"])] = meta["metrics"]
        self._heard(self.steps["sft"], int(meta["version"]))

    def _reported(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        rl = meta["phase"] == "rl"
        self._heard(self.steps["sft"] if rl else int(meta["step"]), int(meta["step"]) if rl else 0)

    def _checkpoint(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        """A resume goes to the newest checkpoint. Who goes back before it, because it is damaged, begins anew: what was trained by then,
        and with which problems, is not kept."""
        self._heard(int(meta["sft_step"]), int(meta["rl_step"]))
        if int(meta["rl_step"]) == self.published and int(meta["id"]) > self.last + 1:  # only an evaluation comes between these two
            self.evaluated.setdefault("final" if self.published else "warmstart", None)
        self.forgotten = max(self.forgotten, int(meta["rl_step"]))
        self.taken = {step: tickets for step, tickets in self.taken.items() if step > int(meta["rl_step"])}
        self._prune()

    def _state(self, meta: Mapping[str, Any], _: bytes | memoryview) -> None:
        if not meta.get("copy"):
            self.groups, self.spans = {}, {}
        elif self.complete:
            return
        self.complete = not meta.get("copy")
        for name in _PLAIN:
            setattr(self, name, copy(meta.get(name, getattr(self, name))))  # the record stays as it was read
        self.open, self.spent = set(meta["open"]), Ranges(meta["spent"])
        self.positions, self.refusals = ({int(t): int(v) for t, v in meta[name]} for name in ("positions", "refusals"))
        self.replay = {int(step): tuple(tickets) for step, tickets in meta["replay"]}
        self.digests = {int(version): str(digest) for version, digest in meta["digests"]}
        self.tally = Tally(**meta["tally"])
        self.taken = {}
        self._prune()


_HANDLERS = {
    kind: getattr(History, f"_{kind}")
    for kind in (
        *("session", "issued", "span", "group", "refused", "failed", "discarded", "lost", "taken", "published", "evaluated"),
        *("reported", "stopped", "checkpoint", "state"),
    )
}


def fold(records: Iterable[Record]) -> History:
    """The history that ``records`` tell. The ledger's records, older than the state that a segment begins with, change nothing."""
    history = History()
    for record in records:
        history.apply(record)
    return history


def _digests(meta: Mapping[str, Any]) -> dict[int, str | None]:
    return {int(version): digest for version, digest in meta["digests"].items()}


def _pairs(table: Mapping[int, Any]) -> list[Json]:
    """JSON has no integer keys."""
    return [[key, list(value) if isinstance(value, tuple) else value] for key, value in table.items()]
