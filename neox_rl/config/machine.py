"""What the rules and the placement need to know of a machine. They take it as an argument, so they stay pure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from neox_rl.config.checkout import VARIABLE


@dataclass(frozen=True)
class Machine:
    """``cores``: ids that this process may use, in order. ``num_gpus`` 0 is a CPU machine. ``exists`` tells whether a path is there.

    ``gpt_neox_path`` is the GPT-NeoX checkout that the environment names, empty where it names none. ``gpu_ids`` are the names of the GPUs
    where CUDA_VISIBLE_DEVICES chose them: GPU g of a config or a placement is ``gpu_ids[g]``, and g itself where they are empty.
    """

    cores: tuple[int, ...]
    num_gpus: int = 0
    memory_gib: float = 64.0
    exists: Callable[[str], bool] = os.path.exists
    gpt_neox_path: str = ""
    gpu_ids: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """This machine, as the launcher sees it."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        path = os.environ.get(VARIABLE, "")
        count, ids = visible_gpus(len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()]), os.environ)
        return cls(tuple(sorted(os.sched_getaffinity(0))), count, memory, gpt_neox_path=path, gpu_ids=ids)

    def visible(self, gpus: Iterable[int]) -> str:
        """What CUDA_VISIBLE_DEVICES must say for a process to see these GPUs and no others."""
        return ",".join(self.gpu_ids[gpu] if gpu < len(self.gpu_ids) else str(gpu) for gpu in gpus)


def visible_gpus(devices: int, env: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
    """How many of this machine's NVIDIA ``devices`` CUDA shows under ``env``, and their names where CUDA_VISIBLE_DEVICES chooses them.

    Asking torch would create a CUDA context in the launcher. As CUDA does, nothing behind an entry that names no device is counted.
    """
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if devices == 0 or chosen is None:
        return devices, ()
    ids = tuple(takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in chosen.split(","))))
    return len(ids), ids
