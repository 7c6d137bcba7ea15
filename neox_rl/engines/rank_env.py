"""Which rank this process is, whoever started it: torchrun, DeepSpeed's runner, mpirun or srun."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from neox_rl.config.network import is_loopback
from neox_rl.errors import ConfigError

DEFAULT_PORT = 29500
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True)
class RankEnv:
    """One process of the training world. ``local_rank`` counts the processes of this node.

    ``has_store``: the rendezvous is there already, torchrun's agent holds it.
    """

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    has_store: bool = False


_SCHEMES: tuple[tuple[str, str, str, str], ...] = (
    ("torchrun or deepspeed", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)
"""(launcher, rank, local rank, world size), first match wins: torchrun inside a SLURM job sets both kinds."""


def rank_environment(environ: Mapping[str, str], default_master: str = "127.0.0.1") -> RankEnv:
    """The rank named by the environment; a lone process with none of the variables is rank 0 of 1.

    ``default_master`` (the config's ``master_addr``) serves where the launcher sets no MASTER_ADDR; a loopback one only where Slurm names
    no address either. Raises ConfigError when the
    variables of one launcher are incomplete or contradict one another.
    """
    configured = "" if is_loopback(default_master) else default_master
    master = environ.get("MASTER_ADDR", "") or configured or environ.get("SLURM_LAUNCH_NODE_IPADDR", "") or default_master
    port = _integer(environ, "MASTER_PORT", DEFAULT_PORT)
    for launcher, rank_key, local_key, world_key in _SCHEMES:
        if rank_key not in environ:
            continue
        if world_key not in environ:
            raise ConfigError(
                f"{rank_key}={environ[rank_key]} is set but {world_key} is not; {launcher} sets both: start the ranks with it"
            )
        rank, world_size = _integer(environ, rank_key, 0), _integer(environ, world_key, 1)
        local_rank = _integer(environ, local_key, 0)
        if not 0 <= rank < world_size:
            raise ConfigError(f"{rank_key}={rank} is outside 0..{world_size - 1} ({world_key}={world_size}); unset what an outer job left")
        if not 0 <= local_rank <= rank:
            raise ConfigError(f"{local_key}={local_rank} is outside 0..{rank} ({rank_key}={rank}); unset what an outer job left")
        return RankEnv(rank, local_rank, world_size, master, port, environ.get(AGENT_STORE) == "True")
    return RankEnv(0, 0, 1, master, port)


def hide_gpus(environ: MutableMapping[str, str]) -> None:
    """On the CPU, which the launcher says by DS_ACCELERATOR, a rank sees no GPU.

    DeepSpeed's launcher numbers the ranks in CUDA_VISIBLE_DEVICES there too: GPUs that the user hid with it would be back, and a rank
    would be pinned to no core, or train on one. To be called before CUDA is asked for anything.
    """
    if environ.get("DS_ACCELERATOR") == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""


def _integer(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not an integer") from None
