"""A run whose ``runs/`` fills up: ``unshare -rm python -m tests.e2e.full_disk DIRECTORY STORY`` mounts a small file system of its own.

Raises AssertionError where the story does not hold. The file system is seen by this process and what it starts, and goes with them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import read_status
from tests.e2e.runs import ROOT, Run

SIZE = "24m"
RL = 16
SILENT_S = 30
SETTINGS = ("metarl.warmstart.steps=2", f"train_iters={RL}", "metarl.evaluation.num_problems=4", "checkpoint_factor=4")
SETTINGS += ("metarl.scripted.token_s=0.01",)  # it must not be far when the disk is full, nor over


class Disk:
    """``fill`` leaves no byte, ``make_room`` gives all of it back."""

    def __init__(self, root: Path) -> None:
        self.root, self._filler = root, root / "filler"
        root.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "neox-rl-test", root], check=True)

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def make_room(self) -> None:
        self._filler.unlink()


def started(directory: Path, disk: Disk, name: str, *settings: str) -> Run:
    run = Run(directory, name, *SETTINGS, f"metarl.runs_dir={disk.root}", *settings)
    run.paths = RunPaths.of(disk.root / name)
    run.until_step("rl", 3)
    disk.fill()
    return run


def goes_on(directory: Path, disk: Disk) -> None:
    """It says what it waits for, trains nothing that it cannot write down, and goes on when there is room: every step and ticket once."""
    deadlines = ("metarl.queue.disk_full_s=600", "metarl.deadlines.silence_s=10", f"metarl.deadlines.orchestrator_s={SILENT_S}")
    run = started(directory, disk, "waits", *deadlines)
    run.until(
        lambda: "disk" in read_status(run.paths.status).message or "the disk is full, make room" in run.said(), "a word about the disk"
    )
    disk.fill()  # what a process gave back meanwhile
    before = run.steps()
    time.sleep(SILENT_S + 5.0)  # for longer than the trainer bears silence
    assert len(run.steps()) <= len(before) + 2 < RL, "rows of steps whose batches and reports are on no disk"
    disk.make_room()
    assert run.wait() == 0, run.said()
    assert [step for phase, step in run.steps() if phase == "rl"] == list(range(1, RL + 1)) and run.gone()
    summary = run.summary()
    assert summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0
    audit = subprocess.run([sys.executable, ROOT / "tools" / "audit.py", run.paths.root], capture_output=True, text=True, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def gives_up(directory: Path, disk: Disk) -> None:
    """Past ``queue.disk_full_s`` it ends, says why and how to go on; with room, ``--resume`` does."""
    run = started(directory, disk, "ends", "metarl.queue.disk_full_s=3")
    assert run.wait() == 1 and run.gone(), run.said()
    error = run.said().split("error: ")[-1].splitlines()[0]
    journal = error.startswith("orchestrator ended with exit status 3, last known at waiting for the disk of ")
    journal = journal and "free): make room there" in error and "--resume" in run.said()
    # Where the disk was full just as a checkpoint was due, its time may be over first; and a slow runner ends after its rank was missed.
    checkpoint = error.startswith(("trainer ended with exit status 3, last known at ", "trainer lost trainer-0 "))
    # Its log is on that disk, and may have no room for the word: then the launcher heard what it was at.
    waited = any(words in run.said() for words in ("for room to save", ", at wait_disk directory ", ", at checkpoint step "))
    assert journal or (checkpoint and waited), run.said()
    disk.make_room()
    again = Run(directory, "ends", *SETTINGS, f"metarl.runs_dir={disk.root}", flags=("--resume",))
    again.paths = run.paths
    assert again.wait() == 0, again.said()
    assert [step for phase, step in again.steps() if phase == "rl"] == list(range(1, RL + 1)) and again.gone()


STORIES = {"goes_on": goes_on, "gives_up": gives_up}

if __name__ == "__main__":
    STORIES[sys.argv[2]](Path(sys.argv[1]), Disk(Path(sys.argv[1]) / "disk"))
