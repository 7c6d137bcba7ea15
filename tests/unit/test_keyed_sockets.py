"""The sockets of a run with keys, over real ZeroMQ: its own peers get through, others are told at their deadline why that may be."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neox_rl.errors import ConfigError, DeadlineError
from neox_rl.keys import CLIENT_FILE, Keys
from neox_rl.queue.wire import ExperienceServer
from neox_rl.queue.wire_client import ExperienceClient
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import make_snapshot, tensors_of
from neox_rl.weights.stager import Stager
from neox_rl.weights.watcher import Watcher
from tests.unit.wire_peers import Recorder

SOON_S, RESEND_S = 0.4, 0.1
STRANGERS = ("no keys", "keys of another run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.make(tmp_path_factory.mktemp("run") / "keys")


@pytest.fixture(scope="module")
def server(run: Keys) -> Keys:
    """What a server of the run has."""
    return Keys.load(run.path.parent / CLIENT_FILE)


@pytest.fixture(params=STRANGERS)
def stranger(request: pytest.FixtureRequest, tmp_path: Path) -> Keys | None:
    return None if request.param == "no keys" else Keys.make(tmp_path / "keys")


def suspects(keys: Keys | None) -> str:
    return "this side has no keys" if keys is None else f"this side has the keys of {keys.path}"


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


def test_a_trainer_without_them_is_not_and_learns_of_keys(run: Keys, stranger: Keys | None) -> None:
    with pytest.raises(DeadlineError, match=suspects(stranger)):
        greet(run, stranger, SOON_S)


def test_who_has_the_keys_of_a_server_cannot_pose_as_the_trainer(run: Keys, server: Keys) -> None:
    with pytest.raises(ConfigError, match=r"client\.json: has no trainer_secret, so nobody can be the trainer with it"):
        greet(run, server, SOON_S)
    posing = replace(server, trainer_public=server.client_public, trainer_secret=server.client_secret)
    with pytest.raises(DeadlineError, match=suspects(server)):
        greet(run, posing, SOON_S)


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
    async def watch(publisher: Publisher) -> None:
        async with Watcher(publisher.address, keys=stranger) as watcher:
            with pytest.raises(DeadlineError, match=suspects(stranger)):
                await watcher.wait_offered(-1, SOON_S)

    with closing(Publisher(keys=run)) as publisher:
        publisher.offer(make_snapshot(4, [("w", torch.ones(2))]))
        with (
            closing(Stager(publisher.address, "a/0", RESEND_S, keys=stranger)) as stager,
            pytest.raises(DeadlineError, match=suspects(stranger)),
        ):
            stager.take(4, SOON_S)
        asyncio.run(watch(publisher))
        assert not publisher._peers.waiting and not publisher._peers.sending and not publisher._peers.watchers


def test_a_server_takes_no_weights_of_a_publisher_that_is_not_the_runs(server: Keys, stranger: Keys | None) -> None:
    with closing(Publisher(keys=stranger)) as publisher, closing(Stager(publisher.address, "a/0", RESEND_S, keys=server)) as stager:
        publisher.offer(make_snapshot(4, [("w", torch.ones(2))]))
        with pytest.raises(DeadlineError, match=suspects(server)):
            stager.take(4, SOON_S)
