"""Sending a sorted wdiff that is made while it goes: from proxies to archives, and from archive to archive.

Source: docs/protocol.md, "Transfers".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from walbd.daemon.conn import Connection
from walbd.daemon.copying import Tick, nothing
from walbd.daemon.env import Pool, Pools
from walbd.errors import CorruptData
from walbd.protocol.base import End, Ok
from walbd.protocol.transfer import WdiffChunk
from walbd.units import MIB

_CHUNK_B: Final = 1 * MIB  # packs are gathered up to this before they are sent
_FOREVER_S: Final = 365 * 86400.0


async def send_wdiff(conn: Connection, pools: Pools, pieces: Iterator[bytes], *, tick: Tick = nothing) -> int:
    """Send the pieces of a wdiff, and End; return their size [byte] once the receiver has it durably.

    `pieces` (walbd.format.wdiff_merge.merge) is run in threads, a little ahead; nothing of it runs any more on
    return. An error of the receiver is raised as soon as it comes. The receiver is told of damaged data.
    """
    size_b = 0
    ahead = asyncio.ensure_future(pools.run(Pool.SEND, gather_pieces, pieces))
    # An error of the receiver must be seen while we send, not after all of it has gone.
    answer = asyncio.ensure_future(conn.expect(Ok, timeout_s=_FOREVER_S))
    try:
        while parts := await ahead:
            ahead = asyncio.ensure_future(pools.run(Pool.SEND, gather_pieces, pieces))
            await conn.send(WdiffChunk(), *parts)
            size_b += sum(map(len, parts))
            tick(size_b)
            if answer.done():
                await answer
                raise conn.unexpected(Ok())
        await conn.send(End())
        if not answer.done():
            answer.cancel()  # to begin again, with a deadline; what has arrived is not lost
            await asyncio.wait({answer})
        await (conn.expect(Ok) if answer.cancelled() else answer)
    except CorruptData as exc:
        await conn.send_error(exc)
        raise
    finally:
        answer.cancel()
        await asyncio.wait({answer, ahead})  # the files are in use until then
        for task in (answer, ahead):
            if not task.cancelled():
                task.exception()  # seen
    return size_b


def gather_pieces(pieces: Iterator[bytes]) -> list[bytes]:
    """Take pieces until they come to a good size for one message; none: the end. Blocking."""
    taken, size_b = [], 0
    for piece in pieces:
        taken.append(piece)
        size_b += len(piece)
        if size_b >= _CHUNK_B:
            break
    return taken
