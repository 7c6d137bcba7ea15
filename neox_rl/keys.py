"""CURVE keys of one run (CurveZMQ, rfc.zeromq.org/spec/26): who may connect to its sockets, and nobody reads along.

    runs/<name>/keys/        0700, made by the launcher, kept over --resume
      run.json    0600       orchestrator and training ranks, which find it in the run directory
      client.json 0600       servers, through NEOX_RL_KEYS or --keys: without the server's secret they cannot pose as the run

A socket with keys refuses a peer that does not know the server's public key, has none itself, or has another than those of its role: the
experience socket lets in the trainer, whose key is in ``run.json`` alone, the others let in the client's.
Both files are secrets: whoever reads ``client.json`` can do what a server of the run does, and no more.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from neox_rl.errors import ConfigError

ENV = "NEOX_RL_KEYS"
RUN_FILE, CLIENT_FILE = "run.json", "client.json"
Role = Literal["client", "trainer"]
_OF_THE_RUN = frozenset({"server_secret", "trainer_public", "trainer_secret"})
_DOOR = "inproc://zeromq.zap.01"
_MAX_FILE_BYTES = 4096
_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_FIX = f"use what the run at this address has: runs/<name>/keys/{CLIENT_FILE} ({ENV}, --keys), for ranks {RUN_FILE}, or no keys"
_monitors = itertools.count()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """Z85 text. What is in ``_OF_THE_RUN`` is empty in the client's file; ``path`` is where they came from."""

    path: Path
    server_public: str = field(repr=False)
    client_public: str = field(repr=False)
    client_secret: str = field(repr=False)
    server_secret: str = field(default="", repr=False)
    trainer_public: str = field(default="", repr=False)
    trainer_secret: str = field(default="", repr=False)

    @classmethod
    def make(cls, directory: Path) -> Keys:
        """The keys in ``directory``, new ones where there are none. Raises ConfigError for files that others can read."""
        path = directory / RUN_FILE
        if path.exists():
            return cls.load(path)
        directory.mkdir(mode=0o700, exist_ok=True)
        server, client, trainer = ([part.decode() for part in zmq.curve_keypair()] for _ in range(3))
        keys = cls(path, server[0], client[0], client[1], server[1], trainer[0], trainer[1])
        keys._write(directory / CLIENT_FILE, secret=False)
        keys._write(path, secret=True)
        return keys

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Raises ConfigError when the file is not there, is not of this user alone, or does not hold keys that fit each other."""
        try:
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                _check_private(path, os.fstat(file.fileno()))
                written = json.loads(file.read(_MAX_FILE_BYTES))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the run's keys ({error.strerror}); copy them from runs/<name>/keys/") from error
        except ValueError as error:
            raise ConfigError(f"{path}: is no key file ({error}); copy it again from runs/<name>/keys/") from error
        names = {f.name for f in fields(cls)} - {"path"}
        texts = isinstance(written, dict) and all(isinstance(value, str) for value in written.values())
        if not texts or written.keys() not in (names, names - _OF_THE_RUN):
            raise ConfigError(
                f"{path}: is no key file: it needs {sorted(names)}; copy it again from runs/<name>/keys/, or, where an earlier release made"
                " that folder, remove it: the run makes new keys, and who joins needs its new client.json"
            )
        for whose in ("client", "server", "trainer")[: 3 if written.keys() >= _OF_THE_RUN else 2]:
            _check_pair(path, whose, written[f"{whose}_public"], written.get(f"{whose}_secret"))
        return cls(path, **written)

    @classmethod
    def of_run(cls, wanted: bool, directory: Path) -> Keys | None:
        """For a process that has the run directory: its keys, None where the run has none. Raises ConfigError."""
        return cls.load(directory / RUN_FILE) if wanted else None

    @classmethod
    def of_environment(cls) -> Keys | None:
        """For a server: the file that ``NEOX_RL_KEYS`` names, None where it is not set. Raises ConfigError."""
        return cls.load(Path(path)) if (path := os.environ.get(ENV)) else None

    def apply_server(self, socket: zmq.Socket[Any], role: Role = "client") -> None:
        """Before ``bind``: only peers with the keys of ``role`` get in. Raises ConfigError for a client's key file."""
        if not self.server_secret:
            raise ConfigError(f"{self.path}: has no server_secret, so nothing can be bound with it; use the run's own {RUN_FILE}")
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.server_public.encode(), self.server_secret.encode()
        socket.zap_domain = self._pair(role)[0]
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a doorkeeper nobody gets in, instead of everybody
        _keep_door(socket.context)

    def apply_client(self, socket: zmq.Socket[Any], role: Role = "client") -> None:
        """Before ``connect``: a peer that is not the run's server is never talked to. Raises ConfigError like ``apply_server``."""
        socket.curve_serverkey = self.server_public.encode()
        socket.curve_publickey, socket.curve_secretkey = self._pair(role)

    def _pair(self, role: Role) -> tuple[bytes, bytes]:
        public, secret = (self.client_public, self.client_secret) if role == "client" else (self.trainer_public, self.trainer_secret)
        if not secret:
            raise ConfigError(f"{self.path}: has no {role}_secret, so nobody can be the {role} with it; use the run's own {RUN_FILE}")
        return public.encode(), secret.encode()

    def _write(self, path: Path, secret: bool) -> None:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path" and (secret or f.name not in _OF_THE_RUN)}
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=2)
            os.fsync(file.fileno())
        draft.replace(path)


class Handshakes:
    """What becomes of the handshakes of a ``socket`` that will connect to ``address``; made before it connects, closed before it.

    A peer that does not let this side's key in says so, and it shows at once where one side has keys and the other none. libzmq does not
    connect again after that, so there is nothing to wait for. A peer with another server key than this side expects only drops the
    connection, which libzmq repeats: a peer that is just ending does so too, and one that is no socket of a run.
    """

    def __init__(self, socket: zmq.Socket[Any] | zmq.SyncSocket, address: str, keys: Keys | None) -> None:
        self._socket, self._address, self._dropped, self._keyless = socket, address, 0, keys is None
        self._held = "no keys" if keys is None else f"the keys of {keys.path}"
        self._monitor: zmq.Socket[bytes] = zmq.Context.shadow(socket.context.underlying).socket(zmq.PAIR)
        name = f"inproc://handshakes-{next(_monitors)}"
        try:
            self._monitor.setsockopt(zmq.RCVHWM, 0)  # libzmq stands still, with all of its connections, where a monitor takes no more
            socket.monitor(name, _FAILURES)
            self._monitor.connect(name)
        except zmq.ZMQError:
            self._monitor.close(linger=0)
            raise

    def check(self) -> None:
        """Never waits. Raises ConfigError once the peer has refused this side."""
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            kind, value = event["event"], int(event["value"])
            if kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise ConfigError(f"{self._address} lets in only the keys of its own run, and refused {self._held}; {_FIX}")
            if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                theirs = "keys" if self._keyless else "no keys"
                raise ConfigError(f"{self._address} has {theirs} (network.curve), and this side {self._held}; {_FIX}")
            self._dropped += kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

    def suspicion(self) -> str:
        """For the error of a wait that got no answer at all."""
        if not self._dropped:
            return f"this side has {self._held}, and nobody refused that"
        return (
            f"this side has {self._held}, and {self._dropped} connections were dropped without a word: by a run with another server key"
            f" than those expect, or by no run at all; {_FIX}"
        )

    def close(self) -> None:
        with suppress(zmq.ZMQError):  # its context is ended already
            self._socket.monitor(None, 0)
        self._monitor.close(linger=0)


def _check_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is no file; keys are in a file of their own")
    if found.st_mode & 0o077:
        raise ConfigError(f"{path}: mode {stat.S_IMODE(found.st_mode):04o} lets others use the run's keys; chmod 600 {path}")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path}: belongs to user {found.st_uid}, who may have put their own keys there; copy it and chmod 600 the copy")


def _check_pair(path: Path, whose: str, public: str, secret: str | None) -> None:
    """``secret`` None: only the public key is in the file."""
    try:
        for key in (public, public if secret is None else secret):
            if len(z85.decode(key.encode("ascii"))) != 32:
                raise ValueError("a key has 32 bytes")
        fits = secret is None or zmq.curve_public(secret.encode()) == public.encode()
    except (ValueError, KeyError, zmq.ZMQError) as error:
        raise ConfigError(f"{path}: the keys of the {whose} are none; copy the file again from runs/<name>/keys/") from error
    if not fits:
        raise ConfigError(f"{path}: the public and the secret key of the {whose} are not a pair; copy the file again")


def _keep_door(context: zmq.Context[Any]) -> None:
    """Answers, in a thread, libzmq's question about every peer of this context (ZAP, rfc.zeromq.org/spec/27), until it is terminated.

    A socket's domain is the one key that it lets in, so one doorkeeper serves sockets of any runs.
    """
    door: zmq.Socket[bytes] = zmq.Context.shadow(context.underlying).socket(zmq.REP)
    door.linger = 0
    try:
        door.bind(_DOOR)
    except zmq.ZMQError as error:
        door.close()
        if error.errno == zmq.EADDRINUSE:
            return
        raise
    threading.Thread(target=_answer, args=(door,), name="zap", daemon=True).start()


def _answer(door: zmq.Socket[bytes]) -> None:
    with door:
        while True:
            try:
                version, request, domain, address, _, mechanism, *credentials = door.recv_multipart()
                known = mechanism == b"CURVE" and z85.encode(credentials[0]) == domain
                if not known:
                    logger.warning("refused a peer at %s: it has not the key that this socket lets in", address.decode(errors="replace"))
                verdict = [b"200", b"OK", b"", b""] if known else [b"400", b"not a key of this run", b"", b""]
                door.send_multipart([version, request, *verdict])
            except zmq.ContextTerminated:
                return
