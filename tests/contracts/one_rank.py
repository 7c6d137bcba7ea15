"""The environment of an engine that is built in the test's own process: one rank, that no launcher has started."""

from __future__ import annotations

import pytest

from neox_rl.run.endpoints import free_port

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR")


def one_rank(patch: pytest.MonkeyPatch) -> None:
    for name in OF_LAUNCHERS:
        patch.delenv(name, raising=False)
    patch.setenv("MASTER_PORT", str(free_port("127.0.0.1")))
