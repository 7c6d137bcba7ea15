"""The journal and what it adds up to, as one: what is written down is applied at once, so that who takes over finds the same."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from neox_rl.codec import encode_group
from neox_rl.queue.answers import Answer, body_of
from neox_rl.queue.history import KEPT_VERSIONS, fold
from neox_rl.queue.journal import LOCK_S, Journal, open_journal
from neox_rl.queue.positions import packed
from neox_rl.queue.records import Record, payload_of
from neox_rl.types import NO_VERSION, Group, Json

logger = logging.getLogger(__name__)
SEGMENT_BYTES = 512 << 20
ANSWERS_FACTOR = 4
"""Of a segment's size: what it may have together with answers, most of them for groups that are there. A search has many times its group's
bytes of them; what was trained is not given up for their room, unless the file would grow without bound."""


class Book:
    """``history`` is the present state; ``damage`` the words about what could not be read, which may leave a hole (``has_holes``). A hole
    is one for good: what it took is in no state either, and the segment that shows it shrinks.
    ``add`` and its kin are for one event loop."""

    def __init__(
        self,
        journal: Journal,
        records: Sequence[Record],
        damage: list[str],
        has_holes: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._segment_bytes = segment_bytes
        self._answers = sum(len(record.body) for record in records if record.kind == "span")
        self._bytes = sum(len(record.body) for record in records) - self._answers
        self.journal, self.history, self.damage = journal, fold(records), damage
        self.has_holes = has_holes or any(record.kind == "state" and record.meta.get("holes") for record in records)
        self._attested: dict[int, str] = {}
        self._follow: Callable[[Record], None] = lambda _: None
        self._past = records

    @classmethod
    def open(
        cls,
        directory: Path,
        attempt: int,
        flush_s: float,
        full_s: float,
        rule: Mapping[str, Json] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        lock_s: float = LOCK_S,
    ) -> Book:
        """Takes over what is there. ``rule``: what the run keeps to, for who audits it; ``segment_bytes``: see ``tidy``; ``lock_s``: how
        long who had it before may take to end.

        Raises ConfigError like ``open_journal``.
        """
        begin = time.monotonic()
        journal, reading = open_journal(directory, flush_s, full_s, lock_s)
        book = cls(journal, reading.records, reading.words(), reading.has_holes, segment_bytes)
        for word in book.damage:
            logger.warning("%s", word)
        logger.info("%d records of %s read in %.2f s", len(reading.records), directory, time.monotonic() - begin)
        book.add("opened", attempt=attempt, pid=os.getpid(), time=time.time(), rule=dict(rule or {}) or None)
        return book

    @property
    def warning(self) -> str:
        """Of damage, for the terminal; empty where there is none."""
        more = f" and {len(self.damage) - 1} more" if len(self.damage) > 1 else ""
        return f"the journal is damaged: {self.damage[0]}{more}; what it held is made again" if self.damage else ""

    def follow(self, hear: Callable[[Record], None]) -> None:
        """``hear`` gets every record, those that are there already first; of a new segment the state alone. Call it once."""
        for record in self._past:
            hear(record)
        self._past, self._follow = (), hear

    def add(self, kind: str, body: bytes = b"", **meta: Json) -> None:
        """Raises JournalError once the journal has given up."""
        payload = payload_of(kind, meta, body)
        seq = self.journal.append(payload)
        if kind == "span":
            self._answers += len(payload)
        else:
            self._bytes += len(payload)
        record = Record(seq, kind, meta, body)
        self._follow(record)
        self.history.apply(record)

    def session(self, session: str, attempt: int, sft_step: int, rl_step: int, state: Mapping[str, Json]) -> None:
        """A trainer says hello, at its checkpoint."""
        self._attested.clear()
        who: dict[str, Json] = {"session": session, "attempt": attempt, "sft_step": sft_step, "rl_step": rl_step}
        self.add("session", b"", id=1, **who, anew=rl_step < self.history.forgotten, time=time.time(), state=dict(state))

    def attested(self, version: int, digest: str) -> None:
        """A server serves ``version``: it may do so, and its tokens come, before the trainer's own word of that version is here."""
        known = self._attested.get(version, digest)
        self._attested = {v: d for v, d in self._attested.items() if v > version - KEPT_VERSIONS}
        self._attested[version] = digest if known == digest else ""  # servers of two timelines: whose tokens are whose is not known

    def group(self, group: Group) -> None:
        versions = version_tokens(group)
        self.add(
            "group",
            encode_group(group),
            ticket=group.ticket,
            digests=self._digests(versions),
            tokens=generated_tokens(group),
            rollouts=len(group.traces),
        )

    def answer(self, ticket: int, answer: Answer) -> bytes:
        """Of a server, for a group that is not finished. Returns its bytes."""
        body = body_of(answer)
        versions = sorted({span.version for chunk in answer.chunks for span in chunk.spans})
        self.add("span", body, ticket=ticket, digests=self._digests(versions))
        return body

    def refused(self, group: Group, position: int) -> None:
        self.add("refused", ticket=group.ticket, position=position, tokens=generated_tokens(group), rollouts=len(group.traces))

    def lost(self) -> None:
        """Says which problems nobody knows the end of, if there are any; in a journal without damage there are none."""
        if lost := self.history.lost():
            logger.warning("no record says what became of the problems at %s", ", ".join(f"{a} to {b - 1}" for a, b in lost))
            self.add("lost", positions=[[start, stop] for start, stop in lost], holes=self.has_holes)

    def taken(self, id: int, step: int, groups: Iterable[Group], positions: Mapping[int, int], state: Mapping[str, Json]) -> None:
        """The batch of an RL step, which may leave once this is durable. ``positions``: ticket -> that of its problem."""
        taken = list(groups)
        versions: list[Json] = [{str(version): tokens for version, tokens in version_tokens(group).items()} for group in taken]
        tickets: list[Json] = [group.ticket for group in taken]
        made = self._makers(group.ticket for group in taken)
        where = packed([group.ticket for group in taken], positions)
        self.add("taken", id=id, phase="rl", step=step, tickets=tickets, positions=where, versions=versions, made=made, state=dict(state))

    def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None:
        """A new segment, without what a resume from this checkpoint cannot need."""
        self.add("checkpoint", id=id, sft_step=sft_step, rl_step=rl_step)
        self._rotate()

    def tidy(self) -> None:
        """A new segment where groups and batches have the size of one, without what was trained. Only when no batch is on its way to the
        trainer."""
        if self._bytes > self._segment_bytes or self._bytes + self._answers > ANSWERS_FACTOR * self._segment_bytes:
            self.history.forget()
            self._rotate()

    def _rotate(self) -> None:
        records = [
            (kind, meta | {"holes": self.has_holes} if kind == "state" else meta, body) for kind, meta, body in self.history.compact()
        ]
        self.journal.rotate([payload_of(*record) for record in records])
        self._follow(Record(-1, *records[0]))
        self._bytes = self._answers = 0  # what was copied is not counted: a new segment of open groups alone would only follow the next

    def bodies(self, groups: Iterable[Group]) -> list[bytes | memoryview]:
        """The groups as they were written down, where they still are at hand."""
        known = self.history.groups
        return [known[g.ticket].body if g.ticket in known else encode_group(g) for g in groups]

    async def durable(self) -> None:
        await self.journal.durable()

    def close(self) -> None:
        self.journal.close()

    def _makers(self, tickets: Iterable[int]) -> dict[str, Json]:
        """Version -> digests of the weights that made tokens of it, as the groups say: one each, or the timelines got mixed."""
        found: dict[int, set[str]] = {}
        for ticket in tickets:
            for version, digest in self.history.groups[ticket].digests.items():
                found.setdefault(version, set()).update([digest] if digest else [])
        return {str(version): [*sorted(digests)] for version, digests in sorted(found.items())}

    def _digests(self, versions: Iterable[int]) -> dict[str, Json]:
        return {str(version): self.history.digests.get(version, self._attested.get(version) or None) for version in versions}


def version_tokens(group: Group) -> dict[int, int]:
    """Tokens of a group by the version that made or scored them: those that have an age."""
    found: dict[int, int] = {}
    for trace in group.traces:
        for segment in trace.segments:
            if segment.version != NO_VERSION:
                found[segment.version] = found.get(segment.version, 0) + len(segment.ids)
    return found


def generated_tokens(group: Group) -> int:
    """What policies wrote for a group, shown in a trace or not; a given solution, which one only scored, is none of it."""
    return sum(len(segment.ids) for trace in group.traces for segment in trace.written) + group.unshown
