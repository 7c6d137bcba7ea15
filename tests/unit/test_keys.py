"""Keys of a run: where they lie, who can read them, and who gets in."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from neox_rl.config.network import curve_on
from neox_rl.config.schema import NetworkConfig
from neox_rl.errors import ConfigError
from neox_rl.keys import CLIENT_FILE, ENV, RUN_FILE, Keys

SOON_MS = 300
"""Long enough for a handshake on one machine; a refused peer waits it out."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("run") / "keys")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("other") / "keys")


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made


@pytest.mark.parametrize(
    ("curve", "host", "on"),
    [
        ("auto", "127.0.0.1", False),
        ("auto", "localhost", False),
        ("auto", "10.0.0.7", True),
        ("auto", "0.0.0.0", True),
        ("auto", "node1", True),
        ("always", "127.0.0.1", True),
        ("never", "10.0.0.7", False),
    ],
)
def test_sockets_beyond_loopback_have_keys(curve: str, host: str, on: bool) -> None:
    assert curve_on(NetworkConfig(bind_host=host, curve=curve)) is on


def test_the_files_are_of_their_owner_alone_and_the_client_gets_no_server_secret(run: Keys) -> None:
    directory = run.path.parent
    assert [oct(path.stat().st_mode & 0o777) for path in (directory, directory / RUN_FILE, directory / CLIENT_FILE)] == [
        "0o700",
        "0o600",
        "0o600",
    ]
    assert sorted(path.name for path in directory.iterdir()) == [CLIENT_FILE, RUN_FILE]
    for secret in (run.server_secret, run.trainer_secret, run.trainer_public):
        assert len(secret) == 40 and secret not in (directory / CLIENT_FILE).read_text() and secret in (directory / RUN_FILE).read_text()
    assert not any(secret in repr(run) for secret in (run.server_secret, run.client_secret, run.server_public, run.trainer_secret))


def test_a_run_that_goes_on_keeps_its_keys(run: Keys, other: Keys) -> None:
    assert Keys.make(run.path.parent) == run and other.server_public != run.server_public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_file_that_others_can_use_is_refused_with_the_fix(run: Keys, tmp_path: Path, mode: int) -> None:
    copy = tmp_path / "copy.json"
    copy.write_text((run.path.parent / CLIENT_FILE).read_text())
    copy.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o} lets others use the run's keys; chmod 600 {copy}"):
        Keys.load(copy)
    copy.chmod(0o600)
    assert Keys.load(copy).client_secret == run.client_secret


@pytest.mark.parametrize(
    "change", [{"client_public": "x"}, {"client_public": 7}, {"server_public": "ä" * 40}, {"client_secret": None}, {"more": ""}]
)
def test_a_file_without_keys_is_refused(run: Keys, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "bad.json"
    path.touch(0o600)
    path.write_text(json.dumps(json.loads((run.path.parent / CLIENT_FILE).read_text()) | change))
    with pytest.raises(ConfigError, match=r"copy (it|the file) again"):
        Keys.load(path)
    path.write_text('{"client_public": ')
    with pytest.raises(ConfigError, match="is no key file"):
        Keys.load(path)
    with pytest.raises(ConfigError, match="cannot read the run's keys"):
        Keys.load(tmp_path / "none.json")


def test_a_secret_key_of_another_pair_is_refused(run: Keys, other: Keys, tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    path.touch(0o600)
    path.write_text(json.dumps(json.loads((run.path.parent / CLIENT_FILE).read_text()) | {"client_secret": other.client_secret}))
    with pytest.raises(ConfigError, match="of the client are not a pair"):
        Keys.load(path)


def test_a_server_reads_its_file_from_the_environment_and_can_bind_nothing(
    run: Keys, monkeypatch: pytest.MonkeyPatch, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    monkeypatch.delenv(ENV, raising=False)
    assert Keys.of_environment() is None
    monkeypatch.setenv(ENV, str(run.path.parent / CLIENT_FILE))
    keys = Keys.of_environment()
    assert keys is not None and keys.client_secret == run.client_secret
    with context.socket(zmq.ROUTER) as socket, pytest.raises(ConfigError, match="has no server_secret"):
        keys.apply_server(socket)


def gets_in(
    context: zmq.Context[zmq.Socket[bytes]], server: Keys | None, client: Keys | None, settled: Callable[[], bool] = lambda: True
) -> bool:
    """Whether a message of a peer with keys ``client`` arrives at a socket with keys ``server``; the peer stays until ``settled``."""
    with context.socket(zmq.ROUTER) as bound, context.socket(zmq.DEALER) as peer:
        bound.linger = peer.linger = 0
        if server is not None:
            server.apply_server(bound)
        if client is not None:
            client.apply_client(peer)
        peer.connect(f"tcp://127.0.0.1:{bound.bind_to_random_port('tcp://127.0.0.1')}")
        peer.send(b"hello")
        arrived = bool(bound.poll(60_000 if server is client else SOON_MS))
        end = time.monotonic() + 60.0
        while not settled() and time.monotonic() < end:
            time.sleep(0.01)
        return arrived or bool(bound.poll(0))


def test_only_the_keys_of_the_run_get_in(
    run: Keys, other: Keys, context: zmq.Context[zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    thief = Keys(run.path, run.server_public, other.client_public, other.client_secret)
    client = Keys.load(run.path.parent / CLIENT_FILE)
    assert gets_in(context, run, run) and gets_in(context, other, other)
    assert not gets_in(context, run, None), "no keys"
    assert not gets_in(context, run, other), "keys of another run"
    with caplog.at_level(logging.WARNING):
        told = gets_in(context, run, thief, lambda: "refused a peer at 127.0.0.1" in caplog.text)
        assert not told, "the server's public key, and a client key that is not the run's"
    assert "refused a peer at 127.0.0.1" in caplog.text
    assert not gets_in(context, None, client), "a server that is not the run's, and has no keys"
    assert not gets_in(context, other, client), "a server with the keys of another run"
