"""The command line and the environment of a server; readiness and death of its process."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from neox_rl.errors import DeadlineError, ProcessDiedError
from neox_rl.guard import guarded_popen, stop
from neox_rl.rollout import vllm_server
from neox_rl.rollout.vllm_server import ServerSpec, core_ids, server_command, wait_ready
from neox_rl.run.endpoints import free_port
from neox_rl.weights import vllm_plugin

SPEC = ServerSpec("server0", Path("model"), "127.0.0.1", 8001, "float32", 512, cores="0")


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_a_cpu_server_has_its_own_core_and_a_bounded_kv_cache() -> None:
    argv, env = server_command(replace(SPEC, kv_cache_gib=1.5), {"PATH": "/bin", "OMP_NUM_THREADS": "8", "VLLM_CPU_KVCACHE_SPACE": "40"})
    assert option(argv, "--kv-cache-memory-bytes") == str(3 << 29) and "VLLM_CPU_KVCACHE_SPACE" not in env
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0" and env["OMP_NUM_THREADS"] == "1"
    assert env["PATH"] == "/bin" and env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in env and "--gpu-memory-utilization" not in argv
    assert "--no-enable-chunked-prefill" in argv and int(option(argv, "--max-num-batched-tokens")) >= SPEC.max_model_len


def test_cache_blocks_are_small_where_the_kernels_lose_nothing_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in no whole block is computed again for each completion of a group and each step of a search."""

    def blocks(machine: str, **other: str) -> tuple[str, bool]:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        argv, env = server_command(replace(SPEC, **other), {})
        return option(argv, "--block-size"), vllm_plugin.SMALL_BLOCKS in env

    assert blocks("x86_64") == ("16", True)
    assert blocks("x86_64", dtype="bfloat16") == blocks("aarch64") == ("32", False)
    assert "--block-size" not in server_command(replace(SPEC, gpus="0"), {})[0]


def test_what_vllm_leaves_in_the_temporary_directory_goes_with_it_and_what_is_compiled_stays() -> None:
    _, env = server_command(SPEC, {"PATH": "/bin"})
    assert env["NEOX_RL_PRIVATE"] == "TMPDIR,VLLM_RPC_BASE_PATH"
    assert env["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir(), "where torch has it without a word"
    assert server_command(SPEC, {"TORCHINDUCTOR_CACHE_DIR": "/fast"})[1]["TORCHINDUCTOR_CACHE_DIR"] == "/fast"
    first = next(iter(server_command(SPEC, {"PATH": "/bin"})[1]))
    assert first == "PATH", "torch sets its cache again: at the front of the environment that would take the engine's title away"


def test_ranks_of_a_server_meet_on_loopback_unless_the_user_says_where() -> None:
    names = psutil.net_if_addrs()
    for spec in (SPEC, replace(SPEC, gpus="4,5", tensor_parallel_size=2)):
        _, env = server_command(spec, {"NCCL_SOCKET_IFNAME": "ib0"})
        assert any(found.address == "127.0.0.1" for found in names[env["GLOO_SOCKET_IFNAME"]])
        assert env["NCCL_SOCKET_IFNAME"] == "ib0"


def test_a_gpu_server_sees_only_its_devices() -> None:
    argv, env = server_command(replace(SPEC, gpus="4,5", tensor_parallel_size=2, dtype="bfloat16", enforce_eager=False), {})
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5" and "--kv-cache-memory-bytes" not in argv
    assert option(argv, "--gpu-memory-utilization") == "0.85" and option(argv, "--tensor-parallel-size") == "2"
    assert "--enforce-eager" not in argv


def test_threads_are_those_of_one_tensor_parallel_rank() -> None:
    _, env = server_command(replace(SPEC, cores="0-3|4-7", tensor_parallel_size=2), {})
    assert env["OMP_NUM_THREADS"] == "4" and core_ids("0-3|4-7") == tuple(range(8))
    assert "--distributed-executor-backend" in server_command(SPEC, {})[0]
    assert "--distributed-executor-backend" not in server_command(replace(SPEC, cores="0|1", tensor_parallel_size=2), {})[0]
    assert replace(SPEC, tensor_parallel_size=2).workers == {"server0/0", "server0/1"}


def test_the_server_loads_no_weights_and_attests_what_the_policy_needs() -> None:
    argv, _ = server_command(SPEC, {})
    assert option(argv, "--load-format") == "dummy" and option(argv, "--logprobs-mode") == "processed_logprobs"
    assert json.loads(option(argv, "--weight-transfer-config")) == {"backend": vllm_plugin.BACKEND}
    assert "--enable-scale-out" in argv and option(argv, "--model") == "model"
    assert vllm_server.BACKEND == vllm_plugin.BACKEND


def test_a_server_that_dies_while_starting_ends_the_wait_at_once_with_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('no memory for the KV cache', file=sys.stderr); sys.exit(1)"
    process = guarded_popen([sys.executable, "-c", code], os.environ, tmp_path / "server0.log")
    begin = time.monotonic()
    with pytest.raises(ProcessDiedError, match=r"server0 ended with exit status 1(?s:.*)no memory for the KV cache"):
        asyncio.run(wait_ready(replace(SPEC, port=free_port("127.0.0.1")), process, 60.0))
    assert time.monotonic() - begin < 30.0


def test_a_server_that_never_answers_is_named_with_its_log(tmp_path: Path) -> None:
    spec = replace(SPEC, port=free_port("127.0.0.1"))
    process = guarded_popen([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "server0.log")
    try:
        with pytest.raises(DeadlineError, match=rf"server0 to answer {spec.address}/health.*server0\.log"):
            asyncio.run(wait_ready(spec, process, 0.2))
    finally:
        stop(process, 1.0)
