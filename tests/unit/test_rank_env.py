"""The rank of a process, whichever launcher started it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from neox_rl.config.dump import dump
from neox_rl.config.machine import visible_gpus
from neox_rl.config.network import is_loopback
from neox_rl.config.run import RunConfig
from neox_rl.engines.rank_env import RankEnv, rank_environment
from neox_rl.engines.world import device_index
from neox_rl.errors import ConfigError
from neox_rl.sockets import interface_towards
from neox_rl.step import main
from neox_rl.telemetry.paths import RunPaths
from tests.e2e.runs import own_address

MASTER = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize("launcher", [TORCHRUN, MPIRUN, SRUN])
def test_every_launcher_says_the_same_in_its_own_words(launcher: dict[str, str]) -> None:
    assert rank_environment({**launcher, **MASTER}) == RankEnv(3, 1, 4, "10.0.0.7", 1234)


@pytest.mark.parametrize(("visible", "expected"), [(0, 3), (8, 3), (1, 0)])
def test_a_rank_takes_its_own_of_all_gpus_or_the_only_one_that_it_sees(visible: int, expected: int) -> None:
    assert device_index(RankEnv(3, 3, 4, "h", 1), visible) == expected


def test_gpus_that_are_hidden_from_a_run_stay_hidden_from_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher numbers the ranks in CUDA_VISIBLE_DEVICES, on a CPU too: on a machine with a GPU they would see it again."""

    class Pinned(Exception):
        pass

    def pinned(*_: object) -> None:
        raise Pinned

    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(main, "pin", pinned)
    (tmp_path / "config.yml").write_text(dump(RunConfig()))
    (tmp_path / "endpoints.json").write_text('{"master_port": 1}')
    for found in ((1, ("0",)), (0, ())):
        with pytest.raises(Pinned):
            main.train(RunPaths.of(tmp_path), False)
        assert visible_gpus(1, environ) == found
        environ["DS_ACCELERATOR"] = "cpu"


def test_a_lone_process_is_rank_0_of_1() -> None:
    assert rank_environment({}) == RankEnv(0, 0, 1, "127.0.0.1", 29500)


def test_torchrun_inside_a_slurm_job_wins() -> None:
    outer = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    assert rank_environment({**outer, **TORCHRUN}).rank == 3


def test_the_master_is_the_environments_then_the_configs_then_the_node_that_srun_was_called_on() -> None:
    slurm = {**SRUN, "SLURM_LAUNCH_NODE_IPADDR": "10.1.1.1"}
    assert rank_environment({**slurm, "MASTER_ADDR": "node0"}, "configured").master_addr == "node0"
    assert rank_environment(slurm, "configured").master_addr == "configured"
    assert rank_environment(slurm).master_addr == "10.1.1.1", "a loopback address is nobody's choice for a job of Slurm"
    assert rank_environment(SRUN).master_addr == "127.0.0.1"


def test_the_store_of_torchruns_agent_is_taken() -> None:
    assert rank_environment({**TORCHRUN, **MASTER, "TORCHELASTIC_USE_AGENT_STORE": "True"}).has_store
    assert not rank_environment({**TORCHRUN, **MASTER, "TORCHELASTIC_USE_AGENT_STORE": "False"}).has_store


def test_the_interface_towards_a_host_is_none_where_no_route_leads_there() -> None:
    assert interface_towards("no-such-host.invalid") == ""
    loopback = {address.address for address in psutil.net_if_addrs()[interface_towards("127.0.0.1")]}
    assert "127.0.0.1" in loopback and interface_towards("localhost") == interface_towards("127.0.0.1")
    if not is_loopback(own_address()):
        assert interface_towards(own_address()) in psutil.net_if_addrs()


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1"),
        ({**TORCHRUN, "LOCAL_RANK": "9"}, "LOCAL_RANK=9"),
        ({**SRUN, "SLURM_NTASKS": "four"}, "SLURM_NTASKS='four'"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
    ],
)
def test_contradictions_are_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        rank_environment(environ)
