"""What the launcher sees of a process from outside: its beats, its last event, requests to end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Collection
from pathlib import Path

from neox_rl.config.placement import num_ranks
from neox_rl.config.run import RunConfig
from neox_rl.run.hosts import read_hosts
from neox_rl.run.processes import ORCHESTRATOR, RANKS
from neox_rl.run.signs import MAX_NAMED, PREPARE, Signs, name_all
from neox_rl.telemetry.heartbeat import Beat, interval_s, read_beats
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import read_status

EXIT_S = 2.0
"""A rank's process is gone, and its runner has not ended: it looks once a second, then ends the other ranks."""
QUIET_BEATS = 2.5
"""Beats that were left out, and that is told: a collective fails in the rank that waits, for the sake of one that is silent."""
TRACEBACKS_S = 0.5
APART_S = 0.05
"""Between the tracebacks of two ranks: they share a log, and those written at once cannot be read."""
LONGER = "give it longer where nothing is wrong: metarl.deadlines.ranks_start_s"
WAITS = "waits for "
"""With which an orchestrator's word in the status begins while nothing can go on."""
_TAIL_BYTES = 4096


class Watch:
    """Looks at beats every ``interval_s``; the rest of what it says is read when it is asked."""

    def __init__(self, config: RunConfig, paths: RunPaths) -> None:
        deadlines = config.metarl.deadlines
        self._paths, self._start_s = paths, deadlines.ranks_start_s
        self._signs = Signs(deadlines.silence_s, deadlines.step_s, deadlines.ranks_start_s)
        self._beat_s = interval_s(deadlines.silence_s)
        self._every_s = min(0.5, self._beat_s)
        self._looked = 0.0
        self._gone: float | None = None
        self._lost = ""
        self._started = self._ranks_started = time.monotonic()
        self._orchestrated = config.metarl.debug.mode != "train_only"
        self._up_at: float | None = None
        ranks = sum(read_hosts(config).values()) if config.neox.hostfile else num_ranks(config)
        self._ranks = [f"{RANKS}-{rank}" for rank in range(ranks)]

    def forget(self, prefix: str) -> None:
        """Processes of these names are about to be started."""
        self._signs.forget(prefix)
        if prefix == ORCHESTRATOR:
            self._started, self._up_at = time.monotonic(), None
        else:
            self._ranks_started = time.monotonic() if prefix == f"{RANKS}-" else self._ranks_started
            self._gone, self._lost = None, ""

    def heard_of(self, name: str) -> list[Beat]:
        return self._signs.heard_of(name)

    def reason_to_end(self, name: str, up: bool, now: float) -> str:
        """Why a process that is alive must be ended; empty where it need not be."""
        if name not in (RANKS, ORCHESTRATOR):
            return self._request(name)
        if now - self._looked >= self._every_s:
            self._signs.hear(read_beats(self._paths.beats, ""), now, self._every_s)
            self._looked = now
            if self._up_at is None and self.orchestrator_is_up():
                self._up_at = now
        if name == ORCHESTRATOR:
            return self._late(now) or self._signs.stuck(ORCHESTRATOR, now)
        return self._lost_rank(now) or self._signs.stuck(f"{RANKS}-", now) or self._not_up(now, up)

    def _request(self, server: str) -> str:
        """What the file of that name says: the orchestrator asks for a server that answers nothing."""
        path = self._paths.restart / server
        if not path.exists():
            return ""
        with contextlib.suppress(OSError):
            reason = path.read_text(errors="replace").strip()[:200]
            path.unlink()
            return f"was to be started again: {reason or 'no reason given'}"
        return ""

    def orchestrator_is_up(self) -> bool:
        """Whether it is heard of, and not at its beginnings any more."""
        return any(not beat.doing.startswith(PREPARE) for beat in self.heard_of(ORCHESTRATOR))

    def _late(self, now: float) -> str:
        """An orchestrator that does not come up, beside living ranks or those that wait for it to begin."""
        if self._up_at is not None or now - self._started <= self._start_s:
            return ""
        at = name_all(self.heard_of(ORCHESTRATOR)) or f"nothing was heard of {ORCHESTRATOR}"
        return f"did not come up within {self._start_s:.0f} s: {at}; {LONGER}"

    def _not_up(self, now: float, up: bool) -> str:
        """Ranks that beat, or have not begun to, and of whom the orchestrator has not heard: none that is not up itself can."""
        if up or (self._orchestrated and self._up_at is None):
            return ""
        if now - max(self._ranks_started, self._up_at or 0.0) <= self._start_s:
            return ""
        beats = self.heard_of(f"{RANKS}-")
        unheard = [rank for rank in self._ranks if rank not in {beat.process for beat in beats}]
        more = f" and {len(unheard) - MAX_NAMED} more" if len(unheard) > MAX_NAMED else ""
        never = f"nothing was heard of {', '.join(unheard[:MAX_NAMED])}{more}" if unheard else ""
        return f"did not come up within {self._start_s:.0f} s: {'; '.join(filter(None, (name_all(beats), never, LONGER)))}"

    def _lost_rank(self, now: float) -> str:
        """A rank whose process is gone. Not where ranks are on other machines, too: one here may be gone because one there was."""
        here, beats = socket.gethostname(), self.heard_of(f"{RANKS}-")
        gone = [beat for beat in beats if not Path(f"/proc/{beat.pid}").exists()] if all(beat.host == here for beat in beats) else []
        if not gone or not Path("/proc/self").exists():
            return ""
        if self._gone is None:  # their runner ends the others in a moment: who was gone first is what matters
            self._gone, self._lost = now, name_all(gone)
            quiet = [beat for beat in self._signs.quiet(f"{RANKS}-", now, QUIET_BEATS * self._beat_s) if beat not in gone]
            self._lost += f"; and no sign of life from {name_all(quiet)}" if quiet else ""
        return f"lost {self._lost}" if now - self._gone > EXIT_S else ""

    def without_room(self) -> str:
        """Which ranks wait for room on the disk, and where, in words; their log may have no room to say so."""
        return name_all([beat for beat in self.heard_of(f"{RANKS}-") if beat.doing.startswith("wait_disk")])

    def doing(self, name: str) -> str:
        """What it was last known to be at, in words."""
        beats = self.heard_of(f"{RANKS}-" if name == RANKS else name)
        if name == RANKS:
            return f"the loss of {self._lost}" if self._lost else name_all(beats) if beats else ""
        if beats:
            # Of a full disk it may have no log: the status is rewritten in its place.
            waits = read_status(self._paths.status).message.partition(WAITS)[2] if name == ORCHESTRATOR else ""
            return f"waiting for {waits}" if waits else beats[0].doing
        return _last_event(self._paths.event_log(name))

    def others_serve(self, ours: Collection[str]) -> bool:
        """Whether the orchestrator has a server that this launcher did not start."""
        servers = read_status(self._paths.status).servers
        return any(state == "serving" and name not in ours for name, state in servers.items())

    def ask_for_tracebacks(self, guardian: int) -> None:
        """Has the ranks below this process write to their log where each of their threads is (``faulthandler``, in ``step.main``)."""
        here = socket.gethostname()
        asked = [beat for beat in self.heard_of(f"{RANKS}-") if beat.host == here and _descends(beat.pid, guardian)]
        for beat in asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGUSR1)
            time.sleep(APART_S)
        if asked:
            time.sleep(TRACEBACKS_S)


def _descends(pid: int, ancestor: int) -> bool:
    """Whether a process was started below another: its number may be a stranger's by now."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1:
            if pid == ancestor:
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def _last_event(path: Path) -> str:
    """The last row of an event log, in words; the rows of its last second may have died with their process."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            row = json.loads(file.read().strip().rpartition(b"\n")[2])
        age_s = time.time() - (row["t_ns"] + row["dur_ns"]) / 1e9
        fields = " ".join(f"{key} {value}" for key, value in row["fields"].items())
        return f"{row['name']} {fields}".strip() + f", {age_s:.1f} s ago"
    return ""
