"""Sending one stretch of log to a proxy: offer, packs, label, acknowledgement.

Nothing durable changes here. What the acknowledgement means for `done` is the caller's to record, and only then
may the log below it be erased. Source: docs/storage.md, "Sending log".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import structlog

from walbd.daemon.conn import Connection, dial
from walbd.daemon.flow import ahead
from walbd.daemon.logs import error_fields
from walbd.daemon.net import Address
from walbd.daemon.scheduler import ASK_AGAIN_S
from walbd.errors import ConnectError, CorruptData, Refused, TimedOut, WalbError
from walbd.format.meta import LogPoint, Transfer, point_after, transfer_diff
from walbd.fs import failpoints
from walbd.ids import Lsid
from walbd.protocol.base import Kind
from walbd.protocol.transfer import Packing, WlogChunk, WlogEnd, WlogOffer
from walbd.storage.device.interface import Device, DeviceInfo
from walbd.storage.logread import LogSource, pack_runs
from walbd.storage.proxies import Proxies
from walbd.storage.shared import Shared, hit

log = structlog.get_logger()

RUNS_AHEAD: Final = 2  # packed and waiting for the socket
END_PATIENCE: Final = 2  # times `io_timeout_s`, for a proxy to make a stretch durable while others are there

FP_BEFORE_END: Final = failpoints.register(
    "storage.transfer.before_end", "a transfer that the proxy throws away, as its end never came"
)
FP_AFTER_ACK: Final = failpoints.register(
    "storage.transfer.after_ack", "log that a proxy has and that will be sent again"
)


@dataclass(frozen=True, slots=True)
class Sent:
    """An acknowledged stretch."""

    done: LogPoint  # what everything is delivered up to now
    size_b: int  # of the log
    wire_b: int  # as sent


async def send_stretch(
    shared: Shared,
    proxies: Proxies,
    device: Device,
    *,
    volume: str,
    path: str,
    info: DeviceInfo,
    transfer: Transfer,
    before_partial: Callable[[int], Awaitable[None]],
    known: str = "",
) -> Sent:
    """Send the whole packs of a planned stretch to the best proxy that takes them; it has them durably on return.

    `before_partial(lsid)` is awaited before the end of a stretch that stops short of its snapshot is sent.
    `known`: the error of the attempt before, of which nothing needs to be logged again.
    Raises ConnectError or Refused when no proxy takes it, CorruptData for a damaged log, and what breaks the
    connection. Cutting it short is safe at every point: the proxy then drops what it has, or has it all.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    offer = WlogOffer(
        volume=volume,
        uuid=info.uuid,
        pbs=info.pbs,
        salt=info.salt,
        size_lb=info.size_lb,
        lsid=transfer.begin.lsid,
        log_max_pb=transfer.limit - transfer.begin.lsid,
    )
    stack, conn, tried = await _connect(shared, proxies, offer, known)
    address = tried[-1]
    async with stack:
        try:
            lsid_end, wire_b = await _send_packs(shared, conn, device, path, info, transfer)
            diff = transfer_diff(transfer, lsid_end)
            if lsid_end != transfer.end.lsid:
                await before_partial(lsid_end)
            hit(FP_BEFORE_END, shared.directory(volume))
            await _finish(proxies, conn, tried, WlogEnd(lsid=lsid_end, diff=diff))
        except (ConnectError, TimedOut):
            proxies.suspect(address)
            raise
        except (CorruptData, Refused) as exc:
            await conn.send_error(exc)
            raise
    hit(FP_AFTER_ACK, shared.directory(volume))
    size_b = (lsid_end - transfer.begin.lsid) * info.pbs
    log.info(
        "wlog.sent",
        volume=volume,
        proxy=conn.peer.node,
        lsid_begin=transfer.begin.lsid,
        lsid_end=lsid_end,
        diff=str(diff),
        size_b=size_b,
        wire_b=wire_b,
        elapsed_s=round(loop.time() - began, 3),
    )
    return Sent(point_after(transfer, lsid_end), size_b, wire_b)


async def _finish(proxies: Proxies, conn: Connection, tried: Sequence[Address], end: WlogEnd) -> None:
    """Send the end, and return when the proxy, the last of those that were tried, has all of it durably.

    A proxy whose disk hangs says for ever that it is at work. If there are others, it is given up after some time,
    and avoided for a while. One that is the only one, or the only one to take the log, is waited for: to begin
    anew would not help.
    """
    limit_s = END_PATIENCE * conn.io_timeout_s if proxies.has_others(tried) else None
    try:
        async with asyncio.timeout(limit_s):
            await conn.call(end)
    except TimeoutError as exc:
        proxies.avoid(tried[-1])
        raise TimedOut(
            "the proxy does not come to an end with the log", proxy=str(tried[-1]), timeout_s=limit_s
        ) from exc


async def _connect(
    shared: Shared, proxies: Proxies, offer: WlogOffer, known: str = ""
) -> tuple[AsyncExitStack, Connection, list[Address]]:
    """Connect to the first proxy, in the order of the configuration, that is there and accepts the offer.

    Leaving the returned stack closes the connection. Returns also those that were tried: the last has accepted.
    """
    problems: list[tuple[Address, WalbError]] = []
    tried: list[Address] = []
    for address in proxies.available():
        tried.append(address)
        async with AsyncExitStack() as stack:
            try:
                conn = await stack.enter_async_context(dial(shared.env, shared.me, address))
                if conn.peer.kind is not Kind.PROXY:
                    raise Refused("the server is no proxy", kind=str(conn.peer.kind))
                await conn.call(offer, timeout_s=min(shared.me.connect_timeout_s, shared.me.io_timeout_s))
                return stack.pop_all(), conn, tried
            except WalbError as exc:
                if isinstance(exc, ConnectError | TimedOut):
                    proxies.suspect(address)
                tell = log.debug if str(exc) in known else log.info  # it is tried every few seconds, for ever
                tell("wlog.refused", volume=offer.volume, proxy=str(address), **error_fields(exc))
                problems.append((address, exc))
    if not problems:
        raise ConnectError("no proxy is available", hint="see the status of the storage for each proxy")
    reasons = "; ".join(f"{address}: {exc}" for address, exc in problems)
    if all(isinstance(exc, ConnectError | TimedOut) for _, exc in problems):
        raise ConnectError("no proxy can be reached", reasons=reasons)
    refused = Refused("no proxy takes the log", hint="see the status of the proxies", reasons=reasons)
    refused.retry_max_s = ASK_AGAIN_S
    raise refused


async def _send_packs(
    shared: Shared, conn: Connection, device: Device, path: str, info: DeviceInfo, transfer: Transfer
) -> tuple[Lsid, int]:
    """Send all whole packs of the stretch; return where they end and how many bytes went out."""
    begin, limit = transfer.begin.lsid, transfer.limit
    lsid_end, wire_b = begin, 0
    if begin < limit:
        reader = await device.open_log()
        try:
            source = LogSource(
                reader=reader,
                path=path,
                pbs=info.pbs,
                salt=info.salt,
                packing=Packing(shared.config.wlog_packing),
            )
            runs = pack_runs(source, begin, limit, shared.env.pools)
            async with ahead(runs, depth=RUNS_AHEAD) as ready:
                async for run in ready:
                    await conn.send(WlogChunk(lsid=run.lsid, size_b=run.size_b, packing=run.packing), run.payload)
                    lsid_end, wire_b = run.lsid_end, wire_b + len(run.payload)
        finally:
            reader.close()
    if limit == transfer.end.lsid and lsid_end < limit:
        raise CorruptData(
            "a log pack reaches beyond the place of a snapshot",
            hint="reset the volume, then run a hash or full backup",
            path=path,
            offset=lsid_end * info.pbs,
            lsid=lsid_end,
            snapshot_lsid=limit,
        )
    return lsid_end, wire_b
