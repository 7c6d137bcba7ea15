"""No process of a run outlives it, whoever is killed. Real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from neox_rl.guard import GuardedProcess, died, guarded_popen, stop, with_own_tmp
from neox_rl.guardian import _pid_space, own_directory

DEADLINE_S = 40.0
"""Of what is to come at once: on a loaded machine a process takes seconds to start. No program here ends before it by itself."""
ROOT = Path(__file__).resolve().parents[2]
# A program like a vLLM server: a child in its group, and another one in a session of its own. Prints all pids.
FAMILY = """
import os, signal, subprocess, sys, time
{setup}
sleep = [sys.executable, "-I", "-S", "-c", "{setup}; import time; time.sleep(60)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
print(os.getpid(), *(child.pid for child in children), flush=True)
time.sleep(60)
"""
# Two pieces of shared memory with names.
SHARING = """
import mmap, os, sys, time
def make(name):
    descriptor = os.open("/dev/shm/" + name, os.O_CREAT | os.O_RDWR)
    os.ftruncate(descriptor, 4096)
    return mmap.mmap(descriptor, 4096)
files = [make(name) for name in sys.argv[1:]]
held = [make(f"neox-rl-test-{os.getpid()}-{kind}") for kind in ("left", "shared")]
print(os.getpid(), 0, 0, flush=True)
time.sleep(60)
"""
PLAIN, STUBBORN = "pass", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "it.log"


@pytest.fixture
def family(log: Path) -> Iterator[GuardedProcess]:
    process = guarded_popen(python(FAMILY.format(setup=PLAIN)), os.environ, log)
    yield process
    stop(process, 0.0)


def pids(log: Path, count: int = 3) -> list[int]:
    wait_for(lambda: log.exists() and len(log.read_text().split()) >= count)
    return [int(word) for word in log.read_text().split()[:count]]


def alive(numbers: list[int]) -> list[int]:
    found = []
    for pid in numbers:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "condition did not come"
        time.sleep(0.01)


def test_output_environment_cores_and_exit_status(log: Path) -> None:
    core = min(os.sched_getaffinity(0))
    code = "import os; print(os.environ, os.sched_getaffinity(0)); raise SystemExit(3)"
    process = guarded_popen(python(code), {"ONLY": "this"}, log, cores=(core,))
    assert process.wait(DEADLINE_S) == 3
    assert "'ONLY': 'this'" in log.read_text() and "PATH" not in log.read_text() and f"{{{core}}}" in log.read_text()


def test_the_status_of_a_program_killed_by_a_signal_names_the_signal(log: Path) -> None:
    process = guarded_popen(python("import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"), {}, log)
    assert process.wait(DEADLINE_S) == -signal.SIGSEGV
    message = str(died("server0", process))
    assert "server0 was killed by SIGSEGV" in message and str(log) in message and "last words" in message


def test_a_program_that_does_not_exist_says_so_in_its_log(log: Path) -> None:
    process = guarded_popen(["/nonexistent/program"], {}, log)
    assert process.wait(DEADLINE_S) == 127
    assert "cannot start '/nonexistent/program'" in str(died("server0", process))


def test_stop_ends_the_whole_family_politely(family: GuardedProcess, log: Path) -> None:
    members = pids(log)
    assert stop(family, DEADLINE_S) == -signal.SIGTERM
    assert alive(members) == []


def test_stop_kills_what_does_not_end_in_time(log: Path) -> None:
    process = guarded_popen(python(FAMILY.format(setup=STUBBORN)), os.environ, log)
    members = pids(log)
    assert stop(process, 0.2) == -signal.SIGKILL
    assert alive(members) == []


def test_signals_are_passed_on_so_that_a_program_can_save(log: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); print('ready', flush=True); time.sleep(60)"
    process = guarded_popen(python(code), {}, log)
    wait_for(lambda: "ready" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) == 7


def test_when_the_program_is_killed_its_children_go_too(family: GuardedProcess, log: Path) -> None:
    members = pids(log)
    os.kill(members[0], signal.SIGKILL)
    assert family.wait(DEADLINE_S) == -signal.SIGKILL
    assert alive(members) == []


def test_when_the_guardian_is_killed_the_program_goes_too(family: GuardedProcess, log: Path) -> None:
    program = pids(log)[0]
    child, daemon = pids(log)[1:]
    os.kill(family.pid, signal.SIGKILL)
    wait_for(lambda: not alive([program]))
    stop(family, 0.0)
    wait_for(lambda: not alive([child]))  # whoever started the guardian ends the rest of its session
    os.kill(daemon, signal.SIGKILL)  # in a session of its own nobody is left to find it: the one gap, and two kill -9 wide


@contextlib.contextmanager
def stranger_of_its_own(leaves: bool) -> Iterator[subprocess.Popen[str]]:
    """The leader of a session, which answers a line with the same; if it ``leaves``, its child does, as a daemon."""
    answer = "[print(line, end='', flush=True) for line in sys.stdin]"
    code = f"import os, sys; print(os.getpid(), flush=True); {leaves} and os.fork() and os._exit(0); {answer}"
    with subprocess.Popen(python(code), text=True, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        if leaves:
            leader.wait(DEADLINE_S)
        yield leader


@pytest.mark.parametrize("leaves", [False, True])
def test_whoever_has_the_number_of_a_process_that_was_stopped_is_not_signalled(family: GuardedProcess, leaves: bool) -> None:
    stop(family, DEADLINE_S)
    with stranger_of_its_own(leaves) as stranger:
        family.pid = stranger.pid
        stop(family, DEADLINE_S)
        assert answers(stranger)


def test_a_number_that_was_given_anew_names_another_session(family: GuardedProcess, log: Path) -> None:
    program, child, daemon = pids(log)
    family.send_signal(signal.SIGKILL)
    family.wait(DEADLINE_S)
    with stranger_of_its_own(False) as stranger:
        family.pid = stranger.pid
        stop(family, DEADLINE_S)
        assert answers(stranger)
    wait_for(lambda: not alive([program]))
    for left in alive([child, daemon]):
        os.kill(left, signal.SIGKILL)


def answers(stranger: subprocess.Popen[str]) -> bool:
    assert stranger.stdin is not None and stranger.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        stranger.stdin.write("well\n")
        stranger.stdin.flush()
    return stranger.stdout.readline() == "well\n"


@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a forked child that keeps the pipe open"])
def test_when_the_launcher_is_killed_everything_goes(log: Path, tmp_path: Path, forked: bool) -> None:
    code = f"""
import os, pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from neox_rl.guard import guarded_popen
process = guarded_popen({python(FAMILY.format(setup=STUBBORN))!r}, os.environ, pathlib.Path({str(log)!r}), grace_s=0.2)
child = os.fork() if {forked} else 0
if not child and {forked}:
    time.sleep(40)
    os._exit(0)
print(process.pid, flush=True)
time.sleep(60)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    guardian = int(launcher.stdout.readline())
    members = [guardian, *pids(log)]
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_for(lambda: not alive(members))


def test_dropping_the_last_reference_ends_the_program(log: Path) -> None:
    process = guarded_popen(python(FAMILY.format(setup=PLAIN)), os.environ, log, grace_s=1.0)
    members = pids(log)
    with pytest.warns(ResourceWarning):
        del process
    wait_for(lambda: not alive(members))


def noted(process: GuardedProcess, *paths: Path) -> bool:
    """Whether the guardian has seen them, which looks from time to time."""
    records = "".join(record.read_text() for record in Path("/dev/shm").glob(f"neox-rl-shm-{process.pid}-*"))
    return all(str(path) in records for path in paths)


@pytest.mark.parametrize("records", [0, 50], ids=["at once", "after a long look through the records of guardians that are gone"])
def test_named_shared_memory_of_killed_processes_goes_and_that_of_others_stays(log: Path, records: int) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for n in range(records):
        Path(f"/dev/shm/neox-rl-shm-{gone.pid}-{n}").write_text(f"{gone.pid} 5 {_pid_space()}\n")
    process = guarded_popen(python(SHARING), os.environ, log)
    pid = pids(log, 1)[0]
    left, shared = (Path(f"/dev/shm/neox-rl-test-{pid}-{kind}") for kind in ("left", "shared"))
    with shared.open("rb"):
        wait_for(lambda: noted(process, left, shared))
        os.kill(pid, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
        assert not left.exists() and shared.exists()
    shared.unlink()


def test_named_shared_memory_that_a_killed_guardian_left_goes_with_the_next_one(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="neox-rl-test-files-") as directory:
        file = Path(directory, "a-model-that-was-staged-there")
        # The next one may be of another run of this user on this machine: then once more.
        assert any(_left_by_a_killed_guardian(tmp_path / f"{n}.log", tmp_path, file) for n in range(2)), "who could remove them is gone"


def _left_by_a_killed_guardian(log: Path, tmp_path: Path, file: Path) -> bool:
    """False where what it left is gone before this test starts another."""
    process = guarded_popen([*python(SHARING), str(file.relative_to("/dev/shm"))], os.environ, log)
    pid = pids(log, 1)[0]
    left, shared = (Path(f"/dev/shm/neox-rl-test-{pid}-{kind}") for kind in ("left", "shared"))
    with shared.open("rb"):
        wait_for(lambda: noted(process, left, shared))
        os.kill(process.pid, signal.SIGKILL)
        stop(process, 0.0)
        wait_for(lambda: not alive([pid]))
        if not left.exists():
            shared.unlink()
            return False
        assert guarded_popen(python("pass"), {}, tmp_path / "next.log").wait(DEADLINE_S) == 0
        assert not left.exists() and shared.exists() and file.exists()
    other = Path(f"/dev/shm/neox-rl-test-{pid}-left")
    other.touch()  # its name was given again, to what is nobody's business here
    assert guarded_popen(python("pass"), {}, tmp_path / "next.log").wait(DEADLINE_S) == 0
    assert other.exists() and not shared.exists()
    other.unlink()
    assert not [*Path("/dev/shm").glob(f"neox-rl-shm-{process.pid}-*")]
    return True


def test_a_directory_of_its_own_goes_with_a_killed_program(log: Path) -> None:
    code = """
import os, socket, time
assert os.environ["HERE"] == os.environ["THERE"] and "NEOX_RL_PRIVATE" not in os.environ
socket.socket(socket.AF_UNIX).bind(os.environ["HERE"] + "/stale")
print(os.getpid(), os.environ["HERE"], flush=True)
time.sleep(60)
"""
    process = guarded_popen(python(code), {"NEOX_RL_PRIVATE": "HERE,THERE"}, log)
    wait_for(lambda: len(log.read_text().split()) == 2)
    pid, directory = log.read_text().split()
    assert Path(directory, "stale").is_socket()
    os.kill(int(pid), signal.SIGKILL)
    assert process.wait(DEADLINE_S) == -signal.SIGKILL
    assert not Path(directory).exists()


def test_what_a_killed_program_leaves_in_its_temporary_directory_goes_too(log: Path) -> None:
    code = "import tempfile, time; print(tempfile.mkdtemp('wandb-media'), flush=True); time.sleep(60)"
    process = guarded_popen(python(code), with_own_tmp({}), log)
    wait_for(lambda: len(log.read_text().split()) == 1)
    left = Path(log.read_text().strip())
    assert left.is_dir()
    process.send_signal(signal.SIGQUIT)
    process.wait(DEADLINE_S)
    assert not left.exists()


def test_directories_of_killed_owners_go_with_the_next_start_and_those_of_others_stay(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = Path(own_directory("neox-rl-guest-"))
    said = (mine / ".owner").read_text()
    pid, started, space = said.split()
    assert int(pid) == os.getpid()
    gone = subprocess.Popen(["true"])
    gone.wait()
    cases = {
        "killed": f"{gone.pid} 5 {space}",
        "number-was-given-again": f"{pid} {int(started) + 1} {space}",
        "of-another-boot-or-container": f"{gone.pid} 5 elsewhere",
        "torn": f"{gone.pid}",
        "nobody-says": "",
    }
    for name, owner in cases.items():
        (tmp_path / f"neox-rl-{name}").mkdir()
        (tmp_path / f"neox-rl-{name}" / "socket").touch()
        if owner:
            (tmp_path / f"neox-rl-{name}" / ".owner").write_text(owner)
    (tmp_path / "neox-rl-link").symlink_to(tmp_path / "neox-rl-nobody-says")
    env = os.environ | {"NEOX_RL_PRIVATE": "HOME", "TMPDIR": str(tmp_path)}
    process = guarded_popen(python("import os; print(os.environ['HOME'], flush=True)"), env, log)
    assert process.wait(DEADLINE_S) == 0 and Path(log.read_text().strip()).parent == tmp_path
    stays = {"number-was-given-again", "killed"} ^ cases.keys()
    assert {path.name for path in tmp_path.glob("neox-rl-*")} == {mine.name, "neox-rl-link", *(f"neox-rl-{name}" for name in stays)}
