"""The run that ``tools/chaos.py`` torments: started, found process by process, tormented, and looked for once it is over.

Everything that it starts carries a mark of its own in the environment. Nothing else, but what descends from these, is ever signaled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from neox_rl.guard import with_own_tmp
from neox_rl.telemetry.jsonl import read_json
from neox_rl.telemetry.paths import RunPaths
from neox_rl.telemetry.status import read_status

ROOT = Path(__file__).resolve().parents[1]
MARK = "NEOX_RL_CHAOS"
SHARED_MEMORY = Path("/dev/shm")
LOOKS, LOOK_S = 4, 1.5
ROLES = ("server", "worker", "orchestrator", "rank", "launcher", "agent", "joined", "guardian")


@dataclass
class Victims:
    """What is alive now, by role; ``names`` says which part of the run each is."""

    by_role: dict[str, list[psutil.Process]] = field(default_factory=lambda: {role: [] for role in ROLES})
    names: dict[int, str] = field(default_factory=dict)


class ChaosRun:
    """One run directory, through as many launches as it takes. ``scratch`` is its TMPDIR: what is left in it was left behind."""

    def __init__(self, argv: Sequence[str], paths: RunPaths, scratch: Path) -> None:
        self._argv, self.paths, self.scratch = list(argv), paths, scratch
        self.mark = f"{paths.root}/{os.getpid()}"
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: set[psutil.Process] = set()
        self._memory: set[Path] = set()
        self.output = scratch.parent / f"{paths.name}.out"
        self.launcher = self.launch(resume=False)

    def launch(self, resume: bool) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            command = [sys.executable, str(ROOT / "deepy.py"), *self._argv, *(["--resume"] if resume else [])]
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=self._env(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        return self.launcher

    def join(self, name: str, extra: Sequence[str]) -> None:
        """A server joins; its agent is a process of its own, as a user starts it."""
        log = self.paths.log(f"agent-{name}")
        with log.open("ab") as output:
            address = read_json(self.paths.endpoints)["join"]
            command = [sys.executable, "-m", "neox_rl.run.serve", "--join", address, "--name", name, "--log-dir", str(log.parent), *extra]
            command += ["--timeout", "120", "--patience", "120"]
            self.agents[name] = subprocess.Popen(
                command, cwd=ROOT, env=self._env(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def _env(self) -> dict[str, str]:
        compiled = {"TORCHINDUCTOR_CACHE_DIR": with_own_tmp(os.environ)["TORCHINDUCTOR_CACHE_DIR"]}  # meant to stay
        return os.environ | compiled | {MARK: self.mark, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch)}

    def position(self) -> tuple[str, int]:
        """Phase and step as the run says it."""
        status = read_status(self.paths.status)
        return status.phase, status.step

    def processes(self) -> list[psutil.Process]:
        """All that is alive. What was found once is remembered, and so are children: vLLM's processes overwrite their environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    self._seen |= {process, *process.children(recursive=True)}
        self._seen = {process for process in self._seen if alive(process)}
        self._memory |= {Path(path) for process in self._seen for path in _mapped(process.pid)}
        return sorted(self._seen, key=lambda process: process.pid)

    def victims(self) -> Victims:
        found = Victims()
        agents = {agent.pid: name for name, agent in self.agents.items() if agent.poll() is None}
        servers = [address.rpartition(":")[2] for address in read_json(self.paths.endpoints).get("servers", [])]
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words, above = process.cmdline(), {parent.pid for parent in process.parents()}
                joined = next((name for pid, name in agents.items() if pid in above), "")
                role, name = _role(process, words, joined, servers, self.launcher.pid, agents)
                if role:
                    found.by_role[role].append(process)
                    found.names[process.pid] = name
        return found

    def left(self, deadline_s: float) -> list[str]:
        """Processes that are still there after ``deadline_s``, in words."""
        end = time.monotonic() + deadline_s
        while (there := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        return [f"process {process.pid}: {_words(process)}" for process in there]

    def left_over(self, killed: Collection[str]) -> list[str]:
        """Shared memory, temporary files and ports that the run has left. Memory that a process of somebody else holds is theirs."""
        memory = self._left_memory()
        endpoints = read_json(self.paths.endpoints)
        ports = [endpoints[key] for key in ("experience_port", "weights_port", "join_port", "master_port") if key in endpoints]
        ports += [int(address.rpartition(":")[2]) for address in endpoints.get("servers", [])]
        return [*memory, *left_in(self.scratch, killed), *(f"port {port} is still listened at" for port in ports if _listening(port))]

    def _left_memory(self) -> list[str]:
        """Of what the run's processes were seen to have mapped: others make and leave shared memory on this machine, too."""
        left = self._memory
        for _ in range(LOOKS):
            held = {path for process in psutil.process_iter() for path in _mapped(process.pid)}
            left = {path for path in left if path.exists() and str(path) not in held}
            if not left:
                break
            time.sleep(LOOK_S)
        return sorted(map(str, left))

    def kill_everything(self) -> None:
        """After a violation: nothing of this run stays behind on the machine."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


def left_in(scratch: Path, killed: Collection[str]) -> list[str]:
    """Whatever lies there. An agent that is killed itself cannot remove the directory with what the run sent it: those of ``killed`` agents
    may be there."""
    theirs = tuple(f"neox-rl-{name}-" for name in killed)
    return sorted(str(path) for path in scratch.iterdir() if not path.name.startswith(theirs))


def _role(
    process: psutil.Process, words: list[str], joined: str, servers: list[str], launcher: int, agents: dict[int, str]
) -> tuple[str, str]:
    """What a process is, and the name of the part of the run that it belongs to; empty for shells, runners, helpers."""
    if process.pid == launcher:
        return "launcher", "launcher"
    if process.pid in agents:
        return "agent", agents[process.pid]
    if any(word.endswith("guardian.py") for word in words):
        return "guardian", joined or _part(words, servers)
    name = joined or _part(words, servers)
    if any(word in ("neox_rl.run.scripted_server", "vllm.entrypoints.openai.api_server") for word in words):
        return ("joined" if joined else "server"), name
    if words and words[0].startswith("VLLM::"):
        return "worker", joined or "server"
    if "neox_rl.run.orchestrator" in words:
        return "orchestrator", name
    if any(word.startswith("--local_rank") for word in words) and "--run-dir" in words:
        return "rank", name
    return "", ""


def _part(words: list[str], servers: list[str]) -> str:
    if "neox_rl.run.orchestrator" in words:
        return "orchestrator"
    if "--port" in words and (port := words[words.index("--port") + 1]) in servers:
        return f"server-{servers.index(port)}"
    return "trainer" if "--run-dir" in words else ""


def alive(process: psutil.Process) -> bool:
    """Whether this very process runs: a later one with its number is another."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was there to take the signal."""
    with contextlib.suppress(psutil.Error):
        if alive(process):
            process.send_signal(number)
            return True
    return False


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _mapped(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if str(SHARED_MEMORY) in line:
                yield line.split(None, 5)[5].removesuffix(" (deleted)")


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "gone"
