"""The run's side of servers that join and leave: ``run/serve.py`` is the other. The protocol is ``run/join_wire.py``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from neox_rl.config.run import RunConfig
from neox_rl.errors import ConfigError, WireError
from neox_rl.rollout.vllm_server import ServerSpec
from neox_rl.run.endpoints import Endpoints, another_seed
from neox_rl.run.join_wire import (
    BEAT,
    BEATEN,
    GONE,
    JOIN,
    LEAVE,
    MAX_FILE_BYTES,
    OVER,
    REFUSED,
    UNKNOWN,
    WELCOME,
    JoinSocket,
    Message,
    message,
    read_message,
)
from neox_rl.run.members import State
from neox_rl.run.versions import ServerKeeper
from neox_rl.telemetry.paths import RunPaths
from neox_rl.types import Json

logger = logging.getLogger(__name__)
POLL_S = 0.5
RESERVED = ("launcher", "orchestrator", "trainer", "server-")
"""Names with these beginnings are those of the run's own processes: each has a log and events under its name."""
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(slots=True)
class _Joined:
    """``unserved``: it has not served since it was last to be started again. ``dropped``: why it is out."""

    token: str
    peer: bytes
    seen: float
    restarts: int = 0
    unserved: bool = False
    dropped: str = ""
    leaving: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class Offer:
    """What a joining server is told. ``spec`` is as one of the run's own; name, host and port are replaced."""

    generator: str
    publisher: str
    drain_s: float
    spec: ServerSpec
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, config: RunConfig, paths: RunPaths, endpoints: Endpoints, spec: ServerSpec) -> Offer:
        """Reads the files of the run's model directory, and its config where a scripted server needs it. Raises ConfigError."""
        generator = config.metarl.rollout.generator
        found = [paths.root / "model" / name for name in MODEL_FILES] if generator == "vllm" else [paths.config]
        files = {path.name: path.read_bytes() for path in found if path.is_file()}
        if big := [name for name, data in files.items() if len(data) > MAX_FILE_BYTES]:
            raise ConfigError(f"{big[0]} has more than {MAX_FILE_BYTES} bytes: servers could not join; take a smaller tokenizer")
        return cls(generator, endpoints.weights, config.metarl.servers.request_timeout_s, spec, files)

    def welcome(self, name: str, token: str) -> dict[str, Json]:
        spec = self.spec
        server: dict[str, Json] = {
            "dtype": spec.dtype,
            "max_model_len": spec.max_model_len,
            "max_num_seqs": spec.max_num_seqs,
            "tensor_parallel_size": spec.tensor_parallel_size,
            "enforce_eager": spec.enforce_eager,
            "seed": another_seed(spec.seed, f"{name}/{token}"),
            "kv_cache_gib": float(spec.kv_cache_gib),
            "gpu_memory_frac": float(spec.gpu_memory_frac),
            "stats": spec.stats,
        }
        return {"name": name, "generator": self.generator, "publisher": self.publisher, "drain_s": float(self.drain_s), "server": server}


class JoinDesk:
    """``run`` answers until cancelled. A server whose agent is silent for ``silence_s`` has left. One that is lost is to be started again
    by its agent; lost once more before it serves, it is dropped, and its agent ends with that word."""

    def __init__(self, socket: JoinSocket, keeper: ServerKeeper, offer: Offer, silence_s: float) -> None:
        self._socket, self._keeper, self._offer, self._silence_s = socket, keeper, offer, silence_s
        self._joined: dict[str, _Joined] = {}
        self._dropped: dict[str, str] = {}
        self.malformed = 0

    async def run(self) -> None:
        while True:
            if (received := await self._socket.receive(POLL_S)) is not None:
                await self._receive(*received)
            for name, joined in list(self._joined.items()):
                if joined.leaving is None and joined.dropped:
                    del self._joined[name]
                    self._dropped[joined.token] = f"{name}, started again, did not come to serve: {joined.dropped}"
                    await self._keeper.remove(name, joined.dropped)
                elif joined.leaving is None and time.monotonic() - joined.seen > self._silence_s:
                    del self._joined[name]
                    await self._keeper.remove(name, f"its agent said nothing for {self._silence_s:g} s")

    async def over(self, reason: str) -> None:
        """The run ends: every agent ends its server."""
        for joined in self._joined.values():
            await self._socket.send(joined.peer, message(OVER, reason=reason[:200]))

    async def _receive(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            got = read_message(frames, (JOIN, BEAT, LEAVE))
        except WireError as error:
            self.malformed += 1
            logger.warning("ignored a message on the join socket: %s", error)
            await self._socket.send(peer, message(REFUSED, message=str(error)[:900]))
            return
        if got.kind != LEAVE and (why := self._dropped.get(got.fields["token"])):
            await self._socket.send(peer, message(REFUSED, message=why[:900]))
            return
        if got.kind == JOIN:
            await self._join(peer, got)
            return
        name = got.fields["name"]
        joined = self._joined.get(name)
        if joined is None or joined.token != got.fields["token"]:
            await self._socket.send(peer, message(GONE if got.kind == LEAVE else UNKNOWN))
            return
        joined.peer, joined.seen = peer, time.monotonic()
        if got.kind == LEAVE and joined.leaving is None:
            joined.leaving = asyncio.create_task(self._leave(name, joined, got.fields["reason"]))
        member = self._keeper.members.get(name)
        state, version = ("left", -1) if member is None else (str(member.state), member.version)
        joined.unserved = joined.unserved and state != State.SERVING
        await self._socket.send(peer, message(BEATEN, state=state, version=version, restarts=joined.restarts))

    async def _join(self, peer: bytes, got: Message) -> None:
        token, name = got.fields["token"], got.fields["name"]
        again = next((known for known, joined in self._joined.items() if joined.token == token), None)
        name = again or name or self._free_name()
        if again is None:
            spec = replace(self._offer.spec, name=name, host=got.fields["host"], port=got.fields["port"], cores="", gpus="")
            try:
                if name.startswith(RESERVED):
                    raise ConfigError(f"--name {name}: names that begin with {', '.join(RESERVED)} are the run's own; choose another")
                self._keeper.add(spec, lambda why: self._restart(name, why))
            except (ConfigError, ValueError) as error:  # of aiohttp, for an address that it cannot read
                await self._socket.send(peer, message(REFUSED, message=str(error)[:900]))
                return
            self._joined[name] = _Joined(token, peer, time.monotonic())
        self._joined[name].peer, self._joined[name].seen = peer, time.monotonic()
        await self._socket.send(peer, message(WELCOME, self._offer.files, **self._offer.welcome(name, token)))

    def _free_name(self) -> str:
        return next(name for n in range(1 << 20) if self._keeper.members.get(name := f"joined-{n}") is None)

    def _restart(self, name: str, why: str) -> None:
        """Its agent hears of it with the next beat."""
        if (joined := self._joined.get(name)) is None:
            return
        if joined.unserved:
            joined.dropped = why
            logger.warning("%s is dropped: %s", name, why)
            return
        joined.restarts, joined.unserved = joined.restarts + 1, True
        logger.warning("%s is to be started again: %s", name, why)

    async def _leave(self, name: str, joined: _Joined, reason: str) -> None:
        await self._keeper.remove(name, reason or "asked to", self._offer.drain_s)
        self._joined.pop(name, None)
        await self._socket.send(joined.peer, message(GONE))
