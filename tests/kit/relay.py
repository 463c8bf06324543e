"""TCP relays between daemons, so that a test can do to each link what networks do.

    with Relay() as relay:
        link = relay.link("s0>p0", ("127.0.0.1", 5001))   # listens on link.port, forwards to 5001
        link.cut_after(100_000)                           # let so many more bytes through, then reset
        ...
        link.heal()

One thread with an event loop serves all links of a `Relay`. Each link counts the bytes that it has passed on. All
methods may be called from any thread and have acted when they return.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, Self, TypeVar

Direction = Literal["out", "back"]  # from the side that connects, or to it
T = TypeVar("T")

_PIECE_B: Final = 256 << 10
_QUEUE: Final = 16  # pieces that wait in a delayed link
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Link:
    """One address that is relayed to another. It begins healthy.

    `sent_b` and `received_b` count what has passed since the beginning, seen from the side that connects.
    """

    def __init__(self, relay: Relay, name: str, target: tuple[str, int]) -> None:
        self.name = name
        self.target = target
        self.sent_b = 0
        self.received_b = 0
        self.connections = 0
        self._relay = relay
        self._is_cut = False
        self._open = asyncio.Event()
        self._open.set()
        self._delay_s = 0.0
        self._rate_b = 0.0  # [byte/s], 0: no limit
        self._cut_in: dict[Direction, int] = {}  # bytes that still pass before the link is cut
        self._stall_in: int | None = None  # bytes out that still pass before nothing does
        self._flip_in: dict[Direction, list[int]] = {"out": [], "back": []}  # bytes that pass before a flipped bit
        self._sockets: set[socket.socket] = set()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]

    @property
    def address(self) -> str:
        """Where to connect instead of the target."""
        return f"127.0.0.1:{self.port}"

    # What can be done to it

    def cut(self) -> None:
        """Reset all connections, and every new one, until `heal`."""
        self._relay.run(self._cut)

    def reset(self) -> None:
        """Reset all connections; new ones are served."""
        self._relay.run(self._reset)

    def blackhole(self) -> None:
        """Pass nothing on any more, in either direction, and close nothing, until `heal`."""
        self._relay.run(self._open.clear)

    def resume(self) -> None:
        """End `cut` and `blackhole`. What is to happen after some bytes stays, if it was asked for since then."""
        self._relay.run(self._resume)

    def heal(self) -> None:
        """End everything that was done to the link."""
        self._relay.run(self._heal)

    def delay(self, seconds: float) -> None:
        """Let every byte of connections made from now on arrive so much later."""
        self._relay.run(lambda: setattr(self, "_delay_s", seconds))

    def rate(self, bytes_per_s: float) -> None:
        """Limit the speed of each connection and direction; 0: no limit."""
        self._relay.run(lambda: setattr(self, "_rate_b", bytes_per_s))

    def cut_after(self, size_b: int, direction: Direction = "out") -> None:
        """Pass exactly `size_b` more bytes in that direction, then cut."""
        self._relay.run(lambda: self._cut_in.update({direction: size_b}))

    def stall_after(self, size_b: int) -> None:
        """Pass that many more bytes out, and at most a piece more; then nothing any more, as `blackhole` does."""
        self._relay.run(lambda: setattr(self, "_stall_in", size_b))

    def corrupt(self, after_b: int, direction: Direction = "out") -> None:
        """Flip one bit of the byte that comes when `after_b` more bytes have passed in that direction."""
        self._relay.run(lambda: self._flip_in[direction].append(after_b))

    @property
    def is_cut(self) -> bool:
        return self._is_cut

    @property
    def is_silent(self) -> bool:
        return not self._open.is_set()

    # On the loop

    def _cut(self) -> None:
        self._is_cut = True
        self._cut_in.clear()
        self._reset()

    def _reset(self) -> None:
        for sock in list(self._sockets):
            self._close(sock)

    def _resume(self) -> None:
        self._is_cut = False
        self._open.set()

    def _heal(self) -> None:
        self._resume()
        self._delay_s = self._rate_b = 0.0
        self._cut_in.clear()
        self._stall_in = None
        for flips in self._flip_in.values():
            flips.clear()

    def _close(self, sock: socket.socket, *, reset: bool = True) -> None:
        """Close a socket, and end whoever waits for it on the loop."""
        self._sockets.discard(sock)
        if sock.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(sock)
            loop.remove_writer(sock)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
        for task in [task for task, ends in self._relay.pumps.items() if sock in ends]:
            task.cancel()

    async def serve(self) -> None:
        """Accept connections for ever."""
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._listener)
            client.setblocking(False)
            self.connections += 1
            if self._is_cut:
                self._close(client)
                continue
            self._relay.spawn(self._connect(client), (client,))

    async def _connect(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._sockets.add(client)
        server = socket.socket()
        server.setblocking(False)
        try:
            await self._open.wait()
            await loop.sock_connect(server, self.target)
        except (OSError, asyncio.CancelledError):
            server.close()
            self._close(client)
            return
        self._sockets.add(server)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ends = (client, server)
        done: list[Direction] = []
        self._relay.spawn(self._pump(client, server, "out", done), ends)
        self._relay.spawn(self._pump(server, client, "back", done), ends)

    async def _pump(self, src: socket.socket, dst: socket.socket, way: Direction, done: list[Direction]) -> None:
        """Pass one direction of a connection on, until its end."""
        try:
            if self._delay_s:
                await self._pump_delayed(src, dst, way)
            else:
                while await self._forward(await self._take(src), dst, way):
                    pass
        except OSError:
            self._close(src)
            self._close(dst)
            return
        done.append(way)
        if len(done) == 2:
            self._close(src, reset=False)
            self._close(dst, reset=False)

    async def _pump_delayed(self, src: socket.socket, dst: socket.socket, way: Direction) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE)

        async def read() -> None:
            data = b"?"
            while data:
                data = await self._take(src)
                await waiting.put((loop.time() + self._delay_s, data))

        async def write() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not await self._forward(data, dst, way):
                    return

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read())
                tasks.create_task(write())
        except* OSError as group:
            raise OSError(str(group)) from group

    async def _take(self, src: socket.socket) -> bytes:
        rate = self._rate_b
        return await asyncio.get_running_loop().sock_recv(src, max(1, min(_PIECE_B, int(rate / 20) or _PIECE_B)))

    async def _forward(self, data: bytes, dst: socket.socket, way: Direction) -> bool:
        """Pass a piece on; return whether more may come."""
        loop = asyncio.get_running_loop()
        await self._open.wait()
        if not data:
            dst.shutdown(socket.SHUT_WR)
            return False
        left = self._cut_in.get(way)
        if left is not None:
            data = data[:left]
            self._cut_in[way] = left - len(data)
        await loop.sock_sendall(dst, self._flipped(data, way))
        if way == "out":
            self.sent_b += len(data)
            if self._stall_in is not None:
                self._stall_in -= len(data)
                if self._stall_in <= 0:
                    self._open.clear()
        else:
            self.received_b += len(data)
        if self._cut_in.get(way) == 0:
            self._cut()
            return False
        if self._rate_b:
            await asyncio.sleep(len(data) / self._rate_b)
        return True

    def _flipped(self, data: bytes, way: Direction) -> bytes:
        flips = self._flip_in[way]
        if not flips:
            return data
        here = [at for at in flips if at < len(data)]
        self._flip_in[way] = [at - len(data) for at in flips if at >= len(data)]
        changed = bytearray(data)
        for at in here:
            changed[at] ^= 0x10
        return bytes(changed)

    def close_all(self) -> None:
        self._reset()
        self._listener.close()


class Relay:
    """A thread that serves links."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.pumps: dict[asyncio.Task[None], tuple[socket.socket, ...]] = {}
        self._links: list[Link] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def link(self, name: str, target: tuple[str, int]) -> Link:
        """Make a link to an address."""

        def make() -> Link:
            link = Link(self, name, target)
            self._links.append(link)
            self.spawn(link.serve(), ())
            return link

        return self.run(make)

    def close(self) -> None:
        """Reset everything and end the thread."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            tasks = list(self.pumps)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for link in self._links:
                link.close_all()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, step: Callable[[], T]) -> T:
        """Call a function on the loop and return what it returns."""

        async def on_loop() -> T:
            return step()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()

    def spawn(self, work: object, ends: tuple[socket.socket, ...]) -> None:
        """Run a task that is cancelled when one of its sockets is closed."""
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]
        self.pumps[task] = ends
        task.add_done_callback(lambda done: self.pumps.pop(done, None) and None)
