"""``metarl.audit``: the orchestrator checks its own run while it goes on, record by record."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from neox_rl.config.run import RunConfig
from neox_rl.errors import StalenessError
from neox_rl.queue.book import Book
from neox_rl.run.audit import Audit, Rule
from neox_rl.run.members import Member, State
from neox_rl.telemetry.events import EventLog
from neox_rl.types import Json

logger = logging.getLogger(__name__)


class LiveAudit:
    """Follows ``book`` from its first record on. With ``stop`` a violation raises StalenessError wherever it is met: the run ends."""

    def __init__(self, config: RunConfig, book: Book, events: EventLog) -> None:
        self._mode, self._events = config.metarl.audit, events
        self._audit = Audit(Rule.of(config), book.has_holes, self._violated, living=True)
        book.follow(self._audit.apply if self._mode != "off" else lambda _: None)

    def member(self, member: Member) -> None:
        """Its state or version changed."""
        if self._mode != "off" and member.state is State.SERVING:
            self._audit.served(member.name, member.incarnation, member.version, member.digest)

    def reported(self, step: int, metrics: Mapping[str, Json]) -> None:
        """What the trainer says of an RL step."""
        if self._mode != "off":
            self._audit.reported(step, metrics)

    def _violated(self, check: str, what: str) -> None:
        self._events.instant("violation", check=check, message=what)
        self._events.flush()
        logger.error("the audit finds a violation: %s: %s", check, what)
        if self._mode == "stop":
            raise StalenessError(f"the audit (metarl.audit: stop) finds a violation: {check}: {what}")
