"""What each process of a run is: its command line, environment, log and cores. Building is pure; ``start`` starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on
from neox_rl.config.placement import num_ranks, place
from neox_rl.config.run import RunConfig
from neox_rl.guard import GuardedProcess, guarded_popen, with_own_tmp
from neox_rl.keys import CLIENT_FILE
from neox_rl.keys import ENV as KEYS
from neox_rl.rollout.vllm_server import ServerSpec, core_ids, server_command
from neox_rl.run.endpoints import Endpoints, another_seed, server_specs
from neox_rl.run.hosts import read_hosts
from neox_rl.run.scripted_server import scripted_command
from neox_rl.run.slurm import srun_ranks
from neox_rl.telemetry.paths import RunPaths

ORCHESTRATOR, RANKS = "orchestrator", "trainer"
ATTEMPT = "NEOX_RL_ATTEMPT"
"""In the environment of ranks and orchestrator: the number of the ranks' start in this run. A newer trainer supersedes an older one."""
RESUME, SEED = "--resume", "--seed"


@dataclass(frozen=True)
class Program:
    """One process to start. ``cores`` None: not pinned."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    cores: tuple[int, ...] | None

    def start(self, grace_s: float) -> GuardedProcess:
        return guarded_popen(self.argv, self.env, self.log, self.cores, grace_s)

    def in_attempt(self, attempt: int, resume: bool) -> Program:
        """The same for another start of the ranks."""
        argv = [*(word for word in self.argv if word != RESUME), *([RESUME] if resume else [])]
        return replace(self, argv=argv, env={**self.env, ATTEMPT: str(attempt)})

    def drawing_anew(self, turn: str) -> Program:
        """The same for another start of a server, which would draw the random numbers again that it has drawn; others have no seed."""
        if SEED not in self.argv:
            return self
        at = self.argv.index(SEED) + 1
        return replace(self, argv=[*self.argv[:at], str(another_seed(int(self.argv[at]), turn)), *self.argv[at + 1 :]])


def programs(
    config: RunConfig, paths: RunPaths, endpoints: Endpoints, machine: Machine, script: str, resume: bool, env: Mapping[str, str]
) -> list[Program]:
    """Servers first, because they take longest to start; the ranks last. Raises ConfigError for a host file that cannot be."""
    where = place(config, machine)
    found: list[Program] = []
    for spec in server_specs(config, endpoints, paths.root / "model", machine)[: len(where.servers)]:
        argv, server_env = command_of(config.metarl.rollout.generator, spec, paths.config, servers_env(config, paths, env))
        found.append(Program(spec.name, argv, server_env, paths.log(spec.name), core_ids(spec.cores) if spec.cores else None))
    if config.metarl.debug.mode != "train_only":
        argv = [sys.executable, "-m", "neox_rl.run.orchestrator", "--run-dir", str(paths.root)]
        single = with_own_tmp(env) | {"OMP_NUM_THREADS": "1"}
        found.append(Program(ORCHESTRATOR, argv, single, paths.log(ORCHESTRATOR), where.orchestrator or None))
    ranks_env = _ranks_env(config, endpoints, env, where.rank_gpus, machine)
    argv = ranks_command(config, paths, endpoints, script, resume, machine.visible(where.rank_gpus))
    found.append(Program(RANKS, argv, ranks_env, paths.log(RANKS), None))
    return found


def command_of(generator: str, spec: ServerSpec, config: Path, env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The argument vector and the whole environment of a server for ``rollout.generator``; ``config`` is the run's resolved one."""
    return server_command(spec, env) if generator == "vllm" else scripted_command(spec, config, env)


def servers_env(config: RunConfig, paths: RunPaths, env: Mapping[str, str]) -> dict[str, str]:
    """A server has no run directory: the environment says where its keys are. Another run's would keep it from these weights."""
    found = {name: value for name, value in env.items() if name != KEYS}
    return found | {KEYS: str((paths.keys / CLIENT_FILE).resolve())} if curve_on(config.metarl.network) else found


def ranks_command(config: RunConfig, paths: RunPaths, endpoints: Endpoints, script: str, resume: bool, gpus: str) -> list[str]:
    """DeepSpeed's runner around the user script, as GPT-NeoX's deepy.py does; ``local`` and ``slurm`` need no ssh.

    ``gpus``: as CUDA_VISIBLE_DEVICES names those of the ranks. The runner reads that variable only where nothing says how many ranks there
    are, and else takes the machine's first GPUs, whoever they belong to.
    """
    n = config.neox
    script_argv = [script, "--run-dir", str(paths.root)] + [RESUME] * resume
    if n.launcher == "slurm":
        return srun_ranks(read_hosts(config), num_ranks(config), [sys.executable, *script_argv])
    where = ["--master_addr", n.master_addr, "--master_port", str(endpoints.master_port)]
    argv = [sys.executable, "-m", "neox_rl.engines.deepspeed_runner", *where]
    if n.launcher == "local":
        which = ["--include", f"localhost:{gpus}"] if gpus and not n.hostfile else ["--num_gpus", str(num_ranks(config))]
        argv += ["--no_ssh", "--node_rank", "0", *which]
    else:
        argv += ["--launcher", n.launcher, "--force_multi"]  # also a single host is where the host file says
    if n.hostfile:
        argv += ["--hostfile", n.hostfile]
    return argv + script_argv


def _ranks_env(config: RunConfig, endpoints: Endpoints, env: Mapping[str, str], gpus: tuple[int, ...], machine: Machine) -> dict[str, str]:
    found = with_own_tmp(env) if config.neox.launcher == "local" else dict(env)  # other machines have no directory of that name
    if config.neox.launcher == "slurm":  # DeepSpeed's runner says it to its ranks, srun says nothing
        found |= {"MASTER_ADDR": config.neox.master_addr, "MASTER_PORT": str(endpoints.master_port)}
    if machine.num_gpus:
        found["CUDA_VISIBLE_DEVICES"] = machine.visible(gpus)
    else:
        # One math thread a rank: two on a contended core are several times slower than one.
        found |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return found
