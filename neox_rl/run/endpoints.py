"""The addresses of one run: chosen once by the launcher, read by every process from ``endpoints.json``."""

from __future__ import annotations

import errno
import random
import socket
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from neox_rl.config.derived import HF_DTYPES
from neox_rl.config.machine import Machine
from neox_rl.config.placement import num_servers, place
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.telemetry.jsonl import read_json, write_json
from neox_rl.telemetry.paths import RunPaths

SEED_STEP, SEEDS = 1_000_003, 1 << 32
"""Servers of one seed would draw the same random numbers for their requests: correlated rollouts."""

FREE_PORTS = range(15_000, 32_768)
"""Where ports are chosen: above those of well-known services, below those that Linux gives to outgoing connections."""
_AGAIN_S = 0.2


@dataclass(frozen=True)
class Endpoints:
    """Host and ports. ``servers`` are ``http://host:port`` in order; ``vocab_size`` is the tokenizer's."""

    host: str
    experience_port: int
    weights_port: int
    master_port: int
    join_port: int
    servers: tuple[str, ...]
    vocab_size: int

    @property
    def experience(self) -> str:
        return f"tcp://{self.host}:{self.experience_port}"

    @property
    def weights(self) -> str:
        return f"tcp://{self.host}:{self.weights_port}"

    @property
    def join(self) -> str:
        return f"tcp://{self.host}:{self.join_port}"


def choose_endpoints(config: RunConfig, vocab_size: int, wait_s: float = 0.0) -> Endpoints:
    """Configured ports as they are, checked to be free; free ones for those that are 0. Raises ConfigError naming a taken port.

    ``wait_s``: how long who has a configured one may take to end.
    """
    network, servers = config.metarl.network, config.metarl.servers
    count = num_servers(config)
    server_ports = [network.server_port + i if network.server_port else 0 for i in range(count)]
    wanted = {
        "metarl.network.experience_port": network.experience_port,
        "metarl.network.weights_port": network.weights_port,
        "metarl.network.master_port": network.master_port,
        "metarl.network.join_port": network.join_port,
        **{f"metarl.network.server_port (server {i})": port for i, port in enumerate(server_ports)},
    }
    experience, weights, master, join, *ports = _reserve(network.bind_host, wanted, wait_s)
    addresses = servers.addresses or tuple(f"http://{network.bind_host}:{port}" for port in ports)
    return Endpoints(network.bind_host, experience, weights, master, join, tuple(addresses), vocab_size)


def free_port(host: str) -> int:
    """One of this machine at ``host``. Raises ConfigError."""
    return _reserve(host, {"--port": 0})[0]


def _reserve(host: str, wanted: dict[str, int], wait_s: float = 0.0) -> list[int]:
    """All at once, so that no free port is found twice. Raises ConfigError."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(f"metarl.network.bind_host = {host!r}: {error.strerror}; give an IPv4 address or name of this machine") from error
    end = time.monotonic() + wait_s
    with ExitStack() as stack:
        ports: list[int] = []
        for key, port in wanted.items():
            found = stack.enter_context(socket.socket())
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                while not _is_bound(found, host, port, last=time.monotonic() >= end):
                    time.sleep(_AGAIN_S)
            except OSError as error:
                raise ConfigError(f"{key} = {port}: cannot bind {host}:{port} ({error.strerror}); choose a free port, or 0") from error
            ports.append(found.getsockname()[1])
        return ports


def _is_bound(found: socket.socket, host: str, port: int, last: bool) -> bool:
    """False where somebody has the port still. Raises OSError; also for that where this was the ``last`` try."""
    try:
        _bind(found, host, port)
        return True
    except OSError as error:
        if last or error.errno != errno.EADDRINUSE:
            raise
        return False


def _bind(found: socket.socket, host: str, port: int) -> None:
    """Port 0: a free one below those that the system hands out for port 0. Its owner binds it many seconds later, and by then a
    server's inner sockets may have got any of those."""
    tries = [port] if port else random.SystemRandom().sample(range(FREE_PORTS.start, min(FREE_PORTS.stop, _first_ephemeral_port())), 64)
    for i, candidate in enumerate(tries):
        try:
            found.bind((host, candidate))
            return
        except OSError:
            if i + 1 == len(tries):
                raise


def _first_ephemeral_port() -> int:
    try:
        return max(FREE_PORTS.start + 1000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return FREE_PORTS.stop


def write_endpoints(paths: RunPaths, endpoints: Endpoints) -> None:
    addresses = {"experience": endpoints.experience, "weights": endpoints.weights, "join": endpoints.join}
    write_json(paths.endpoints, asdict(endpoints) | addresses, indent=2)


def read_endpoints(path: Path) -> Endpoints:
    """What the launcher wrote. Raises ConfigError where there is no such file."""
    if not path.is_file():
        raise ConfigError(f"{path} is not there: start the run with deepy.py, or a part of it with the --run-dir of a started run")
    written = read_json(path)
    known = {f.name: written[f.name] for f in fields(Endpoints)}
    return Endpoints(**{**known, "servers": tuple(known["servers"])})


def server_specs(config: RunConfig, endpoints: Endpoints, model_dir: Path, machine: Machine) -> Sequence[ServerSpec]:
    """One spec a server, those that run elsewhere included (of which only name, address and TP size count)."""
    where, any_server = place(config, machine), offered_spec(config, model_dir)
    specs: list[ServerSpec] = []
    for i, address in enumerate(endpoints.servers):
        host, _, port = address.removeprefix("http://").rpartition(":")
        started = i < len(where.servers)
        specs.append(
            replace(
                any_server,
                name=f"server-{i}",
                host=host,
                port=int(port),
                seed=(config.metarl.seed + i * SEED_STEP) % SEEDS,
                cores="|".join(",".join(map(str, rank)) for rank in where.servers[i]) if started and any(where.servers[i]) else "",
                gpus=machine.visible(where.server_gpus[i]) if started and where.server_gpus else "",
            )
        )
    return specs


def another_seed(seed: int, turn: str) -> int:
    """For a server that is started again: neither its own of before nor that of any other."""
    return zlib.crc32(f"{seed}/{turn}".encode())


def offered_spec(config: RunConfig, model_dir: Path) -> ServerSpec:
    """What every server of the run is; it has no name, address, cores and GPUs yet."""
    servers = config.metarl.servers
    return ServerSpec(
        name="",
        model_dir=model_dir,
        host="",
        port=0,
        dtype=HF_DTYPES[config.neox.precision] if servers.dtype == "auto" else servers.dtype,
        max_model_len=config.neox.seq_length,
        max_num_seqs=servers.max_num_seqs,
        tensor_parallel_size=servers.tensor_parallel_size if config.metarl.rollout.generator == "vllm" else 1,
        enforce_eager=servers.enforce_eager,
        seed=config.metarl.seed,
        kv_cache_gib=servers.kv_cache_gib,
        gpu_memory_frac=servers.gpu_memory_frac,
        stats=config.metarl.rollout.method == "search",
    )
