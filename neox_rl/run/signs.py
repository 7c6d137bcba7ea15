"""Who shows no sign of life, and who stays too long at one thing: judged from beats (``telemetry/heartbeat.py``). Pure.

Silence is a stopped process, or one that holds its interpreter for good. A rank that beats but stays at one step waits for another rank
in a collective: which one can be told from what each is at, so all are named, those that are behind first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox_rl.telemetry.heartbeat import Beat

BUILD, LOAD, PREPARE = "build", "load", "prepare"
HAND_OVER = "hand_over"
WAITING = ("wait_batch", "evaluate", "wait_disk", BUILD, LOAD)
"""Spans of a rank with deadlines of their own: those of the requests to the orchestrator, of a full disk, and of the start."""
STALL_S = 2.0
"""Between two looks: the launcher was stopped itself, perhaps with everything else, and what it did not hear counts for nothing."""
MAX_NAMED = 4


@dataclass(slots=True)
class _Heard:
    """The last beat of a process, when it was heard, and since when the process has been at what it says."""

    beat: Beat
    at: float
    since: float


class Signs:
    """``hear`` takes the newest beats, ``stuck`` says what is wrong with whom, in words; empty where nothing is."""

    def __init__(self, silence_s: float, step_s: float, start_s: float) -> None:
        self._silence_s, self._step_s, self._start_s = silence_s, step_s, start_s
        self._heard: dict[str, _Heard] = {}
        self._looked: float | None = None

    def hear(self, beats: Mapping[str, Beat], now: float, every_s: float) -> None:
        """``every_s``: how often it is called."""
        if self._looked is not None and (missed := now - self._looked - every_s) > STALL_S:
            for heard in self._heard.values():
                heard.at, heard.since = heard.at + missed, heard.since + missed
        self._looked = now
        for process, beat in beats.items():
            before = self._heard.get(process)
            if before is None or before.beat.pid != beat.pid:
                self._heard[process] = _Heard(beat, now, now)
            elif before.beat.number != beat.number:
                since = before.since if before.beat.doing == beat.doing else now
                self._heard[process] = _Heard(beat, now, since)

    def forget(self, prefix: str) -> None:
        """These processes ended."""
        self._heard = {process: heard for process, heard in self._heard.items() if not process.startswith(prefix)}

    def heard_of(self, prefix: str) -> list[Beat]:
        """The last beats of the processes whose name begins so."""
        return [heard.beat for process, heard in self._heard.items() if process.startswith(prefix)]

    def quiet(self, prefix: str, now: float, for_s: float) -> list[Beat]:
        """The last beats of those whose name begins so and who were not heard for ``for_s``."""
        return [h.beat for process, h in self._heard.items() if process.startswith(prefix) and now - h.at > for_s]

    def stuck(self, prefix: str, now: float) -> str:
        """Why the processes whose name begins so cannot be left alone."""
        found = {process: heard for process, heard in self._heard.items() if process.startswith(prefix)}
        silent = [h for h in found.values() if now - h.at > self._patience(h.beat)]
        if silent:
            longest = max(now - h.at for h in silent)
            return f"shows no sign of life for {longest:.0f} s: {name_all([h.beat for h in silent])}"
        slow = [h for h in found.values() if now - h.since > self._step_s and not h.beat.doing.startswith(WAITING)]
        if slow and prefix != "orchestrator":
            behind = sorted(slow, key=lambda h: h.since)
            handing_over = any(h.beat.doing.startswith(HAND_OVER) for h in slow)
            late = [h.beat for h in found.values() if handing_over and h.beat.doing.startswith(WAITING)]
            found_late = f"; who did not take it: {name_all(late)}" if late else ""
            return f"stands still for {now - behind[0].since:.0f} s: {name_all([h.beat for h in behind])}{found_late}"
        return ""

    def _patience(self, beat: Beat) -> float:
        """Imports and compilations of the start hold the interpreter for long, and longer where many processes start on few cores; so does
        torch while it reads a large tensor of a checkpoint."""
        return max(self._start_s, self._silence_s) if beat.doing.startswith((BUILD, LOAD, PREPARE)) else self._silence_s


def name_all(beats: list[Beat]) -> str:
    """``trainer-1 (pid 17 on node3), at train_step phase rl step 4``."""
    named = [f"{b.process} (pid {b.pid} on {b.host}), at {b.doing or 'nothing that is recorded'}" for b in beats[:MAX_NAMED]]
    return "; ".join(named) + (f"; and {len(beats) - MAX_NAMED} more" if len(beats) > MAX_NAMED else "")
