"""A server for a run that is under way: joins it, serves, leaves; on this machine or another.

    python -m neox_rl.run.serve --join tcp://HOST:PORT [--keys FILE] [--name N] [--port P] [--gpus 0,1] [--cores 4-7]
    python -m neox_rl.run.serve --join runs/NAME ...            where the run directory is on a file system that this machine shares

    join -> start the server -> beat each second -> Ctrl-C: leave, let what is in flight end -> end the server

The address is ``join`` in runs/<name>/endpoints.json; of a run directory, address and keys are read, also of a run that is yet to start.
The run says what the server must be: nothing else need be here, no file, no config. A server that dies is started again; an orchestrator
that is started again finds the server as it is; a run that ends ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from neox_rl.config.machine import Machine
from neox_rl.config.rules_run import HOST
from neox_rl.errors import ConfigError, DeadlineError, NeoxRLError, ProcessDiedError
from neox_rl.guard import GuardedProcess, died, guarded_popen, stop
from neox_rl.guardian import own_directory
from neox_rl.keys import CLIENT_FILE, Keys
from neox_rl.keys import ENV as KEYS
from neox_rl.rollout.vllm_server import ServerSpec, core_ids
from neox_rl.run.endpoints import another_seed, free_port, read_endpoints
from neox_rl.run.join_wire import (
    BEAT,
    BEAT_S,
    BEATEN,
    GONE,
    JOIN,
    LEAVE,
    NAME,
    OVER,
    REFUSED,
    UNKNOWN,
    WELCOME,
    JoinClient,
    Message,
    message,
)
from neox_rl.run.processes import command_of
from neox_rl.run.recovery import Restarts
from neox_rl.telemetry.paths import RunPaths

logger = logging.getLogger("neox_rl.serve")
MAX_RESTARTS = 3
STOP_S = 10.0
LOOK_S = 0.5
"""Between looks for a run that is yet to start."""


@dataclass
class Agent:
    """``run`` does all of it; ``stop_asked`` is set by a signal."""

    options: argparse.Namespace
    client: JoinClient | None = None
    found: tuple[str, Keys | None] | None = None
    stop_asked: asyncio.Event = field(default_factory=asyncio.Event)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    name: str = ""
    process: GuardedProcess | None = None
    restarts: Restarts = field(default_factory=Restarts)
    due: float | None = None
    starts: int = 0
    asked_restarts: int = 0
    said: str = ""
    clock: Callable[[], float] = time.monotonic

    async def run(self) -> None:
        """Returns when the run is over or the server has left. Raises NeoxRLError."""
        if (joined := await self._join()) is None:
            return
        host, port, welcome = joined
        self.name = welcome.fields["name"]
        logger.info("joins as %s at http://%s:%d", self.name, host, port)
        home = own_directory(f"neox-rl-{self.name}-")
        try:
            for file, data in welcome.files.items():
                (Path(home) / file).write_bytes(data)
            spec = ServerSpec(
                name=self.name,
                model_dir=Path(home),
                host=host,
                port=port,
                cores=self.options.cores,
                gpus=self.options.gpus,
                **welcome.fields["server"],
            )
            try:
                _check_gpus(spec, welcome.fields["generator"], Machine.here().num_gpus)
            except ConfigError:
                await self._leave("its GPUs are not named", 0.0)
                raise
            try:
                self._start(spec, welcome)
                if await self._serve(spec, welcome, host, port):
                    await self._leave("asked to", welcome.fields["drain_s"])
            except ProcessDiedError:
                await self._leave("its server does not stay up", 0.0)
                raise
            finally:
                await self._end()
        finally:
            shutil.rmtree(home, ignore_errors=True)

    async def _join(self) -> tuple[str, int, Message] | None:
        """The address of the server, and the run's answer; None where the user has no patience.

        Raises ConfigError where the run refuses, DeadlineError naming the address.
        """
        end, port = time.monotonic() + self.options.timeout, self.options.port
        while time.monotonic() < end and not self.stop_asked.is_set():
            if not self._look():
                await asyncio.sleep(LOOK_S)
                continue
            assert self.client is not None
            self.client.handshakes.check()  # after the look: what refused may be a new run, whose keys are now in the directory
            host = self.options.host or _own_address(self.client.address)
            port = port or free_port(host)
            await self.client.send(message(JOIN, token=self.token, name=self.name or self.options.name, host=host, port=port))
            got = await self.client.receive(BEAT_S, (WELCOME, REFUSED, OVER, BEATEN))
            if got is not None and got.kind == REFUSED:
                raise ConfigError(f"the run at {self.client.address} refuses: {got.fields['message']}")
            if got is not None and got.kind == WELCOME:
                return host, port, got
        if self.stop_asked.is_set():
            return None
        if self.client is None or self.found is None:
            raise DeadlineError(f"a run to start in {self.options.join}", self.options.timeout, "is it the directory of a run, and shared?")
        hint = "is it the join address in endpoints.json of a run that goes on, and reachable from here?"
        raise DeadlineError(f"a run to answer at {self.found[0]}", self.options.timeout, f"{hint} {self.client.handshakes.suspicion()}")

    def _look(self) -> bool:
        """Whether it is known where the run is; of a directory, what was there may be an earlier run of that name. Raises ConfigError."""
        found = find_run(self.options.join, self.options.keys)
        if found is not None and found != self.found:
            self.close()
            self.client, self.found = JoinClient(*found), found
        return self.client is not None

    def close(self) -> None:
        if self.client is not None:
            self.client.close()

    def _start(self, spec: ServerSpec, welcome: Message) -> None:
        env = {name: value for name, value in os.environ.items() if name != KEYS}
        keys = self.found[1] if self.found else None
        if keys is not None:
            env[KEYS] = str(keys.path.resolve())
        if self.process is not None:
            self.starts += 1
            spec = replace(spec, seed=another_seed(spec.seed, f"start {self.starts}"))
        argv, env = command_of(welcome.fields["generator"], spec, spec.model_dir / "config.yml", env)
        log = Path(self.options.log_dir) / f"{self.name}.log"
        self.restarts.started = time.monotonic()
        self.process = guarded_popen(argv, env, log, core_ids(spec.cores) if spec.cores and not spec.gpus else None)
        logger.info("server pid %d, log %s", self.process.pid, log)

    async def _serve(self, spec: ServerSpec, welcome: Message, host: str, port: int) -> bool:
        """Whether the server is to leave; not where the run is over. Raises ProcessDiedError, DeadlineError."""
        heard = self.clock()
        assert self.client is not None
        while not self.stop_asked.is_set():
            self._keep_up(spec, welcome, self.clock())
            self.client.handshakes.check()
            await self.client.send(message(BEAT, token=self.token, name=self.name))
            next_beat = self.clock() + BEAT_S
            while (left := next_beat - self.clock()) > 0 and not self.stop_asked.is_set():
                got = await self.client.receive(min(left, 0.2), (BEATEN, UNKNOWN, OVER, WELCOME, REFUSED))
                if got is None:
                    continue
                heard = self.clock()
                match got.kind:
                    case "over":
                        logger.info("the run is over: %s", got.fields["reason"])
                        return False
                    case "unknown":  # another orchestrator than before
                        await self.client.send(message(JOIN, token=self.token, name=self.name, host=host, port=port))
                    case "welcome":
                        self.asked_restarts = 0
                    case "refused":
                        raise ConfigError(f"the run at {self.client.address} refuses: {got.fields['message']}")
                    case "beaten":
                        self._note(got, spec, welcome)
            if (waited := self.clock() - heard) > self.options.patience:
                raise DeadlineError(f"a word from the run at {self.client.address}", waited, "it has ended, or cannot be reached")
        return True

    def _note(self, got: Message, spec: ServerSpec, welcome: Message) -> None:
        version = got.fields["version"]
        said = got.fields["state"] + (f" v{version}" if version >= 0 else "")
        if said != self.said:
            self.said = said
            logger.info("%s is %s", self.name, said)
        if got.fields["restarts"] > self.asked_restarts:
            self.asked_restarts = got.fields["restarts"]
            logger.warning("the run asks for a new start of the server")
            assert self.process is not None
            self.process.send_signal(signal.SIGQUIT)  # its guardian kills the group: what it holds cannot be trusted

    def _keep_up(self, spec: ServerSpec, welcome: Message, now: float) -> None:
        """By the rule of the run's own servers. Raises ProcessDiedError."""
        assert self.process is not None
        if self.due is None:
            if self.process.poll() is None:
                return
            self.restarts.fell(now)
            if self.restarts.used == MAX_RESTARTS:
                raise died(f"the server {self.name}, started again {MAX_RESTARTS} times,", self.process)
            self.due = now + self.restarts.again()
            logger.warning("%s", str(died(self.name, self.process)).splitlines()[0])
            stop(self.process, 0.0)  # what a killed guardian left
        if now >= self.due:
            self.due = None
            self._start(spec, welcome)

    async def _leave(self, reason: str, drain_s: float) -> None:
        """Returns when nothing is in flight at the server, or nobody answers."""
        assert self.client is not None
        logger.info("%s leaves: %s", self.name, reason)
        end = time.monotonic() + drain_s + 5.0
        heard = time.monotonic()
        while time.monotonic() < end and time.monotonic() - heard < 5.0:
            await self.client.send(message(LEAVE, token=self.token, name=self.name, reason=reason))
            got = await self.client.receive(BEAT_S, (BEATEN, UNKNOWN, GONE, OVER, WELCOME, REFUSED))
            heard = heard if got is None else time.monotonic()
            if got is not None and got.kind in (GONE, OVER, UNKNOWN):
                return

    async def _end(self) -> None:
        if self.process is not None:
            await asyncio.to_thread(stop, self.process, STOP_S)


def find_run(join: str, keys: Path | None) -> tuple[str, Keys | None] | None:
    """The join address of a run and its keys; None for a directory without a run. Raises ConfigError."""
    if "://" in join:
        return join, Keys.load(keys) if keys else Keys.of_environment()
    paths = RunPaths.of(join)
    if not paths.endpoints.is_file():
        return None
    written = paths.keys / CLIENT_FILE
    return read_endpoints(paths.endpoints).join, Keys.load(keys or written) if keys or written.exists() else Keys.of_environment()


def _own_address(join: str) -> str:
    """The address of this machine under which whoever listens at ``join`` can reach it. Raises ConfigError."""
    host, _, port = join.removeprefix("tcp://").rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing: it only chooses the interface
            return str(probe.getsockname()[0])
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"--join {join}: must be tcp://HOST:PORT, the join address of endpoints.json ({error})") from error


def _check_places(cores: str, gpus: str) -> None:
    """Raises ConfigError for what the server would only say in its log, once it is started."""
    try:
        wanted = set(core_ids(cores)) if cores else set()
    except ValueError as error:
        raise ConfigError(f"--cores {cores!r}: must be as in 0-3,5, with | between TP ranks") from error
    if absent := wanted - os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        raise ConfigError(f"--cores {cores}: this process may not use core {min(absent)}; it has {sorted(os.sched_getaffinity(0))}")
    if gpus and not re.fullmatch(r"[0-9]+(,[0-9]+)*", gpus):
        raise ConfigError(f"--gpus {gpus!r}: must be ids with commas between, as in 0,1")
    if len(set(gpus.split(","))) < len(gpus.split(",")):
        raise ConfigError(f"--gpus {gpus}: names a GPU twice; name each once")


def _check_addresses(options: argparse.Namespace) -> None:
    """Raises ConfigError for what would only be waited for in vain."""
    if "://" in options.join and not re.fullmatch(r"tcp://[^/]+:[0-9]{1,5}", options.join):
        raise ConfigError(
            f"--join {options.join}: is no address to join: give tcp://HOST:PORT, as endpoints.json has it, or the run's directory"
        )
    if options.host and not HOST.fullmatch(options.host):
        raise ConfigError(f"--host {options.host!r}: must be an IPv4 address or a host name of this machine, without port; as in 10.0.0.5")
    if not 0 <= options.port < 1 << 16:
        raise ConfigError(f"--port {options.port}: must be a port, 1 to 65535, or 0 for a free one")
    for name in ("timeout", "patience"):
        if not 0.0 < (seconds := getattr(options, name)) < math.inf:
            raise ConfigError(f"--{name} {seconds:g}: must be seconds, more than 0")


def _check_gpus(spec: ServerSpec, generator: str, num_gpus: int) -> None:
    """Where there are GPUs, a vLLM server takes the first ones unless told, whoever works there. Raises ConfigError."""
    if generator != "vllm" or not (num_gpus or spec.gpus):
        return
    named, tp = spec.gpus.split(",") if spec.gpus else [], spec.tensor_parallel_size
    if len(named) != tp:
        raise ConfigError(
            f"--gpus {spec.gpus!r}: a server of this run has {tp} TP ranks with a GPU each, and this machine shows {num_gpus} GPUs; name"
            f" {tp}, as in --gpus {','.join(map(str, range(tp)))}, or hide all with CUDA_VISIBLE_DEVICES= for a server on the CPU"
        )


async def serve(options: argparse.Namespace) -> None:
    with contextlib.closing(Agent(options)) as agent:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, agent.stop_asked.set)
        await agent.run()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neox_rl.run.serve", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--join",
        required=True,
        metavar="tcp://HOST:PORT | RUN_DIR",
        help="join address of the run, from its endpoints.json; or its directory",
    )
    parser.add_argument(
        "--keys", type=Path, help="copy of runs/<name>/keys/client.json, where the run has keys and its directory is not given"
    )
    parser.add_argument("--name", default="", help="name in logs and events; empty: the run chooses")
    parser.add_argument("--host", default="", help="address of this machine for the run; empty: the one that reaches it")
    parser.add_argument("--port", type=int, default=0, help="port of the server; 0: a free one")
    parser.add_argument("--gpus", default="", help="ids of its GPUs, as in 0,1")
    parser.add_argument("--cores", default="", help="CPU cores of its TP ranks, as in 0-3 or 0|1")
    parser.add_argument("--log-dir", default=".", help="where the server's log goes")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for the run to answer")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds without a word after which the run has ended")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if options.name and not NAME.fullmatch(options.name):
            raise ConfigError(f"--name {options.name!r}: must be 1-64 of A-Z a-z 0-9 . _ - and start with a letter or digit")
        _check_addresses(options)
        _check_places(options.cores, options.gpus)
        asyncio.run(serve(options))
    except NeoxRLError as error:
        logger.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
