"""One stock vLLM server process: its command line, its start, its end. The same code for CPU and GPU builds of vLLM.

The model directory holds only ``config.json`` and the tokenizer: the server starts with dummy weights, and serves what the trainer
publishes.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from neox_rl.errors import DeadlineError
from neox_rl.guard import GuardedProcess, died, guarded_popen, with_own_tmp
from neox_rl.sockets import interface_towards

BACKEND = "zmq"
_POLL_S = 0.5
MIN_BATCHED_TOKENS = 2048
"""Prompt tokens that a CPU server reads at once: vLLM's default with chunked prefill."""
SMALL_BLOCK, SMALL_BLOCKS = 16, "NEOX_RL_SMALL_BLOCKS"
"""The plugin makes vLLM take so small a block where this is in its environment."""
_IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """What one server is. ``name`` is its name in logs and acks.

    ``cores``: CPU cores of its tensor-parallel ranks as vLLM writes them ("0", "0-3", "0|1"); empty: vLLM chooses. ``gpus``: ids, "4,5";
    empty on a CPU machine. ``dtype`` is float32, bfloat16 or float16.
    ``stats``: it counts, as its prefix cache's hits: about 4 us a token of its API server's time, which a small model notices.
    """

    name: str
    model_dir: Path
    host: str
    port: int
    dtype: str
    max_model_len: int
    max_num_seqs: int = 256
    tensor_parallel_size: int = 1
    enforce_eager: bool = True
    seed: int = 0
    cores: str = ""
    gpus: str = ""
    kv_cache_gib: float = 1.0
    gpu_memory_frac: float = 0.85
    stats: bool = False

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def workers(self) -> frozenset[str]:
        """The names under which its ranks ack a staged version."""
        return frozenset(f"{self.name}/{rank}" for rank in range(self.tensor_parallel_size))


def server_command(spec: ServerSpec, base_env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The argument vector and the whole environment of the server."""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spec.model_dir), "--load-format", "dummy"]
    argv += ["--host", spec.host, "--port", str(spec.port), "--dtype", spec.dtype, "--seed", str(spec.seed)]
    argv += ["--max-model-len", str(spec.max_model_len), "--max-num-seqs", str(spec.max_num_seqs)]
    argv += ["--tensor-parallel-size", str(spec.tensor_parallel_size), "--generation-config", "vllm"]
    argv += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    argv += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    argv += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    if not spec.stats:
        argv.append("--disable-log-stats")
    if spec.enforce_eager:
        argv.append("--enforce-eager")
    if spec.gpus:
        argv += ["--gpu-memory-utilization", str(spec.gpu_memory_frac)]
    else:
        # Without it each server wants 92 % of the machine's memory.
        argv += ["--kv-cache-memory-bytes", str(int(spec.kv_cache_gib * 2**30))]
        # Only whole blocks of a prompt are shared between the completions of a group, and between the steps of a search: what is in none
        # is computed for each of them. vLLM's 128 shares nothing of a short prompt.
        argv += ["--block-size", str(SMALL_BLOCK if _small_blocks(spec) else 32)]
        # A prompt read in two parts would end the server where its request has a seed: vLLM rewinds the request's generator by an
        # offset, which generators on CPUs do not have.
        argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(MIN_BATCHED_TOKENS, spec.max_model_len))]
        if spec.cores and spec.tensor_parallel_size == 1:
            # vLLM's default on CPUs, a worker process of its own, makes the engine spin on the worker's core while it waits. What that
            # default is for, binding threads, is done here: affinity is inherited and OMP_NUM_THREADS is set.
            argv += ["--distributed-executor-backend", _IN_PROCESS]
    return argv, _environment(spec, base_env)


def _environment(spec: ServerSpec, base_env: Mapping[str, str]) -> dict[str, str]:
    env = with_own_tmp(base_env, "VLLM_RPC_BASE_PATH")  # its sockets, too, which it leaves when it is killed
    env |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the pause, resume and weight routes
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if loopback := interface_towards("127.0.0.1"):  # all ranks are on this machine, and by themselves listen on the network
        for library in ("GLOO", "NCCL"):
            env.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    if spec.gpus:
        env["CUDA_VISIBLE_DEVICES"] = spec.gpus
        return env
    if _small_blocks(spec):
        env[SMALL_BLOCKS] = "1"
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the flag
    if spec.cores:  # left out, all servers bind to core 0
        env["VLLM_CPU_OMP_THREADS_BIND"] = spec.cores
        env["OMP_NUM_THREADS"] = str(min(num_cores(part) for part in spec.cores.split("|")))
    return env


def _small_blocks(spec: ServerSpec) -> bool:
    """Where blocks of 16 are as fast. Elsewhere they would cost the kernels that need 32: bfloat16 on x86 (AMX), and other CPUs."""
    return not spec.gpus and spec.dtype == "float32" and platform.machine() == "x86_64"


def num_cores(cores: str) -> int:
    """Cores in a list as vLLM writes it: "0,2-4" has 4."""
    return len(core_ids(cores))


def core_ids(cores: str) -> tuple[int, ...]:
    """The cores of "0,2-4" or, over all tensor-parallel ranks, of "0|1"."""
    found: list[int] = []
    for part in cores.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def start(spec: ServerSpec, log_path: Path, base_env: Mapping[str, str]) -> GuardedProcess:
    """Starts the server; returns before it is ready. End it with ``neox_rl.guard.stop``.

    Any exit before that is a failure, also one with status 0: so vLLM ends when its engine was killed.
    """
    argv, env = server_command(spec, base_env)
    return guarded_popen(argv, env, log_path, core_ids(spec.cores) if spec.cores and not spec.gpus else None)


async def wait_ready(spec: ServerSpec, process: GuardedProcess | None, deadline_s: float) -> None:
    """Returns once the health route answers. ``process`` None: a server that runs elsewhere.

    Raises ProcessDiedError with the end of the log as soon as the process ends, DeadlineError if it is not ready in time.
    """
    end = time.monotonic() + deadline_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
        while time.monotonic() < end:
            if process is not None and process.poll() is not None:
                raise died(spec.name, process)
            try:
                async with session.get(f"{spec.address}/health") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_S)
    hint = f"log {process.log_path}" if process is not None else "it is not started by this run"
    raise DeadlineError(f"{spec.name} to answer {spec.address}/health", deadline_s, hint)
