"""Publisher, stager and watcher over real sockets: who comes late, who repeats itself, who lies."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from neox_rl.errors import DeadlineError, WeightError, WireError
from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.snapshot import Snapshot, make_snapshot, tensors_of
from neox_rl.weights.stager import MAX_HELD, Stager
from neox_rl.weights.watcher import Watcher
from neox_rl.weights.wire import FETCH, OFFERED, STAGED, WATCH, control, read_control

RESEND_S = 0.1


def snapshot(version: int) -> Snapshot:
    return make_snapshot(version, [("w", torch.full((300, 300), float(version))), ("b", torch.ones(3))])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def publisher(stack: ExitStack) -> Publisher:
    return stack.enter_context(closing(Publisher()))


def stager(stack: ExitStack, address: str, who: str) -> Stager:
    return stack.enter_context(closing(Stager(address, who, resend_s=RESEND_S)))


def test_a_worker_gets_what_is_there_and_what_comes(stack: ExitStack, publisher: Publisher) -> None:
    early = stager(stack, publisher.address, "a/0")
    publisher.offer(snapshot(0))
    assert tensors_of(early.take(0, 30.0))["w"][0, 0] == 0.0
    publisher.offer(snapshot(1))
    late = stager(stack, publisher.address, "b/0")
    for worker in (early, late):
        staged = worker.take(1, 30.0)
        assert (staged.version, staged.digest) == (1, snapshot(1).digest)
        assert tensors_of(staged)["w"][-1, -1] == 1.0


def test_a_worker_that_starts_before_the_publisher_finds_it(stack: ExitStack) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    worker = stager(stack, f"tcp://127.0.0.1:{port}", "a/0")
    time.sleep(0.2)
    publisher = stack.enter_context(closing(Publisher(port=port)))
    publisher.offer(snapshot(4))
    assert worker.take(4, 30.0).version == 4


def test_a_version_is_held_until_it_or_a_newer_one_is_taken(stack: ExitStack, publisher: Publisher) -> None:
    worker = stager(stack, publisher.address, "a/0")
    for version in (0, 1):
        publisher.offer(snapshot(version))
        wait_for(lambda version=version: version in worker._held)
    assert worker.take(0, 1.0).version == 0
    assert worker.take(1, 1.0).version == 1


def test_a_worker_that_is_left_behind_holds_no_more_than_a_few_versions(stack: ExitStack, publisher: Publisher) -> None:
    worker = stager(stack, publisher.address, "a/0")
    for version in range(MAX_HELD + 3):
        publisher.offer(snapshot(version))
        wait_for(lambda version=version: version in worker._held)
    assert sorted(worker._held) == [*range(3, MAX_HELD + 3)]
    with pytest.raises(WeightError, match="v0 is gone"):
        worker.take(0, 1.0)
    assert worker.take(MAX_HELD + 2, 1.0).version == MAX_HELD + 2 and not worker._held


def test_a_version_older_than_what_is_staged_is_named_as_gone(stack: ExitStack, publisher: Publisher) -> None:
    publisher.offer(snapshot(3))
    worker = stager(stack, publisher.address, "a/0")
    wait_for(lambda: 3 in worker._held)
    with pytest.raises(WeightError, match=r"v1 is gone, staged are \[3\]"):
        worker.take(1, 30.0)


def test_each_ack_of_what_was_offered_is_an_event_once_with_the_digest_that_the_worker_found(stack: ExitStack, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "trainer-0.jsonl", "trainer-0")
    publisher = stack.enter_context(closing(Publisher(events=log)))
    for who in ("a/0", "b/0"):
        stager(stack, publisher.address, who)
    with zmq.Context() as context, context.socket(zmq.DEALER) as liar:
        liar.connect(publisher.address)
        for version in (0, 1):
            publisher.offer(snapshot(version))
            held = dict.fromkeys(("a/0", "b/0"), snapshot(version).digest)
            wait_for(lambda held=held: publisher._peers.staged == held)
            liar.send_multipart(control(STAGED, version=version, who="c/0", digest="another"))
            wait_for(lambda version=version: publisher.malformed == version + 1)
        time.sleep(3 * RESEND_S)  # they repeat themselves
    log.close()
    acked = sorted((e.fields["version"], e.fields["who"], e.fields["digest"]) for e in read_events(tmp_path))
    right = [(version, who, snapshot(version).digest) for version in (0, 1) for who in ("a/0", "b/0")]
    assert acked == sorted([*right, (0, "c/0", "another"), (1, "c/0", "another")]), "one with other weights too: an audit judges it"


class SlowStager(Stager):
    """Reads one snapshot for each ``release()`` of its gate."""

    def __init__(self, address: str, who: str) -> None:
        self.gate = threading.Semaphore(0)
        super().__init__(address, who, resend_s=RESEND_S)

    def _receive(self, socket: zmq.SyncSocket) -> bool:
        self.gate.acquire(timeout=30.0)
        return super()._receive(socket)


def test_a_fast_worker_still_holds_the_version_that_a_slow_one_acks_last(stack: ExitStack, publisher: Publisher) -> None:
    async def story() -> None:
        async with Watcher(publisher.address) as watcher:
            fast = stager(stack, publisher.address, "fast/0")
            slow = stack.enter_context(closing(SlowStager(publisher.address, "slow/0")))
            wait_for(lambda: len(publisher._peers.waiting) == 2)
            for version in range(1, 5):
                publisher.offer(snapshot(version))
                assert await watcher.wait_staged(version, {"fast/0"}, 30.0) == version
            slow.gate.release()
            assert await watcher.wait_staged(1, {"fast/0", "slow/0"}, 30.0) == 1
            assert [worker.take(1, 1.0).version for worker in (fast, slow)] == [1, 1]
            slow.gate.release()
            assert await watcher.wait_staged(2, {"fast/0", "slow/0"}, 30.0) == 4
            assert [worker.take(4, 1.0).version for worker in (fast, slow)] == [4, 4]
            slow.gate.release()

    asyncio.run(story())


class SlowLink:
    """A proxy that hands on what the publisher says only while ``open`` is set; the other way always."""

    def __init__(self, address: str) -> None:
        self.open = threading.Event()
        self.open.set()
        self._upstream = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.open.set()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        far.connect(self._upstream)
        self._sockets += [near, far]
        threading.Thread(target=self._copy, args=(near, far, None), daemon=True).start()
        self._copy(far, near, self.open)

    def _copy(self, source: socket.socket, target: socket.socket, gate: threading.Event | None) -> None:
        with suppress(OSError):
            while gate is None or gate.wait(60.0):
                if not (data := source.recv(1 << 16)):
                    return
                target.sendall(data)


class Witness(Stager):
    """Remembers which versions came, in their order."""

    def __init__(self, address: str, who: str) -> None:
        self.came: list[int] = []
        super().__init__(address, who, resend_s=RESEND_S)

    def _receive(self, socket: zmq.SyncSocket) -> bool:
        newer = super()._receive(socket)
        self.came.append(self._have)
        return newer


def test_a_peer_behind_a_slow_link_has_one_snapshot_on_its_way_and_then_gets_the_newest(stack: ExitStack, publisher: Publisher) -> None:
    """Queued behind one another they would fill the trainer's memory, and what the peer gets would be ever staler."""
    link = stack.enter_context(closing(SlowLink(publisher.address)))
    worker = stack.enter_context(closing(Witness(link.address, "far/0")))
    wait_for(lambda: bool(publisher._peers.waiting))
    link.open.clear()
    # More than the buffers of both sockets hold: what is sent stays on its way until the link opens.
    big = [make_snapshot(version, [("w", torch.full((4 << 20,), float(version)))]) for version in range(1, 5)]
    asked = 0
    answer = publisher._answer

    def counting(identity: bytes, kind: str, fields: dict[str, Any]) -> None:
        nonlocal asked
        answer(identity, kind, fields)
        asked += kind == FETCH

    publisher._answer = counting  # type: ignore[method-assign]
    for version in big:
        publisher.offer(version)
        before = asked
        wait_for(lambda before=before: asked >= before + 3)
    link.open.set()
    assert worker.take(4, 30.0).digest == big[-1].digest
    wait_for(lambda: 4 in worker.came)
    assert worker.came[:2] == [1, 4] and set(worker.came) == {1, 4}, "what was asked for twice may come twice"


def test_a_worker_that_has_a_version_in_hand_need_not_repeat_its_request_for_the_next(stack: ExitStack, publisher: Publisher) -> None:
    """Its request comes back sooner than this side hears that the bytes are gone."""
    worker = stack.enter_context(closing(Stager(publisher.address, "a/0", resend_s=600.0)))
    for version in range(30):
        publisher.offer(snapshot(version))
        assert worker.take(version, 30.0).version == version


def test_a_version_that_does_not_come_is_named_with_its_publisher(stack: ExitStack, publisher: Publisher) -> None:
    worker = stager(stack, publisher.address, "a/0")
    with pytest.raises(DeadlineError, match=f"a/0 to stage v7 from {publisher.address}"):
        worker.take(7, 0.05)


def test_a_stager_whose_thread_died_says_of_what(stack: ExitStack) -> None:
    worker = stager(stack, "tcp://127.0.0.1:no-port", "a/0")
    begin = time.monotonic()
    with pytest.raises(WeightError, match="a/0 cannot stage v1: its thread ended with ZMQError"):
        worker.take(1, 30.0)
    assert time.monotonic() - begin < 25.0


def test_a_publisher_whose_thread_died_says_of_what_and_still_closes(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher()))
    stager(stack, publisher.address, "a/0")
    wait_for(lambda: bool(publisher._peers.waiting))
    good = snapshot(1)
    publisher.offer(Snapshot(1, good.digest, good.manifest, (1.5,)))  # type: ignore[arg-type]
    wait_for(lambda: not publisher._thread.is_alive())
    with pytest.raises(WireError, match=r"v2 .*thread ended with TypeError"):
        publisher.offer(snapshot(2))


def test_corrupted_bytes_are_refused_never_acked_and_asked_for_again(stack: ExitStack, publisher: Publisher) -> None:
    good = snapshot(1)
    frames = [good.frames[0], bytearray(good.frames[1]), *good.frames[2:]]
    frames[1][100] ^= 1  # type: ignore[index]
    publisher.offer(Snapshot(1, good.digest, good.manifest, tuple(frames)))  # type: ignore[arg-type]
    worker = stager(stack, publisher.address, "a/0")
    wait_for(lambda: bool(worker._failure))
    with pytest.raises(DeadlineError, match="bytes of 'w' do not match"):
        worker.take(1, 0.1)
    assert publisher._peers.staged == {}
    publisher.offer(snapshot(2))
    assert worker.take(2, 30.0).version == 2


def test_a_watcher_that_comes_late_learns_everything(stack: ExitStack, publisher: Publisher) -> None:
    async def story() -> None:
        publisher.offer(snapshot(3))
        workers = [stager(stack, publisher.address, who) for who in ("a/0", "a/1", "b/0")]
        async with Watcher(publisher.address) as early:
            assert await early.wait_offered(-1, 30.0) == 3
            assert early.digests == {3: snapshot(3).digest}
            assert await early.wait_staged(3, {"a/0", "a/1", "b/0"}, 30.0) == 3
            async with Watcher(publisher.address) as late:
                assert await late.wait_staged(0, {"b/0"}, 30.0) == 3
        assert len(workers) == 3

    asyncio.run(story())


def test_waiting_for_acks_skips_a_version_that_a_slow_worker_never_saw(stack: ExitStack, publisher: Publisher) -> None:
    async def story() -> None:
        stager(stack, publisher.address, "fast/0")
        async with Watcher(publisher.address) as watcher:
            publisher.offer(snapshot(1))
            assert await watcher.wait_staged(1, {"fast/0"}, 30.0) == 1
            with pytest.raises(DeadlineError, match="v1 to be staged by slow/0"):
                await watcher.wait_staged(1, {"fast/0", "slow/0"}, 0.1)
            publisher.offer(snapshot(2))
            stager(stack, publisher.address, "slow/0")
            assert await watcher.wait_staged(1, {"fast/0", "slow/0"}, 30.0) == 2

    asyncio.run(story())


def test_waiting_for_an_offer_ends_at_its_deadline(publisher: Publisher) -> None:
    async def story() -> None:
        async with Watcher(publisher.address) as watcher:
            with pytest.raises(DeadlineError, match="after v4"):
                await watcher.wait_offered(4, 0.1)

    asyncio.run(story())


def test_malformed_messages_are_counted_and_harm_nobody(stack: ExitStack, publisher: Publisher) -> None:
    bad = [
        [b""],
        [b"\xff\x00", b"more"],
        [b"[]"],
        [b'{"v":1,"kind":"fetch","meta":{"have":"x","who":"a"},"arrays":[]}'],
        [b'{"v":1,"kind":"steal","meta":{},"arrays":[]}'],
        control(STAGED, version=9, who="liar/0", digest="0" * 32),
        control(OFFERED, version=9, digest="0" * 32),
        [b"[" * 30000],
    ]
    context = stack.enter_context(zmq.Context())
    socket = stack.enter_context(context.socket(zmq.DEALER))
    socket.linger = 0
    socket.connect(publisher.address)
    for message in bad:
        socket.send_multipart(message)
    wait_for(lambda: publisher.malformed == len(bad))
    publisher.offer(snapshot(0))
    assert stager(stack, publisher.address, "a/0").take(0, 30.0).version == 0


def test_versions_must_rise_and_a_closed_publisher_takes_none(publisher: Publisher) -> None:
    publisher.offer(snapshot(2))
    for version in (2, 1):
        with pytest.raises(WireError, match="versions must rise"):
            publisher.offer(snapshot(version))
    publisher.close()
    publisher.close()
    with pytest.raises(WireError, match="closed"):
        publisher.offer(snapshot(3))


def test_only_the_newest_snapshot_is_kept(publisher: Publisher) -> None:
    for version in range(5):
        publisher.offer(snapshot(version))
    wait_for(lambda: publisher._newest is not None and publisher._newest.version == 4)
    gc.collect()
    assert [s.version for s in gc.get_objects() if type(s) is Snapshot] == [4]


def test_control_messages_are_read_exactly() -> None:
    assert read_control([bytes(f) for f in control(WATCH)], (FETCH, WATCH)) == (WATCH, {})
    with pytest.raises(WireError):
        read_control([bytes(f) for f in control(WATCH)], (FETCH,))
    with pytest.raises(WireError, match="fields"):
        read_control([bytes(f) for f in control(FETCH, have=True, who="a")], (FETCH,))


def test_a_worker_that_is_late_is_heard_for_as_long_as_a_worker_may_hold_a_version() -> None:
    """v0 was acked by one, and ``MAX_HELD`` - 1 newer ones were offered when the other's ack comes; more come before anybody switches."""
    watcher = Watcher("tcp://127.0.0.1:1")

    def heard(kind: str, version: int, **who: str) -> None:
        watcher._note(kind, {"version": version, "digest": f"d{version}", **who})

    heard(OFFERED, 0)
    heard(STAGED, 0, who="a/0")
    for version in range(1, MAX_HELD):
        heard(OFFERED, version)
    heard(STAGED, 0, who="b/0")
    for version in range(MAX_HELD, 2 * MAX_HELD):
        heard(OFFERED, version)
    held = watcher.staged_by({"a/0", "b/0"})
    assert held == 0 and watcher.digests[held] == "d0", "a switch to it says by which weights"
    assert len(watcher.digests) == MAX_HELD + 1


def wait_for(condition: object, deadline_s: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "condition did not come"
        time.sleep(0.005)
