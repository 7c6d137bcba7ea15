"""Waiting for a descriptor, and what waits for one in a process that has more than ``select`` knows (1,024)."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox_rl.episodes.sandbox import why_not
from neox_rl.waits import readable, writable

ROOT = Path(__file__).resolve().parents[2]
MANY = 2048
PRELUDE = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({MANY}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
def fill():
    while os.open(os.devnull, os.O_RDONLY) < 1100: pass
"""
SANDBOX = """
from neox_rl.episodes.sandbox import Limits, PythonSandbox
def check(box):
    ended = lambda program: str(box.run_sync(program).end)
    box.limits = Limits(wall_s=60.0)
    assert [ended("print(1)"), ended("import os; os._exit(3)")] == ["done", "died"]
    box.limits = Limits()
    assert ended("import os; os.close(1), os.close(2)\\nwhile True: pass") == "time"
    box.limits = Limits(wall_s=60.0)
    assert box.run_sync("print(3)").text == "3\\n"
"""
STORIES = {
    "a sandbox from before": SANDBOX + "box = PythonSandbox(1)\nfill()\ncheck(box)\nbox.close()",
    "a sandbox from afterwards": SANDBOX + "fill()\nbox = PythonSandbox(1)\ncheck(box)\nbox.close()",
    "a verifier": """
from neox_rl.types import Problem
from neox_rl.verify.pool import VerifierPool
fill()
with VerifierPool(1, 60.0) as pool:
    half = Problem("p", "math", "", "\\\\frac{1}{2}", "c")
    found = [str(pool.check_sync(half, "\\\\boxed{" + x + "}").reason) for x in ("\\\\frac{2}{4}", "x^2", "\\\\frac{3}{6}")]
    assert found == ["match", "mismatch", "match"], found
    pool._slots[0]._replace_child()
    assert pool.check_sync(half, "\\\\boxed{\\\\frac{2}{4}}").correct
""",
    "a guardian": """
from pathlib import Path
from neox_rl.guard import guarded_popen, stop
fill()
process = guarded_popen([sys.executable, "-I", "-S", "-c", "raise SystemExit(7)"], os.environ, Path(sys.argv[1]))
assert process.wait(60.0) == 7, process.returncode
held = guarded_popen(["sleep", "1000"], os.environ, Path(sys.argv[1]))
assert held.poll() is None
stop(held, 10.0)
""",
}


@pytest.mark.parametrize("story", STORIES)
def test_a_process_with_more_than_a_thousand_descriptors(story: str, tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MANY:
        pytest.skip(f"the hard limit on open files is {hard}")
    if "sandbox" in story and why_not():
        pytest.skip(why_not())
    command = [sys.executable, "-c", PRELUDE + STORIES[story], str(tmp_path / "log")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_readable_is_what_has_bytes_or_an_end_and_writable_what_has_room_or_no_reader() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    soon = time.monotonic() + 0.05
    assert not readable(reader, soon) and time.monotonic() >= soon
    assert writable(writer, 0.0)
    os.write(writer, b"x")
    assert readable(reader, 0.0)
    while writable(writer, 0.0):
        os.write(writer, b"x" * 4096)
    os.close(reader)
    assert writable(writer, 0.0), "the write fails at once"
    os.close(writer)
    reader, writer = os.pipe()
    os.close(writer)
    assert readable(reader, 0.0)
    os.close(reader)
