"""Rules on processes, paths, addresses and deadlines. Each yields one message a broken value: value, rule, fix."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from neox_rl.config.derived import HF_DTYPES, hf_config, warmstart_skipped
from neox_rl.config.hf_directory import check_directory
from neox_rl.config.machine import Machine
from neox_rl.config.network import curve_on, is_loopback, is_unreachable
from neox_rl.config.placement import num_ranks, num_servers, num_vllm_servers, parse_core_sets
from neox_rl.config.rules_model import config_is_local
from neox_rl.config.rules_own import own_parts_exist
from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, WeightError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ADDRESS = re.compile(r"http://[A-Za-z0-9.\-\[\]:]+:\d{1,5}")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
SERVER_GIB = 2.5
"""Resident memory of one vLLM server's processes beside its KV cache."""
RANK_GIB = 0.6
COMEBACK_S = 20.0
"""What an orchestrator may need to be ended and to come up again."""


def name_is_a_file_name(config: RunConfig, machine: Machine) -> Iterator[str]:
    if not RUN_NAME.fullmatch(config.metarl.name):
        yield (
            f"metarl.name = {config.metarl.name!r}: must be 1-100 of A-Z a-z 0-9 . _ - and start with a letter or digit; for example"
            " countdown-3"
        )


def paths_exist(config: RunConfig, machine: Machine) -> Iterator[str]:
    m, n = config.metarl, config.neox
    paths = {
        "load": n.load,
        "hostfile": n.hostfile,
        "metarl.problems.path": m.problems.path,
        "metarl.problems.heldout_path": m.problems.heldout_path,
        "metarl.tokenizer.path": m.tokenizer.path,
        "metarl.warmstart.hf_checkpoint": m.warmstart.hf_checkpoint,
        "metarl.debug.batches": m.debug.batches,
    }
    fix = {
        "load": "; without load a run starts anew, and --resume goes on with it",
        "metarl.warmstart.hf_checkpoint": "; a model of the Hugging Face Hub is downloaded first (hf download NAME --local-dir DIR)",
    }
    for key, path in paths.items():
        if path and not machine.exists(path):
            yield f"{key} = {path!r}: does not exist; relative paths are from the working directory{fix.get(key, '')}"


def checkpoint_fits(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The ranks would say so minutes later. The vocabulary is the tokenizer's, which is not read here: ``run.launch`` compares it."""
    path = config.metarl.warmstart.hf_checkpoint
    if not path or not os.path.exists(path) or any(own_parts_exist(config, machine)):
        return
    try:
        check_directory(Path(path), hf_config(config, vocab_size=0))
    except WeightError as error:
        yield f"metarl.warmstart.hf_checkpoint = {path!r}: {error}"
    except OSError as error:
        yield (
            f"metarl.warmstart.hf_checkpoint = {path!r}: cannot read {error.filename or path} ({error.strerror}); get the right to, or take"
            " a copy"
        )


def servers_come_from_one_place(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.debug.mode == "train_only":
        return
    if m.servers.addresses and m.servers.num_servers:
        yield (
            f"metarl.servers.num_servers = {m.servers.num_servers}: would start servers although addresses names servers that run"
            " elsewhere; set num_servers: 0 or remove addresses"
        )
    if not m.servers.addresses and not m.servers.num_servers and not m.network.join_port:
        yield (
            "metarl.servers.num_servers = 0: nobody generates; set num_servers: 1, give addresses, or set network.join_port, where servers"
            " join"
        )
    for address in m.servers.addresses:
        if not ADDRESS.fullmatch(address):
            yield f"metarl.servers.addresses has {address!r}: must be http://host:port; for example http://10.0.0.4:8000"
    if len(set(m.servers.addresses)) < len(m.servers.addresses):
        yield "metarl.servers.addresses names a server twice: each would be sent every version twice; name each once"


def scripts_know_the_problems(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.rollout.generator == "scripted" and m.problems.free_text and m.debug.mode != "train_only":
        yield "metarl.rollout.generator = 'scripted': writes searches of arithmetic problems; use vllm, or problems.source: countdown"


def core_sets_fit(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    wanted = (
        ("metarl.servers.cores", m.servers.cores, num_vllm_servers(config), m.servers.tensor_parallel_size, "server"),
        ("metarl.trainer_cores", m.trainer_cores, num_ranks(config), 1, "training rank"),
    )
    users: dict[int, str] = {}
    for key, text, count, parts, what in wanted:
        if text == "auto" or count == 0:
            continue
        try:
            sets = parse_core_sets(text, key)
        except ConfigError as error:
            yield str(error)
            continue
        if len(sets) != count:
            yield f"{key} = {text!r}: has {len(sets)} sets for {count} {what}{'s' * (count > 1)}; write one set each, separated by ;"
        if any(len(s) != parts for s in sets):
            yield (
                f"{key} = {text!r}: each {what} has {parts} TP rank{'s' * (parts > 1)}; write {parts} set{'s' * (parts > 1)} each,"
                " separated by |"
            )
        for core in sorted({c for s in sets for part in s for c in part}):
            if config_is_local(config) and core not in machine.cores:
                yield f"{key} = {text!r}: core {core} is not among this machine's cores {list(machine.cores)}; use those, or auto"
            if core in users:
                yield f"{key} = {text!r}: core {core} is given to {users[core]} too; give each its own, or set both to auto"
            users[core] = key


def gpus_fit(config: RunConfig, machine: Machine) -> Iterator[str]:
    s, servers, ranks = config.metarl.servers, num_vllm_servers(config), num_ranks(config)
    if not machine.num_gpus or not config_is_local(config):
        return
    if named := [name for name in machine.gpu_ids if not name.isdigit()]:
        yield f"CUDA_VISIBLE_DEVICES names {named[0]}: DeepSpeed's launcher knows GPUs by number alone; give numbers, as in 0,1"
    need = ranks + servers * s.tensor_parallel_size
    if s.gpus == "auto" and need > machine.num_gpus:
        wanted = f"training ranks and {servers} x TP {s.tensor_parallel_size} servers need" if servers else "training ranks need"
        fix = "lower num_gpus or metarl.servers.num_servers" if servers else "lower num_gpus"
        if machine.num_gpus == 1 and servers:  # no rank and server share a GPU, so nothing that could be lowered helps
            fix = "with one GPU a run is on the CPU: CUDA_VISIBLE_DEVICES= before its command, after make clean install KIND=cpu"
        yield (f"num_gpus = {ranks}: {wanted} {need} GPUs, and this machine has {machine.num_gpus}; {fix}")
    if s.gpus == "auto" or not servers:
        return
    try:
        sets = parse_core_sets(s.gpus, "metarl.servers.gpus")
    except ConfigError as error:
        yield str(error)
        return
    if len(sets) != servers or any(len(part[0]) != s.tensor_parallel_size or len(part) > 1 for part in sets):
        yield f"metarl.servers.gpus = {s.gpus!r}: must be {servers} sets of {s.tensor_parallel_size} GPU ids, as in '4,5;6,7'"
    used = [gpu for part in sets for gpu in part[0]]
    if bad := sorted({g for g in used if g >= machine.num_gpus or g < ranks or used.count(g) > 1}):
        yield (
            f"metarl.servers.gpus = {s.gpus!r}: {bad} are taken by training ranks, absent, or named twice; use"
            f" {list(range(ranks, machine.num_gpus))}"
        )


def debug_mode_is_complete(config: RunConfig, machine: Machine) -> Iterator[str]:
    m = config.metarl
    if m.debug.mode == "train_only" and not m.debug.batches:
        yield (
            "metarl.debug.batches is empty: mode train_only trains on recorded batches; record some with debug.record_batches and give that"
            " directory"
        )
    if m.debug.mode != "train_only" and m.debug.batches:
        yield f"metarl.debug.batches = {m.debug.batches!r}: is read with mode train_only; set debug.mode: train_only or remove it"
    if m.debug.mode == "train_only" and m.debug.record_batches:
        yield f"metarl.debug.record_batches = {m.debug.record_batches!r}: mode train_only delivers no new batches; remove it"
    if m.debug.mode == "rollout_only" and m.warmstart.steps:
        yield f"metarl.warmstart.steps = {m.warmstart.steps}: mode rollout_only trains nothing; set steps: 0"


def ports_are_free_of_one_another(config: RunConfig, machine: Machine) -> Iterator[str]:
    net = config.metarl.network
    fixed = {key: getattr(net, key) for key in ("weights_port", "experience_port", "join_port", "master_port", "server_port")}
    users: dict[int, str] = {}
    for key, port in fixed.items():
        count = max(1, num_servers(config)) if key == "server_port" else 1
        if port and not 1024 <= port <= 65536 - count:
            yield f"metarl.network.{key} = {port}: must be 0 (a free one) or 1024 to {65536 - count}"
        for p in range(port, port + count) if port else ():
            if p in users:
                yield f"metarl.network.{key} = {port}: port {p} is {users[p]} too; change one, or set it to 0 (a free one)"
            users[p] = key


def host_can_be_bound(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The sockets are IPv4, and the same text is bound and connected to: no ``*``, no ``::1``."""
    host = config.metarl.network.bind_host
    if not HOST.fullmatch(host):
        yield (
            f"metarl.network.bind_host = {host!r}: must be an IPv4 address or a host name, without port; for example 127.0.0.1, or this"
            " node's address"
        )


def servers_elsewhere_reach_the_publisher(config: RunConfig, machine: Machine) -> Iterator[str]:
    """They fetch the weights from the host that the trainer binds, as it is written."""
    m = config.metarl
    if m.debug.mode == "train_only" or not is_unreachable(host := m.network.bind_host):
        return
    for address in m.servers.addresses:
        if ADDRESS.fullmatch(address) and not is_loopback(address.removeprefix("http://").rpartition(":")[0]):
            yield (
                f"metarl.network.bind_host = {host}: the server {address} fetches weights from this host, and cannot reach it there; set"
                " this node's address"
            )
            return


def several_nodes_are_reachable(config: RunConfig, machine: Machine) -> Iterator[str]:
    n, net = config.neox, config.metarl.network
    if config_is_local(config):
        return
    why = f"launcher {n.launcher}" + (" with a hostfile" if n.hostfile else "")
    if n.launcher != "local" and not n.hostfile:
        yield f"launcher = {n.launcher}: needs to know the hosts of the ranks; give hostfile, lines of HOST slots=RANKS"
    if is_loopback(n.master_addr):
        yield (
            f"master_addr = {n.master_addr}: {why} starts ranks on other nodes, which cannot reach a loopback address; set the address of"
            " the first node"
        )
    if is_unreachable(net.bind_host):
        yield (
            f"metarl.network.bind_host = {net.bind_host}: {why} starts ranks on other nodes, which need an address to connect to; set this"
            " node's address"
        )


def inner_deadlines_come_first(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The wait inside names the server that is late; were the outer one shorter, a person would read of a version only."""
    d, w, s = config.metarl.deadlines, config.metarl.weights, config.metarl.servers
    if d.publish_s < (inner := w.stage_timeout_s + w.switch_timeout_s):
        yield (
            f"metarl.deadlines.publish_s = {d.publish_s:g}: must be >= weights.stage_timeout_s + weights.switch_timeout_s = {inner:g}; set"
            " it so"
        )
    waits = s.request_timeout_s + config.metarl.queue.disk_full_s
    for name, given in (("batch_s", d.batch_s), ("evaluate_s", d.evaluate_s)):
        if given < waits:
            yield (
                f"metarl.deadlines.{name} = {given:g}: must be >= servers.request_timeout_s + queue.disk_full_s = {waits:g}, or the trainer"
                " gives up while a full disk is still waited for; set it so"
            )
    if d.step_s < d.silence_s:
        yield (
            f"metarl.deadlines.step_s = {d.step_s:g}: must be >= deadlines.silence_s = {d.silence_s:g}, or who waits in a collective for a"
            " silent rank ends before that one is found and named; set it so, or lower silence_s"
        )
    if d.orchestrator_s < (needed := d.silence_s + COMEBACK_S):
        yield (
            f"metarl.deadlines.orchestrator_s = {d.orchestrator_s:g}: must be >= deadlines.silence_s + {COMEBACK_S:g} = {needed:g}, or the"
            " trainer gives a stuck orchestrator up before it is started again; set it so"
        )


def sockets_are_private(config: RunConfig, machine: Machine) -> Iterator[str]:
    network = config.metarl.network
    if is_loopback(network.bind_host):
        return
    if not curve_on(network):
        yield (
            "metarl.network.curve = never: whoever reaches this interface can send weights and rollouts, and read them; set curve: auto, or"
            " keep it in a private network"
        )
    if config.metarl.debug.mode != "train_only":
        yield (
            f"metarl.network.bind_host = {network.bind_host}: the servers' HTTP has no keys, so whoever reaches it can pause them and"
            " switch their weights; keep it in a private network"
        )


def cores_are_enough(config: RunConfig, machine: Machine) -> Iterator[str]:
    need = num_vllm_servers(config) * config.metarl.servers.tensor_parallel_size + num_ranks(config)
    if not machine.num_gpus and config_is_local(config) and need > len(machine.cores):
        yield (
            f"servers and training ranks want {need} cores and this machine has {len(machine.cores)}: they will share, which is several"
            " times slower"
        )


def memory_is_enough(config: RunConfig, machine: Machine) -> Iterator[str]:
    servers = num_vllm_servers(config)
    need = servers * (SERVER_GIB + config.metarl.servers.kv_cache_gib) + num_ranks(config) * RANK_GIB
    if not machine.num_gpus and config_is_local(config) and need > machine.memory_gib:
        yield (
            f"metarl.servers.kv_cache_gib = {config.metarl.servers.kv_cache_gib:g}: {servers} servers and the ranks need about {need:.1f}"
            f" GiB of {machine.memory_gib:.1f} GiB; lower it, or num_servers"
        )


def precision_suits_machine(config: RunConfig, machine: Machine) -> Iterator[str]:
    n, dtype = config.neox, config.metarl.servers.dtype
    if n.precision != "fp32" and not machine.num_gpus and config_is_local(config):
        slower = " (1.65 times where it was measured)" if n.precision == "bfloat16" else ""
        yield f"precision = {n.precision}: is slower than fp32 on most CPUs{slower}; use fp32 on this machine"
    if dtype != "auto" and dtype != HF_DTYPES[n.precision]:
        yield (
            f"metarl.servers.dtype = {dtype}: differs from precision = {n.precision}, so server and trainer disagree on log-probs at equal"
            " versions; use auto"
        )


def checkpoints_come_in_time(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    warm = 0 if warmstart_skipped(config) else config.metarl.warmstart.steps
    if n.checkpoint_factor > warm + n.train_iters > 0:
        yield (
            f"checkpoint_factor = {n.checkpoint_factor}: is beyond the {warm} steps of the warm start and train_iters = {n.train_iters},"
            " so only the end is saved; set it lower, or 0"
        )


RUN_RULES = (
    name_is_a_file_name,
    paths_exist,
    checkpoint_fits,
    servers_come_from_one_place,
    scripts_know_the_problems,
    core_sets_fit,
    gpus_fit,
    debug_mode_is_complete,
    ports_are_free_of_one_another,
    host_can_be_bound,
    servers_elsewhere_reach_the_publisher,
    several_nodes_are_reachable,
    inner_deadlines_come_first,
)
RUN_WARNINGS = (sockets_are_private, cores_are_enough, memory_is_enough, precision_suits_machine, checkpoints_come_in_time)
