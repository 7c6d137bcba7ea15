"""Starts the processes of a run, watches them, and ends every one of them however the run goes.

start all -> watch -> Ctrl-C: ask to stop, once; end at once, twice
                   -> a process ends that should not: the others are ended, an error names it
                   -> the ranks are done: the others are ended
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from neox_rl.config.run import RunConfig
from neox_rl.errors import DeadlineError, ProcessDiedError
from neox_rl.guard import GuardedProcess, died, stop
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import read_status

POLL_S = 0.2
FALL_S = 2.0
"""After a death: one brings others down, and the first to be seen need not be the first that fell."""
AT_ONCE_S = 1.0
"""What is left to the processes after a second Ctrl-C."""


@dataclass
class Interrupts:
    """Counts Ctrl-C and SIGTERM while the run goes on."""

    count: int = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.count += 1

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Supervisor:
    """``run`` does all of it. Signals are counted by ``interrupts.caught()``, which the caller wraps around."""

    config: RunConfig
    paths: RunPaths
    events: EventLog
    running: dict[str, GuardedProcess] = field(default_factory=dict)
    interrupts: Interrupts = field(default_factory=Interrupts)

    def run(self, parts: list[Program]) -> bool:
        """True when the ranks trained everything, False when the user stopped the run. Raises ProcessDiedError, DeadlineError."""
        grace_s = self.config.metarl.deadlines.shutdown_s
        try:
            for program in parts:
                self.running[program.name] = program.start(grace_s)
            self._start()
            self._watch()
            # Ctrl-C may have come too late to stop anything: then the trainer's last word is that it finished.
            return self.interrupts.count == 0 or read_status(self.paths.status).message == "finished"
        finally:
            with self.events.span("shutdown"):
                self._stop_all(grace_s)

    def _start(self) -> None:
        """Returns when the first rank has said hello, or ended, or the user wants no more of it: nothing is trained yet."""
        with self.events.span("start_ranks"):
            begin, limit_s = time.monotonic(), self.config.metarl.deadlines.ranks_start_s
            while self.running[RANKS].poll() is None and not self.interrupts.count and read_status(self.paths.status).phase == "starting":
                self._check_alive()
                if time.monotonic() - begin > limit_s:
                    raise DeadlineError("the training ranks to come up", limit_s, f"log {self.paths.log(RANKS)}")
                time.sleep(POLL_S)
        if self.interrupts.count and read_status(self.paths.status).phase == "starting":
            self.interrupts.count = max(2, self.interrupts.count)

    def _watch(self) -> None:
        deadlines, log = self.config.metarl.deadlines, f"log {self.paths.log(RANKS)}"
        asked: float | None = None
        served: float | None = None
        while self.running[RANKS].poll() is None and self.interrupts.count < 2:
            self._check_alive()
            now = time.monotonic()
            if self.interrupts.count and asked is None:
                asked = now
                self._ask_to_stop()
            if served is None and ORCHESTRATOR in self.running and self.running[ORCHESTRATOR].poll() == 0:
                served = now  # it ends once the trainer says that it is done: the ranks have only to exit
            if asked is not None and now - asked > deadlines.stop_s:
                raise DeadlineError("the trainer to save after Ctrl-C", now - asked, log)
            if served is not None and now - served > deadlines.shutdown_s:
                raise DeadlineError("the training ranks to exit after their last word", now - served, log)
            time.sleep(POLL_S)
        if self.interrupts.count < 2:
            self._check_alive()
            self._await_orchestrator(deadlines.shutdown_s)

    def _await_orchestrator(self, limit_s: float) -> None:
        """The ranks ended with status 0, and so does DeepSpeed's runner when its inner launcher is killed: the trainer's last word
        brings the run to its last phase, and without that word the ranks died."""
        begin, orchestrator = time.monotonic(), self.running.get(ORCHESTRATOR)
        while orchestrator is not None and orchestrator.poll() is None:
            waited = time.monotonic() - begin
            if waited > FALL_S and read_status(self.paths.status).phase != "report":
                raise died(RANKS, self.running[RANKS])
            if waited > limit_s:
                raise DeadlineError("the orchestrator to end after the ranks", waited, f"log {self.paths.log(ORCHESTRATOR)}")
            time.sleep(POLL_S)
        self._check_alive()

    def _check_alive(self) -> None:
        """Raises for a process that failed, and for a server that ended at all: vLLM exits with 0 when its engine was killed."""
        fallen = self._fallen()
        if fallen:
            end = time.monotonic() + FALL_S
            while time.monotonic() < end and len(self._fallen()) < len(self.running):
                time.sleep(POLL_S)
            fallen += [name for name in self._fallen() if name not in fallen]
            raise ProcessDiedError("\n".join(str(died(name, self.running[name])) for name in fallen))

    def _fallen(self) -> list[str]:
        may_end = (RANKS, ORCHESTRATOR)
        return [n for n, p in self.running.items() if p.poll() is not None and (p.poll() != 0 or n not in may_end)]

    def _ask_to_stop(self) -> None:
        if read_status(self.paths.status).phase == "report":
            return  # all is trained and saved: a signal would only hit processes that are ending
        if orchestrator := self.running.get(ORCHESTRATOR):
            if orchestrator.poll() is None:
                orchestrator.send_signal(signal.SIGINT)
        else:
            self.paths.stop.touch()

    def _stop_all(self, grace_s: float) -> None:
        """All at once, under one deadline."""
        end = time.monotonic() + (grace_s if self.interrupts.count < 2 else AT_ONCE_S)
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            stop(process, max(0.0, end - time.monotonic()))
