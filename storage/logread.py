"""Reading a stretch of log for sending: in large pieces, ahead of the sender, verified, cut into whole packs.

Each piece is scanned by one call into `walbd.ext` and packed in the same thread, so that Python touches the log
once per piece. Source: docs/storage.md, "Reading the log".
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from walbd.daemon.env import Pool, Pools
from walbd.daemon.flow import in_order
from walbd.daemon.packing import pack_bytes
from walbd.errors import CorruptData, Refused
from walbd.ext.buffers import Buf
from walbd.ext.logpack import Stop, scan
from walbd.format.logpack import FAULT_TEXT
from walbd.ids import Lsid
from walbd.protocol.transfer import Packing
from walbd.storage.device.interface import LogReader
from walbd.units import MIB

PIECE_B: Final = 2 * MIB
READS_AHEAD: Final = 3
CHUNK_MAX_B: Final = 60 * MIB  # of one message; the frame's payload ends at 64 MiB


class BadLog(CorruptData):
    """The log of a device is not what it should be; carries the block in trouble."""

    def __init__(self, message: str, *, hint: str = "", block: bytes, lsid: int, **facts: object) -> None:
        super().__init__(message, hint=hint, lsid=lsid, **facts)
        self.block = block
        self.lsid = lsid


@dataclass(frozen=True, slots=True)
class PackRun:
    """Whole, verified packs [lsid, lsid_end), packed for the wire."""

    lsid: Lsid
    lsid_end: Lsid
    size_b: int  # unpacked
    packing: Packing
    payload: Buf


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSource:
    """Where a log is read from, and how it is made."""

    reader: LogReader
    path: str  # of the device, for errors
    pbs: int
    salt: int
    packing: Packing
    piece_b: int = PIECE_B


async def pack_runs(source: LogSource, begin: int, limit: int, pools: Pools) -> AsyncGenerator[PackRun, None]:
    """Yield the packs from the pack boundary `begin` on that end at or below `limit`, in order.

    What is left below `limit` is the beginning of a pack that ends above it. Raises BadLog when a pack is not
    whole and valid, Refused when one is too large for a message, and what the reader raises.
    """
    piece_pb = max(source.piece_b // source.pbs, 1)
    pieces = ((lsid, min(piece_pb, limit - lsid)) for lsid in range(begin, limit, piece_pb))

    async def read(piece: tuple[int, int]) -> memoryview:
        lsid, n_pb = piece
        data = await source.reader.read(lsid, n_pb)
        if len(data) != n_pb * source.pbs:
            raise CorruptData(
                "the log device ended inside the log", path=source.path, offset=lsid * source.pbs, lsid=lsid
            )
        return data

    lsid, held, need_b = Lsid(begin), list[Buf](), source.pbs
    async with in_order(pieces, read, depth=READS_AHEAD) as read_pieces:
        async for data in read_pieces:
            held.append(data)
            if sum(map(len, held)) < need_b:
                continue
            run, rest, need_b = await pools.run(Pool.SEND, partial(_pack, source, lsid, held))
            held = [rest] if rest else []
            if run is not None:
                yield run
                lsid = run.lsid_end


def _pack(source: LogSource, lsid: Lsid, held: Sequence[Buf]) -> tuple[PackRun | None, Buf, int]:
    """Verify and pack the whole packs in `held`, which begins at `lsid`; runs in a thread.

    Returns them, the rest of the bytes, and how many bytes from there on make the next pack whole.
    """
    data: Buf = held[0] if len(held) == 1 else b"".join(held)
    found = scan(data, source.pbs, source.salt, lsid)
    if found.stop is not Stop.MORE:
        at = found.trouble_b // source.pbs * source.pbs
        raise BadLog(
            "the log ends where it should go on" if found.stop is Stop.END else FAULT_TEXT[found.fault],
            block=bytes(memoryview(data)[at : at + source.pbs]),
            lsid=lsid + at // source.pbs,
            path=source.path,
            offset=lsid * source.pbs + found.trouble_b,  # [byte] of the endless log
            pack_lsid=found.lsid,
        )
    if found.need_b > CHUNK_MAX_B:
        raise Refused(
            "a log pack is too large to be sent",
            hint="make the device pack less at once; then reset the volume and run a backup",
            lsid=found.lsid,
            size_b=found.need_b,
            size_max_b=CHUNK_MAX_B,
        )
    view = memoryview(data)
    if not found.consumed_b:
        return None, data, found.need_b
    kind, payload = pack_bytes(view[: found.consumed_b], source.packing)
    run = PackRun(lsid, Lsid(found.lsid), found.consumed_b, kind, payload)
    return run, bytes(view[found.consumed_b :]), found.need_b
