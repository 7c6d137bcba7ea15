"""A lock that a killed compilation left does not stop the next one; that of a compilation in progress stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from neox_rl import build_locks
from neox_rl.build_locks import extension_directory, remove_stale_locks


def test_a_lock_without_an_owner_goes_and_one_that_is_held_stays(tmp_path: Path) -> None:
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for name in ("killed", "py311_cpu/killed", "building"):
        (tmp_path / name).mkdir(parents=True)
    dead = [tmp_path / "killed" / "lock", tmp_path / "py311_cpu" / "killed" / "lock"]
    for path in dead:
        path.touch()
    building = FileBaton(str(tmp_path / "building" / "lock"))
    assert building.try_acquire()
    assert remove_stale_locks(env) == dead
    assert (tmp_path / "building" / "lock").exists()
    building.release()
    assert remove_stale_locks(env) == []


def test_on_a_shared_file_system_only_an_old_lock_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner may be a process of another machine, which nobody sees from here."""
    monkeypatch.setattr(build_locks, "_on_shared_file_system", lambda path: True)
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op" / "lock"
    lock.touch()
    assert remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == []
    long_ago = time.time() - build_locks.LONGEST_BUILD_S - 60
    os.utime(lock, (long_ago, long_ago))
    assert remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == [lock]


def test_the_directory_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert extension_directory(os.environ) == Path(get_default_build_root())
    assert remove_stale_locks({"HOME": str(tmp_path / "nobody")}) == []
