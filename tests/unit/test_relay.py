"""The relay of tests: what is done to a link happens to its bytes, and only then."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.kit.process import wait_until
from tests.kit.relay import Link, Relay

DATA = bytes(range(256)) * 4096  # 1 MiB


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(sock,), daemon=True))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(65536):
                    sock.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def link() -> Iterator[Link]:
    echo = Echo()
    with Relay() as relay:
        yield relay.link("test", echo.address)
    echo.close()


def connect(link: Link) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", link.port))
    sock.settimeout(10)
    return sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send everything and return what came back until the end or a reset."""
    got = bytearray()

    def receive() -> None:
        try:
            while len(got) < len(data) and (piece := sock.recv(65536)):
                got.extend(piece)
        except OSError:
            pass

    reader = threading.Thread(target=receive)
    reader.start()
    try:
        sock.sendall(data)
    except OSError:
        pass
    reader.join(10)
    return bytes(got)


def test_passes_everything_on_and_counts(link: Link) -> None:
    with connect(link) as sock:
        assert exchange(sock, DATA) == DATA
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert (link.sent_b, link.received_b, link.connections) == (len(DATA), len(DATA), 1)


def test_cut_and_healed(link: Link) -> None:
    with connect(link) as sock:
        assert exchange(sock, b"before") == b"before"
        link.cut()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        with connect(link) as another, pytest.raises(ConnectionResetError):
            another.recv(1)
    link.heal()
    with connect(link) as sock:
        assert exchange(sock, b"after") == b"after"


def test_cut_after_so_many_bytes(link: Link) -> None:
    link.cut_after(100_000)
    with connect(link) as sock:
        assert DATA.startswith(exchange(sock, DATA))
    assert link.is_cut
    assert link.sent_b == 100_000


def test_one_bit_is_flipped(link: Link) -> None:
    link.corrupt(70_000)
    link.corrupt(5, "back")
    with connect(link) as sock:
        got = exchange(sock, DATA)
    assert [at for at in range(len(DATA)) if got[at] != DATA[at]] == [5, 70_000]
    with connect(link) as sock:
        assert exchange(sock, DATA) == DATA


def test_a_black_hole_keeps_what_it_has_until_it_is_healed(link: Link) -> None:
    with connect(link) as sock:
        assert exchange(sock, b"before") == b"before"
        link.blackhole()
        sock.sendall(b"into the dark")
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        link.heal()
        sock.settimeout(10)
        assert sock.recv(100) == b"into the dark"


def test_delay_and_rate_change_no_byte(link: Link) -> None:
    link.delay(0.01)
    link.rate(20e6)
    with connect(link) as sock:
        assert exchange(sock, DATA) == DATA


def test_nobody_behind_it(link: Link) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        link.target = unused.getsockname()
    with connect(link) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)
    wait_until(lambda: link.connections == 1, "the connection to be counted")


def test_silent_after_so_many_bytes_and_going_on_until_it_is_cut(link: Link) -> None:
    link.stall_after(100_000)
    with connect(link) as sock:
        sender = threading.Thread(target=exchange, args=(sock, DATA))
        sender.start()
        wait_until(lambda: link.is_silent, "the link to fall silent")
        assert link.sent_b >= 100_000
        assert (link.is_silent, link.is_cut) == (True, False)
        link.cut()
        sender.join(10)
    link.cut_after(1000)
    link.resume()  # what is to come stays
    sent = link.sent_b
    with connect(link) as sock:
        exchange(sock, DATA)
    assert link.is_cut
    assert link.sent_b == sent + 1000
