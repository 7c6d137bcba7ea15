"""The journal and what it adds up to, as one: what is written down is applied at once, so that who takes over finds the same."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from neox_rl.codec import encode_group
from neox_rl.queue.history import History, chunk_body, fold
from neox_rl.queue.journal import Journal, open_journal
from neox_rl.queue.records import Record, payload_of
from neox_rl.types import NO_VERSION, Completion, Group, Json

logger = logging.getLogger(__name__)


class Book:
    """``history`` is the present state; ``damage`` the words about what could not be read. ``add`` and its kin are for one event loop."""

    def __init__(self, journal: Journal, history: History, damage: list[str]) -> None:
        self.journal, self.history, self.damage = journal, history, damage

    @classmethod
    def open(cls, directory: Path, attempt: int, flush_s: float, full_s: float) -> Book:
        """Takes over what is there. Raises ConfigError like ``open_journal``."""
        begin = time.monotonic()
        journal, reading = open_journal(directory, flush_s, full_s)
        book = cls(journal, fold(reading.records), reading.words())
        for word in book.damage:
            logger.warning("%s", word)
        logger.info("%d records of %s read in %.2f s", len(reading.records), directory, time.monotonic() - begin)
        book.add("opened", attempt=attempt, pid=os.getpid(), time=time.time())
        return book

    def add(self, kind: str, body: bytes = b"", **meta: Json) -> None:
        """Raises JournalError once the journal has given up."""
        seq = self.journal.append(payload_of(kind, meta, body))
        self.history.apply(Record(seq, kind, meta, body))

    def group(self, group: Group) -> None:
        versions = version_tokens(group)
        self.add(
            "group",
            encode_group(group),
            ticket=group.ticket,
            digests=self._digests(versions),
            tokens=sum(versions.values()),
            rollouts=len(group.traces),
        )

    def chunk(self, ticket: int, rollout: int, start: int, chunk: Completion) -> None:
        """``chunk`` follows on the ``start`` tokens of the rollout's earlier ones."""
        self.add(
            "span",
            chunk_body(chunk),
            ticket=ticket,
            rollout=rollout,
            start=start,
            spans=[[span.version, span.start, span.end] for span in chunk.spans],
            finish=chunk.finish.value,
            digests=self._digests(span.version for span in chunk.spans),
        )

    def refused(self, group: Group) -> None:
        self.add("refused", ticket=group.ticket, tokens=sum(version_tokens(group).values()), rollouts=len(group.traces))

    def taken(self, id: int, step: int, groups: Iterable[Group], state: Mapping[str, Json]) -> None:
        """The batch of an RL step, which may leave once this is durable."""
        taken = list(groups)
        versions: list[Json] = [{str(version): tokens for version, tokens in version_tokens(group).items()} for group in taken]
        tickets: list[Json] = [group.ticket for group in taken]
        self.add("taken", id=id, phase="rl", step=step, tickets=tickets, versions=versions, state=dict(state))

    def checkpoint(self, id: int, sft_step: int, rl_step: int) -> None:
        """A new segment, without what a resume from this checkpoint cannot need."""
        self.add("checkpoint", id=id, sft_step=sft_step, rl_step=rl_step)
        self.journal.rotate([payload_of(*record) for record in self.history.compact()])

    def bodies(self, groups: Iterable[Group]) -> list[bytes | memoryview]:
        """The groups as they were written down, where they still are at hand."""
        known = self.history.groups
        return [known[g.ticket].body if g.ticket in known else encode_group(g) for g in groups]

    async def durable(self) -> None:
        await self.journal.durable()

    def close(self) -> None:
        self.journal.close()

    def _digests(self, versions: Iterable[int]) -> dict[str, Json]:
        return {str(version): self.history.digests.get(version) for version in versions}


def version_tokens(group: Group) -> dict[int, int]:
    """Sampled tokens of a group by the version that made them."""
    found: dict[int, int] = {}
    for trace in group.traces:
        for segment in trace.segments:
            if segment.version != NO_VERSION:
                found[segment.version] = found.get(segment.version, 0) + len(segment.ids)
    return found
