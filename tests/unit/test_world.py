"""How the ranks meet: where their rendezvous listens, and what is said where it cannot. One rank, real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from neox_rl.config.neox import NeoXConfig
from neox_rl.engines.rank_env import RankEnv
from neox_rl.engines.world import join_ranks, listener_at, longest_wait_s
from neox_rl.errors import ConfigError
from neox_rl.run.endpoints import free_port
from neox_rl.step import main
from neox_rl.telemetry.events import EventLog
from tests.e2e.runs import own_address
from tests.unit.small_run import small_config, small_paths

TIMEOUT_S = 60.0


def test_other_ranks_wait_as_long_as_rank_0_may_for_a_batch_and_then_for_room_to_record_it(tmp_path: Path) -> None:
    def wait_s(**debug: str) -> float:
        config = small_config(tmp_path, queue={"disk_full_s": 600.0}, deadlines={"batch_s": 2000.0, "evaluate_s": 2100.0}, debug=debug)
        return longest_wait_s(config.metarl)

    assert wait_s() == 2100.0 and wait_s(record_batches=str(tmp_path / "batches")) == 2600.0


@pytest.mark.parametrize(("method", "factor"), [("episodes", 3), ("sample", 1)])
def test_an_evaluation_under_several_discounts_may_take_as_many_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, factor: int
) -> None:
    """They are evaluated one after the other, and both the trainer and the ranks that wait for it know."""
    blocks = {"rollout": {"method": method}, "episodes": {"gammas": (0.99, 0.997, 1.0)}}
    config, waits = small_config(tmp_path, deadlines={"batch_s": 50.0, "evaluate_s": 2000.0}, **blocks), []

    def client(address: str, batch_s: float, evaluate_s: float, *rest: float, **options: object) -> None:
        waits.append(evaluate_s)

    monkeypatch.setattr(main, "ExperienceClient", client)
    monkeypatch.setattr(main, "LiveFeed", lambda *_: None)
    monkeypatch.setattr(main, "Publisher", lambda *_: None)
    paths = small_paths(config)
    with closing(EventLog(paths.event_log("trainer-0"), "trainer-0")) as events:
        main._leader(config, paths, {"experience": "tcp://127.0.0.1:9", "weights_port": 0}, events)
    assert waits == [longest_wait_s(config.metarl)] == [2000.0 * factor]


@contextmanager
def joined(host: str, port: int, has_store: bool = False) -> Iterator[None]:
    join_ranks(NeoXConfig(), RankEnv(0, 0, 1, host, port, has_store), torch.device("cpu"), TIMEOUT_S)
    try:
        yield
    finally:
        dist.destroy_process_group()


def listening(port: int) -> set[str]:
    """The addresses at which this process listens on ``port``."""
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_ranks_of_one_machine_meet_where_no_other_machine_comes(host: str) -> None:
    with joined(host, port := free_port("127.0.0.1")):
        assert listening(port) <= {"127.0.0.1", "::1"} and len(listening(port)) == 1
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0]
    assert not listening(port), "another world may meet there"


def test_ranks_of_several_machines_meet_at_the_address_that_they_were_told() -> None:
    if not (host := own_address()):
        pytest.skip("this machine has no address but loopback")
    with joined(host, port := free_port(host)):
        assert listening(port) == {host}


def test_an_address_that_is_not_this_machines_is_somebodys_who_forwards_it() -> None:
    assert listener_at("192.0.2.1", 1234) is None


def test_a_name_may_mean_another_address_to_other_machines_or_none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /etc/hosts has a machine's own name, or before a cluster's name server knows it."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert listener_at("node0", 1234) is None


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"cannot listen at MASTER_ADDR 127\.0\.0\.1, MASTER_PORT {port}: .*in use.*master_port"):
            join_ranks(NeoXConfig(), RankEnv(0, 0, 1, "127.0.0.1", port), torch.device("cpu"), TIMEOUT_S)


def test_the_store_of_torchruns_agent_is_joined_and_none_is_made() -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    before = listening(agent.port)
    with joined("127.0.0.1", agent.port, has_store=True):
        assert listening(agent.port) == before and agent.num_keys() > 1
