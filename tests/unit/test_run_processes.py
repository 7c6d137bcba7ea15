"""What is started, with which arguments, environment and cores; and under which addresses they meet."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.config.machine import Machine, visible_gpus
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.rollout.vllm_server import server_command
from neox_rl.run import endpoints as endpoints_module
from neox_rl.run.endpoints import Endpoints, choose_endpoints, offered_spec, read_endpoints, server_specs, write_endpoints
from neox_rl.run.launch import commands
from neox_rl.run.processes import ORCHESTRATOR, RANKS, Program, programs
from neox_rl.run.slurm import node_addresses
from neox_rl.run.supervise import Supervisor
from neox_rl.telemetry.events import EventLog
from tests.unit.small_run import small_config, small_paths

LAPTOP = Machine(cores=(0, 1, 2, 3), memory_gib=16)
NODE = Machine(cores=tuple(range(16)), num_gpus=4)
ADDRESSES = Endpoints("127.0.0.1", 5001, 5002, 5003, 5005, ("http://127.0.0.1:5004",), 99)
ENV = {"PATH": "/bin", "HOME": "/nowhere"}


def parts(config: RunConfig, machine: Machine = LAPTOP, endpoints: Endpoints = ADDRESSES, resume: bool = False) -> dict[str, Program]:
    return {p.name: p for p in programs(config, small_paths(config), endpoints, machine, "train.py", resume, ENV)}


def with_servers(root: Path) -> RunConfig:
    return small_config(root, rollout={"generator": "vllm"})


def test_one_program_a_server_then_the_orchestrator_then_the_ranks(tmp_path: Path) -> None:
    found = parts(with_servers(tmp_path))
    assert list(found) == ["server-0", ORCHESTRATOR, RANKS]
    server = found["server-0"]
    assert server.cores == (0,) and server.argv[server.argv.index("--port") + 1] == "5004"
    assert server.env["OMP_NUM_THREADS"] == "1" and server.env["HOME"] == "/nowhere"
    assert found[ORCHESTRATOR].cores == (1, 2) and found[RANKS].cores is None, "each rank binds itself to its own core"
    assert all(p.log.parent.name == "logs" and p.log.stem == p.name for p in found.values())


def test_every_program_has_a_temporary_directory_of_its_own_and_ranks_elsewhere_their_machines(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert {name for name, p in parts(config).items() if "TMPDIR" in p.env["NEOX_RL_PRIVATE"]} == {"server-0", ORCHESTRATOR, RANKS}
    pdsh = RunConfig(replace(config.neox, launcher="pdsh", hostfile="hosts", master_addr="10.0.0.1"), config.metarl)
    assert "NEOX_RL_PRIVATE" not in parts(pdsh)[RANKS].env


def test_modes_leave_out_what_they_do_not_need(tmp_path: Path) -> None:
    scripted = parts(small_config(tmp_path))
    assert list(scripted) == ["server-0", ORCHESTRATOR, RANKS] and "neox_rl.run.scripted_server" in scripted["server-0"].argv
    assert scripted["server-0"].cores is None, "it mostly sleeps"
    assert list(parts(small_config(tmp_path, debug={"mode": "train_only", "batches": "b"}))) == [RANKS]


def test_ranks_run_under_deepspeed_with_the_port_of_this_run(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    argv = list(parts(RunConfig(replace(config.neox, num_gpus=2), config.metarl), resume=True)[RANKS].argv)
    assert argv[:3] == [sys.executable, "-m", "neox_rl.engines.deepspeed_runner"]
    assert argv[argv.index("--master_port") + 1] == "5003" and argv[argv.index("--num_gpus") + 1] == "2"
    assert argv[-4:] == ["train.py", "--run-dir", str(tmp_path / "small"), "--resume"]
    pdsh = RunConfig(replace(config.neox, launcher="pdsh", hostfile="hosts", master_addr="10.0.0.1"), config.metarl)
    argv = list(parts(pdsh)[RANKS].argv)
    assert "--no_ssh" not in argv and "--force_multi" in argv
    assert argv[argv.index("--launcher") + 1] == "pdsh" and argv[argv.index("--hostfile") + 1] == "hosts"


def test_slurm_starts_the_ranks_on_the_hosts_of_the_host_file_and_tells_them_where_to_meet(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# training\nn7 slots=2\nn9 slots=2\n")
    config = small_config(tmp_path)
    slurm = RunConfig(replace(config.neox, launcher="slurm", hostfile=str(hosts), master_addr="10.0.0.1", num_gpus=2), config.metarl)
    ranks = parts(slurm, resume=True)[RANKS]
    assert ranks.argv[0] == "srun" and ranks.argv[-5:] == [sys.executable, "train.py", "--run-dir", str(tmp_path / "small"), "--resume"]
    said = dict(zip(ranks.argv, ranks.argv[1:], strict=False))
    assert (said["--nodes"], said["--nodelist"], said["--ntasks"], said["--ntasks-per-node"]) == ("2", "n7,n9", "4", "2")
    assert (ranks.env["MASTER_ADDR"], ranks.env["MASTER_PORT"]) == ("10.0.0.1", "5003")
    assert "MASTER_ADDR=10.0.0.1" in (line := commands(slurm, [ranks], ENV)) and "srun --overlap" in line and "torchrun" not in line

    hosts.write_text("n7 slots=1\n")
    with pytest.raises(ConfigError, match=r"n7 slots=1: every host has num_gpus = 2 ranks"):
        parts(slurm)


def test_addresses_are_those_that_slurm_knows_nodes_by() -> None:
    shown = "NodeName=n1 Arch=x86_64 NodeAddr=10.77.0.1 NodeHostName=n1 OS=Linux 6.1 #1 SMP\n\nNodeName=n2 State=DOWN\n"
    assert node_addresses(shown) == {"n1": "10.77.0.1", "n2": "n2"}
    with pytest.raises(ConfigError, match="names no node"):
        node_addresses("Node n3 not found")


def test_a_run_whose_servers_all_join_starts_none_and_offers_what_a_server_must_be(tmp_path: Path) -> None:
    config = small_config(tmp_path, rollout={"generator": "vllm"}, servers={"num_servers": 0}, network={"join_port": 5005})
    assert list(parts(config, endpoints=replace(ADDRESSES, servers=()))) == [ORCHESTRATOR, RANKS]
    spec = offered_spec(config, tmp_path)
    assert (spec.name, spec.host, spec.max_model_len) == ("", "", config.neox.seq_length)


def test_servers_of_searches_count_the_hits_of_their_prefix_caches(tmp_path: Path) -> None:
    """Others do not: it is the hits alone that are read."""
    for method in ("sample", "search"):
        spec = offered_spec(small_config(tmp_path, rollout={"generator": "vllm", "method": method}), tmp_path)
        assert ("--disable-log-stats" in server_command(spec, {})[0]) == (method == "sample")


def test_gpus_go_to_the_ranks_first_and_a_cpu_rank_gets_one_thread(tmp_path: Path) -> None:
    config = with_servers(tmp_path)
    found = parts(RunConfig(replace(config.neox, num_gpus=2), config.metarl), NODE)
    assert found[RANKS].env["CUDA_VISIBLE_DEVICES"] == "0,1" and "DS_ACCELERATOR" not in found[RANKS].env
    assert found["server-0"].env["CUDA_VISIBLE_DEVICES"] == "2" and found["server-0"].cores is None
    cpu = parts(config)[RANKS].env
    assert (cpu["DS_ACCELERATOR"], cpu["OMP_NUM_THREADS"]) == ("cpu", "1")


def test_a_gpu_server_of_two_tp_ranks_is_pinned_to_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path, rollout={"generator": "vllm"}, servers={"tensor_parallel_size": 2})
    server = parts(config, NODE)["server-0"]
    assert server.env["CUDA_VISIBLE_DEVICES"] == "1,2" and server.cores is None and "VLLM_CPU_OMP_THREADS_BIND" not in server.env


def test_gpus_that_the_environment_chose_keep_their_names(tmp_path: Path) -> None:
    """DeepSpeed's runner, told a number of ranks alone, would take the machine's first GPUs."""
    config = with_servers(tmp_path)
    found = parts(RunConfig(replace(config.neox, num_gpus=2), config.metarl), replace(NODE, num_gpus=3, gpu_ids=("5", "2", "7")))
    argv = list(found[RANKS].argv)
    assert argv[argv.index("--include") + 1] == "localhost:5,2" and "--num_gpus" not in argv
    assert found[RANKS].env["CUDA_VISIBLE_DEVICES"] == "5,2" and found["server-0"].env["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, (8, ())),
        ("", (0, ())),
        ("4, 6", (2, ("4", "6"))),
        ("3,-1,5", (1, ("3",))),
        ("GPU-8d2c,GPU-01ab", (2, ("GPU-8d2c", "GPU-01ab"))),
    ],
)
def test_visible_gpus_are_counted_as_cuda_does(said: str | None, found: tuple[int, tuple[str, ...]]) -> None:
    assert visible_gpus(8, {} if said is None else {"CUDA_VISIBLE_DEVICES": said}) == found
    assert visible_gpus(0, {"CUDA_VISIBLE_DEVICES": "0"}) == (0, ())


def test_each_part_can_be_started_by_hand(tmp_path: Path) -> None:
    config = with_servers(tmp_path)
    server, orchestrator, ranks = commands(config, list(parts(config).values()), ENV).splitlines()
    assert server.startswith("env ") and "taskset -c 0" in server and "vllm.entrypoints.openai.api_server" in server
    assert orchestrator.endswith(f"-m neox_rl.run.orchestrator --run-dir {tmp_path}/small")
    assert ranks.endswith(f"torchrun --nproc_per_node 1 train.py --run-dir {tmp_path}/small")


def test_free_ports_differ_and_configured_ones_stay(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = small_config(tmp_path, rollout={"generator": "vllm"}, servers={"num_servers": 3}, network={"weights_port": port})
    found = choose_endpoints(config, 99)
    ports = [found.experience_port, found.weights_port, found.master_port, *(int(s.rpartition(":")[2]) for s in found.servers)]
    assert len(set(ports)) == 6 and found.weights_port == port


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"network\.master_port = {port}: cannot bind .* choose a free port, or 0"):
            choose_endpoints(small_config(tmp_path, network={"master_port": port}), 99)


def test_a_port_of_a_run_that_is_being_ended_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = small_config(tmp_path, network={"master_port": taken.getsockname()[1]})
        monkeypatch.setattr(endpoints_module.time, "sleep", lambda _: taken.close())
        assert choose_endpoints(config, 99, wait_s=60.0).master_port == config.metarl.network.master_port


def test_a_host_that_is_not_here_is_named(tmp_path: Path) -> None:
    for host in ("no-such-host.invalid", "192.0.2.1"):
        with pytest.raises(ConfigError, match=rf"network\.bind_host = '{host}': .*; give an IPv4 address or name of this machine"):
            choose_endpoints(small_config(tmp_path, network={"bind_host": host}), 99)


def test_each_server_draws_its_own_random_numbers(tmp_path: Path) -> None:
    config = small_config(tmp_path, rollout={"generator": "vllm"}, servers={"num_servers": 3})
    specs = server_specs(config, choose_endpoints(config, 99), tmp_path, NODE)
    assert specs[0].seed == config.metarl.seed and len({spec.seed for spec in specs}) == 3


def test_a_server_that_is_started_again_draws_other_numbers_than_before(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    events = EventLog(tmp_path / "events.jsonl", "launcher")
    supervisor = Supervisor(config, small_paths(config), events)
    supervisor._programs = {"server-0": Program("server-0", ["true", "--seed", "7"], {"PATH": "/bin:/usr/bin"}, tmp_path / "log", None)}
    seeds = []
    for _ in range(3):
        supervisor._start("server-0")
        seeds.append(supervisor.running["server-0"].program[2])
        assert supervisor.running["server-0"].wait(20.0) == 0
    assert seeds[0] == "7" and len({*seeds}) == 3
    events.close()
    assert parts(config)[ORCHESTRATOR].drawing_anew("start") == parts(config)[ORCHESTRATOR]


def test_endpoints_are_read_as_they_were_written(tmp_path: Path) -> None:
    paths = small_paths(small_config(tmp_path))
    with pytest.raises(ConfigError, match="start the run with deepy"):
        read_endpoints(paths.endpoints)
    write_endpoints(paths, ADDRESSES)
    assert read_endpoints(paths.endpoints) == ADDRESSES


def test_servers_that_run_elsewhere_are_known_but_not_started(tmp_path: Path) -> None:
    elsewhere = ("http://10.0.0.4:8000", "http://10.0.0.5:8000")
    config = small_config(tmp_path, rollout={"generator": "vllm"}, servers={"num_servers": 0, "addresses": elsewhere})
    endpoints = choose_endpoints(config, 99)
    assert endpoints.servers == elsewhere and list(parts(config, endpoints=endpoints)) == [ORCHESTRATOR, RANKS]
    specs = server_specs(config, endpoints, tmp_path, LAPTOP)
    assert [(s.name, s.address) for s in specs] == [("server-0", elsewhere[0]), ("server-1", elsewhere[1])]
