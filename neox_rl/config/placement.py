"""Which process runs on which cores and GPUs, and the list of processes that a run starts. Pure functions of config and machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from neox_rl.config.derived import makes_policy
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError

Cores: TypeAlias = tuple[int, ...]
"""Core ids of one process or TP rank; empty: not pinned."""

SERVERS = {
    "vllm": ("vLLM server", "python -m vllm.entrypoints.openai.api_server (TP {tp})"),
    "scripted": ("scripted server", "python -m neox_rl.run.scripted_server"),
}
"""What starts for each ``rollout.generator``: its name, and its command in short."""


@dataclass(frozen=True)
class Placement:
    """``servers[i][t]``: cores of TP rank t of server i. ``ranks[r]``: cores of training rank r. GPUs are empty on a CPU machine."""

    servers: tuple[tuple[Cores, ...], ...]
    ranks: tuple[Cores, ...]
    orchestrator: Cores
    server_gpus: tuple[tuple[int, ...], ...]
    rank_gpus: tuple[int, ...]


@dataclass(frozen=True)
class Process:
    """``count`` like processes of a run, and what the i-th of them is pinned to."""

    name: str
    count: int
    command: str
    cores: tuple[str, ...]


def num_servers(config: RunConfig) -> int:
    """Servers that the run itself starts, vLLM's or scripted ones."""
    m = config.metarl
    return 0 if m.debug.mode == "train_only" or m.servers.addresses or not makes_policy(config) else m.servers.num_servers


def num_vllm_servers(config: RunConfig) -> int:
    """Those that want cores or GPUs of their own: a scripted server mostly sleeps."""
    return num_servers(config) if config.metarl.rollout.generator == "vllm" else 0


def num_ranks(config: RunConfig) -> int:
    """Training ranks on this node."""
    return config.neox.num_gpus


def parse_core_sets(text: str, key: str) -> tuple[tuple[Cores, ...], ...]:
    """``0;1`` is two servers, ``0|1;2|3`` two servers of two TP ranks, ``0-3,8`` one set of five cores. Raises ConfigError."""
    try:
        sets = tuple(tuple(_core_set(part) for part in server.split("|")) for server in text.split(";"))
    except ValueError as error:
        raise ConfigError(
            f"{key} = {text!r}: must be auto, or core sets such as 0;1 or 0-3,8 or 0|1;2|3 (| between TP ranks); {error}"
        ) from error
    return sets


def _core_set(text: str) -> Cores:
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not 0 <= low <= high < 4096:
            raise ValueError(f"{part.strip()!r} is not a range of cores")
        cores.extend(range(low, high + 1))
    return tuple(cores)


def place(config: RunConfig, machine: Machine) -> Placement:
    """Explicit sets as written; on a CPU machine ``auto`` gives servers the first cores and training ranks the last ones, one core each.

    One core each, because two math threads on a contended core are several times slower than one. Cores left in the middle are the
    orchestrator's and the verifier's. With none left these are not pinned: trainer and servers wait for one another in turn, and the
    scheduler finds the core that is idle just then. With fewer cores than servers and ranks, they share in turn.
    """
    m = config.metarl
    servers, ranks, tp = num_vllm_servers(config), num_ranks(config), m.servers.tensor_parallel_size
    server_sets = parse_core_sets(m.servers.cores, "metarl.servers.cores") if m.servers.cores != "auto" and servers else None
    rank_sets = [s[0] for s in parse_core_sets(m.trainer_cores, "metarl.trainer_cores")] if m.trainer_cores != "auto" and ranks else None
    pinned = machine.num_gpus == 0
    taken = {c for s in server_sets or () for r in s for c in r} | {c for s in rank_sets or () for c in s}
    free = tuple(c for c in machine.cores if c not in taken) or machine.cores
    if server_sets is None:
        flat = _take(free, servers * tp) if pinned else [()] * (servers * tp)
        server_sets = tuple(tuple(flat[i * tp : (i + 1) * tp]) for i in range(servers))
    if rank_sets is None:
        rank_sets = _take(free[::-1], ranks)[::-1] if pinned else [()] * ranks
    taken = {c for s in server_sets for r in s for c in r} | {c for s in rank_sets for c in s}
    rank_gpus = tuple(range(ranks)) if machine.num_gpus else ()
    return Placement(
        server_sets or (((),),) * num_servers(config),
        tuple(rank_sets),
        tuple(c for c in machine.cores if c not in taken) if pinned else (),
        _server_gpus(config, machine, servers, ranks),
        rank_gpus,
    )


def _take(cores: Sequence[int], count: int) -> list[Cores]:
    return [(cores[i % len(cores)],) for i in range(count)]


def _server_gpus(config: RunConfig, machine: Machine, servers: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    tp, text = config.metarl.servers.tensor_parallel_size, config.metarl.servers.gpus
    if not machine.num_gpus or not servers:
        return ()
    if text != "auto":
        return tuple(s[0] for s in parse_core_sets(text, "metarl.servers.gpus"))
    return tuple(tuple(range(ranks + i * tp, ranks + (i + 1) * tp)) for i in range(servers))


def plan(config: RunConfig, machine: Machine, script: str = "train.py") -> tuple[Process, ...]:
    """The processes that a run starts, in the order they start."""
    where = place(config, machine)
    m, n = config.metarl, config.neox
    rows: list[Process] = []
    if where.servers:
        labels = tuple(_server_label(s, where.server_gpus[i] if where.server_gpus else ()) for i, s in enumerate(where.servers))
        name, command = SERVERS[m.rollout.generator]
        rows.append(Process(name, len(where.servers), command.format(tp=m.servers.tensor_parallel_size), labels))
    if m.debug.mode != "train_only":
        rows.append(Process("orchestrator", 1, "python -m neox_rl.run.orchestrator", (_label(where.orchestrator),)))
        rows.append(Process("verifier", m.verify.workers, "started by the orchestrator", (_label(where.orchestrator),) * m.verify.workers))
    if where.ranks:
        layout = f"TP {n.model_parallel_size} x PP {n.pipe_stages} x DP {len(where.ranks) // (n.model_parallel_size * n.pipe_stages)}"
        gpus = where.rank_gpus
        labels = tuple(f"GPU {gpus[r]}" if gpus else _label(cores) for r, cores in enumerate(where.ranks))
        rows.append(Process("training rank", len(where.ranks), f"{script} under the {n.launcher} launcher ({layout})", labels))
    return tuple(rows)


def _server_label(ranks: tuple[Cores, ...], gpus: tuple[int, ...]) -> str:
    return "GPU " + ",".join(map(str, gpus)) if gpus else _label(tuple(c for rank in ranks for c in rank))


def _label(cores: Cores) -> str:
    if not cores:
        return "any core"
    return f"core{'s' if len(cores) > 1 else ''} " + ",".join(map(str, cores))
