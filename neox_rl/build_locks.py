"""Locks of killed compilations: torch builds an extension under a file ``lock`` that only its owner removes, and waits for it for ever.

The owner keeps the file open while it builds (``torch.utils.file_baton``), so a lock that nobody has open is nobody's. Other caches need
no such care: Triton renames whole files, inductor and the hub lock by ``flock``, which ends with its process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "9p", "afs", "fuse.")
"""File systems on which a process of another machine may hold the lock: there only age tells."""
LONGEST_BUILD_S = 3600.0


def extension_directory(env: Mapping[str, str]) -> Path:
    """Where torch builds extensions."""
    if chosen := env.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen)
    return Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or Path.home(), ".cache"), "torch_extensions")


def remove_stale_locks(env: Mapping[str, str]) -> list[Path]:
    """Removes this user's locks that nobody holds, and returns them. Only where ``/proc`` can tell; a build that goes on is left alone."""
    root = extension_directory(env)
    locks = {path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)}
    mine = {path for path in locks if path.is_file() and path.stat().st_uid == os.getuid()}
    if not mine or not Path("/proc/self/fd").is_dir():
        return []
    held = _open_files()
    far = _on_shared_file_system(root)
    removed = []
    for path in sorted(mine):
        with contextlib.suppress(OSError):  # its owner may remove it at the same moment
            if str(path.resolve()) not in held and not (far and time.time() - path.stat().st_mtime < LONGEST_BUILD_S):
                path.unlink()
                removed.append(path)
    return removed


def _open_files() -> set[str]:
    """What the processes that this user can see have open."""
    found: set[str] = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                for descriptor in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        found.add(os.readlink(descriptor))
    return found


def _on_shared_file_system(path: Path) -> bool:
    with contextlib.suppress(OSError):
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
        here = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
        return max(here, key=lambda mount: len(mount[0]))[1].startswith(SHARED)
    return True
