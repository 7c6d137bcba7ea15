"""What the publisher makes of acks: of the newest version, of an earlier one, and of one that it never offered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import zmq

from neox_rl.telemetry.events import EventLog, read_events
from neox_rl.weights.publisher import Publisher
from neox_rl.weights.stager import MAX_HELD
from neox_rl.weights.wire import OFFERED, STAGED, WATCH, control, read_control
from tests.unit.small_run import small_snapshot
from tests.unit.test_weights_wire import wait_for


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def peer(stack: ExitStack, publisher: Publisher) -> zmq.SyncSocket:
    """Of a server, or of nobody that was asked."""
    socket = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.DEALER))
    socket.linger, socket.rcvtimeo = 0, 10_000
    socket.connect(publisher.address)
    return socket


def all_is_read(socket: zmq.SyncSocket) -> None:
    """What was sent before: this is answered after it."""
    socket.send_multipart(control(WATCH))
    read_control(socket.recv_multipart(), (OFFERED,))


def test_an_ack_that_comes_after_the_next_offer_is_an_event_too(stack: ExitStack, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "trainer-0.jsonl", "trainer-0")
    publisher = stack.enter_context(closing(Publisher(events=log)))
    slow = peer(stack, publisher)
    for version in range(MAX_HELD + 1):
        publisher.offer(small_snapshot(version))
        slow.send_multipart(control(WATCH))
        while read_control(slow.recv_multipart(), (OFFERED,))[1]["version"] != version:
            pass
    for version, of in ((0, 0), (1, 5), (1, 1), (1, 1), (3, 3), (1, 5)):
        slow.send_multipart(control(STAGED, version=version, who="a/0", digest=small_snapshot(of).digest))
    wait_for(lambda: publisher.malformed >= 2)  # v1 with another's digest, the second time after all others
    told = list[int]()
    while 3 not in told:
        kind, fields = read_control(slow.recv_multipart(), (OFFERED, STAGED))
        told += [fields["version"]] * (kind == STAGED)
    assert told == [1, 1, 3], "a server may switch to what is told: only to what it acked"
    log.close()
    acked = [(e.fields["version"], e.fields["who"], e.fields["digest"]) for e in read_events(tmp_path)]
    right, wrong = ([(version, "a/0", small_snapshot(of).digest) for version, of in some] for some in (((1, 1), (3, 3)), ((1, 5),)))
    assert acked == [*wrong, *right], "once each: a server repeats itself, and what it holds is for the audit to judge"


def test_a_digest_that_was_not_offered_is_no_ack(stack: ExitStack) -> None:
    publisher = stack.enter_context(closing(Publisher()))
    publisher.offer(small_snapshot(0))
    liar = peer(stack, publisher)
    liar.send_multipart(control(STAGED, version=0, who="liar/0", digest="0" * 32))
    all_is_read(liar)
    assert publisher.malformed == 1 and publisher._peers.staged == {}


def test_an_ack_of_an_undone_version_is_told_once(stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """A server that holds a later version of steps that a rollback undid repeats that every few seconds."""
    publisher = stack.enter_context(closing(Publisher()))
    publisher.offer(small_snapshot(1))
    old = peer(stack, publisher)
    for version in (5, 5, 5, 6, 6):
        old.send_multipart(control(STAGED, version=version, who="a/0", digest="0" * 32))
    all_is_read(old)
    assert publisher.malformed == 2 and caplog.text.count("it is of steps that were undone") == 2
