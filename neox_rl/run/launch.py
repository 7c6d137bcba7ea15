"""The launcher: prepares the run directory, has every process started, watched and ended, and reports.

    prepare -> servers, orchestrator, ranks -> watch -> stop -> report.html, summary.json, table

A process that ends when it should not have is started again where that heals the run (``recovery``); else the run ends at once, with an
error that names it and its log. Ctrl-C asks to stop:
the trainer saves after its step and the run ends with status 130; a second Ctrl-C ends it at once.

By hand: ``deepy.py train.py CONFIG.yml --prepare`` makes the run directory and prints one command a part, to start in any order:

    python -m vllm.entrypoints.openai.api_server ...                              each server, with its environment
    python -m neox_rl.run.orchestrator --run-dir runs/NAME
    torchrun --nproc_per_node N train.py --run-dir runs/NAME                      or mpirun -n N, srun -n N with ``python train.py``
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from neox_rl.config.derived import hf_config, words_around
from neox_rl.config.dump import dump
from neox_rl.config.hf_directory import CONFIG, check_config
from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on
from neox_rl.config.placement import num_ranks
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, WeightError
from neox_rl.keys import Keys
from neox_rl.problems.sources import problems_of_run
from neox_rl.problems.tokenizer import RunTokenizer, SymbolicTokenizer, load_tokenizer, refuse_other_tokens
from neox_rl.queue.journal import LOCK_S
from neox_rl.run.demonstrating import demonstration_source, refuse_unrecorded
from neox_rl.run.endpoints import choose_endpoints, write_endpoints
from neox_rl.run.hosts import BY_SSH, check_hosts, read_hosts
from neox_rl.run.preflight import check_servers
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program, programs
from neox_rl.run.resume import (
    has_checkpoint,
    hold,
    next_attempt,
    refuse_damaged,
    refuse_full_directories,
    refuse_resume,
)
from neox_rl.run.solution_groups import with_references
from neox_rl.run.supervise import Supervisor
from neox_rl.run.tools import make_tool
from neox_rl.telemetry.display import LiveDisplay
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.jsonl import replace_durably, write_json
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.report import write_report
from neox_rl.telemetry.sinks import check_logging
from neox_rl.telemetry.status import Status, read_status, write_status
from neox_rl.telemetry.summary import write_summary
from neox_rl.telemetry.table import print_table

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
INTERRUPTED = 130
"""Exit status of a run that the user stopped, as a shell has it for Ctrl-C."""


def launch(config: RunConfig, script: str, resume: bool) -> int:
    """Runs to the end; the exit status. Raises ConfigError before anything starts, ProcessDiedError and DeadlineError later."""
    check_logging(config.metarl.logging)
    if missing := asyncio.run(check_servers(config.metarl.servers.addresses)):
        raise ConfigError("\n".join(f"metarl.servers.addresses: {line}; start it first, or leave it out" for line in missing))
    with prepared(config, script, resume, by_hand=False) as (paths, parts):
        events = EventLog(paths.event_log("launcher"), "launcher")
        supervisor = Supervisor(config, paths, events)
        finished: bool | None = None
        try:
            with supervisor.interrupts.caught(), LiveDisplay(paths.status, paths.processes, f"neox-rl  {paths.root}"):
                try:
                    finished = supervisor.run(parts)
                    _end(paths, "done", "" if finished else "stopped by the user")
                except BaseException as error:
                    _end(paths, "failed", (str(error) or type(error).__name__).splitlines()[0].removesuffix(", which ends:"))
                    raise
        finally:
            events.close()
            _report(paths, must=finished is True)
        if not finished and has_checkpoint(config, paths):
            print(f"to continue: {shlex.join([*_command(), '--resume'])}")
        return 0 if finished else INTERRUPTED


def _command() -> list[str]:
    return [Path(sys.executable).name, *sys.argv]


def _end(paths: RunPaths, phase: str, message: str) -> None:
    write_status(paths.status, replace(read_status(paths.status), phase=phase, message=message, eta_s=None))


@contextmanager
def prepared(config: RunConfig, script: str, resume: bool, by_hand: bool = True) -> Iterator[tuple[RunPaths, list[Program]]]:
    """The run directory with what the processes read, and the processes; the directory is locked until the context ends.

    ``by_hand``: the user starts the ranks, and ssh need not lead to their hosts.

    Whatever a user can get wrong is found first: a start that fails leaves the directory as it was. Raises ConfigError.
    """
    tokenizer = load_tokenizer(config.metarl.tokenizer, config.metarl.problems, words_around(config))
    _refuse_vocabulary(config, tokenizer)
    if config.metarl.debug.mode == "train_only":
        refuse_unrecorded(config)
    else:
        problems = with_references(config, problems_of_run(config, tokenizer), tokenizer)
        demonstration_source(config, problems.train, tokenizer)
        with ExitStack() as tools:
            make_tool(config, tools)
    endpoints = choose_endpoints(config, tokenizer.vocab_size, _ending_s(config) if resume else 0.0)
    if config.neox.hostfile:
        read_hosts(config)
    if config.neox.launcher in BY_SSH and not by_hand:
        check_hosts(config, endpoints)
    with ExitStack() as stack:
        try:
            paths = _directory(config, resume, stack)
            replace_durably(paths.config, dump(config).encode())
            _write_model(config, paths, tokenizer)
            if curve_on(config.metarl.network):
                Keys.make(paths.keys)
            write_endpoints(paths, endpoints)
            write_status(paths.status, Status(message="starting processes"))
            parts = programs(config, paths, endpoints, Machine.here(), script, resume, os.environ)
            attempt = next_attempt(paths)
            parts = [p.drawing_anew(f"attempt {attempt}") for p in parts] if resume else parts
        except OSError as error:
            where = error.filename or "the run directory"
            raise ConfigError(
                f"metarl.runs_dir = {config.metarl.runs_dir!r}: cannot write {where} ({error.strerror}); set it to a directory with space"
                " left in which you may write"
            ) from error
        yield paths, [p.in_attempt(attempt, resume and p.name == RANKS) if p.name in (RANKS, ORCHESTRATOR) else p for p in parts]


def _refuse_vocabulary(config: RunConfig, tokenizer: RunTokenizer) -> None:
    """Raises ConfigError for a checkpoint that has no rows for all tokens, or those of others; what else must fit is a rule of the
    config."""
    if path := config.metarl.warmstart.hf_checkpoint:
        try:
            check_config(Path(path), hf_config(config, tokenizer.vocab_size))
        except WeightError as error:
            raise ConfigError(f"metarl.warmstart.hf_checkpoint = {path!r}: {error}") from error
        refuse_other_tokens(path, tokenizer.ids)


def _ending_s(config: RunConfig) -> float:
    """How long guardians of a launcher that was killed just now may take to end what it had started. Raises ConfigError where it lives."""
    paths = RunPaths.of(Path(config.metarl.runs_dir) / config.metarl.name)
    if paths.config.is_file():
        hold(paths).close()
    return config.metarl.deadlines.shutdown_s + LOCK_S


def _directory(config: RunConfig, resume: bool, stack: ExitStack) -> RunPaths:
    """The locked directory of the run. An earlier run of the same name is moved aside, never overwritten. Raises ConfigError."""
    paths = RunPaths.of(Path(config.metarl.runs_dir) / config.metarl.name)
    if resume:
        refuse_resume(config, paths)
    if paths.root.exists():
        stack.enter_context(hold(paths))
    if resume:
        refuse_resume(config, paths)  # again: another launcher may have held it until now
        refuse_damaged(config, paths)
        paths.stop.unlink(missing_ok=True)
        for request in paths.restart.glob("*"):
            request.unlink()
        return paths.create()
    refuse_full_directories(config, paths)
    if paths.root.exists():
        paths.root.rename(_free_name(paths.root))  # its lock stays held: whoever opened it before must not move the new run
    stack.enter_context(hold(paths.create()))
    return paths


def _free_name(root: Path) -> Path:
    return next(path for n in range(1, 1 << 20) if not (path := root.with_name(f"{root.name}.{n}")).exists())


def commands(config: RunConfig, parts: list[Program], env: Mapping[str, str]) -> str:
    """One shell command a part, with what it needs beside the environment ``env``. The ranks are given to torchrun, or to srun."""
    lines = []
    for part in parts:
        argv = list(part.argv)
        if part.name == RANKS and config.neox.launcher != "slurm":
            script = next(i for i, word in enumerate(argv) if word == "--run-dir") - 1
            argv = ["torchrun", "--nproc_per_node", str(num_ranks(config)), *argv[script:]]
        extra = [f"{name}={value}" for name, value in part.env.items() if env.get(name) != value]
        pinned = ["taskset", "-c", ",".join(map(str, part.cores))] if part.cores else []
        lines.append(shlex.join([*(["env"] * bool(extra)), *extra, *pinned, *argv]))
    return "\n".join(lines) + "\n"


def _write_model(config: RunConfig, paths: RunPaths, tokenizer: RunTokenizer) -> None:
    """What servers and transformers read beside the weights: config and tokenizer."""
    directory = paths.root / "model"
    directory.mkdir(exist_ok=True)
    if isinstance(tokenizer, SymbolicTokenizer):
        tokenizer.save(directory)
    else:
        for name in TOKENIZER_FILES:
            source = Path(config.metarl.tokenizer.path) / name
            if source.is_file():
                (directory / name).write_bytes(source.read_bytes())
    described = hf_config(config, tokenizer.vocab_size, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    write_json(directory / CONFIG, described, indent=2)


def _report(paths: RunPaths, must: bool) -> None:
    """Also of a run that failed: what is there is shown, and a report that fails then must not hide why the run did."""
    try:
        summary = write_summary(str(paths.root))
        write_report(paths.root)
        print_table(paths, summary)
    except Exception as error:
        if must:
            raise
        sys.stderr.write(f"warning: no report of {paths.root}: {type(error).__name__}: {error}\n")
