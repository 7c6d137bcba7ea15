"""Starts the processes of a run, watches them, heals what can be healed, and ends every one of them however the run goes.

start all -> watch -> Ctrl-C: ask to stop, once; end at once, twice
                   -> a process ends that should not, is stuck, or is to be started again: ``recovery`` decides
                        it is started again | orchestrator and ranks resume | the others go on | all are ended, an error names it
                   -> the ranks are done: the others are ended
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType

from neox_rl.build_locks import remove_stale_locks
from neox_rl.config.run import RunConfig
from neox_rl.errors import DeadlineError, ProcessDiedError
from neox_rl.guard import GuardedProcess, died, ending, stop
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program
from neox_rl.run.recovery import Act, Decision, Recovery
from neox_rl.run.resume import has_checkpoint, next_attempt
from neox_rl.run.watch import Watch
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.heartbeat import forget_beats
from neox_rl.telemetry.jsonl import unless_full
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import ProcessState, read_status, write_processes, write_status

POLL_S = 0.1
FALL_S = 2.0
"""After a death: one brings others down, and the first to be seen need not be the first that fell."""
AT_ONCE_S = 1.0
"""What is left to a process that must not live on: after a second Ctrl-C, or when its place is to be taken."""


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

    def __post_init__(self) -> None:
        self._programs: dict[str, Program] = {}
        self._states: dict[str, ProcessState] = {}
        self._recovery = Recovery(self.config)
        self._watch = Watch(self.config, self.paths)
        self._due: dict[str, float] = {}
        self._healing: dict[str, tuple[int, int]] = {}
        self._up = False
        self._now = time.monotonic()
        self._asked: float | None = None
        self._told: GuardedProcess | None = None
        self._served: float | None = None
        self._trained = self._enough = self._full = False

    def run(self, parts: list[Program]) -> bool:
        """True when the ranks trained everything, False when the user stopped the run. Raises ProcessDiedError, DeadlineError."""
        self._programs = {program.name: program for program in parts}
        grace_s = self.config.metarl.deadlines.shutdown_s
        try:
            for name in self._programs:
                self._start(name)
            with self.events.span("start_ranks"):
                while not self._over() and not self._up:
                    self._look()
            while not self._over():
                self._look()
            # Ctrl-C may have come too late to stop anything: then the trainer's last word is that it finished.
            return self.interrupts.count == 0 or read_status(self.paths.status).message == "finished"
        finally:
            with self.events.span("shutdown"):
                self._stop_all(grace_s)

    def _start(self, name: str) -> None:
        prefix = f"{name}-" if name == RANKS else name
        forget_beats(self.paths.beats, prefix)
        self._watch.forget(prefix)
        (self.paths.restart / name).unlink(missing_ok=True)  # what was asked of the process before
        for lock in remove_stale_locks(self._programs[name].env):
            self._warn(f"removed {lock}, which a killed compilation left")
        if name in self.running:
            self._programs[name] = self._programs[name].drawing_anew("start")
        self.running[name] = self._programs[name].start(self.config.metarl.deadlines.shutdown_s)
        self._recovery.started(name, time.monotonic())
        self._show(name, replace(self._states.get(name, ProcessState()), state="running"))

    def _over(self) -> bool:
        """Whether the ranks are done, and the orchestrator with them; or the user has no more patience."""
        if self.interrupts.count and not self._up and read_status(self.paths.status).phase == "starting":
            self.interrupts.count = max(2, self.interrupts.count)  # nothing is trained yet
        if self.interrupts.count >= 2 or self._enough:
            return True
        if RANKS in self._due or self.running[RANKS].poll() != 0:
            return False
        orchestrator = self.running.get(ORCHESTRATOR)
        if orchestrator is None or orchestrator.poll() == 0:
            return True
        # One that died after the trainer's last word has nothing left to do, nor has its successor.
        return self._said_last_word() and (ORCHESTRATOR in self._due or self._states[ORCHESTRATOR].restarts > 0)

    def _said_last_word(self) -> bool:
        """Whether the trainer has said that all is trained and saved: it brings the run to its last phase."""
        self._trained = self._trained or read_status(self.paths.status).phase == "report"
        return self._trained

    def _look(self) -> None:
        """One round. Raises what ends the run."""
        self._now = time.monotonic()
        for name, why in self._fallen():
            self._heal(name, why)
        for name in [name for name, due in self._due.items() if due <= self._now]:
            del self._due[name]
            self._start(name)
            if name in self._healing:  # else it was well, and goes along with the ranks
                self.events.instant("restarted", process=name, restarts=self._states[name].restarts)
                self.events.flush()
        if not self._up and (RANKS not in self._due) and read_status(self.paths.status).phase != "starting":
            self._up = True
            self._healed(RANKS)
        if ORCHESTRATOR in self._healing and ORCHESTRATOR not in self._due and self._watch.orchestrator_is_up():
            self._healed(ORCHESTRATOR)
        if (room := self._watch.without_room()) and not self._full:
            self._warn(f"the disk is full, make room: {room}")
        self._full = bool(room)
        self._check_deadlines()
        time.sleep(POLL_S)

    def _check_deadlines(self) -> None:
        deadlines, now, log = self.config.metarl.deadlines, self._now, f"log {self.paths.log(RANKS)}"
        if self.interrupts.count and self._asked is None:
            self._asked = now
        if self._asked is not None:
            self._ask_to_stop()
            if now - self._asked > deadlines.stop_s:
                self._watch.ask_for_tracebacks(self.running[RANKS].pid)
                raise DeadlineError("the trainer to save after Ctrl-C", now - self._asked, log)
        orchestrator = self.running.get(ORCHESTRATOR)
        done = {name for name in (RANKS, ORCHESTRATOR) if (process := self.running.get(name)) is not None and process.poll() == 0}
        if not done or orchestrator is None or RANKS in self._due:
            return
        self._served = now if self._served is None else self._served
        if now - self._served > deadlines.shutdown_s:
            late = "the orchestrator to end after the ranks" if RANKS in done else "the training ranks to exit after their last word"
            name = ORCHESTRATOR if RANKS in done else RANKS
            self._watch.ask_for_tracebacks(self.running[RANKS].pid)
            error = DeadlineError(late, now - self._served, f"log {self.paths.log(name)}")
            if not self._said_last_word():
                raise error
            self._warn(f"{error}; all is trained and saved, so they are ended")
            self._enough = True

    def _fallen(self) -> list[tuple[str, str]]:
        """Who must be healed, and why where it was not its own end: in the order of the parts."""
        found: list[tuple[str, str]] = []
        for name, process in self.running.items():
            if name in self._due or self._states[name].state == "lost":
                continue
            code = process.poll()
            if code is None:
                why = "" if self._said_last_word() else self._watch.reason_to_end(name, self._up, self._now)
            elif code != 0 or name not in (RANKS, ORCHESTRATOR) or self._ended_too_early(name):
                why = ending(process)
            else:
                continue
            if why:
                found.append((name, why))
        return found

    def _ended_too_early(self, name: str) -> bool:
        """Ranks that ended with status 0: so does DeepSpeed's runner when its inner launcher is killed. Without a last word they died."""
        if name != RANKS or ORCHESTRATOR not in self.running:
            return False
        self._served = self._now if self._served is None else self._served
        return self._now - self._served > FALL_S and not self._said_last_word()

    def _heal(self, name: str, why: str) -> None:
        """Ends what is left of it, and has ``recovery`` decide. Raises ProcessDiedError where that ends the run."""
        process = self.running[name]
        status = process.poll()
        doing = self._watch.doing(name) if status is not None or name != RANKS else ""  # else ``why`` has it
        if status is None and name == RANKS:
            self._watch.ask_for_tracebacks(process.pid)
        stop(process, AT_ONCE_S)  # also of one that has ended: a guardian that was killed leaves somebody
        said = died(name, process, why, doing)
        self.events.instant("died", process=name, why=why, doing=doing)
        decision = self._recovery.fell(name, self._now, status, self._watch.others_serve(self._programs))
        if name == RANKS and self._asked is not None:
            decision = Decision(Act.END, decision.used, decision.limit, why="it was saving to stop")
        self._healing[name] = (time.time_ns(), time.monotonic_ns())
        if decision.act is Act.END:
            raise self._end(name, said, decision)
        self._warn(f"{str(said).splitlines()[0].removesuffix(', which ends:')}; {_consequence(name, decision)}")
        if decision.act is Act.RESUME:
            self._resume(decision)
        elif decision.act is Act.RESTART:
            self._due[name] = self._now + decision.delay_s
        state = "lost" if decision.act is Act.GO_ON else "restarting"
        self._show(name, ProcessState(state, decision.used, decision.limit))

    def _end(self, name: str, said: ProcessDiedError, decision: Decision) -> ProcessDiedError:
        """The error that ends the run. Who falls within a moment is named after the first."""
        end, lines = time.monotonic() + FALL_S, [str(said)]
        left = {other: p for other, p in self.running.items() if other != name and other not in self._due and p.poll() is None}
        while time.monotonic() < end and any(process.poll() is None for process in left.values()):
            time.sleep(POLL_S)
        for other, process in left.items():
            if (code := process.poll()) is not None and (code != 0 or other not in (RANKS, ORCHESTRATOR)):
                lines.append(str(died(other, process)))
        if decision.limit:
            lines[0] = lines[0].replace("; log ", f" ({decision.why}); log ", 1)
        return ProcessDiedError("\n".join(lines))

    def _resume(self, decision: Decision) -> None:
        """A new attempt of orchestrator and ranks. The ranks went first: the old publisher is gone before the new one binds its port."""
        self._up, self._served, self._trained = False, None, False
        if (orchestrator := self.running.get(ORCHESTRATOR)) is not None:
            stop(orchestrator, AT_ONCE_S)
            self._show(ORCHESTRATOR, replace(self._states[ORCHESTRATOR], state="restarting"))
        again = has_checkpoint(self.config, self.paths)
        where = "from the last checkpoint" if again else "from the start: there is no checkpoint yet"
        message = f"restart {decision.used} of {decision.limit}, {where}"
        write_status(self.paths.status, replace(read_status(self.paths.status), phase="starting", message=message))
        attempt = next_attempt(self.paths)
        for name in (ORCHESTRATOR, RANKS):
            if name in self._programs:
                self._programs[name] = self._programs[name].in_attempt(attempt, again and name == RANKS)
                self._due[name] = self._now + decision.delay_s

    def _healed(self, name: str) -> None:
        if name in self._healing:
            wall_ns, start_ns = self._healing.pop(name)
            self.events.add_span("heal", wall_ns, time.monotonic_ns() - start_ns, process=name)
            self.events.flush()

    def _show(self, name: str, state: ProcessState) -> None:
        self._states[name] = state
        write_processes(self.paths.processes, self._states)

    def _warn(self, text: str) -> None:
        sys.stderr.write(f"warning: {text}\n")
        self.events.flush()  # a fault must be on the disk when its cause comes for the launcher too
        with unless_full(), self.paths.log("launcher").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _ask_to_stop(self) -> None:
        """Once to each orchestrator: one that was started again meanwhile must hear of it too, when it can."""
        if self._said_last_word():
            return  # a signal would only hit processes that are ending
        orchestrator = self.running.get(ORCHESTRATOR)
        if orchestrator is None:
            self.paths.stop.touch()
        elif orchestrator.poll() is None and orchestrator is not self._told and ORCHESTRATOR not in self._healing:
            self._told = orchestrator
            orchestrator.send_signal(signal.SIGINT)

    def _stop_all(self, grace_s: float) -> None:
        """All at once, under one deadline."""
        end = time.monotonic() + (grace_s if self.interrupts.count < 2 else AT_ONCE_S)
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            stop(process, max(0.0, end - time.monotonic()))


def _consequence(name: str, decision: Decision) -> str:
    if decision.act is Act.GO_ON:
        return decision.why
    what = "orchestrator and ranks start again" if decision.act is Act.RESUME else f"{name} is started again"
    return f"{what} ({decision.used} of {decision.limit})"
