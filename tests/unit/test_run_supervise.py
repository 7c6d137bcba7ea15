"""A run ends when its ranks do, when the user says so, or when any process dies. Real processes, each a few lines of Python."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from neox_rl.config.run import RunConfig
from neox_rl.errors import DeadlineError, ProcessDiedError
from neox_rl.run import supervise
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program
from neox_rl.run.supervise import Supervisor
from neox_rl.telemetry.events import EventLog
from neox_rl.telemetry.status import Status, write_status
from tests.unit.small_run import small_config, small_paths

FOREVER = "import time; time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); " + FOREVER
POLITE = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(0)); print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(supervise, "FALL_S", 0.4)
    config = small_config(tmp_path, deadlines={"ranks_start_s": 20.0, "stop_s": 20.0, "shutdown_s": 2.0})
    paths = small_paths(config)
    write_status(paths.status, Status(phase="rl"))
    events = EventLog(paths.event_log("launcher"), "launcher")
    yield Supervisor(config, paths, events)
    events.close()


def program(supervisor: Supervisor, name: str, code: str) -> Program:
    return Program(name, [sys.executable, "-I", "-S", "-c", code], dict(os.environ), supervisor.paths.log(name), None)


def run(supervisor: Supervisor, **codes: str) -> bool:
    return supervisor.run([program(supervisor, name.replace("server", "server-"), code) for name, code in codes.items()])


def with_deadline(supervisor: Supervisor, name: str, seconds: float) -> None:
    metarl = supervisor.config.metarl
    supervisor.config = RunConfig(supervisor.config.neox, replace(metarl, deadlines=replace(metarl.deadlines, **{name: seconds})))


def later(supervisor: Supervisor, seconds: float = 0.0, count: int = 1) -> None:
    """Ctrl-C once the orchestrator has said that it is ready, or after some seconds."""

    def press() -> None:
        log, end = supervisor.paths.log(ORCHESTRATOR), time.monotonic() + (seconds or 10.0)
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
def test_a_killed_process_ends_the_run_at_once_under_its_name_and_log(supervisor: Supervisor, victim: str, how: str) -> None:
    parts = {"server-0": FOREVER, ORCHESTRATOR: FOREVER, RANKS: FOREVER}
    parts[victim] = "import os, signal, time; print('my last word', flush=True); time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    begin = time.monotonic()
    with pytest.raises(ProcessDiedError, match=rf"^{victim} was killed by {how}; log .*{victim}\.log, which ends:\n  my last word$"):
        supervisor.run([program(supervisor, name, code) for name, code in parts.items()])
    assert time.monotonic() - begin < 8.0 and no_process_is_left(supervisor)


def test_a_server_that_ends_with_status_0_has_died_too(supervisor: Supervisor) -> None:
    with pytest.raises(ProcessDiedError, match=r"^server-0 ended with exit status 0"):
        run(supervisor, server0="pass", orchestrator=FOREVER, trainer=FOREVER)


def test_who_fell_with_the_first_is_named_after_it(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FALL_S", 6.0)  # far above what a loaded machine needs to start two processes
    with pytest.raises(ProcessDiedError, match=r"(?s)orchestrator ended with exit status 1.*server-0 ended with exit status 3"):
        late, first = ("import sys, time; time.sleep({}); sys.exit({})".format(*how) for how in ((3.0, 3), (0.5, 1)))
        run(supervisor, server0=late, orchestrator=first, trainer=FOREVER)


def test_ctrl_c_reaches_the_orchestrator_and_the_ranks_end_by_themselves(supervisor: Supervisor) -> None:
    later(supervisor)
    assert run(supervisor, orchestrator=POLITE, trainer="import time; time.sleep(2.0)") is False
    assert supervisor.running[RANKS].returncode == 0 and supervisor.running[ORCHESTRATOR].returncode == 0


def test_a_second_ctrl_c_ends_it_at_once(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    later(supervisor, count=2)
    begin = time.monotonic()
    assert run(supervisor, orchestrator=stubborn + "print('ready', flush=True); " + FOREVER, trainer=stubborn + FOREVER) is False
    assert time.monotonic() - begin < 8.0 and no_process_is_left(supervisor)


def test_ctrl_c_before_the_ranks_are_up_waits_for_nothing(supervisor: Supervisor) -> None:
    write_status(supervisor.paths.status, Status())
    later(supervisor, seconds=0.3)
    begin = time.monotonic()
    assert run(supervisor, orchestrator=FOREVER, trainer=FOREVER) is False
    assert time.monotonic() - begin < 5.0 and no_process_is_left(supervisor)


def test_ctrl_c_that_came_too_late_stopped_nothing(supervisor: Supervisor) -> None:
    write_status(supervisor.paths.status, Status(phase="report", message="finished"))
    supervisor.interrupts.count = 1
    assert run(supervisor, orchestrator="import time; time.sleep(0.5)", trainer="import time; time.sleep(0.5)") is True


def test_ranks_without_an_orchestrator_are_asked_by_a_file(supervisor: Supervisor) -> None:
    waits = f"import os, time\nwhile not os.path.exists({str(supervisor.paths.stop)!r}): time.sleep(0.05)"
    supervisor.interrupts.count = 1
    assert run(supervisor, trainer=waits) is False and supervisor.running[RANKS].returncode == 0


@pytest.mark.parametrize(
    ("deadline", "phase", "interrupts", "orchestrator", "named"),
    [
        ("ranks_start_s", "starting", 0, FOREVER, "the training ranks to come up"),
        ("stop_s", "rl", 1, DEAF, "to save after Ctrl-C"),
        ("shutdown_s", "rl", 0, "pass", "the training ranks to exit"),
    ],
)
def test_every_wait_has_its_deadline(
    supervisor: Supervisor, deadline: str, phase: str, interrupts: int, orchestrator: str, named: str
) -> None:
    with_deadline(supervisor, deadline, 0.8)
    write_status(supervisor.paths.status, Status(phase=phase))
    if interrupts:
        later(supervisor)
    with pytest.raises(DeadlineError, match=rf"{named}.*trainer\.log"):
        run(supervisor, orchestrator=orchestrator, trainer=FOREVER)
    assert no_process_is_left(supervisor)


def test_signals_are_counted_only_inside(supervisor: Supervisor) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with supervisor.interrupts.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert supervisor.interrupts.count == 2 and signal.getsignal(signal.SIGTERM) is before


def test_ranks_that_end_without_a_last_word_died_whatever_their_exit_status(supervisor: Supervisor) -> None:
    begin = time.monotonic()
    with pytest.raises(ProcessDiedError, match=r"trainer ended with exit status 0; log .*trainer\.log"):
        run(supervisor, orchestrator=FOREVER, trainer="pass")
    assert time.monotonic() - begin < 10.0 and no_process_is_left(supervisor)
