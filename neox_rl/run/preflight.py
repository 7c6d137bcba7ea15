"""Whether the nodes of a run reach one another, before anything starts: names the node and the port that cannot be reached.

    python -m neox_rl.run.preflight --nodes n1=10.0.0.1,n2=10.0.0.2,n3=10.0.0.3 --num-train 2 --base-port 15000 --dir DIR      on every node
    python -m neox_rl.run.preflight --join runs/NAME                  on a machine that is to add servers to a run

The first node is the head: launcher, orchestrator and rank 0 are there. DIR is empty, and on a file system that all nodes share.

    listen where the run will -> DIR/<node>.json -> all nodes are there -> connect to what the run will connect to -> DIR/<node>.done

Whoever listens says its name, so that an address that leads to another node, or back to this one, is found too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from neox_rl.config.network import is_loopback
from neox_rl.errors import ConfigError, DeadlineError, NeoxRLError
from neox_rl.run.endpoints import Endpoints, read_endpoints
from neox_rl.telemetry.jsonl import read_json, write_json
from neox_rl.telemetry.paths import RunPaths

HEAD_PORTS = {"experience": 0, "weights": 1, "join": 2, "master": 3}
"""Of the head node: what the port is for, and its place after the base port."""
FIRST_SERVER = 4
COLLECTIVES = "collectives"
POLL_S, RUN_POLL_S = 0.1, 1.0
CONNECT_S = 5.0
TOLD = "preflight: "
"""What a line that it says begins with: other lines are of ssh, or of a Python that breaks."""
_HELLO = "neox-rl preflight "
_SOCKET = re.compile(r"(\w+)=([^\s:=]+):(\d{1,5})")


@dataclass(frozen=True)
class Plan:
    """``nodes``: name -> address, training nodes first. ``servers``: how many start on each inference node."""

    nodes: Mapping[str, str]
    num_train: int
    base_port: int
    servers: int

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 1 <= self.num_train <= len(self.nodes):
            raise ConfigError(f"--num-train {self.num_train}: of {len(self.nodes)} nodes; give 1 to {len(self.nodes)}")
        if not 1024 <= self.base_port <= 65536 - (most := FIRST_SERVER + self.servers):
            raise ConfigError(f"--base-port {self.base_port}: {most} ports are taken from there on; give 1024 to {65536 - most}")

    @property
    def head(self) -> str:
        return next(iter(self.nodes))

    @property
    def train(self) -> list[str]:
        return list(self.nodes)[: self.num_train]

    def listens(self, node: str) -> dict[str, int]:
        """What ``node`` listens for, and at which port; 0: any, as NCCL and gloo choose theirs."""
        ports = {what: self.base_port + place for what, place in HEAD_PORTS.items()} if node == self.head else {}
        if node in self.train:
            return ports | {COLLECTIVES: 0}
        return {f"server {i}": self.base_port + FIRST_SERVER + i for i in range(self.servers)}

    def reaches(self, node: str) -> list[tuple[str, str]]:
        """(node, what) that ``node`` will connect to. The orchestrator is on the head node, and so is the first training rank."""
        found = [(self.head, "weights")]
        if node in self.train:
            found += [(self.head, "master"), *((other, COLLECTIVES) for other in self.train)]
        else:
            found.append((self.head, "join"))
        if node == self.head:
            found += [(self.head, "experience")]
            found += [(other, what) for other in self.nodes if other not in self.train for what in self.listens(other)]
        return found

    def settings(self) -> list[str]:
        """For deepy.py, so that the run uses what was tried."""
        address = self.nodes[self.head]
        ports = [f"metarl.network.{what}_port={self.base_port + place}" for what, place in HEAD_PORTS.items()]
        found = [f"metarl.network.bind_host={address}", f"master_addr={address}", *ports]
        return [word for setting in found for word in ("--set", setting)]


async def check_node(plan: Plan, node: str, directory: Path, timeout_s: float) -> list[str]:
    """What ``node`` cannot reach, a line each; empty where all is well. Returns when every node is done.

    Raises ConfigError for a port that cannot be bound, here or on another node, and for a directory that was used before, DeadlineError
    naming the nodes that do not come.
    """
    if old := [name for suffix in ("json", "done", "failed") if (directory / (name := f"{node}.{suffix}")).exists()]:
        raise ConfigError(f"--dir {directory}: holds {old[0]} of an earlier try; give an empty directory that all nodes share")
    async with AsyncExitStack() as stack:
        try:
            ports = {what: await listen(stack, node, plan.nodes[node], what, port) for what, port in plan.listens(node).items()}
        except ConfigError as error:
            (directory / f"{node}.failed").write_text(str(error))  # the others need not wait for this node
            raise
        write_json(directory / f"{node}.json", ports)
        await _all_there(directory, ".json", plan.nodes, timeout_s, "is Python started there, and is this directory shared?")
        tries = [
            _try(node, other, plan.nodes[other], read_json(directory / f"{other}.json")[what], what) for other, what in plan.reaches(node)
        ]
        failed = [line for line in await asyncio.gather(*tries) if line]
        (directory / f"{node}.done").touch()
        await _all_there(directory, ".done", plan.nodes, timeout_s + CONNECT_S, "see what it says")
        return failed


async def listen(stack: AsyncExitStack, node: str, address: str, what: str, port: int) -> int:
    """The port at which ``node`` says its name until ``stack`` is left; ``port`` 0: any. Raises ConfigError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{_HELLO}{node}\n".encode())
        await asyncio.wait_for(reader.read(), CONNECT_S)  # the other side closes first: the port must be free again at once
        writer.close()

    try:
        server = await asyncio.start_server(answer, address, port, family=socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"{node} cannot listen at {address} port {port} ({what}): {_why(error)}") from error
    await stack.enter_async_context(server)
    return int(server.sockets[0].getsockname()[1])


async def _try(node: str, other: str, address: str, port: int, what: str, named: bool = True) -> str:
    """Why ``other`` cannot be reached from ``node``; empty where it can. ``named``: it must say that it is ``other``."""
    there = f"{node} cannot reach {other} ({address}) at port {port} ({what})"
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(address, port, family=socket.AF_INET)
            said = (await reader.readline()).decode(errors="replace").strip() if named else ""
            writer.close()
    except TimeoutError:
        return f"{there}: no answer within {CONNECT_S:g} s; does a firewall drop it?"
    except OSError as error:
        return f"{there}: {_why(error)}"
    if named and said != f"{_HELLO}{other}":
        return f"{there}: {said.removeprefix(_HELLO)[:80] or 'somebody else'} answers there; is it the address of {other}?"
    return ""


def _why(error: OSError) -> str:
    """asyncio repeats address and port in its words."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


async def _all_there(directory: Path, suffix: str, nodes: Collection[str], timeout_s: float, hint: str) -> None:
    end = time.monotonic() + timeout_s
    while missing := [node for node in nodes if not (directory / f"{node}{suffix}").exists()]:
        if failed := [node for node in missing if (directory / f"{node}.failed").exists()]:
            raise ConfigError(f"gives up, because {failed[0]} did: {(directory / f'{failed[0]}.failed').read_text()[:500]}")
        if time.monotonic() > end:
            raise DeadlineError(f"{', '.join(missing)} in {directory}", timeout_s, hint)
        await asyncio.sleep(POLL_S)


async def check_run(node: str, run_dir: Path, timeout_s: float) -> list[str]:
    """Which sockets of a run a server on ``node`` could not reach within ``timeout_s``: it may be yet to start, and its directory that of
    an earlier start. Raises ConfigError where there is no run."""
    end, endpoints = time.monotonic() + timeout_s, RunPaths.of(run_dir).endpoints
    while True:
        lines = await _unreached(node, read_endpoints(endpoints)) if endpoints.is_file() else [f"{endpoints} is not there"]
        if not lines:
            return []
        if (left := end - time.monotonic()) <= 0:
            read_endpoints(endpoints)
            return lines
        await asyncio.sleep(min(left, RUN_POLL_S))


async def _unreached(node: str, run: Endpoints) -> list[str]:
    ports = {"join": run.join_port, "weights": run.weights_port}
    lines = await asyncio.gather(*(_try(node, "the run", run.host, port, what, named=False) for what, port in ports.items()))
    return [line for line in lines if line]


async def check_servers(addresses: Sequence[str]) -> list[str]:
    """At which of ``http://HOST:PORT`` nobody listens, a line each."""
    here, split = socket.gethostname(), [urlsplit(address) for address in addresses]
    lines = await asyncio.gather(*(_try(here, url.geturl(), url.hostname or "", url.port or 80, "server", named=False) for url in split))
    return [line for line in lines if line]


async def check_sockets(node: str, head: str, sockets: str) -> list[str]:
    """Which of ``what=address:port,...``, at which ``head`` must say its name, ``node`` cannot reach. Raises ConfigError."""
    found = [_SOCKET.fullmatch(part) for part in sockets.split(",")]
    if None in found:
        raise ConfigError(f"--reach {sockets}: must be WHAT=ADDRESS:PORT,WHAT=ADDRESS:PORT")
    lines = await asyncio.gather(*(_try(node, head, part[2], int(part[3]), part[1]) for part in found if part))
    return [line for line in lines if line]


def parse_nodes(text: str) -> dict[str, str]:
    """``n1=10.0.0.1,n2=10.0.0.2``. Raises ConfigError."""
    pairs = [part.partition("=") for part in text.split(",")]
    if bad := [name for name, sign, address in pairs if not (name and sign and address)]:
        raise ConfigError(f"--nodes: {bad[0]!r} has no address; write NODE=ADDRESS,NODE=ADDRESS")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError("--nodes names a node twice; name each once")
    if len(pairs) > 1 and (local := [f"{name}={address}" for name, _, address in pairs if is_loopback(address)]):
        raise ConfigError(f"--nodes {local[0]}: no other node reaches a loopback address; give the node's own")
    return {name: address for name, _, address in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 after a line for each connection that fails; 2 for what cannot be tried."""
    parser = argparse.ArgumentParser(prog="python -m neox_rl.run.preflight", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--node", default=os.environ.get("SLURMD_NODENAME") or socket.gethostname(), help="name of this node")
    parser.add_argument("--join", type=Path, metavar="RUN_DIR", help="try the sockets of this run, and nothing else")
    parser.add_argument("--reach", default="", metavar="WHAT=ADDRESS:PORT,...", help="try these alone")
    parser.add_argument("--head", default="", help="the node that listens at those of --reach")
    parser.add_argument("--nodes", default="", metavar="NODE=ADDRESS,...", help="all nodes, those of the training ranks first")
    parser.add_argument("--num-train", type=int, default=1, help="how many of them have training ranks")
    parser.add_argument("--servers", type=int, default=1, help="servers on each of the others")
    parser.add_argument("--base-port", type=int, default=15000, help="experience, weights, join, master, then the servers' ports")
    parser.add_argument("--dir", type=Path, default=Path("."), help="an empty directory that all nodes share")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for all nodes, or the run, to come")
    parser.add_argument("--settings", action="store_true", help="try nothing; print the arguments with which deepy.py uses these ports")
    options = parser.parse_args(argv)
    try:
        if options.reach:
            failed = asyncio.run(check_sockets(options.node, options.head, options.reach))
        elif options.join is not None:
            failed = asyncio.run(check_run(options.node, options.join, options.timeout))
        else:
            plan = Plan(parse_nodes(options.nodes), options.num_train, options.base_port, options.servers)
            if options.settings:
                print(" ".join(plan.settings()))
                return 0
            if options.node not in plan.nodes:
                raise ConfigError(f"--node {options.node!r} is not among --nodes {', '.join(plan.nodes)}; name it as there")
            failed = asyncio.run(check_node(plan, options.node, options.dir, options.timeout))
    except NeoxRLError as error:
        sys.stderr.write(f"{TOLD}{error}\n")
        return 2
    sys.stderr.write("".join(f"{TOLD}{line}\n" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
