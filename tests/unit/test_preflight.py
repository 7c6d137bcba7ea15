"""Nodes try one another before a run: who must reach whom, and what is said of the port that cannot be reached."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from neox_rl.errors import ConfigError, DeadlineError
from neox_rl.keys import Keys
from neox_rl.run import preflight
from neox_rl.run.endpoints import Endpoints, free_port, write_endpoints
from neox_rl.run.preflight import Plan, check_node, check_run, check_servers, main, parse_nodes
from neox_rl.run.serve import find_run
from neox_rl.telemetry.paths import RunPaths

SOON_S = 60.0
NODES = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}


@contextmanager
def taken(port: int = 0) -> Iterator[int]:
    """A port that somebody else listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", port))
        found.listen()
        yield found.getsockname()[1]


def test_servers_reach_the_weights_and_the_desk_and_the_orchestrator_reaches_the_servers() -> None:
    plan = Plan(NODES, 2, 15000, 2)
    assert plan.listens("n1") == {"experience": 15000, "weights": 15001, "join": 15002, "master": 15003, "collectives": 0}
    assert plan.listens("n2") == {"collectives": 0} and plan.listens("n3") == {"server 0": 15004, "server 1": 15005}
    assert set(plan.reaches("n3")) == {("n1", "weights"), ("n1", "join")}
    assert {("n1", "master"), ("n1", "collectives")} < set(plan.reaches("n2")) and ("n3", "server 0") not in plan.reaches("n2")
    assert {("n3", "server 0"), ("n3", "server 1"), ("n2", "collectives")} < set(plan.reaches("n1"))


def test_the_run_is_told_to_use_what_was_tried() -> None:
    said = Plan(NODES, 2, 15000, 2).settings()
    assert said[::2] == ["--set"] * 6
    assert {"metarl.network.bind_host=10.0.0.1", "master_addr=10.0.0.1", "metarl.network.join_port=15002"} < set(said)


def test_what_is_no_plan_is_named() -> None:
    for text, said in (("n1", "'n1' has no address"), ("n1=a,n1=b", "a node twice")):
        with pytest.raises(ConfigError, match=said):
            parse_nodes(text)
    with pytest.raises(ConfigError, match="no other node reaches a loopback address"):
        parse_nodes("n1=127.0.0.1,n2=10.0.0.2")
    with pytest.raises(ConfigError, match="give 1 to 3"):
        Plan(NODES, 4, 15000, 1)
    assert main(["--nodes", "n1=10.0.0.1", "--node", "n9"]) == 2


def hosts(base_port: int) -> Plan:
    """Two nodes on this machine: Linux has all of 127.0.0.0/8, so each can have an address of its own."""
    return Plan({"n1": "127.0.0.1", "n2": "127.0.0.2"}, 1, base_port, 1)


def free_base() -> int:
    """Below the ports of outgoing connections: the next to a free one of those is often taken."""
    return free_port("127.0.0.1")


def test_nodes_that_reach_one_another_have_nothing_to_say(tmp_path: Path) -> None:
    async def both() -> list[list[str]]:
        plan = hosts(free_base())
        return await asyncio.gather(*(check_node(plan, node, tmp_path, SOON_S) for node in plan.nodes))

    assert asyncio.run(both()) == [[], []]


def test_an_address_at_which_another_node_answers_is_named(tmp_path: Path) -> None:
    async def both() -> list[list[str]]:
        plan = hosts(free_base())
        wrong = replace(plan, nodes={"n1": "127.0.0.2", "n2": "127.0.0.2"})  # what n2 believes
        return await asyncio.gather(check_node(plan, "n1", tmp_path, SOON_S), check_node(wrong, "n2", tmp_path, 10.0))

    first, second = asyncio.run(both())
    assert first == [] and len(second) == 2
    assert all(line.startswith("n2 cannot reach n1 (127.0.0.2) at port ") for line in second)
    assert {line.partition("(")[2].partition("(")[2].partition(")")[0] for line in second} == {"weights", "join"}


def test_a_taken_port_is_named_on_every_node(tmp_path: Path) -> None:
    async def both(plan: Plan) -> list[list[str] | BaseException]:
        return await asyncio.gather(*(check_node(plan, node, tmp_path, SOON_S) for node in plan.nodes), return_exceptions=True)

    with taken(free_base() + 1) as port:
        for error in asyncio.run(both(hosts(port - 1))):
            assert isinstance(error, ConfigError)
            assert f"n1 cannot listen at 127.0.0.1 port {port} (weights): Address already in use" in str(error)


def test_nodes_that_do_not_come_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match=r"n2 in .*is this directory shared\?"):
        asyncio.run(check_node(hosts(free_base()), "n1", tmp_path, 0.3))


def test_a_directory_that_was_used_before_says_nothing_of_today(tmp_path: Path) -> None:
    (tmp_path / "n1.done").touch()
    with pytest.raises(ConfigError, match=r"--dir .*: holds n1.done of an earlier try; give an empty directory"):
        asyncio.run(check_node(hosts(free_base()), "n1", tmp_path, 0.3))


def test_a_closed_port_of_a_run_is_named_before_a_server_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, closed = RunPaths.of(tmp_path / "run").create(), free_base()
    with taken() as join:
        write_endpoints(paths, Endpoints("127.0.0.1", 1, closed, 1, join, (), 99))
        assert main(["--node", "n7", "--join", str(paths.root), "--timeout", "0"]) == 1
    assert capsys.readouterr().err == (f"preflight: n7 cannot reach the run (127.0.0.1) at port {closed} (weights): Connection refused\n")


def test_a_run_that_starts_later_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the directory has the addresses of an earlier start, at which nobody listens."""
    monkeypatch.setattr(preflight, "RUN_POLL_S", 0.01)
    root = tmp_path / "run"
    assert main(["--join", str(root), "--timeout", "0"]) == 2
    assert f"{root}/endpoints.json is not there: start the run" in capsys.readouterr().err

    async def story(join: int) -> list[str]:
        looking = asyncio.create_task(check_run("n7", root, SOON_S))
        await asyncio.sleep(0.05)
        paths, closed = RunPaths.of(root).create(), free_base()
        for port in (closed, join):
            assert not looking.done()
            write_endpoints(paths, Endpoints("127.0.0.1", 1, port, 1, port, (), 99))
            await asyncio.sleep(0.05)
        return await looking

    with taken() as join:
        assert asyncio.run(story(join)) == []


def test_a_run_directory_says_where_to_join_and_with_which_keys_once_the_run_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert find_run(str(run), None) is None
    write_endpoints(paths := RunPaths.of(run).create(), Endpoints("10.0.0.1", 1, 2, 3, 15002, (), 99))
    assert find_run(str(run), None) == ("tcp://10.0.0.1:15002", None)
    made = Keys.make(paths.keys)
    found = find_run(str(run), None)
    assert found is not None and found[1] is not None and found[1].server_public == made.server_public
    assert not found[1].server_secret, "a server gets the client's file"


def test_servers_that_nobody_has_started_are_named() -> None:
    with taken() as port:
        here, nowhere = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_base()}"
        (line,) = asyncio.run(check_servers([here, nowhere]))
    assert f"cannot reach {nowhere} (127.0.0.1) at port" in line and "(server): Connection refused" in line
