"""The experience socket over real ZeroMQ: order, exactly once, deadlines that name what they wait for, and hostile frames."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import zmq

from neox_rl.errors import DeadlineError, NeoxRLError, StalenessError
from neox_rl.framing import Frame, pack, unpack_any
from neox_rl.queue.wire import Delivery, Phase
from neox_rl.run.endpoints import free_port
from neox_rl.types import Json
from tests.unit.wire_headers import kind_of
from tests.unit.wire_peers import Gated, Recorder, connected, make_group, raw_peer, serving


def test_a_run_is_handled_in_the_order_it_was_sent() -> None:
    handler = Recorder()
    with serving(handler) as running, connected(running.address, greet=False) as client:
        client.hello(world=2, state={"cursor": 4})
        assert client.next_groups(Phase.SFT, 1) == (make_group(1),)
        client.report(Phase.SFT, 1, {"loss": 2.5, "grad_norm": float("inf")})
        client.published(0, "d0")
        assert client.evaluate("warmstart", 0) == {"accuracy": 0.25, "none": None}
        assert client.next_groups(Phase.RL, 1) == (make_group(1),)
        assert client.state == {"after": 1}
        client.report(Phase.RL, 1, {"loss": 0.5})
        client.done("all steps are trained")
        assert running.result.result(timeout=60) == "all steps are trained"
    assert handler.calls == [
        ("hello", 2, {"cursor": 4}),
        ("next", "sft", 1),
        ("report", "sft", 1, {"loss": 2.5, "grad_norm": None}),
        ("published", 0),
        ("evaluate", "warmstart", 0),
        ("next", "rl", 1),
        ("report", "rl", 1, {"loss": 0.5}),
        ("done", "all steps are trained"),
    ]


def test_a_stop_leaves_the_state_for_the_checkpoint_as_it_was() -> None:
    class Stopping(Recorder):
        async def next_groups(self, id: int, phase: Phase, step: int) -> Delivery:
            return await super().next_groups(id, phase, step) if step == 6 else Delivery(())

    with serving(Stopping()) as running, connected(running.address, greet=False) as client:
        client.hello(world=2, state={"after": 4})
        assert (client.next_groups(Phase.RL, 5), client.state) == ((), {"after": 4})
        client.next_groups(Phase.RL, 6)
        assert (client.next_groups(Phase.RL, 7), client.state) == ((), {"after": 6})


def test_a_late_orchestrator_is_waited_for() -> None:
    port, handler = free_port("127.0.0.1"), Recorder()
    with ThreadPoolExecutor(1) as pool, connected(f"tcp://127.0.0.1:{port}", greet=False) as client:
        greeting = pool.submit(client.hello, 2)
        time.sleep(0.7)
        with serving(handler, port):
            greeting.result(timeout=60)
    assert handler.calls == [("hello", 2, {})]


def test_no_orchestrator_is_a_deadline_naming_the_address() -> None:
    port = free_port("127.0.0.1")
    with (
        connected(f"tcp://127.0.0.1:{port}", deadline_s=0.3, greet=False) as client,
        pytest.raises(DeadlineError, match=rf"the orchestrator to answer on tcp://127.0.0.1:{port}.*see the orchestrator's log"),
    ):
        client.hello(world=1)


def test_an_evaluation_has_a_deadline_of_its_own() -> None:
    handler = Recorder(delay_s=1.2)
    with serving(handler) as running, connected(running.address, deadline_s=0.8) as client:
        assert client.evaluate("final", 3)["accuracy"] == 0.25
        handler.delay_s = 30
        with pytest.raises(DeadlineError, match="for the batch of rl step 1"):
            client.next_groups(Phase.RL, 1)


def test_a_deadline_names_the_batch_and_the_tickets_it_waits_for() -> None:
    handler = Recorder(delay_s=30)
    with serving(handler) as running, connected(running.address, deadline_s=1.5, silence_s=1.0) as client:
        with pytest.raises(DeadlineError, match=r"waited 1.* s for the batch of rl step 5.*last waited for g000003, due by step 5"):
            client.next_groups(Phase.RL, 5)
        assert handler.calls.count(("next", "rl", 5)) == 1, "heartbeats kept the client from repeating or giving up"


def test_an_orchestrator_that_dies_is_noticed_long_before_the_deadline() -> None:
    with serving(Recorder(delay_s=30)) as running, connected(running.address, deadline_s=60, silence_s=0.5) as client:
        threading.Timer(0.3, running.stop).start()
        start = time.monotonic()
        with pytest.raises(DeadlineError, match="a word from the orchestrator"):
            client.next_groups(Phase.RL, 1)
        assert time.monotonic() - start < 10


def test_a_repeated_request_gets_the_same_batch_and_is_handled_once() -> None:
    """The event loop stands still longer than the client's patience: the client repeats, the server answers once."""
    handler, sent = Recorder(), list[tuple[int, ...]]()
    with serving(handler) as running, connected(running.address) as client:
        send = client._send
        client._send = lambda *ids: (sent.append(ids), send(*ids))[1]  # type: ignore[method-assign]
        handler.stuck = lambda: sent.count(sent[-1]) < 2
        assert client.next_groups(Phase.RL, 1) == (make_group(1),)
        assert client.next_groups(Phase.RL, 2) == (make_group(2),)
        assert running.server.duplicates >= 1
    assert handler.calls == [("hello", 2, {}), ("next", "rl", 1), ("next", "rl", 2)]


def test_messages_lost_with_a_connection_arrive_once_and_in_order() -> None:
    """A proxy that swallows a quarter of the messages, both ways, stands for a network that breaks connections. It swallows the first
    report, and hands on what comes right after it."""
    handler = Recorder()
    with serving(handler) as running, lossy_proxy(running.address) as (address, healed), connected(address) as client:
        for step in range(1, 6):
            client.next_groups(Phase.RL, step)
            client.report(Phase.RL, step, {})
            client.published(step, f"d{step}")
        healed.set()  # nobody can repeat the very last answer: the orchestrator has ended
        client.done("end")
        assert running.result.result(timeout=60) == "end"
        assert running.server.out_of_order > 0
    expected = [call for s in range(1, 6) for call in (("next", "rl", s), ("report", "rl", s, {}), ("published", s))]
    assert handler.calls == [("hello", 2, {}), *expected, ("done", "end")]


@contextmanager
def lossy_proxy(target: str) -> Iterator[tuple[str, threading.Event]]:
    stop, healed = threading.Event(), threading.Event()
    front, back = zmq.Context.instance().socket(zmq.ROUTER), zmq.Context.instance().socket(zmq.DEALER)
    port = front.bind_to_random_port("tcp://127.0.0.1")
    back.connect(target)

    def pump() -> None:
        identity, rng = b"", random.Random(1)
        fates = {"report": [False], "published": [True]}  # of the first ones

        def arrives(frames: list[bytes]) -> bool:
            fate = fates.get(kind_of(frames))
            return fate.pop() if fate else healed.is_set() or rng.random() > 0.25

        while not stop.is_set():
            if front.poll(5):
                identity, *frames = front.recv_multipart()
                if arrives(frames):
                    back.send_multipart(frames)
            if back.poll(5):
                frames = back.recv_multipart()
                if arrives(frames):
                    front.send_multipart([identity, *frames])

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}", healed
    finally:
        stop.set()
        thread.join(10)
        front.close(linger=0)
        back.close(linger=0)


def test_an_answer_follows_the_trainer_to_its_new_connection() -> None:
    """The trainer's connection breaks while its request is in progress; a request after it is not taken up before its time."""
    handler = Gated()
    with serving(handler) as running:
        old, new = raw_peer(running.address), raw_peer(running.address)
        body: dict[str, Json] = {"session": "s", "phase": "rl"}
        old.send_multipart(pack("hello", {"session": "s", "id": 1, "since": 1, "world": 1, "pid": 1, "attempt": 0, "state": {}}, {}))
        assert kind_of(old.recv_multipart()) == "ok"
        old.send_multipart(pack("next", {**body, "since": 2, "id": 2, "step": 1}, {}))
        assert kind_of(old.recv_multipart()) == "heartbeat"
        old.close(linger=0)
        new.send_multipart(pack("next", {**body, "since": 2, "id": 2, "step": 1}, {}))
        new.send_multipart(pack("next", {**body, "since": 2, "id": 3, "step": 2}, {}))
        assert kind_of(new.recv_multipart()) == "heartbeat", "the answer is on its way to the new connection"
        while running.server.out_of_order == 0:
            assert kind_of(new.recv_multipart()) == "heartbeat"
        handler.gate.set()
        while (kind := kind_of(new.recv_multipart())) == "heartbeat":
            pass
        assert kind == "batch"
        assert not new.poll(300), "the third message came too early: the trainer repeats it"
        new.close(linger=0)
    assert handler.calls[1:] == [("next", "rl", 1)]


def test_a_failure_of_the_orchestrator_reaches_both_sides() -> None:
    with serving(Recorder(failure=StalenessError("step 1 was taken"))) as running, connected(running.address) as client:
        with pytest.raises(NeoxRLError, match="waited for the batch of rl step 1: StalenessError: step 1 was taken"):
            client.next_groups(Phase.RL, 1)
        assert isinstance(running.result.exception(timeout=60), StalenessError)


def test_the_last_answer_arrives_though_the_orchestrator_ends_at_once() -> None:
    """libzmq drops unread answers when a peer closes and zmq.IMMEDIATE is set: one end in five was lost so."""
    for _ in range(30):
        with serving(Recorder()) as running, connected(running.address) as client:
            client.done("end")


def test_a_second_trainer_is_refused_and_the_first_goes_on() -> None:
    with serving(Recorder()) as running, connected(running.address) as client:
        with connected(running.address, greet=False) as second, pytest.raises(NeoxRLError, match="another trainer holds the session"):
            second.hello(world=1)
        assert client.next_groups(Phase.RL, 1) == (make_group(1),)


def test_a_ticket_that_comes_twice_stops_the_trainer() -> None:
    with serving(Recorder(same=True)) as running, connected(running.address) as client:
        client.next_groups(Phase.RL, 1)
        with pytest.raises(StalenessError, match="g000000 was trained by step 1"):
            client.next_groups(Phase.RL, 2)


def hostile(rng: random.Random, session: str) -> list[Frame]:
    """A message that is wrong somewhere: random bytes, cut or flipped real messages, wrong types, wrong ids, too many frames."""
    kind = rng.choice(["hello", "next", "evaluate", "report", "published", "done", "batch", ""])
    value = rng.choice([None, True, -1, 10**30, 1.5, "x", [], {}, {"a": [[]]}, "\ud800"])
    body: dict[str, Json] = {"session": session, "id": rng.choice([0, -1, 1, 2, 10**9, "1", None, True]), "phase": "rl", "step": 1}
    body[rng.choice(["session", "id", "phase", "step", "label", "version", "reason", "world"])] = value
    frames = pack(kind, body, {})
    match rng.randrange(5):
        case 0:
            return [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 4))]
        case 1:
            raw = bytearray(frames[0])
            raw[rng.randrange(len(raw))] = rng.randrange(256)
            return [bytes(raw)]
        case 2:
            return [bytes(frames[0])[: rng.randrange(len(frames[0]))]]
        case 3:
            return [*frames, rng.randbytes(8)]
        case _:
            return [b"[" * rng.randrange(1, 5000)] if rng.random() < 0.05 else frames


def replayed(rng: random.Random, session: str) -> list[Frame]:
    """A well-formed message that was handled before, comes after a gap, or is of another session."""
    return pack("published", {"session": session, "id": rng.choice([1, 10**9]), "since": 1, "version": 7, "digest": "d"}, {})


def test_ten_thousand_hostile_messages_are_counted_and_change_nothing() -> None:
    """From another peer, with and without the session's real name. Not covered: a peer that knows the session and the next id."""
    rng, handler = random.Random(5), Recorder()
    with serving(handler) as running, connected(running.address, resend_s=600.0) as client:  # what it repeats would be counted too
        session = client._session
        peer = raw_peer(running.address)
        try:
            for _ in range(10_000):
                make = hostile if rng.random() < 0.8 else replayed
                peer.send_multipart(make(rng, rng.choice([session, "other"])))
                while peer.poll(0):
                    unpack_any(peer.recv_multipart(), ("ok", "error"))
            client.published(0, "d0")
            assert client.next_groups(Phase.RL, 1) == (make_group(1),)
            server, deadline = running.server, time.monotonic() + 60
            while (unused := server.malformed + server.strangers + server.duplicates + server.out_of_order) < 10_000:
                assert time.monotonic() < deadline, f"{unused} of 10000 messages were accounted for"
                time.sleep(0.01)
        finally:
            peer.close(linger=0)
        assert unused == 10_000
        assert min(server.malformed, server.strangers, server.duplicates, server.out_of_order) > 100
    assert handler.calls == [("hello", 2, {}), ("published", 0), ("next", "rl", 1)]
