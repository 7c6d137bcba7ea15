"""An orchestrator that takes over from another: who may go on, who may begin, and that nothing is lost or handled twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from neox_rl.errors import JournalError, NeoxRLError
from neox_rl.framing import pack
from neox_rl.queue.wire_messages import Phase, parse_answer
from neox_rl.run.endpoints import free_port
from tests.unit.wire_peers import Recorder, connected, make_group, raw_peer, serving


def test_an_orchestrator_without_a_journal_refuses_a_run_it_does_not_know() -> None:
    port = free_port("127.0.0.1")
    with serving(Recorder(), port) as first, connected(f"tcp://127.0.0.1:{port}") as client:
        first.stop()
        with serving(Recorder(), port), pytest.raises(NeoxRLError, match="was restarted and knows no session"):
            client.next_groups(Phase.RL, 1)


def test_a_successor_goes_on_in_the_session_and_nothing_is_handled_twice() -> None:
    """The first dies with a request in progress: its successor knows what was durable, and is told the rest."""
    port, first_calls, second_calls = free_port("127.0.0.1"), Recorder(delay_s=30), Recorder()
    with serving(first_calls, port) as first, connected(f"tcp://127.0.0.1:{port}") as client:
        client.report(Phase.SFT, 1, {"loss": 1.0})
        client.published(0, "d0")
        with ThreadPoolExecutor(1) as pool:
            batch = pool.submit(client.next_groups, Phase.RL, 1)
            wait_until(lambda: ("next", "rl", 1) in first_calls.calls)
            first.stop()
            with serving(second_calls, port, session=client._session, last=2):
                assert batch.result(timeout=60) == (make_group(1),)
                client.done("end")
    assert second_calls.calls == [("published", 0), ("next", "rl", 1), ("done", "end")], "the report was in the journal, the rest was not"


def test_a_successor_answers_a_repeated_request_again() -> None:
    port, calls = free_port("127.0.0.1"), Recorder()
    with serving(Recorder(delay_s=30), port) as first, connected(f"tcp://127.0.0.1:{port}") as client, ThreadPoolExecutor(1) as pool:
        batch = pool.submit(client.next_groups, Phase.RL, 1)
        time.sleep(0.3)
        first.stop()
        with serving(calls, port, session=client._session, last=2):
            assert batch.result(timeout=60) == (make_group(1),) and calls.calls == [("next", "rl", 1)]


def test_a_successor_whose_journal_lost_what_the_trainer_cannot_repeat_says_so() -> None:
    port = free_port("127.0.0.1")
    with serving(Recorder(), port) as first, connected(f"tcp://127.0.0.1:{port}") as client:
        client.next_groups(Phase.RL, 1)
        first.stop()
        with serving(Recorder(), port, session=client._session, last=1) as second:
            with pytest.raises(NeoxRLError, match="messages 2 to 2 of the trainer were handled, but the journal"):
                client.next_groups(Phase.RL, 2)
            assert isinstance(second.result.exception(timeout=60), JournalError)


def test_a_successor_whose_journal_lost_a_batch_says_so_at_the_trainers_next_word() -> None:
    port, calls = free_port("127.0.0.1"), Recorder()
    with serving(Recorder(), port) as first, connected(f"tcp://127.0.0.1:{port}") as client:
        client.next_groups(Phase.RL, 1)
        first.stop()
        with serving(calls, port, session=client._session, last=2, lost="the journal lost what step 1 took") as second:
            with pytest.raises(NeoxRLError, match="lost what step 1 took: the run goes on from its checkpoint, with --resume"):
                client.next_groups(Phase.RL, 2)
            assert isinstance(second.result.exception(timeout=60), JournalError) and not calls.calls


def test_a_new_trainer_needs_a_higher_attempt_and_an_orchestrator_that_has_not_heard_the_old_one() -> None:
    handler = Recorder()
    with serving(handler, session="", attempt=1) as running:
        with connected(running.address, greet=False) as same, pytest.raises(NeoxRLError, match=r"attempt 1.*--resume.*NEOX_RL_ATTEMPT=2"):
            same.hello(world=1)
        with connected(running.address, greet=False, attempt=2) as client:
            client.hello(world=1)
            with (
                connected(running.address, greet=False, attempt=3) as later,
                pytest.raises(NeoxRLError, match="another trainer holds the session"),
            ):
                later.hello(world=1)
            assert client.next_groups(Phase.RL, 1) == (make_group(1),)


def test_nothing_is_acknowledged_before_it_is_durable() -> None:
    on_disk = threading.Event()

    class Slow(Recorder):
        async def durable(self) -> None:
            await asyncio.to_thread(on_disk.wait, 60)

    with serving(Slow()) as running:
        peer = raw_peer(running.address)
        peer.send_multipart(pack("hello", {"session": "s", "id": 1, "since": 1, "world": 1, "pid": 1, "attempt": 0, "state": {}}, {}))
        waiting = [parse_answer(peer.recv_multipart()) for _ in range(3)]
        on_disk.set()
        answer = parse_answer(peer.recv_multipart())
        while answer.kind == "heartbeat":
            answer = parse_answer(peer.recv_multipart())
        peer.close(linger=0)
    assert {(beat.kind, beat.acked) for beat in waiting} == {("heartbeat", 0)} and answer.acked == 1


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)
