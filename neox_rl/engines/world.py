"""The training ranks meet: device, rendezvous and place of each, whatever framework goes on from there."""

from __future__ import annotations

import errno
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed has them, and says so to no type checker

from neox_rl.config.derived import evaluation_s
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.network import is_address, is_loopback
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.port import Topology
from neox_rl.engines.rank_env import RankEnv
from neox_rl.errors import ConfigError, DeadlineError

CONTROL_SLACK_S = 60.0


def rank_device(env: RankEnv) -> torch.device:
    """This rank's device, made the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", device_index(env, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def device_index(env: RankEnv, num_gpus: int) -> int:
    """Its own among the ``num_gpus`` that this rank sees: all of the node's, or one alone (``srun --gpus-per-task=1``). Without any, its
    place on the node."""
    return env.local_rank % num_gpus if num_gpus else env.local_rank


def backend_of(neox: NeoXConfig, device: torch.device) -> str:
    return neox.distributed_backend if neox.distributed_backend != "auto" else ("nccl" if device.type == "cuda" else "gloo")


def join_ranks(neox: NeoXConfig, env: RankEnv, device: torch.device, timeout_s: float) -> None:
    """Rendezvous of all ranks, with a deadline for it and for every collective of the world's own group.

    It has no keys: whoever reaches its port can read and set what the ranks tell one another there.

    Raises ConfigError for a world that TP x PP does not divide, DeadlineError when not all come.
    """
    tp, pp = neox.model_parallel_size, neox.pipe_stages
    if env.world_size % (tp * pp):
        raise ConfigError(
            f"{env.world_size} ranks are not a multiple of model_parallel_size {tp} x pipe_parallel_size {pp}; "
            f"set num_gpus (or the number of processes) to a multiple of {tp * pp}"
        )
    backend, timeout = backend_of(neox, device), timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("default_pg", _store(env, timeout)),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
    except (dist.DistStoreError, dist.DistNetworkError, OSError) as error:
        place = f"MASTER_ADDR {env.master_addr}, MASTER_PORT {env.master_port}"
        if env.rank == 0 and not isinstance(error, dist.DistStoreError):
            raise ConfigError(f"rank 0 cannot listen at {place}: {error}; set master_addr and metarl.network.master_port") from error
        where = f"rank {env.rank} met nobody else at {place}; see the logs of the other ranks ({error})"
        raise DeadlineError(f"all {env.world_size} training ranks", timeout_s, where) from error


def _store(env: RankEnv, timeout: timedelta) -> TCPStore:
    """What torch makes of ``tcp://``, except that it would listen on every interface of rank 0's machine. Raises OSError."""
    listens = env.rank == 0 and not env.has_store
    listener = listener_at(env.master_addr, env.master_port) if listens else None
    return TCPStore(
        env.master_addr.strip("[]"),
        env.master_port,
        env.world_size,
        is_master=listens,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),  # the store closes it
    )


def listener_at(host: str, port: int) -> socket.socket | None:
    """A socket bound to ``host`` alone. None where that is not an address of this machine, and only torch's way reaches all who come: one
    that is forwarded to it, or a name, which may mean another address to other machines, or none yet. Raises OSError."""
    if not is_loopback(host) and not is_address(host):
        return None
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    for family, kind, _, _, address in found:
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of ranks that were just ended
            listener.bind(address)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return None


def topology_of(neox: NeoXConfig, env: RankEnv, device: torch.device, tp_rank: int, pp_rank: int, dp_rank: int) -> Topology:
    tp, pp = neox.model_parallel_size, neox.pipe_stages
    return Topology(
        rank=env.rank,
        world_size=env.world_size,
        tp=tp,
        pp=pp,
        dp=env.world_size // (tp * pp),
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dp_rank=dp_rank,
        device=str(device),
    )


def longest_wait_s(metarl: MetaRLConfig) -> float:
    """Of rank 0 alone, while the others wait for it: a batch that is recorded waits for the orchestrator, then for room on the disk."""
    deadlines = metarl.deadlines
    record_s = metarl.queue.disk_full_s if metarl.debug.record_batches else 0.0
    return max(deadlines.batch_s + record_s, evaluation_s(metarl), deadlines.publish_s, deadlines.ranks_start_s)


def control_group(metarl: MetaRLConfig) -> dist.ProcessGroup:
    """All ranks over gloo, with a deadline above the longest wait of rank 0."""
    timeout = timedelta(seconds=longest_wait_s(metarl) + CONTROL_SLACK_S)
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group
