"""Sending a sorted wdiff that is made while it goes: from proxies to archives, and from archive to archive.

Source: docs/protocol.md, "Transfers".
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, Final, TypeVar

from walbd.daemon.conn import Connection
from walbd.daemon.copying import LAST_WORDS_S, Tick, nothing
from walbd.daemon.env import Pool, Pools
from walbd.daemon.flow import cancel_all
from walbd.errors import ConnectError, CorruptData, TimedOut
from walbd.protocol.base import End, Ok
from walbd.protocol.transfer import WdiffChunk
from walbd.units import MIB

_CHUNK_B: Final = 1 * MIB  # packs are gathered up to this before they are sent
_FOREVER_S: Final = 365 * 86400.0

T = TypeVar("T")


async def send_wdiff(conn: Connection, pools: Pools, pieces: Iterator[bytes], *, tick: Tick = nothing) -> int:
    """Send the pieces of a wdiff, and End; return their size [byte] once the receiver has it durably.

    `pieces` (walbd.format.wdiff_merge.merge) is run in threads, a little ahead; nothing of it runs any more on
    return. An error of the receiver is raised as soon as it comes. The receiver is told of damaged data.
    """
    try:
        return await until_ok(conn, _send(conn, pools, pieces, tick))
    except CorruptData as exc:
        await conn.send_error(exc)
        raise


async def _send(conn: Connection, pools: Pools, pieces: Iterator[bytes], tick: Tick) -> int:
    size_b = 0
    ahead = asyncio.ensure_future(pools.run(Pool.SEND, gather_pieces, pieces))
    try:
        while parts := await ahead:
            ahead = asyncio.ensure_future(pools.run(Pool.SEND, gather_pieces, pieces))
            await conn.send(WdiffChunk(), *parts)
            size_b += sum(map(len, parts))
            tick(size_b)
        await conn.send(End())
    finally:
        await cancel_all([ahead])  # the files are in use until then
    return size_b


async def until_ok(conn: Connection, sending: Coroutine[Any, Any, T]) -> T:
    """Return the result of `sending`, which sends a stream with its End, once the receiver has answered Ok.

    An error of the receiver ends the sending at once, instead of after all of it has gone. An Ok before End is
    none; after it, it may be here before `sending` has returned.
    """
    answer = asyncio.ensure_future(conn.expect(Ok, timeout_s=_FOREVER_S))
    work = asyncio.ensure_future(sending)
    try:
        await asyncio.wait({answer, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            answer.result()
            if conn.sent is not End:
                raise conn.unexpected(Ok())
            await asyncio.wait({work})
        if isinstance(work.exception(), ConnectError | TimedOut):
            await asyncio.wait({answer}, timeout=LAST_WORDS_S)
            if answer.done():
                answer.result()  # why the receiver hung up, if it said so
        result = work.result()
        if not answer.done():
            answer.cancel()  # to begin again, with a deadline; what has arrived is not lost
            await asyncio.wait({answer})
        await (conn.expect(Ok) if answer.cancelled() else answer)
        return result
    finally:
        await cancel_all([answer, work])


def gather_pieces(pieces: Iterator[bytes]) -> list[bytes]:
    """Take pieces until they come to a good size for one message; none: the end. Blocking."""
    taken, size_b = [], 0
    for piece in pieces:
        taken.append(piece)
        size_b += len(piece)
        if size_b >= _CHUNK_B:
            break
    return taken
