"""Stands between a process of the run and its parent: no member of the child's process group outlives either of them.

Started by ``neox_rl.guard`` as ``python -I -S guardian.py LIFELINE_FD GRACE_S CORES ARGV...``: standard library only, no imports of the
project, up in 15 ms. The parent holds the other end of the lifeline pipe and never writes to it; its end of file means that the parent is
gone, however it went. Exit status: the child's own, signal included.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1   passed on to the group
    SIGQUIT                            the group is killed now
    lifeline closed                    SIGTERM to the group, SIGKILL after GRACE_S
    child ends                         what is left of its group, and every orphan it left, is killed; so is the shared memory that they had

Shared memory with a name (``/dev/shm``) outlives whoever is killed. Which of it is the group's is seen from time to time in the maps of its
processes; what was there before, or somebody else has mapped or open, stays. It is written down beside it: what a guardian that was killed
had seen, the next one removes.

NEOX_RL_PRIVATE in the environment names variables that are to say where a directory of the program's own is: it is made here, and goes with
the group. A server's sockets lie there. Whose it is stands in it (``own_directory``): what a guardian that was killed has left, the next
one removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_REAP_S = 10.0
_SHARED_MEMORY, _RECORD = "/dev/shm", "neox-rl-shm-"
_PRIVATE, _OWNER = "NEOX_RL_PRIVATE", ".owner"
_LOOK_S = (1.0, 2.0, 5.0)
"""Between looks at the group's shared memory: it is made at the start."""


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the lifeline and the group alone must do."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _signal_group(pgid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


def _spawn(argv: list[str]) -> int:
    """Forks the child into a process group of its own; it is killed if this guardian is."""
    guardian = os.getpid()
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # the child may have done it, and may have executed, first
            os.setpgid(child, child)
        return child
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (*PASSED_ON, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() == guardian:
            os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"cannot start {argv[0]!r}: {error}\n".encode())
    os._exit(127)


def _ended(child: int) -> bool:
    """Whether the child has ended. It is not reaped, so its group id cannot be given to a stranger meanwhile."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _group(pgid: int) -> list[int]:
    """The processes of the group."""
    found = []
    for pid in os.listdir("/proc") if os.path.isdir(_SHARED_MEMORY) else ():
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/stat") as file:
            if int(file.read().rpartition(")")[2].split()[2]) == pgid:
                found.append(int(pid))
    return found


def _mapped(pid: int | str) -> set[str]:
    """Files of shared memory that a process has mapped or open."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
        found |= {line.rstrip("\n").split(None, 5)[5] for line in file if _SHARED_MEMORY in line}
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return {path for path in found if path.startswith(_SHARED_MEMORY + "/") and not path.endswith(" (deleted)")}


def _named() -> set[str]:
    """What there is of shared memory."""
    with contextlib.suppress(OSError):
        return {f"{_SHARED_MEMORY}/{name}" for name in os.listdir(_SHARED_MEMORY) if not name.startswith(_RECORD)}
    return set()


class _SharedMemory:
    """What the group has in ``/dev/shm``, as far as it was seen. Its record says whose it is, as ``.owner``; then inode, path each.

    ``before``: what was there when the child did not run yet. It may be quicker than the look through old records.
    """

    def __init__(self, child: int, before: set[str]) -> None:
        _remove_recorded()
        self._record = f"{_SHARED_MEMORY}/{_RECORD}{os.getpid()}-{_started(os.getpid())}"
        self._child, self._looks, self._next = child, 0, time.monotonic() + _LOOK_S[0]
        self._before, self._seen = before, set[str]()

    def look(self, now: bool = False) -> None:
        """From time to time, or ``now``."""
        if now or time.monotonic() >= self._next:
            self._looks += 1
            self._next = time.monotonic() + _LOOK_S[min(self._looks, len(_LOOK_S) - 1)]
            found: set[str] = set()
            for pid in _group(self._child) if _named() - self._before else ():
                found |= _mapped(pid)
            found &= _named()  # what is below a directory there is somebody's files: a model, a run directory
            self._note(found - self._before - self._seen)
            self._seen |= found

    def _note(self, paths: set[str]) -> None:
        """Without room for it, only this guardian can remove them."""
        lines = []
        for path in sorted(paths):
            with contextlib.suppress(OSError):
                lines.append(f"{os.lstat(path).st_ino} {path}\n")
        if lines and (space := _pid_space()):
            with contextlib.suppress(OSError), open(self._record, "a", errors="surrogateescape", opener=_open_own) as file:
                owner = "" if file.tell() else f"{os.getpid()} {_started(os.getpid())} {space}\n"
                file.write(owner + "".join(lines))

    def remove(self) -> None:
        """Once the group is gone."""
        left = (self._seen - self._before) & _named()
        if left:
            for path in left - _held():
                with contextlib.suppress(OSError):
                    os.unlink(path)
        with contextlib.suppress(OSError):
            os.unlink(self._record)


def _held() -> set[str]:
    """Shared memory that any process has mapped or open."""
    return set().union(*(_mapped(pid) for pid in os.listdir("/proc") if pid.isdigit()))


def _open_own(path: str, flags: int) -> int:
    """Whoever may write there could have put a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _remove_recorded() -> None:
    """What guardians of this user that are gone had seen. What somebody holds stays, and its record with it, for the next one."""
    names = os.listdir(_SHARED_MEMORY) if os.path.isdir(_SHARED_MEMORY) else []
    for record in (f"{_SHARED_MEMORY}/{name}" for name in names if name.startswith(_RECORD)):
        if not _is_nobodys(record, record):
            continue
        held, kept = _held(), False
        with contextlib.suppress(OSError):
            with open(record, errors="surrogateescape", opener=_open_own) as file:
                lines = file.read().split("\n")[1:]
            for line in lines:
                inode, _, path = line.partition(" ")
                with contextlib.suppress(OSError):  # it went meanwhile
                    if os.path.dirname(path) == _SHARED_MEMORY and str(os.lstat(path).st_ino) == inode:  # not another's of that name
                        kept = kept or path in held
                        if path not in held:
                            os.unlink(path)
            if not kept:
                os.unlink(record)


def _watch(child: int, lifeline: int, grace_s: float, wakeup: int, memory: _SharedMemory) -> None:
    """Returns when the child has ended."""
    parent, kill_at = os.getppid(), float("inf")
    # Not ``select``: the lifeline has the number that it has in the parent, which may be beyond 1,023.
    watched = select.poll()
    watched.register(lifeline, select.POLLIN)
    watched.register(wakeup, select.POLLIN)
    while not _ended(child):
        memory.look()
        left = max(0.0, min(1.0, kill_at - time.monotonic()))
        ready = [fd for fd, _ in watched.poll(left * 1e3)]
        for number in os.read(wakeup, 64) if wakeup in ready else b"":
            if number in (signal.SIGQUIT, signal.SIGTERM):
                memory.look(now=True)
            if number == signal.SIGQUIT:
                _signal_group(child, signal.SIGKILL)
            elif number in PASSED_ON:
                _signal_group(child, number)
        # A process that the parent forked keeps the pipe open; the change of parent does not depend on it.
        if kill_at == float("inf") and (lifeline in ready or os.getppid() != parent):
            watched.unregister(lifeline)
            memory.look(now=True)
            kill_at = time.monotonic() + grace_s
            _signal_group(child, signal.SIGTERM)
        if time.monotonic() >= kill_at:
            _signal_group(child, signal.SIGKILL)


def _orphans() -> list[int]:
    """Processes that were handed to this guardian when their parent died (it is their subreaper)."""
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
    return []


def _reap(child: int) -> int:
    """Kills and reaps everything that is left; the child's wait status."""
    _signal_group(child, signal.SIGKILL)
    status = 0
    end = time.monotonic() + _REAP_S
    while time.monotonic() < end:
        try:
            pid, got = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == child:
            status = got
        elif pid == 0:
            for orphan in _orphans():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(orphan, signal.SIGKILL)
            time.sleep(0.01)
    return status


def _make_private() -> str:
    """The directory; empty where the program needs none."""
    names = os.environ.pop(_PRIVATE, "")
    if not names:
        return ""
    directory = own_directory("neox-rl-")
    os.environ.update(dict.fromkeys(names.split(","), directory))
    return directory


def own_directory(prefix: str) -> str:
    """A new temporary directory that says in ``.owner`` who made it: this process. Those of processes that are gone are removed first.

    A process is known by its number, the time of its start, and the boot and the process namespace in which both mean something: what
    another machine or container has made in a shared directory is left alone, and so is what does not say whose it is.
    """
    import shutil  # here: 10 ms that most programs need not wait for
    import tempfile

    for name in os.listdir(parent := tempfile.gettempdir()):
        path = os.path.join(parent, name)
        if name.startswith("neox-rl-") and not os.path.islink(path) and _is_nobodys(path, os.path.join(path, _OWNER)):
            shutil.rmtree(path, ignore_errors=True)
    directory = tempfile.mkdtemp(prefix=prefix)
    if space := _pid_space():
        with contextlib.suppress(OSError), open(os.path.join(directory, _OWNER), "w") as file:  # without room for it, it is left alone
            file.write(f"{os.getpid()} {_started(os.getpid())} {space}")
    return directory


def _is_nobodys(path: str, owner: str) -> bool:
    """Whether this user's process that made it is gone, by the first line of the file ``owner``."""
    try:
        with open(owner) as file:
            pid, started, space = file.readline(200).split()
        mine = os.lstat(path).st_uid == os.geteuid()
        return mine and space == _pid_space() and _started(int(pid)) != started
    except (OSError, ValueError):
        return False


def _started(pid: int) -> str:
    """When a process was started, in ticks since the boot; empty where there is none."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]
    return ""


def _pid_space() -> str:
    """Within which numbers and times of processes can be compared; empty where nobody can tell."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def main(argv: list[str]) -> int:
    lifeline, grace_s = int(argv[0]), float(argv[1])
    os.set_inheritable(lifeline, False)
    wakeup, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    for number in (*PASSED_ON, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if argv[2] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in argv[2].split(",")})
    private = _make_private()
    before = _named()
    child = _spawn(argv[3:])
    memory = _SharedMemory(child, before)
    _watch(child, lifeline, grace_s, wakeup, memory)
    memory.look(now=True)
    code = os.waitstatus_to_exitcode(_reap(child))
    memory.remove()
    if private:
        import shutil

        shutil.rmtree(private, ignore_errors=True)
    if code < 0:  # end as the child did, so that the parent's status says which signal
        signal.set_wakeup_fd(-1)
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
