"""What a run asks of Slurm: which hosts, at which addresses, and training ranks on them. Pure; stock Slurm (``MpiDefault=none``) suffices.

DeepSpeed's own slurm launcher is not used: it asks for ssh to the first host, and tells the ranks no MASTER_ADDR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from neox_rl.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_FIELD = re.compile(r"(\w+)=(\S*)")


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


def srun_ranks(hosts: Mapping[str, int], ranks_per_host: int, command: Sequence[str]) -> list[str]:
    """``command`` once a rank, on exactly these hosts of the allocation. Raises ConfigError where Slurm cannot place them.

    One rank that fails ends all; so does the end of srun, however it ends. GPUs, CPUs and binding are those of the job, or of SRUN_* and
    SLURM_* in the environment.
    """
    if odd := {host: slots for host, slots in hosts.items() if slots != ranks_per_host}:
        host, slots = next(iter(odd.items()))
        raise ConfigError(f"hostfile: {host} slots={slots}: every host has num_gpus = {ranks_per_host} ranks; set one of them")
    tasks = ["--nodes", str(len(hosts)), "--nodelist", ",".join(hosts), "--ntasks", str(len(hosts) * ranks_per_host)]
    each = ["--ntasks-per-node", str(ranks_per_host), "--distribution", "block"]
    return ["srun", "--overlap", *tasks, *each, "--mpi=none", "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL", *command]


def node_addresses(shown: str) -> dict[str, str]:
    """Node -> NodeAddr of what ``scontrol show node -o`` printed. Raises ConfigError for a line that is no node."""
    found: dict[str, str] = {}
    for line in filter(None, map(str.strip, shown.splitlines())):
        fields = dict(_FIELD.findall(line))
        if not fields.get("NodeName"):
            raise ConfigError(f"scontrol show node printed {line[:80]!r}, which names no node")
        found[fields["NodeName"]] = fields.get("NodeAddr") or fields["NodeName"]
    return found
