"""The sockets of a run with keys, over real ZeroMQ: its own peers get through, others are refused within a second, or are told at their
deadline why that may be where a wrong key looks like no peer at all."""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neox_rl.errors import ConfigError, DeadlineError, WeightError
from neox_rl.keys import CLIENT_FILE, ENV, Keys
from neox_rl.queue.wire import ExperienceServer
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.run.join_wire import JoinSocket
from neox_rl.run.serve import Agent
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import make_snapshot, tensors_of
from neox_rl.weights.stager import Stager
from neox_rl.weights.watcher import Watcher
from tests.unit.wire_peers import Recorder

RESEND_S = 0.1
SOON_S = 4.0
"""A deadline that a refusal must not need, and that what cannot be told apart from silence gets."""
LONG_S = 60.0
STRANGERS = ("no keys", "keys of another run", "another client's")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("run") / "keys")


@pytest.fixture(scope="module")
def server(run: Keys) -> Keys:
    """What a server of the run has."""
    return Keys.load(run.path.parent / CLIENT_FILE)


@pytest.fixture(params=STRANGERS)
def stranger(request: pytest.FixtureRequest, tmp_path: Path, run: Keys) -> Keys | None:
    if request.param == "no keys":
        return None
    other = Keys.make(tmp_path / "keys")
    return replace(other, server_public=run.server_public) if request.param == "another client's" else other


def ended(run: Keys, peer: Keys | None) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
    """How a wait of ``peer`` at a socket of ``run`` must end: refused by name, or for want of an answer where libzmq says no more."""
    if peer is None:
        return pytest.raises(
            (ConfigError, WeightError), match=r"tcp://127\.0\.0\.1:\d+ has keys \(network.curve\), and this side no keys; use what"
        )
    held = re.escape(f"the keys of {peer.path}")
    if peer.server_public == run.server_public:
        return pytest.raises(
            (ConfigError, WeightError), match=rf"lets in only the keys of its own run, and refused {held}; use what the run"
        )
    return pytest.raises(
        DeadlineError, match=rf"this side has {held}, and \d+ connections were dropped without a word: .*; use what the run"
    )


def patience_s(run: Keys, peer: Keys | None) -> float:
    """A deadline that would fail the test where a refusal is not noticed before it."""
    return LONG_S if peer is None or peer.server_public == run.server_public else SOON_S


def greet(keys: Keys, peer: Keys | None, deadline_s: float) -> list[tuple[object, ...]]:
    """What an orchestrator with ``keys`` hears of a trainer with the keys of ``peer``."""
    heard = Recorder()

    async def story() -> None:
        with closing(ExperienceServer("127.0.0.1", 0, keys=keys)) as server:
            serving = asyncio.create_task(server.serve(heard))
            with closing(ExperienceClient(f"tcp://127.0.0.1:{server.port}", deadline_s, resend_s=RESEND_S, keys=peer)) as client:
                try:
                    await asyncio.to_thread(client.hello, 1)
                finally:
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)

    asyncio.run(story())
    return heard.calls


def test_a_trainer_with_the_runs_keys_is_heard(run: Keys) -> None:
    assert greet(run, run, 10.0) == [("hello", 1, {})]


def test_a_trainer_without_them_is_not(run: Keys, stranger: Keys | None) -> None:
    with ended(run, stranger):
        greet(run, stranger, patience_s(run, stranger))


def test_who_has_the_keys_of_a_server_cannot_pose_as_the_trainer(run: Keys, server: Keys) -> None:
    with pytest.raises(ConfigError, match=r"client\.json: has no trainer_secret, so nobody can be the trainer with it"):
        greet(run, server, SOON_S)
    posing = replace(server, trainer_public=server.client_public, trainer_secret=server.client_secret)
    with ended(run, posing):
        greet(run, posing, LONG_S)


def test_a_server_and_the_orchestrator_follow_the_publisher(run: Keys, server: Keys) -> None:
    async def story(publisher: Publisher) -> None:
        async with Watcher(publisher.address, keys=run) as watcher:
            with closing(Stager(publisher.address, "a/0", RESEND_S, keys=server)) as stager:
                assert await watcher.wait_staged(4, {"a/0"}, 10.0) == 4
                assert tensors_of(stager.take(4, 1.0))["w"].tolist() == [1.0, 1.0]

    with closing(Publisher(keys=run)) as publisher:
        publisher.offer(make_snapshot(4, [("w", torch.ones(2))]))
        asyncio.run(story(publisher))


def test_weights_go_to_nobody_else(run: Keys, stranger: Keys | None) -> None:
    deadline_s = patience_s(run, stranger)

    async def watch(publisher: Publisher) -> None:
        async with Watcher(publisher.address, keys=stranger) as watcher:
            with ended(run, stranger):
                await watcher.wait_offered(-1, deadline_s)

    with closing(Publisher(keys=run)) as publisher:
        publisher.offer(make_snapshot(4, [("w", torch.ones(2))]))
        with closing(Stager(publisher.address, "a/0", RESEND_S, keys=stranger)) as stager, ended(run, stranger):
            stager.take(4, deadline_s)
        asyncio.run(watch(publisher))
        assert not publisher._peers.waiting and not publisher._peers.sending and not publisher._peers.watchers


@pytest.mark.parametrize("theirs", ["no keys", "keys of another run"])
def test_a_server_takes_no_weights_of_a_publisher_that_is_not_the_runs(server: Keys, tmp_path: Path, theirs: str) -> None:
    other = None if theirs == "no keys" else Keys.make(tmp_path / "keys")
    refusal = "has no keys .network.curve., and this side the keys of" if other is None else "connections were dropped without a word"
    with closing(Publisher(keys=other)) as publisher, closing(Stager(publisher.address, "a/0", RESEND_S, keys=server)) as stager:
        publisher.offer(make_snapshot(4, [("w", torch.ones(2))]))
        with pytest.raises(WeightError if other is None else DeadlineError, match=refusal):
            stager.take(4, LONG_S if other is None else SOON_S)


def joining(run: Keys, join: Callable[[int], str], keys: Path | None, timeout_s: float) -> None:
    """The program that brings a server to a run, up to the run's answer; this one never answers."""

    async def story() -> None:
        with closing(JoinSocket("127.0.0.1", 0, run)) as socket:
            options = argparse.Namespace(join=join(socket.port), keys=keys, host="", port=0, name="", timeout=timeout_s)
            with closing(Agent(options)) as agent:
                await agent._join()

    asyncio.run(story())


def test_a_joiner_with_keys_that_are_not_the_runs_ends_at_once(run: Keys, stranger: Keys | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    if stranger is not None:
        stranger._write(stranger.path, secret=False)
    with ended(run, stranger):
        joining(run, lambda port: f"tcp://127.0.0.1:{port}", stranger and stranger.path, patience_s(run, stranger))


def test_nobody_is_suspected_where_nobody_listens(server: Keys) -> None:
    expected = re.escape(f"this side has the keys of {server.path}, and nobody refused that")
    with closing(Stager("tcp://127.0.0.1:1", "a/0", RESEND_S, keys=server)) as stager, pytest.raises(DeadlineError, match=expected):
        stager.take(4, 0.5)
