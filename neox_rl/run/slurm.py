"""What a run asks of Slurm: which hosts, at which addresses, and training ranks on them. Stock Slurm (``MpiDefault=none``) suffices.

    python -m neox_rl.run.slurm         in a job: its nodes and their addresses, n1=10.0.0.1,n2=10.0.0.2

DeepSpeed's own slurm launcher is not used: it asks for ssh to the first host, and tells the ranks no MASTER_ADDR.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Collection, Sequence

from neox_rl.errors import ConfigError

SCONTROL_S = 30.0
_FIELD = re.compile(r"(\w+)=(\S*)")


def srun_ranks(hosts: Collection[str], ranks_per_host: int, command: Sequence[str]) -> list[str]:
    """``command`` once a rank, on exactly these hosts of the allocation.

    One rank that fails ends all; so does the end of srun, however it ends. GPUs, CPUs and binding are those of the job, or of SRUN_* and
    SLURM_* in the environment.
    """
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


def addresses_of_job(nodelist: str) -> dict[str, str]:
    """The nodes of an allocation, in its order, each with the IPv4 address that Slurm knows it by. Raises ConfigError naming the node."""
    names = _scontrol("show", "hostnames", nodelist).split()
    known = node_addresses(_scontrol("show", "node", "-o", nodelist))
    found: dict[str, str] = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"{name}: scontrol show node knows no such node of {nodelist}")
        try:
            found[name] = socket.gethostbyname(known[name])
        except OSError as error:
            raise ConfigError(
                f"{name}: its NodeAddr {known[name]!r} resolves to nothing here ({error}); set NODES=NODE=ADDRESS,..."
            ) from error
    return found


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=SCONTROL_S, check=True)
    except FileNotFoundError as error:
        raise ConfigError("scontrol is not here: this is no node of Slurm; set NODES=NODE=ADDRESS,...") from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"scontrol {' '.join(arguments)} failed: {str(error.stderr or error).strip()}") from error
    return done.stdout


def main() -> int:
    """Prints the nodes of this job as ``neox_rl.run.preflight --nodes`` takes them."""
    try:
        nodes = addresses_of_job(os.environ.get("SLURM_JOB_NODELIST", ""))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(",".join(f"{name}={address}" for name, address in nodes.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
