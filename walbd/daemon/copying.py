"""What all copies of whole images between daemons share: where the data comes from, and not falling silent.

Source: docs/protocol.md, "Transfers".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from walbd.daemon.conn import Connection
from walbd.errors import ConnectError, DiskFailed, RemoteError, WalbError
from walbd.ext.buffers import Buf
from walbd.protocol.base import Filler
from walbd.protocol.codec import Message

LAST_WORDS_S: Final = 2.0  # to hear, or to tell, why a copy ends

Read = Callable[[int, int], Awaitable[Buf]]
"""Returns `size_b` bytes from `offset_b` on; several calls may be under way at once."""

Tick = Callable[[int], None]
"""Called on the loop with the bytes done so far; it may raise to give the copy up."""

Spend = Callable[[int, Callable[[], Awaitable[None]]], Awaitable[None]]
"""Returns when so many bytes more may be read; awaits its second argument now and then while it holds back."""


def nothing(_done_b: int) -> None:
    """A `Tick` for a copy that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """An image to be copied."""

    read: Read
    size_b: int
    data_b: int | None = None  # from here on there is nothing to read: zeros up to `size_b`. None: no such part
    tick: Tick = nothing
    spend: Spend | None = None  # None: as fast as it goes

    async def read_all(self, offset_b: int, size_b: int) -> memoryview:
        """Return exactly that range; raises DiskFailed when the image ends inside it."""
        wanted_b = size_b if self.data_b is None else max(min(size_b, self.data_b - offset_b), 0)
        data = await self.read(offset_b, wanted_b) if wanted_b else b""
        if len(data) != wanted_b:
            raise DiskFailed(
                "the volume ended before its size", offset=offset_b, size_b=len(data), expected_b=wanted_b
            )
        if wanted_b == size_b:
            return memoryview(data)
        padded = bytearray(size_b)
        padded[:wanted_b] = data
        return memoryview(padded)

    async def done(self, done_b: int, size_b: int, keep_alive: Callable[[], Awaitable[None]]) -> None:
        """Account for `size_b` bytes that were copied, with which `done_b` are done."""
        self.tick(done_b)
        if self.spend is not None:
            await self.spend(size_b, keep_alive)


@asynccontextmanager
async def heeding(conn: Connection) -> AsyncIterator[None]:
    """When sending fails because the peer has ended the connection, raise what it said last, if it said why."""
    try:
        yield
    except ConnectError:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                while True:
                    await conn.receive()
        except RemoteError:
            raise
        except (TimeoutError, WalbError):
            pass
        raise


async def tell(conn: Connection, error: WalbError) -> None:
    """Tell the peer why a copy ends here, if it still listens; a lost connection would do as well."""
    try:
        async with asyncio.timeout(LAST_WORDS_S):
            await conn.send_error(error)
    except TimeoutError:
        pass


class LiveSender:
    """Sends messages of a long copy, and fillers when it was silent for a while. One task at a time uses it."""

    def __init__(self, conn: Connection) -> None:
        self.payload_b = 0  # sent so far
        self._conn = conn
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()

    @property
    def quiet_max_s(self) -> float:
        """How long to be silent at most; the peer's patience is a multiple of it."""
        return self._conn.io_timeout_s / 4

    @property
    def is_silent(self) -> bool:
        """Nothing was sent for so long that the peer should be told that we are still there."""
        return self._loop.time() - self._sent_at >= self.quiet_max_s

    async def send(self, message: Message, *payload: Buf) -> None:
        """Send a message and its payload."""
        await self._conn.send(message, *payload)
        self._sent_at = self._loop.time()
        self.payload_b += sum(len(part) for part in payload)

    async def keep_alive(self) -> None:
        """Send a filler if it was silent for too long."""
        if self.is_silent:
            await self.send(Filler())
