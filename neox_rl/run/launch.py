"""The launcher: prepares the run directory, starts every process, watches them, ends them all, and reports.

    prepare -> servers, orchestrator, ranks -> watch -> stop -> report.html, summary.json, table

A process that ends when it should not have ends the run at once, with an error that names it and its log. Ctrl-C asks the
orchestrator to stop: the trainer saves after its step and the run ends; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from neox_rl.config.derived import hf_config
from neox_rl.config.dump import dump
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, DeadlineError, NeoxRLError, ProcessDiedError
from neox_rl.guard import GuardedProcess, died, stop
from neox_rl.problems.tokenizer import SymbolicTokenizer, load_tokenizer
from neox_rl.run.endpoints import choose_endpoints, write_endpoints
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program, programs
from neox_rl.telemetry.display import LiveDisplay
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import write_json
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.report import write_report
from neox_rl.telemetry.status import Status, read_status, write_status
from neox_rl.telemetry.summary import write_summary
from neox_rl.telemetry.table import print_table

POLL_S = 0.2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INTERRUPTED = 130
"""Exit status of a run that the user stopped, as a shell has it for Ctrl-C."""


@dataclass
class _Interrupts:
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
    """Starts programs, watches them, and ends every one of them however the run goes."""

    config: RunConfig
    paths: RunPaths
    events: EventLog
    running: dict[str, GuardedProcess] = field(default_factory=dict)
    interrupts: _Interrupts = field(default_factory=_Interrupts)

    def run(self, parts: list[Program]) -> bool:
        """True when the ranks trained everything, False when the user stopped the run. Raises ProcessDiedError, DeadlineError."""
        grace_s = self.config.metarl.deadlines.shutdown_s
        try:
            for program in parts:
                self.running[program.name] = program.start(grace_s)
            self._watch()
        finally:
            with self.events.span("shutdown"):
                self._stop_all(grace_s)
        return self.interrupts.count == 0

    def _watch(self) -> None:
        deadlines = self.config.metarl.deadlines
        started, stop_by, asked = time.monotonic(), float("inf"), False
        ended: float | None = None
        while self.running[RANKS].poll() is None:
            self._check_alive()
            now = time.monotonic()
            if read_status(self.paths.status).phase == "starting" and now - started > deadlines.ranks_start_s:
                raise DeadlineError("the training ranks to come up", now - started, f"log {self.paths.log(RANKS)}")
            if self.interrupts.count and not asked:
                asked, stop_by = True, now + deadlines.stop_s
                self._ask_to_stop()
            if self.interrupts.count > 1:
                return
            if ended is None and ORCHESTRATOR in self.running and self.running[ORCHESTRATOR].poll() == 0:
                ended = now  # it ends once the trainer says that it is done: the ranks have only to exit
            if ended is not None and now - ended > deadlines.shutdown_s:
                raise DeadlineError("the training ranks to exit after their last word", now - ended, f"log {self.paths.log(RANKS)}")
            if now > stop_by:
                raise DeadlineError("the trainer to save after Ctrl-C", deadlines.stop_s, f"log {self.paths.log(RANKS)}")
            time.sleep(POLL_S)
        self._check_alive()
        if orchestrator := self.running.get(ORCHESTRATOR):
            try:
                orchestrator.wait(deadlines.shutdown_s)
            except subprocess.TimeoutExpired as error:
                hint = f"log {self.paths.log(ORCHESTRATOR)}"
                raise DeadlineError("the orchestrator to end after the ranks", deadlines.shutdown_s, hint) from error
            self._check_alive()

    def _check_alive(self) -> None:
        """Raises for a process that failed, and for a server that ended at all."""
        fallen = [n for n, p in self.running.items() if p.poll() is not None and (p.poll() != 0 or n not in (RANKS, ORCHESTRATOR))]
        if not fallen:
            return
        time.sleep(1.0)  # one death brings others down: name those that fell within the same second too
        fallen += [n for n, p in self.running.items() if n not in fallen and p.poll() not in (None, 0)]
        raise ProcessDiedError("\n".join(str(died(name, self.running[name])) for name in fallen))

    def _ask_to_stop(self) -> None:
        target = self.running.get(ORCHESTRATOR) or self.running[RANKS]
        if target.poll() is None:
            target.send_signal(signal.SIGINT)

    def _stop_all(self, grace_s: float) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for name in (RANKS, ORCHESTRATOR, *self.running):
            if name in self.running:
                stop(self.running[name], grace_s)


def launch(config: RunConfig, script: str, resume: bool) -> int:
    """Runs to the end; the exit status. Raises ConfigError before anything starts, ProcessDiedError and DeadlineError later."""
    paths = prepare(config, resume)
    machine = Machine.here()
    endpoints = choose_endpoints(config, _write_model(config, paths))
    write_endpoints(paths, endpoints)
    write_status(paths.status, Status(message="starting processes"))
    parts = programs(config, paths, endpoints, machine, script, resume, os.environ)
    events = EventLog(paths.event_log("launcher"), "launcher")
    supervisor = Supervisor(config, paths, events)
    try:
        with supervisor.interrupts.caught(), LiveDisplay(paths.status, f"neox-rl  {paths.root}"):
            finished = supervisor.run(parts)
    except NeoxRLError as error:
        write_status(paths.status, Status(phase="failed", message=str(error).splitlines()[0]))
        _report(paths)
        raise
    finally:
        events.close()
    write_status(paths.status, Status(phase="done", message="" if finished else "stopped by the user; --resume continues"))
    _report(paths)
    return 0 if finished else INTERRUPTED


def prepare(config: RunConfig, resume: bool) -> RunPaths:
    """The run directory with its config. An earlier run of the same name is moved aside, never overwritten."""
    paths = RunPaths.of(Path(config.metarl.runs_dir) / config.metarl.name)
    if resume:
        if not paths.config.is_file():
            raise ConfigError(f"--resume: there is no run {paths.root}; leave --resume out, or give the --name of a run that is there")
    elif paths.root.exists():
        paths.root.rename(_free_name(paths.root))
    paths.create()
    paths.config.write_text(dump(config))
    return paths


def _free_name(root: Path) -> Path:
    return next(path for n in range(1, 1 << 20) if not (path := root.with_name(f"{root.name}.{n}")).exists())


def _write_model(config: RunConfig, paths: RunPaths) -> int:
    """What servers and transformers read beside the weights: config and tokenizer. Returns the vocabulary's size."""
    directory = paths.root / "model"
    directory.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems)
    if isinstance(tokenizer, SymbolicTokenizer):
        tokenizer.save(directory)
    else:
        for name in TOKENIZER_FILES:
            source = Path(config.metarl.tokenizer.path) / name
            if source.is_file():
                (directory / name).write_bytes(source.read_bytes())
    write_json(directory / "config.json", hf_config(config, tokenizer.vocab_size, eos_id=tokenizer.eos_id), indent=2)
    return tokenizer.vocab_size


def _report(paths: RunPaths) -> None:
    summary = write_summary(str(paths.root))
    write_report(paths.root)
    print_table(paths, summary)
