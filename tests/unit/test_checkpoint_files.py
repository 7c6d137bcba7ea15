"""Checkpoints as files: whatever a crash leaves, a whole one is found; old ones go when they are asked to."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neox_rl.engines import checkpoint_digests, checkpoint_files, mcore_state
from neox_rl.errors import WeightError


def save(directory: Path, step: int, label: str = "first") -> Path:
    final = directory / f"step{step:06d}"
    temporary = directory / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    checkpoint_files.publish(temporary, final, {"label": label})
    return final


def label(directory: Path) -> str:
    meta = json.loads((checkpoint_files.find(directory) / "meta.json").read_text())
    return str(meta["label"])


class CrashError(Exception):
    """The process is gone."""


@pytest.mark.parametrize("survives", range(8))
def test_a_crash_anywhere_in_saving_a_step_again_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    save(tmp_path, 4)
    left = survives

    def crashing(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise CrashError
            left -= 1
            return action(*args, **options)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashing(Path.rename))
        patch.setattr(os, "fsync", crashing(os.fsync))
        with pytest.raises(CrashError):
            save(tmp_path, 4, "again")
    assert label(tmp_path) in ("first", "again")
    save(tmp_path, 4, "after")
    assert label(tmp_path) == "after"
    assert not (tmp_path / "step000004.old").exists()


def test_nothing_is_deleted_while_the_replaced_one_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = save(tmp_path, 4)
    final.rename(tmp_path / "step000004.old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(CrashError))
        with pytest.raises(CrashError):
            save(tmp_path, 4, "again")
    assert checkpoint_files.find(tmp_path) == tmp_path / "step000004.old"


def test_a_step_whose_pointer_was_never_written_is_found_under_its_old_name_too(tmp_path: Path) -> None:
    final = save(tmp_path, 4)
    (tmp_path / "latest").unlink()
    final.rename(tmp_path / "step000004.old")
    assert checkpoint_files.find(tmp_path) == tmp_path / "step000004.old"


def test_what_killed_saves_left_goes_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    for name in ("step000003.tmp", "step000002.old", "kept.old"):
        (tmp_path / name).mkdir()
    save(tmp_path, 4)
    checkpoint_files.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step000004", "kept.old"}


KILLED = """
import itertools, pathlib, shutil, sys, torch
from neox_rl.engines import checkpoint_digests, checkpoint_files, mcore_state
root = pathlib.Path(sys.argv[1])
print("saving", flush=True)
for step in itertools.count(1):
    for _ in range(2):  # the second replaces the first
        final = root / f"step{step:06d}"
        temporary = root / f"{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mcore_state.write_rank(temporary, 0, {"step": torch.full((1000,), step)})
        checkpoint_files.publish(temporary, final, {"step": step})
        checkpoint_files.tidy(root)
        checkpoint_files.prune(final, 2)
        print(step, flush=True)
"""


def test_kill_9_at_any_moment_of_saving_leaves_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(7)
    for trial in range(2):
        root = tmp_path / str(trial)
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        assert process.stdout.readline() == b"saving\n" and process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        said = [int(line) for line in process.stdout.read().split()] or [1]
        process.wait(10.0)
        process.stdout.close()
        found = checkpoint_files.find(root)
        meta, state = json.loads((found / "meta.json").read_text()), mcore_state.read_rank(found, 0)
        assert meta["step"] in (said[-1], said[-1] + 1) and state["step"].eq(meta["step"]).all()


def test_the_pointer_decides_and_without_it_the_newest_whole_one(tmp_path: Path) -> None:
    pointed, newest = save(tmp_path, 9), save(tmp_path, 10_000_000)
    (tmp_path / "latest").write_text(f"{pointed.name}\n")
    (tmp_path / "step99999999.tmp").mkdir()
    (tmp_path / "step99999999").mkdir()
    assert checkpoint_files.find(tmp_path) == pointed
    assert checkpoint_files.find(newest) == newest
    for spoil in (lambda: (tmp_path / "latest").write_text(""), (tmp_path / "latest").unlink):
        spoil()
        assert checkpoint_files.find(tmp_path) == newest


def test_what_was_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step000003.tmp").mkdir()
    (tmp_path / "step000003.tmp" / "meta.json").write_text("{}")
    with pytest.raises(WeightError, match=r"neither a checkpoint \(meta.json\) nor a file 'latest'"):
        checkpoint_files.find(tmp_path)
    (tmp_path / "latest").write_text("step000003\n")
    with pytest.raises(WeightError, match="names 'step000003', which is no checkpoint"):
        checkpoint_files.find(tmp_path)


@pytest.mark.parametrize("prefix", ["step0000", "global_step"])
def test_who_cannot_use_one_is_told_the_last_whole_one_before_it(tmp_path: Path, prefix: str) -> None:
    """By its step, not by its name: GPT-NeoX's have no zeros in front."""
    for name in ("08", "12", "16", "10.tmp", "11.old") if prefix == "step0000" else ("8", "12", "16", "10.tmp", "11.old"):
        (tmp_path / f"{prefix}{name}").mkdir()
        (tmp_path / f"{prefix}{name}" / "meta.json").write_text("{}")
    (tmp_path / f"{prefix}9").mkdir()
    first = min(tmp_path.glob("*step*8")).name
    for damaged, told in (("12", first), ("16", f"{prefix}12"), ("99", f"{prefix}16")):
        assert f": echo {told} > {tmp_path}/latest" in checkpoint_digests.fix(tmp_path / f"{prefix}{damaged}")
    assert "there is no earlier checkpoint beside it" in checkpoint_digests.fix(tmp_path / first), "later ones are of an undone timeline"


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 5]), (1, [5]), (2, [3, 5]), (3, [2, 3, 5]), (9, [1, 2, 3, 5])])
def test_the_newest_and_the_last_ones_before_it_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    """Step 8 is from before a return to step 3: it may be damaged, and never stays in the place of a good one."""
    for step in (1, 2, 3, 8, 5):
        newest = save(tmp_path, step)
    (tmp_path / "notes").mkdir()
    checkpoint_files.prune(newest, keep)
    undone = [] if keep else ["step000008.undone1"]
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "notes", *undone, *(f"step{step:06d}" for step in left)}
    assert checkpoint_files.find(tmp_path) == newest
    assert "step000008" not in checkpoint_digests.fix(newest)


@pytest.mark.parametrize(("keep", "left"), [(0, ["step000040", "step000047.undone1", "step000050"]), (2, ["step000040", "step000050"])])
def test_what_was_undone_is_no_checkpoint_before_a_later_one(tmp_path: Path, keep: int, left: list[str]) -> None:
    """The stop at step 47 saved one that is damaged: the user went back to step 40, and the next one is of step 50."""
    stock = tmp_path / "global_step45"
    stock.mkdir()
    for step in (40, 47):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("step000040\n")
    newest = save(tmp_path, 50)
    checkpoint_files.prune(newest, keep)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", stock.name, *left}
    assert f": echo step000040 > {tmp_path}/latest" in checkpoint_digests.fix(newest)


def test_who_undoes_a_step_twice_finds_both(tmp_path: Path) -> None:
    save(tmp_path, 40)
    for step in (47, 47, 50):
        (tmp_path / "latest").write_text("step000040\n")
        save(tmp_path, step)
    assert [path.name for path in checkpoint_digests.whole(tmp_path)] == ["step000050", "step000040"]
    assert {path.name for path in tmp_path.glob("*.undone*")} == {"step000047.undone1", "step000047.undone2"}
