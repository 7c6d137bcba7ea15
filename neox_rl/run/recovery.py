"""Who is started again after a death, and when: a pure state machine. Clocks are passed in, nothing is started or ended here.

    a server        again, up to ``servers.max_restarts``; then the others go on without it, and with no other the run ends
    orchestrator    again, up to ``orchestrator_restarts``: ranks and servers go on
    a rank          with ``restarts`` left, ranks and orchestrator start again from the last checkpoint, the servers stay; else the run ends

A process that was well for ``HEALTHY_S`` has its restarts forgiven, so that a run of weeks does not end by a death a day, and one that dies
again and again right after its start does. The restarts of ranks are what the user allowed, and are never forgiven: each costs training.
A restart waits only where the process died within ``SOON_S`` of its start, the longer the more often in a row it did so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from neox_rl.config.run import RunConfig
from neox_rl.errors import GIVES_UP
from neox_rl.run.processes import ORCHESTRATOR, RANKS

HEALTHY_S = 300.0
SOON_S = 8.0
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0


class Act(Enum):
    """What follows a death."""

    RESTART = auto()
    """The process alone, after ``delay_s``."""
    RESUME = auto()
    """Orchestrator and ranks, from the last checkpoint."""
    GO_ON = auto()
    """The run does without it."""
    END = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """``used`` of ``limit`` restarts, this one included; ``why`` ends an error or a warning."""

    act: Act
    used: int = 0
    limit: int = 0
    delay_s: float = 0.0
    why: str = ""


@dataclass(slots=True)
class Restarts:
    """Of one process: those that count, when it was last started, and how often in a row it died soon after."""

    used: int = 0
    started: float = 0.0
    soon: int = 0

    def fell(self, now: float, forgiven: bool = True) -> None:
        """``forgiven``: a while of health makes earlier ones count no longer."""
        if forgiven and now - self.started >= HEALTHY_S:
            self.used = 0
        self.soon = self.soon + 1 if self.used and now - self.started < SOON_S else 0

    def again(self) -> float:
        """Counts one; how long it is to wait, in seconds. A lone death is healed at once, and so is one after a while of work."""
        self.used += 1
        return 0.0 if self.soon == 0 else min(LONGEST_BACKOFF_S, BACKOFF_S * 2.0 ** (self.soon - 1))


class Recovery:
    """``started`` and ``fell`` are told what happens, in the order it happens; ``now`` is any clock in seconds that does not go back."""

    def __init__(self, config: RunConfig) -> None:
        metarl = config.metarl
        self._limits = {ORCHESTRATOR: metarl.orchestrator_restarts, RANKS: metarl.restarts}
        self._server_limit = metarl.servers.max_restarts
        self._records: dict[str, Restarts] = {}
        self._lost: set[str] = set()

    def started(self, name: str, now: float) -> None:
        self._records.setdefault(name, Restarts()).started = now

    def fell(self, name: str, now: float, status: int | None, others_serve: bool = False) -> Decision:
        """``status`` is the exit status, None for a process that had to be ended. ``others_serve``: who is not of this launcher."""
        record = self._records.setdefault(name, Restarts(started=now))
        record.fell(now, forgiven=name != RANKS)
        limit = self._limits.get(name, self._server_limit)
        if status == GIVES_UP:
            return Decision(Act.END, record.used, limit, why="its error would come again")
        if record.used < limit:
            delay_s = record.again()
            return Decision(Act.RESUME if name == RANKS else Act.RESTART, record.used, limit, delay_s)
        if name in self._limits:
            return Decision(Act.END, record.used, limit, why=_spent(record.used, limit))
        self._lost.add(name)
        if others_serve or any(other not in self._limits and other not in self._lost for other in self._records):
            return Decision(Act.GO_ON, record.used, limit, why=f"{_spent(record.used, limit)}; the other servers go on without it")
        return Decision(Act.END, record.used, limit, why=f"{_spent(record.used, limit)}, and no other server is left")


def _spent(used: int, limit: int) -> str:
    return f"it was started again {used} time{'s' * (used != 1)} already" if limit else "it is not started again"
