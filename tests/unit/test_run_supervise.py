"""A run ends when its ranks do or when the user says so, and heals when a process dies. Real processes, each a few lines of Python."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from neox_rl.config.run import RunConfig
from neox_rl.errors import DeadlineError, ProcessDiedError
from neox_rl.guard import died
from neox_rl.run import recovery, supervise
from neox_rl.run.processes import ATTEMPT, ORCHESTRATOR, RANKS, Program
from neox_rl.run.recovery import Decision, Recovery
from neox_rl.run.supervise import Supervisor
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import ProcessState, Status, read_processes, write_status
from tests.unit.small_run import small_config, small_paths

AT_ONCE_S = 15.0
"""Before the deadlines of 20 s that a run sets for an end in good order: room for a loaded machine."""

FOREVER = "import time; time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); " + FOREVER
POLITE = (
    "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('asked', flush=True), sys.exit(0))); "
    "print('ready', flush=True); time.sleep(60)"
)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervise, "FALL_S", 0.4)
    config = small_config(tmp_path, deadlines={"ranks_start_s": 20.0, "stop_s": 20.0, "shutdown_s": 8.0}, servers={"max_restarts": 0})
    paths = small_paths(config)
    write_status(paths.status, Status(phase="rl"))
    events = EventLog(paths.event_log("launcher"), "launcher")
    yield Supervisor(replace(config, metarl=replace(config.metarl, orchestrator_restarts=0)), paths, events)
    events.close()


def there(path: Path) -> str:
    return f"os.path.exists({str(path)!r})"


def until(*conditions: str) -> str:
    """A program that ends once all of them hold; after a minute in any case."""
    return f"import os, time; any(({' and '.join(conditions)}) or time.sleep(0.05) for _ in range(1200))"


def program(supervisor: Supervisor, name: str, code: str) -> Program:
    return Program(name, [sys.executable, "-I", "-S", "-c", code], dict(os.environ), supervisor.paths.log(name), None)


def run(supervisor: Supervisor, **codes: str) -> bool:
    return supervisor.run([program(supervisor, name.replace("server", "server-"), code) for name, code in codes.items()])


def with_deadline(supervisor: Supervisor, name: str, seconds: float) -> Supervisor:
    metarl = supervisor.config.metarl
    supervisor.config = RunConfig(supervisor.config.neox, replace(metarl, deadlines=replace(metarl.deadlines, **{name: seconds})))
    return supervisor


def later(supervisor: Supervisor, seconds: float = 0.0, count: int = 1) -> None:
    """Ctrl-C once the orchestrator has said that it is ready, or after some seconds."""

    def press() -> None:
        log, end = supervisor.paths.log(ORCHESTRATOR), time.monotonic() + (seconds or 60.0)
        while time.monotonic() < end and (seconds or not log.exists() or "ready" not in log.read_text()):
            time.sleep(0.05)
        for _ in range(count):
            supervisor.interrupts.count += 1
            time.sleep(0.3)

    threading.Thread(target=press, daemon=True).start()


def no_process_is_left(supervisor: Supervisor) -> bool:
    def alive(pid: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        return False

    return all(p.poll() is not None and not alive(p.pid) for p in supervisor.running.values())


def test_a_run_ends_with_its_ranks_and_its_servers_with_it(supervisor: Supervisor) -> None:
    assert run(supervisor, server0=FOREVER, orchestrator="pass", trainer="import time; time.sleep(0.5)") is True
    assert no_process_is_left(supervisor)


@pytest.mark.parametrize(("victim", "how"), [("server-0", "SIGKILL"), (ORCHESTRATOR, "SIGKILL"), (RANKS, "SIGKILL")])
def test_a_process_killed_once_too_often_ends_the_run_at_once_under_its_name_and_log(supervisor: Supervisor, victim: str, how: str) -> None:
    parts = {"server-0": FOREVER, ORCHESTRATOR: FOREVER, RANKS: FOREVER}
    parts[victim] = "import os, signal, time; print('my last word', flush=True); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    begin = time.monotonic()
    with pytest.raises(ProcessDiedError, match=rf"^{victim} was killed by {how}; log .*{victim}\.log, which ends:\n  my last word$"):
        supervisor.run([program(supervisor, name, code) for name, code in parts.items()])
    assert time.monotonic() - begin < AT_ONCE_S and no_process_is_left(supervisor)


def test_a_server_that_ends_with_status_0_has_died_too(supervisor: Supervisor) -> None:
    with pytest.raises(ProcessDiedError, match=r"^server-0 ended with exit status 0"):
        run(supervisor, server0="pass", orchestrator=FOREVER, trainer=FOREVER)


def test_who_fell_with_the_first_is_named_after_it(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FALL_S", 60.0)  # it is over sooner: nobody is left
    first_is_seen = supervisor.paths.root / "seen"
    monkeypatch.setattr(supervise, "died", lambda *of: (first_is_seen.touch(), died(*of))[1])
    with pytest.raises(ProcessDiedError, match=r"(?s)orchestrator ended with exit status 1.*server-0 ended with exit status 3"):
        late = until(there(first_is_seen))
        run(supervisor, server0=f"{late}; raise SystemExit(3)", orchestrator="raise SystemExit(1)", trainer=late)


def test_ctrl_c_reaches_the_orchestrator_and_the_ranks_end_by_themselves(supervisor: Supervisor) -> None:
    later(supervisor)
    asked = f"'asked' in open({str(supervisor.paths.log(ORCHESTRATOR))!r}).read()"
    assert run(supervisor, orchestrator=POLITE, trainer=until(asked)) is False
    assert supervisor.running[RANKS].returncode == 0 and supervisor.running[ORCHESTRATOR].returncode == 0


def test_a_second_ctrl_c_ends_it_at_once(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    later(supervisor, count=2)
    begin = time.monotonic()
    assert run(supervisor, orchestrator=stubborn + "print('ready', flush=True); " + FOREVER, trainer=stubborn + FOREVER) is False
    assert time.monotonic() - begin < AT_ONCE_S and no_process_is_left(supervisor)


def test_ctrl_c_before_the_ranks_are_up_waits_for_nothing(supervisor: Supervisor) -> None:
    write_status(supervisor.paths.status, Status())
    later(supervisor, seconds=0.3)
    begin = time.monotonic()
    assert run(supervisor, orchestrator=FOREVER, trainer=FOREVER) is False
    assert time.monotonic() - begin < AT_ONCE_S and no_process_is_left(supervisor)


def test_ctrl_c_that_came_too_late_stopped_nothing(supervisor: Supervisor) -> None:
    write_status(supervisor.paths.status, Status(phase="report", message="finished"))
    supervisor.interrupts.count = 1
    assert run(supervisor, orchestrator="import time; time.sleep(0.5)", trainer="import time; time.sleep(0.5)") is True


def test_ranks_without_an_orchestrator_are_asked_by_a_file(supervisor: Supervisor) -> None:
    supervisor.interrupts.count = 1
    assert run(supervisor, trainer=until(there(supervisor.paths.stop))) is False and supervisor.running[RANKS].returncode == 0


@pytest.mark.parametrize(
    ("deadline", "interrupts", "orchestrator", "named"),
    [("stop_s", 1, DEAF, "to save after Ctrl-C"), ("shutdown_s", 0, "pass", "the training ranks to exit")],
)
def test_every_wait_has_its_deadline(supervisor: Supervisor, deadline: str, interrupts: int, orchestrator: str, named: str) -> None:
    with_deadline(supervisor, deadline, 0.8)
    if interrupts:
        later(supervisor)
    with pytest.raises(DeadlineError, match=rf"{named}.*trainer\.log"):
        run(supervisor, orchestrator=orchestrator, trainer=FOREVER)
    assert no_process_is_left(supervisor)


def test_ranks_that_do_not_exit_after_their_last_word_are_ended_and_the_run_is_whole(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    with_deadline(supervisor, "shutdown_s", 0.8)
    write_status(supervisor.paths.status, Status(phase="report", message="finished"))
    assert run(supervisor, orchestrator="pass", trainer=FOREVER) is True and no_process_is_left(supervisor)
    assert "for the training ranks to exit after their last word, which did not come" in capsys.readouterr().err


def test_signals_are_counted_only_inside(supervisor: Supervisor) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with supervisor.interrupts.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert supervisor.interrupts.count == 2 and signal.getsignal(signal.SIGTERM) is before


# --- healing


def healing(supervisor: Supervisor, restarts: int = 0) -> Supervisor:
    metarl = supervisor.config.metarl
    metarl = replace(metarl, restarts=restarts, orchestrator_restarts=2, servers=replace(metarl.servers, max_restarts=2))
    return Supervisor(RunConfig(supervisor.config.neox, metarl), supervisor.paths, supervisor.events)


def once(paths: RunPaths, name: str, first: str, then: str) -> str:
    """A program that does ``first`` when it is started for the first time, and ``then`` ever after."""
    mark = str(paths.root / f"{name}-was-here")
    return f"import os\nif os.path.exists({mark!r}):\n    {then}\nelse:\n    open({mark!r}, 'w').close()\n    {first}"


def put(path: Path, words: str) -> str:
    """A program that writes what the expression ``words`` gives at once, as those whom it stands for do: no reader finds half of it."""
    new = f"{path}.new"
    return f"import os; open({new!r}, 'w').write({words}); os.replace({new!r}, {str(path)!r})"


def last_word(paths: RunPaths, after_s: float) -> str:
    """An orchestrator that says so when all is trained."""
    return f"import time; time.sleep({after_s}); {put(paths.status, repr(json.dumps({'phase': 'report'})))}"


def until_said(paths: RunPaths, *also: str) -> str:
    """Ranks that end once the orchestrator has said its last word and the conditions ``also`` hold; after a minute in any case."""
    return until(f"'report' in open({str(paths.status)!r}).read()", *also)


DIE = "import time; time.sleep(0.3); os.kill(os.getpid(), 9)"


def faults(supervisor: Supervisor) -> list[tuple[str, str]]:
    supervisor.events.flush()
    found = [e for e in read_events(supervisor.paths.events) if e.name in ("died", "restarted")]
    return [(e.name, e.fields["process"]) for e in found]


def test_a_server_and_an_orchestrator_that_were_killed_come_back_and_the_ranks_never_know(
    supervisor: Supervisor, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = healing(supervisor)
    back = supervisor.paths.root / "server-is-back"
    server = once(supervisor.paths, "server", DIE, f"open({str(back)!r}, 'w').close(); {FOREVER}")
    orchestrator = once(supervisor.paths, "orchestrator", DIE, last_word(supervisor.paths, 0.5))
    assert run(supervisor, server0=server, orchestrator=orchestrator, trainer=until_said(supervisor.paths, there(back))) is True
    assert sorted(faults(supervisor)) == [(what, who) for what in ("died", "restarted") for who in ("orchestrator", "server-0")]
    said = capsys.readouterr().err
    for name in ("server-0", ORCHESTRATOR):
        assert f"warning: {name} was killed by SIGKILL; log {supervisor.paths.log(name)}; {name} is started again (1 of 2)" in said
    assert read_processes(supervisor.paths.processes)["server-0"] == ProcessState("running", 1, 2)
    assert no_process_is_left(supervisor)


def test_a_crash_loop_ends_the_run_and_says_how_often_it_was_tried(supervisor: Supervisor) -> None:
    supervisor = healing(supervisor)
    with pytest.raises(
        ProcessDiedError, match=r"server-0 ended with exit status 7 \(it was started again 2 times already, and no other server"
    ):
        run(supervisor, server0="raise SystemExit(7)", orchestrator=FOREVER, trainer=FOREVER)
    assert no_process_is_left(supervisor)


def test_a_lost_rank_takes_the_orchestrator_along_and_both_start_again_while_the_servers_stay(supervisor: Supervisor) -> None:
    supervisor = healing(supervisor, restarts=1)
    paths = supervisor.paths
    (paths.checkpoints / "step000001").mkdir()
    said = f"import json, sys; open({str(paths.root / 'said')!r}, 'w').write(json.dumps([sys.argv[1:], os.environ[{ATTEMPT!r}]]))"
    up, healed = until(there(paths.root / "orchestrator-was-here")), f"'\"heal\"' in open({str(paths.event_log('launcher'))!r}).read()"
    trainer = program(supervisor, RANKS, once(paths, "trainer", f"{up}; {DIE}", f"{said}; {until_said(paths, healed)}"))
    orchestrator = program(supervisor, ORCHESTRATOR, once(paths, "orchestrator", FOREVER, last_word(paths, 0.4)))
    assert supervisor.run([program(supervisor, "server-0", FOREVER), orchestrator, trainer]) is True
    assert faults(supervisor) == [("died", RANKS), ("restarted", RANKS)]
    assert json.loads((paths.root / "said").read_text()) == [["--resume"], "1"], "the launcher's own start was not counted here"
    assert [e.fields["process"] for e in read_events(paths.events) if e.name == "heal"] == [RANKS]
    assert no_process_is_left(supervisor)


def test_ranks_that_die_again_right_after_their_start_wait_and_the_orchestrator_with_them(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is away for a moment must not cost every restart that the user allowed."""
    starts: dict[str, list[float]] = {ORCHESTRATOR: [], RANKS: []}
    deaths: list[float] = []

    class Told(Recovery):
        def started(self, name: str, now: float) -> None:
            starts[name].append(now)
            super().started(name, now)

        def fell(self, name: str, now: float, *how: Any) -> Decision:
            deaths.append(now)
            return super().fell(name, now, *how)

    monkeypatch.setattr(supervise, "Recovery", Told)
    monkeypatch.setattr(recovery, "SOON_S", 600.0)  # also where a process takes long to start
    supervisor = healing(supervisor, restarts=2)
    orchestrator = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); " + FOREVER
    with pytest.raises(ProcessDiedError, match=r"trainer ended with exit status 0 \(it was started again 2 times already\)"):
        run(supervisor, orchestrator=orchestrator, trainer="pass")
    assert len(deaths) == len(starts[ORCHESTRATOR]) == len(starts[RANKS]) == 3
    assert min(at[2] for at in starts.values()) - deaths[1] >= 1.0, "the first time at once, then after a second"
    assert faults(supervisor) == [("died", RANKS), ("restarted", RANKS)] * 2 + [("died", RANKS)] and no_process_is_left(supervisor)


def test_ctrl_c_while_ranks_wait_for_their_next_start_ends_the_run(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "BACKOFF_S", 3600.0)
    monkeypatch.setattr(recovery, "LONGEST_BACKOFF_S", 3600.0)
    monkeypatch.setattr(recovery, "SOON_S", 600.0)
    supervisor = healing(supervisor, restarts=2)

    def press() -> None:
        end = time.monotonic() + 60.0
        while time.monotonic() < end and read_processes(supervisor.paths.processes).get(RANKS) != ProcessState("restarting", 2, 2):
            time.sleep(0.05)
        supervisor.interrupts.count += 1

    threading.Thread(target=press, daemon=True).start()
    assert run(supervisor, orchestrator=FOREVER, trainer="raise SystemExit(7)") is False
    assert read_processes(supervisor.paths.processes)[ORCHESTRATOR].state == "restarting" and no_process_is_left(supervisor)


def test_a_server_is_started_again_when_the_orchestrator_asks_for_it(supervisor: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    supervisor = healing(supervisor)
    request = supervisor.paths.restart / "server-0"
    asks = f"{put(request, repr('answers nothing'))}; {until(f'not {there(request)}')}; {last_word(supervisor.paths, 0.0)}"
    assert run(supervisor, server0=FOREVER, orchestrator=asks, trainer=until_said(supervisor.paths)) is True
    assert "server-0 was to be started again: answers nothing; log " in capsys.readouterr().err
    assert not list(supervisor.paths.restart.iterdir())


def beating(supervisor: Supervisor, name: str, then: str) -> str:
    row = {"process": name, "pid": 0, "host": socket.gethostname(), "number": 1, "doing": "train_step phase rl step 3"}
    written = put(supervisor.paths.beats / f"{name}.json", f"json.dumps({row!r} | {{'pid': os.getpid()}})")
    return f"import json, time; {written}; {then}"


def test_a_stopped_rank_is_found_by_its_silence_and_named(supervisor: Supervisor) -> None:
    supervisor = healing(with_deadline(supervisor, "silence_s", 1.0))
    with pytest.raises(
        ProcessDiedError, match=r"trainer shows no sign of life for \d+ s: trainer-0 \(pid \d+ on .*\), at train_step phase rl step 3"
    ):
        run(supervisor, orchestrator=FOREVER, trainer=beating(supervisor, "trainer-0", "time.sleep(0.3); os.kill(os.getpid(), 19)"))
    assert no_process_is_left(supervisor)


def test_ranks_that_stand_still_say_where_they_are_before_they_are_ended(supervisor: Supervisor) -> None:
    supervisor = healing(with_deadline(supervisor, "step_s", 1.0))
    path = supervisor.paths.beats / "trainer-0.json"
    beats = f"import faulthandler, signal; faulthandler.register(signal.SIGUSR1); row = json.load(open({str(path)!r}))\nwhile True:\n"
    beats += f"    time.sleep(0.1); row['number'] += 1; {put(path, 'json.dumps(row)')}"
    with pytest.raises(
        ProcessDiedError, match=r"trainer stands still for \d+ s: trainer-0 .* at train_step phase rl step 3; .*(?s:.*)line \d+ in <module>"
    ):
        run(supervisor, orchestrator=FOREVER, trainer=beating(supervisor, "trainer-0", beats))
    assert no_process_is_left(supervisor)


def starting(supervisor: Supervisor, restarts: int) -> Supervisor:
    """With two ranks, of which the orchestrator has not heard."""
    supervisor.config = replace(supervisor.config, neox=replace(supervisor.config.neox, num_gpus=2))
    write_status(supervisor.paths.status, Status())
    return healing(with_deadline(supervisor, "ranks_start_s", 8.0), restarts)  # a loaded machine takes some of it where nothing hangs


def test_ranks_that_hang_while_they_start_are_named_with_what_they_are_at_and_those_never_heard_of(supervisor: Supervisor) -> None:
    supervisor = starting(supervisor, restarts=0)
    heard = r"trainer-0 \(pid \d+ on .*\), at train_step phase rl step 3; nothing was heard of trainer-1"
    heard += r"; give it longer where nothing is wrong: metarl\.deadlines\.ranks_start_s"
    with pytest.raises(ProcessDiedError, match=rf"^trainer did not come up within 8 s: {heard}; log .*trainer\.log"):
        serving, rank = (beating(supervisor, name, "time.sleep(60)") for name in (ORCHESTRATOR, "trainer-0"))
        run(supervisor, orchestrator=serving, trainer=rank)
    assert no_process_is_left(supervisor)


def test_ranks_that_hang_while_they_start_are_started_again(supervisor: Supervisor) -> None:
    supervisor = starting(supervisor, restarts=1)
    trainer = once(supervisor.paths, "trainer", "import time; time.sleep(60)", until_said(supervisor.paths))
    orchestrator = once(supervisor.paths, ORCHESTRATOR, beating(supervisor, ORCHESTRATOR, FOREVER), last_word(supervisor.paths, 0.4))
    assert run(supervisor, orchestrator=orchestrator, trainer=trainer) is True
    assert faults(supervisor) == [("died", RANKS), ("restarted", RANKS)] and no_process_is_left(supervisor)


def test_a_silent_orchestrator_is_started_again(supervisor: Supervisor) -> None:
    supervisor = healing(with_deadline(supervisor, "silence_s", 1.0))
    stopped = beating(supervisor, ORCHESTRATOR, "os.kill(os.getpid(), 19)")
    orchestrator = once(supervisor.paths, "orchestrator", stopped, last_word(supervisor.paths, 0.2))
    assert run(supervisor, orchestrator=orchestrator, trainer=until_said(supervisor.paths)) is True
    assert faults(supervisor) == [("died", ORCHESTRATOR), ("restarted", ORCHESTRATOR)]


def test_a_rank_whose_process_is_gone_is_noticed_before_its_runner_ends(supervisor: Supervisor) -> None:
    child = beating(supervisor, "trainer-1", "pass")
    runner = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(60)"
    with pytest.raises(ProcessDiedError, match=r"trainer lost trainer-1 \(pid \d+ on .*at train_step"):
        run(supervisor, orchestrator=FOREVER, trainer=runner)
    assert no_process_is_left(supervisor)


def test_ranks_that_end_without_a_last_word_died_whatever_their_exit_status(supervisor: Supervisor) -> None:
    begin = time.monotonic()
    with pytest.raises(ProcessDiedError, match=r"trainer ended with exit status 0; log .*trainer\.log"):
        run(supervisor, orchestrator=FOREVER, trainer="pass")
    assert time.monotonic() - begin < AT_ONCE_S and no_process_is_left(supervisor)
