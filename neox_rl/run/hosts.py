"""The hosts of a host file, and whether the ranks can be started there: tried by ssh before anything else, because pdsh and mpirun tell of
one bad host in the middle of their logs, or not before a deadline.

    for each host:  ssh HOST -> the repository is there, and what this machine writes -> its Python -> what a rank connects to (preflight)
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.run.endpoints import Endpoints
from neox_rl.run.preflight import TOLD, listen

BY_SSH = {"pdsh": ("ssh", "pdsh"), "openmpi": ("ssh", "mpirun", "ompi_info")}
"""Launchers that reach the hosts by ssh, and what each needs on the head."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
AT_A_TIME = 64
HOST_S = 120.0
_LINE = re.compile(r"([^\s-]\S*)\s+slots=(\d+)")
_NO_REPOSITORY, _NO_FILE, _NO_PYTHON, _SSH_FAILED = 71, 72, 73, 255


def parse_hostfile(text: str, path: str) -> dict[str, int]:
    """Hosts of a DeepSpeed host file (``HOST slots=N``) in order, with the ranks on each. Raises ConfigError naming the line."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not (line := line.partition("#")[0].strip()):
            continue
        found = _LINE.fullmatch(line)
        if found is None or int(found[2]) < 1:
            raise ConfigError(f"{path}:{number}: {line!r} is no host; write HOST slots=RANKS")
        if found[1] in hosts:
            raise ConfigError(f"{path}:{number}: {found[1]} is there twice; write each host once, with all of its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"{path}: names no host; write HOST slots=RANKS, a line each")
    return hosts


def read_hosts(config: RunConfig) -> dict[str, int]:
    """Those of ``hostfile``. Raises ConfigError for a file that is none, or ranks that do not fit the layout."""
    n = config.neox
    hosts = parse_hostfile(Path(n.hostfile).read_text(errors="replace"), n.hostfile)
    if odd := [host for host, slots in hosts.items() if slots != n.num_gpus]:
        rule = f"every host has num_gpus = {n.num_gpus} ranks; set one of them"
        raise ConfigError(f"{n.hostfile}: {odd[0]} slots={hosts[odd[0]]}: {rule}")
    tp, pp = n.model_parallel_size, n.pipe_stages
    if (ranks := len(hosts) * n.num_gpus) % (tp * pp):
        raise ConfigError(
            f"{n.hostfile}: {len(hosts)} hosts of {n.num_gpus} ranks are {ranks}: must be a multiple of model_parallel_size {tp} x"
            f" pipe_parallel_size {pp}; change hosts, num_gpus or the layout"
        )
    return hosts


def check_hosts(config: RunConfig, endpoints: Endpoints) -> None:
    """Raises ConfigError with a line for each host on which ``launcher: pdsh`` or ``openmpi`` could not start ranks."""
    n = config.neox
    if missing := [name for name in BY_SSH[n.launcher] if shutil.which(name) is None]:
        raise ConfigError(f"launcher = {n.launcher}: there is no {missing[0]} on this machine; install it, or set another launcher")
    hosts = list(read_hosts(config))
    if not _is_here(hosts[0]):
        raise ConfigError(
            f"{n.hostfile}: its first host {hosts[0]} is not this machine, and rank 0 must be beside the orchestrator; start the run there,"
            " or put this machine first"
        )
    where = Path(config.metarl.runs_dir).absolute()
    where = next(path for path in (where, *where.parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(prefix=".neox-rl-", dir=where) as written:
        if failed := asyncio.run(_check_all(hosts, _sockets(config, endpoints), written.name)):
            raise ConfigError("\n".join(failed))


def _sockets(config: RunConfig, endpoints: Endpoints) -> dict[str, tuple[str, int]]:
    """What a rank on another host connects to, on the head."""
    return {"master": (config.neox.master_addr, endpoints.master_port), "weights": (endpoints.host, endpoints.weights_port)}


def _is_here(host: str) -> bool:
    with suppress(OSError), socket.socket() as probe:
        probe.bind((socket.gethostbyname(host), 0))
        return True
    return False


async def _check_all(hosts: Sequence[str], sockets: Mapping[str, tuple[str, int]], written: str) -> list[str]:
    """A line for each host that cannot be used. Raises ConfigError for a port that cannot be bound here."""
    turns = asyncio.Semaphore(AT_A_TIME)
    reach = ",".join(f"{what}={address}:{port}" for what, (address, port) in sockets.items())

    async def check(host: str) -> str:
        async with turns:
            return await _check(host, _script(host, hosts[0], reach, written), written)

    async with AsyncExitStack() as stack:
        for what, (address, port) in sockets.items():
            await listen(stack, hosts[0], address, what, port)
        return [line for line in await asyncio.gather(*map(check, hosts)) if line]


def _script(host: str, head: str, reach: str, written: str) -> str:
    """What a host is asked to do, for its POSIX shell."""
    here, python = os.getcwd(), sys.executable
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    command = [python, "-m", "neox_rl.run.preflight", "--node", host, "--head", head, "--reach", reach]
    return (
        f"cd {shlex.quote(here)} || exit {_NO_REPOSITORY}; test -e {shlex.quote(written)} || exit {_NO_FILE};"
        f" test -x {shlex.quote(python)} || exit {_NO_PYTHON}; PYTHONPATH={shlex.quote(path)} exec {shlex.join(command)}"
    )


async def _check(host: str, script: str, written: str) -> str:
    """Why ranks cannot be started on ``host``; empty where they can."""
    process = await asyncio.create_subprocess_exec(
        *SSH, host, f"exec sh -c {shlex.quote(script)}", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=-1
    )
    try:
        said = (await asyncio.wait_for(process.communicate(), HOST_S))[1].decode(errors="replace").strip()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"{host}: ssh {host} brought no answer within {HOST_S:g} s; does it log in there, and is the file system of Python fast?"
    status, last = process.returncode, (said.splitlines() or ["no word"])[-1]
    cannot_run = f"{host}: cannot run {sys.executable} there (exit status {status}): {last}"
    told = [line.removeprefix(TOLD) for line in said.splitlines() if line.startswith(TOLD)]  # not ssh's banners, nor a traceback
    shared = "repository, Python and metarl.runs_dir must be at the same path on every host, on a file system that they share"
    return {
        0: "",
        1: "\n".join(told) or cannot_run,
        _NO_REPOSITORY: f"{host}: has no directory {os.getcwd()}; {shared}",
        _NO_FILE: f"{host}: does not see what this machine writes in {Path(written).parent}; {shared}",
        _NO_PYTHON: f"{host}: has no {sys.executable}; {shared}",
        _SSH_FAILED: f"{host}: ssh {host} failed: {last}; it must lead there without a question, by a key, to a known host",
    }.get(status or 0, cannot_run)
