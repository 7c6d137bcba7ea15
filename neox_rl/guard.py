"""Starting and ending the processes of a run so that none is left behind, whatever happens to whom.

    process = guarded_popen(argv, env, run_dir / "logs/server0.log", cores=(0,))
    ...
    stop(process, deadline_s=20)

``process`` is the guardian (``neox_rl/guardian.py``): its exit status is the program's, and signals sent to it reach the program's whole
process group. If this process ends, by ``kill -9`` or otherwise, the group ends too.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from neox_rl.errors import ProcessDiedError

GUARDIAN = Path(__file__).with_name("guardian.py")
PRIVATE = "NEOX_RL_PRIVATE"
"""In the environment of a guarded program: which variables are to name a directory of its own (``guardian.py``)."""
_LAST_LINES = 15
_LAST_BYTES = 8192
_KILL_S = 15.0


class GuardedProcess(subprocess.Popen[bytes]):
    """A ``Popen`` of the guardian, with the program's ``argv`` and ``log_path``, and the write end of the lifeline.

    ``is_over``: it was stopped, and whoever has its number now is a stranger.
    """

    def __init__(self, argv: Sequence[str], log_path: Path, lifeline: int, command: list[str], **popen: Any) -> None:
        self.program, self.log_path, self.lifeline, self.is_over = tuple(argv), log_path, lifeline, False
        super().__init__(command, **popen)

    def __del__(self, *args: Any) -> None:
        with contextlib.suppress(OSError):
            os.close(self.lifeline)
        super().__del__(*args)


def guarded_popen(
    argv: Sequence[str], env: Mapping[str, str], log_path: Path, cores: Collection[int] | None = None, grace_s: float = 10.0
) -> GuardedProcess:
    """Starts ``argv`` in a session of its own with exactly ``env``, its output appended to ``log_path``, on these CPU ``cores``.

    ``grace_s`` is how long the group gets to end after this process is gone. A program that cannot be started exits with 127 and says so
    in the log.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", str(GUARDIAN), str(reader), str(grace_s), ",".join(map(str, sorted(cores or ()))), *argv]
    try:
        with log_path.open("ab") as log:
            return GuardedProcess(
                argv,
                log_path,
                writer,
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(reader,),
                start_new_session=True,
            )
    finally:
        os.close(reader)


def with_own_tmp(env: Mapping[str, str], *more: str) -> dict[str, str]:
    """``env`` for a program of ``guarded_popen`` whose TMPDIR, and what the variables ``more`` name, is a directory of its own, which goes
    with it: libraries leave files there when they are killed, vLLM with every start.

    What torch compiles stays where it always is, and the next start finds it.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody has this number
        user = f"uid_{os.getuid()}"
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{user}")
    # Last, not first: torch sets it again, and a process whose first variable has moved cannot change its title ("VLLM::EngineCore").
    return {**env, "TORCHINDUCTOR_CACHE_DIR": env.get("TORCHINDUCTOR_CACHE_DIR", str(compiled)), PRIVATE: ",".join(("TMPDIR", *more))}


def stop(process: GuardedProcess, deadline_s: float) -> int:
    """SIGTERM to the program's group, SIGKILL after ``deadline_s``. Returns the exit status once the whole group is gone.

    Signals nobody when it is called again.
    """
    for number, wait_s in ((signal.SIGTERM, deadline_s), (signal.SIGQUIT, _KILL_S), (signal.SIGKILL, _KILL_S)):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
    status = process.wait(_KILL_S)
    if not process.is_over:
        _end_session(process.pid)
        process.is_over = True
    return status


def _end_session(leader: int) -> None:
    """A guardian that was killed itself could end nobody but its child: who is left in its session goes now.

    ``leader`` was waited for. Its number is nobody's as long as the session has a member: where somebody has it, the session is his.
    """
    if Path(f"/proc/{leader}").exists():
        return
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)


def died(name: str, process: GuardedProcess, why: str = "", doing: str = "") -> ProcessDiedError:
    """The error for a process that ended when it should not have: its status, its log, the last lines of it.

    ``why`` stands for the status where the launcher ended it; ``doing`` is what it was last known to be at.
    """
    at = f", last known at {doing}" if doing else ""
    said = f"{name} {why or ending(process)}{at}; log {process.log_path}, which ends:\n{last_lines(process.log_path)}"
    return ProcessDiedError(said)


def ending(process: GuardedProcess) -> str:
    """How it ended, in words. A wrapper tells of a child that was killed by signal n as exit status 256 - n (DeepSpeed's runner)."""
    code = process.poll()
    if code is None or code >= 0:
        child = next((f" (a process of it was killed by {s.name})" for s in signal.Signals if code == 256 - s), "")
        return "is running" if code is None else f"ended with exit status {code}{child}"
    return f"was killed by {signal.Signals(-code).name}"


def last_lines(log_path: Path) -> str:
    """The end of a log, indented; for error messages."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - _LAST_BYTES))
            text = log.read().decode(errors="replace")
    except OSError as error:
        return f"  (no log: {error})"
    return "\n".join(f"  {line[:300]}" for line in text.splitlines()[-_LAST_LINES:]) or "  (empty)"
