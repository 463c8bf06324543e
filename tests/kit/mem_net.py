"""A network in memory: frames handed over between tasks of one loop, so that it works on virtual time.

Connections can be refused (nobody listens) and addresses can be cut off: then connecting hangs, as it does
behind a broken switch. A server can be paused, as by SIGSTOP: connecting works, and nothing more. And connections
can go half open: whatever is sent from then on is lost, and neither side is told.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence

from walbd.daemon.net import Accept, Address, Listener
from walbd.daemon.tasks import Signal
from walbd.errors import ConnectError
from walbd.fs import Buf
from walbd.protocol.frame import HELLO_LIMITS, Frame, FrameLimits, encode_prefix


class MemStream:
    """One end of a connection (`walbd.daemon.net.FrameStream`)."""

    def __init__(self, peer: str, held: Callable[[], bool]) -> None:
        """`held()`: nothing arrives now."""
        self._held = held
        self.limits: FrameLimits = HELLO_LIMITS
        self.peer = peer
        self.other: MemStream | None = None
        self._frames: deque[Frame] = deque()
        self._eof = False  # the other end has closed
        self._broken = False
        self._closed = False  # we have closed
        self._changed = Signal()

    async def send(self, header: bytes, payload: Sequence[Buf] = ()) -> None:
        other = self.other
        data = b"".join(bytes(part) for part in payload)
        encode_prefix(len(header), len(data), self.limits)
        if other is None or self._broken or self._closed or other._closed:
            raise ConnectError("the connection was lost", peer=self.peer)
        other._frames.append(Frame(header, memoryview(data)))
        other._changed.set()
        await asyncio.sleep(0)

    async def receive(self) -> Frame | None:
        await self._changed.wait_for(
            lambda: self._closed or (not self._held() and (bool(self._frames) or self._eof or self._broken))
        )
        if self._broken or self._closed:
            raise ConnectError("the connection was lost", peer=self.peer)
        return self._frames.popleft() if self._frames else None

    async def close(self) -> None:
        self._finish(broken=False)

    def abort(self) -> None:
        if not self._closed:
            self._finish(broken=True)

    def look_again(self) -> None:
        self._changed.set()

    def _finish(self, *, broken: bool) -> None:
        self._closed = True
        self._changed.set()
        if self.other is not None:
            self.other._eof = True
            self.other._broken = self.other._broken or broken
            self.other._changed.set()


class MemNetwork:
    """All addresses of a test (`walbd.daemon.net.Network`)."""

    def __init__(self) -> None:
        self.cut_off: set[Address] = set()
        self._listening: dict[Address, Accept] = {}
        self._next_port = 40000
        self.connects: list[Address] = []
        self.paused: set[Address] = set()
        self._half_open: set[MemStream] = set()
        self._streams: list[tuple[Address, MemStream]] = []

    async def connect(self, address: Address, tls: ssl.SSLContext | None = None) -> MemStream:
        self.connects.append(address)
        await asyncio.sleep(0)
        if address in self.cut_off:
            await asyncio.get_running_loop().create_future()
        accept = self._listening.get(address)
        if accept is None:
            raise ConnectError("cannot connect", address=str(address), reason="Connection refused")

        def held() -> bool:
            return address in self.paused or here in self._half_open

        here, there = MemStream(str(address), held), MemStream("client", held)
        here.other, there.other = there, here
        self._streams += [(address, here), (address, there)]
        accept(there)
        return here

    async def listen(self, address: Address, accept: Accept, tls: ssl.SSLContext | None = None) -> Listener:
        if not address.port:
            self._next_port += 1
            address = Address(host=address.host, port=self._next_port)
        if address in self._listening:
            raise ConnectError("cannot listen", address=str(address), reason="Address already in use")
        self._listening[address] = accept
        return MemListener(self, address)

    def resume(self, address: Address) -> None:
        """End a pause: what was sent meanwhile arrives."""
        self.paused.discard(address)
        for at, stream in self._streams:
            if at == address:
                stream.look_again()

    def lose(self, address: Address) -> None:
        """Make all connections to a server that exist now half open, for ever."""
        self._half_open |= {stream for at, stream in self._streams if at == address}

    def forget(self, address: Address) -> None:
        self._listening.pop(address, None)


class MemListener:
    def __init__(self, net: MemNetwork, address: Address) -> None:
        self.address = address
        self._net = net

    def close(self) -> None:
        self._net.forget(self.address)
