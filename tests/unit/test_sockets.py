"""Ports of sockets that are closing."""

import errno
import threading
import time

import pytest
import zmq

from neox_rl.sockets import REBIND_S, bind_tcp


def router(context: zmq.Context[zmq.Socket[bytes]], linger_ms: int) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, linger_ms)
    return socket


def test_a_port_is_bound_again_while_its_last_socket_still_closes() -> None:
    with zmq.Context() as context:
        for _ in range(20):
            first = router(context, 1000)
            port = bind_tcp(first, "127.0.0.1", 0)
            with context.socket(zmq.DEALER) as peer:
                peer.connect(f"tcp://127.0.0.1:{port}")
                peer.send(b"a request")
                name, _ = first.recv_multipart()
                first.send_multipart([name, b"an answer"])
                first.close()
                with router(context, 0) as second:
                    assert bind_tcp(second, "127.0.0.1", port) == port


def test_a_port_that_is_freed_in_time_is_bound() -> None:
    with zmq.Context() as context, router(context, 0) as second:
        first = router(context, 0)
        port = bind_tcp(first, "127.0.0.1", 0)
        freeing = threading.Timer(0.3, first.close)
        freeing.start()
        assert bind_tcp(second, "127.0.0.1", port, wait_s=60.0) == port
        freeing.join()


def test_a_port_that_stays_taken_is_an_error_after_the_wait() -> None:
    with zmq.Context() as context, router(context, 0) as first, router(context, 0) as second:
        port = bind_tcp(first, "127.0.0.1", 0)
        began = time.monotonic()
        with pytest.raises(zmq.ZMQError) as refused:
            bind_tcp(second, "127.0.0.1", port, wait_s=0.2)
        assert refused.value.errno == errno.EADDRINUSE
        assert 0.2 <= time.monotonic() - began < REBIND_S


def test_an_address_of_another_machine_is_an_error_at_once() -> None:
    with zmq.Context() as context, router(context, 0) as socket:
        began = time.monotonic()
        with pytest.raises(zmq.ZMQError):
            bind_tcp(socket, "192.0.2.1", 20_000)
        assert time.monotonic() - began < REBIND_S / 2
