"""What the rules and the placement need to know of a machine. They take it as an argument, so they stay pure."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neox_rl.config.checkout import VARIABLE


@dataclass(frozen=True)
class Machine:
    """``cores``: ids that this process may use, in order. ``num_gpus`` 0 is a CPU machine. ``exists`` tells whether a path is there.

    ``gpt_neox_path`` is the GPT-NeoX checkout that the environment names, empty where it names none.
    """

    cores: tuple[int, ...]
    num_gpus: int = 0
    memory_gib: float = 64.0
    exists: Callable[[str], bool] = os.path.exists
    gpt_neox_path: str = ""

    @classmethod
    def here(cls) -> Machine:
        """This machine, as the launcher sees it."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        path = os.environ.get(VARIABLE, "")
        return cls(tuple(sorted(os.sched_getaffinity(0))), _visible_gpus(), memory, gpt_neox_path=path)


def _visible_gpus() -> int:
    """NVIDIA devices, or those that CUDA_VISIBLE_DEVICES leaves. Asking torch would create a CUDA context in the launcher."""
    devices = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices == 0 or visible is None:
        return devices
    return len([v for v in visible.split(",") if v.strip() not in ("", "-1")])
