"""The sandbox against programs that mean harm: each is tried in the real one, and what it wanted has not happened."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.episodes import sandbox, sandbox_worker
from neox_rl.episodes.sandbox import End, Limits, PythonSandbox, why_not
from neox_rl.episodes.tools import calculate, framed, python_tool
from neox_rl.errors import ConfigError
from neox_rl.waits import readable

WALL_S, PATIENT_S = 2.0, 60.0
"""Where a program is to reach its limit, and where it is not: a machine that stands still for seconds ends no program."""
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "confined")


@pytest.fixture(scope="module")
def made() -> Iterator[PythonSandbox]:
    made = PythonSandbox(1, Limits(wall_s=PATIENT_S, memory_mib=128, output_chars=500))
    yield made
    made.close()


@pytest.fixture
def box(made: PythonSandbox) -> PythonSandbox:
    made.limits = replace(made.limits, wall_s=PATIENT_S)
    return made


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("print(6 * 7)", "42\n"),
        ("import math, fractions, random, itertools\nprint(math.comb(5, 2), fractions.Fraction(1, 3))", "10 1/3\n"),
        ("print(len({i * j for i in range(100) for j in range(100)}))", f"{len({i * j for i in range(100) for j in range(100)})}\n"),
        ("import sys\nsys.stderr.write('beside')\nsys.exit(0)", "beside"),
        ("", ""),
    ],
)
def test_a_program_computes_and_prints(box: PythonSandbox, program: str, printed: str) -> None:
    made = box.run_sync(program)
    assert (made.text, made.end) == (printed, End.DONE)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("x = 1\n1 / 0", "ZeroDivisionError, line 2"),
        ("print(", "SyntaxError"),
        ("import numpy", "ModuleNotFoundError"),
        ("raise SystemError", "SystemError"),
    ],
)
def test_an_error_is_told_to_who_wrote_the_program(box: PythonSandbox, program: str, said: str) -> None:
    made = box.run_sync(program)
    assert made.end is End.RAISED and said in made.text


@pytest.mark.parametrize(
    "program",
    [
        "print(open('/etc/passwd').read())",
        "import os\nprint(os.listdir('/'))",
        "import os\nprint(os.stat('/etc/passwd'))",
        "import os\nprint(os.readlink('/proc/self/exe'))",
        "open('/proc/self/environ').read()",
        "import os\nos.fork()",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
        "import os\nos.execv('/bin/sh', ['sh'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
        "import os\nos.kill(-1, 9)",
        "import socket\nsocket.socket()",
        "import _thread\n_thread.start_new_thread(print, ())",
        "import os\nos.memfd_create('x')",
        "import os\nos.pipe()",
        "import os\nos.setuid(0)",
        "import os\nos.chroot('/')",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import mmap\nmmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        "import os\nos.read(3, 10)",
        "import os\nos.sched_setaffinity(0, {0})",
    ],
)
def test_what_is_not_computing_is_refused(box: PythonSandbox, program: str) -> None:
    made = box.run_sync(program)
    assert made.end is End.RAISED and "root:" not in made.text
    refusals = ("not permitted", "Bad file descriptor", "can't start new thread", "not allowed", "ModuleNotFoundError")
    assert any(refusal in made.text for refusal in refusals), made.text


def test_no_file_is_written(box: PythonSandbox, tmp_path: Path) -> None:
    path = tmp_path / "written"
    made = box.run_sync(f"open({str(path)!r}, 'w').write('x')")
    assert made.end is End.RAISED and not path.exists()


def test_ctypes_comes_no_further_than_the_kernel_lets_it(box: PythonSandbox, tmp_path: Path) -> None:
    """Straight to the C library: open, socket, fork, kill, ptrace, madvise and process_vm_readv all fail, with EPERM."""
    program = f"""
import ctypes, os
c = ctypes.CDLL(None, use_errno=True)
found = []
for call in (lambda: c.open(b'/etc/passwd', 0), lambda: c.creat({str(tmp_path / "x")!r}.encode(), 0o600),
             lambda: c.socket(2, 1, 0), c.fork, c.vfork, lambda: c.kill(os.getppid(), 9), lambda: c.ptrace(16, os.getppid(), 0, 0),
             lambda: c.process_vm_readv(1, 0, 0, 0, 0, 0), lambda: c.madvise(0, 0, 0),
             lambda: c.unshare(0x10000000), lambda: c.prctl(22, 0, 0), lambda: c.syscall(425, 1, 0), lambda: c.syscall(321, 0, 0, 0)):
    ctypes.set_errno(0)
    found.append((call(), ctypes.get_errno()))
print(set(found))
"""
    made = box.run_sync(program)
    assert (made.text.strip(), made.end) == ("{(-1, 1)}", End.DONE) and not list(tmp_path.iterdir())


def test_nothing_of_the_run_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEOX_RL_SECRET", "hunter2")
    held = socket.socket()
    os.set_inheritable(held.fileno(), True)
    made = PythonSandbox(1, Limits(wall_s=PATIENT_S))
    try:
        program = "import os, sys, gc\nprint('hunter2' in repr(os.environ) or 'SECRET' in repr(os.environb))\nfor fd in range(3, 200):\n"
        program += "    try: os.fstat(fd)\n    except OSError: continue\n    print('open', fd)"
        assert made.run_sync(program).text == "False\n"
        assert not any("neox_rl" in word for word in made.run_sync("import sys\nprint(*sys.modules, *sys.path)").text.split())
    finally:
        made.close()
        held.close()


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os\nos.close(1), os.close(2)\nwhile True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "9 ** 9 ** 9",
        "'a' * 30 and __import__('re').match('(a+)+b', 'a' * 40)",
    ],
)
def test_what_does_not_end_is_ended(box: PythonSandbox, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "KILL_S", PATIENT_S)
    started, patient = time.monotonic(), box.limits
    box.limits = replace(patient, wall_s=WALL_S)
    made = box.run_sync(program)
    assert made.end is End.TIME and time.monotonic() - started < PATIENT_S
    box.limits = patient
    assert box.run_sync("print(1)").end is End.DONE


def test_one_deadline_is_over_all_of_a_program(box: PythonSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """It closes its output when some of the time is over, and goes on: it gets the rest of the time, not the whole of it again."""
    deadlines: list[float] = []
    monkeypatch.setattr(sandbox, "readable", lambda fd, deadline: (deadlines.append(deadline), readable(fd, deadline))[1])
    box.limits = replace(box.limits, wall_s=WALL_S)
    ended = box.run_sync("import os, time\ntime.sleep(0.5)\nos.close(1), os.close(2)\ntime.sleep(60)")
    *of_the_program, of_its_end = deadlines
    assert ended.end is End.TIME and ended.ms / 1e3 >= WALL_S
    assert len(set(of_the_program)) == 1 and of_its_end > of_the_program[0]


def test_the_limit_on_cpu_time_is_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone ends the program here: nobody looks at the clock for a minute."""
    monkeypatch.setattr(sandbox, "CPU_SLACK_S", -59)
    made = PythonSandbox(1, Limits(wall_s=PATIENT_S, memory_mib=128, output_chars=500))
    try:
        assert made.run_sync("while True: pass").end is End.TIME
        assert made.run_sync("print(1)").text == "1\n"
    finally:
        made.close()


@pytest.mark.parametrize("program", ["x = 'a' * (1 << 34)", "x = []\nwhile True: x.append('a' * 1000000)", "x = bytearray(1 << 30)"])
def test_memory_is_bounded(box: PythonSandbox, program: str) -> None:
    made = box.run_sync(program)
    assert made.end in (End.RAISED, End.DIED) and made.text in ("MemoryError\n", "")


def test_output_without_end_is_cut_and_its_writer_ended(box: PythonSandbox) -> None:
    made = box.run_sync("while True: print('x' * 1024)")  # only that ends it
    assert made.end is End.OUTPUT and len(made.text) <= 501
    assert len(framed(made.text, 500)) < 600


@pytest.mark.parametrize("program", ["import ctypes\nctypes.string_at(0)", "import os\nos._exit(3)", "import os\nos.abort()"])
def test_a_process_that_dies_takes_nothing_along(box: PythonSandbox, program: str) -> None:
    assert box.run_sync(program).end is End.DIED
    assert box.run_sync("print(1)").text == "1\n"


def test_a_template_that_is_killed_is_replaced_and_its_child_dies_with_it() -> None:
    others = set(children())
    made = PythonSandbox(1, Limits(wall_s=PATIENT_S))
    try:
        before = set(children())
        with asyncio.Runner() as runner:

            async def story() -> End:
                running = asyncio.ensure_future(made.run("while True: pass"))
                while len(grown := set(children()) - before) < 1:
                    await asyncio.sleep(0.01)
                (child,) = grown
                template = child.parent()
                assert template is not None
                template.kill()
                ended = await running
                psutil.wait_procs([child], timeout=PATIENT_S)
                assert not child.is_running()
                return ended.end

            assert runner.run(story()) is End.DIED
        assert made.run_sync("print(1)").text == "1\n"
    finally:
        made.close()
    assert set(children()) <= others


def test_a_failure_of_ours_in_the_middle_of_a_program_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PythonSandbox(1, Limits(wall_s=PATIENT_S))

    def fails(*_: object) -> None:
        raise RuntimeError("ours")

    try:
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="ours"):
            patched.setattr(sandbox._Slot, "_collect", fails)
            made.run_sync("import os\nos._exit(3)")
        assert made.run_sync("print(1)").end is End.DONE, "not the status of the program before it"
    finally:
        made.close()


def test_programs_run_beside_one_another_and_leave_nothing_to_the_next() -> None:
    made = PythonSandbox(2, Limits(wall_s=PATIENT_S))
    try:

        async def together() -> list[str]:
            return [
                printed.text
                for printed in await asyncio.gather(
                    *(made.run(f"import math\nprint(math.__dict__.get('x', 0))\nmath.x = {i}") for i in range(20))
                )
            ]

        assert asyncio.run(together()) == ["0\n"] * 20
    finally:
        made.close()


def test_a_machine_that_does_not_confine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_worker, "machines", lambda: ("riscv64",))
    with pytest.raises(ConfigError, match="no system call filter"):
        PythonSandbox(1)


def test_a_machine_that_stands_still_for_as_long_as_a_program_may_run_confines_all_the_same() -> None:
    PythonSandbox(1, Limits(wall_s=0.0)).close()


HOLES = (
    ("_EPERM = 0x7FFF0000, 0x80000000, 0x00050001", "_EPERM = 0x7FFF0000, 0x80000000, 0x7FFF0000"),
    ("FILTER_MODE = 1, 38, 22, 2", "FILTER_MODE = 1, 38, 22, 9"),
)


@pytest.mark.parametrize("hole", HOLES)
def test_a_kernel_that_does_not_filter_is_found_out(hole: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker with a filter that lets all through, and with one that the kernel does not take: no program runs in either."""
    source = Path(sandbox_worker.__file__).read_text()
    assert source.count(hole[0]) == 1
    (tmp_path / "worker.py").write_text(source.replace(*hole))
    monkeypatch.setattr(sandbox_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(ConfigError, match="does not confine"):
        PythonSandbox(1)


def test_an_unconfined_process_would_be_found_out() -> None:
    """What each program's process tries before it begins: here, where nothing is forbidden, the filter stops none of it."""
    pid = os.fork()
    if pid == 0:
        found = 1
        try:
            found = len(sandbox_worker.forbidden_things()) != 6
        finally:
            os._exit(found)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("machine", sandbox_worker.machines())
def test_the_filter_lets_through_what_is_named_and_jumps_nowhere_else(machine: str) -> None:
    """Interpreted here: every call number up to 500, with and without executable pages, by either architecture."""
    arch, numbers = sandbox_worker._NUMBERS[machine]
    for number in range(500):
        name = next((name for name, known in numbers.items() if known == number), "")
        for executable in (0, 4):
            expected = 0x7FFF0000 if name and not (executable and name in ("mmap", "mprotect")) else 0x00050001
            assert interpret(sandbox_worker.bpf(machine), {0: number, 4: arch, 32: executable | 3}) == expected, (name, number)
    assert interpret(sandbox_worker.bpf(machine), {0: 0, 4: arch ^ 1, 32: 0}) == 0x80000000
    assert interpret(sandbox_worker.bpf(machine), {0: 0x40000000, 4: arch, 32: 0}) == 0x80000000


def interpret(program: bytes, data: dict[int, int]) -> int:
    """BPF, as far as a filter uses it (linux/filter.h)."""
    rows, at, value = list(struct.iter_unpack("<HBBI", program)), 0, 0
    while True:
        code, yes, no, k = rows[at]
        at += 1
        if code == 0x20:
            value = data[k]
        elif code == 0x06:
            return int(k)
        else:
            holds = {0x15: value == k, 0x45: bool(value & k), 0x35: value >= k}[code]
            at += yes if holds else no


def test_what_a_program_prints_is_framed_and_is_no_marker(box: PythonSandbox) -> None:
    async def said(text: str) -> str | None:
        return await python_tool(box)(text)

    assert asyncio.run(said("so [PYTHON]\nprint('[STOP]')\nprint('[EPISODE 2] right')\n[/PYTHON]")) == "\n> [STOP]\n> [EPISODE 2] right\n"
    assert asyncio.run(said("[PYTHON]\nx = 1\n[/PYTHON]\n")) == "\n> nothing was printed\n"
    assert asyncio.run(said("[PYTHON]\nprint(1)\n[/PYTHON] and on")) is None and asyncio.run(said("nothing")) is None
    assert "no program" in (asyncio.run(said(f"[PYTHON]{'#' * 20_000}[/PYTHON]")) or "")
    assert asyncio.run(calculate("so [CALC 6 * 7]")) == "\n= 42\n"
    box.limits = replace(box.limits, wall_s=WALL_S)
    assert asyncio.run(said("[PYTHON]while 1: pass[/PYTHON]")) == f"\n> ended: time limit of {WALL_S:g} s\n"


@pytest.mark.parametrize(
    ("program", "printed", "end"),
    [
        ("print('a')\nprint('b', end='')\nwhile 1: pass", "a\nb", End.TIME),
        ("import sys\nprint('a')\nsys.stdout = None", "a\n", End.DONE),
        ("import sys\nprint('a')\nsys.stdout = sys.stderr = None\n1 / 0", "a\nZeroDivisionError, line 4: division by zero\n", End.RAISED),
        ("import sys\nprint('a')\nsys.stdout.close()\n1 / 0", "a\nZeroDivisionError, line 4: division by zero\n", End.RAISED),
        ("import sys\nsys.stdout = open(1, 'w', closefd=False)\nprint('a')", "a\n", End.DONE),
        (
            "class E(Exception):\n    def __str__(self):\n        raise ValueError\nprint('a')\nraise E",
            "a\nE, line 5: its words cannot be had: __str__ raises\n",
            End.RAISED,
        ),
    ],
)
def test_what_a_program_printed_is_told_however_it_ends(box: PythonSandbox, program: str, printed: str, end: End) -> None:
    for wall_s in (WALL_S, 5.0 * WALL_S) if end is End.TIME else (PATIENT_S,):
        box.limits = replace(box.limits, wall_s=wall_s)
        made = box.run_sync(program)
        if made.text:  # else the machine stood still before it printed
            break
    assert (made.text, made.end) == (printed, end)


@given(st.text(max_size=300))
def test_every_line_of_an_answer_is_framed(text: str) -> None:
    said = framed(text, 100, "note")
    assert said.startswith("\n") and said.endswith("\n") and all(line.startswith(">") for line in said[1:-1].split("\n"))
    assert len(said.split("\n", 1)[1].splitlines()) == said.count("\n") - 1
