"""Receiving wlogs from storages: checks at the door, conversion while the rest still comes, acknowledgement last.

A storage that is refused tries its next proxy, so refusals are cheap and name their reason. What is acknowledged
is durable, in the sets of all archives, and the volume is ready for the next wlog.
Source: docs/proxy.md, Receiving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Env, Pool
from walbd.daemon.pipeline import Pipeline
from walbd.errors import Busy, DiskFull, Refused
from walbd.format.meta import Diff
from walbd.format.superblock import PBS_VALUES
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import Kind, Ok
from walbd.protocol.transfer import WlogAccepted, WlogChunk, WlogEnd, WlogOffer
from walbd.proxy.config import ProxyConfig
from walbd.proxy.convert import WlogConverter
from walbd.proxy.states import Command, nothing_to_save
from walbd.proxy.volume import Volume

log = structlog.get_logger()

FP_BEFORE_ACK: Final = failpoints.register(
    "proxy.wdiff.before_ack", "a wdiff for all archives that the storage does not know of: it sends the log again"
)


class Receiver:
    """Serves wlog transfers."""

    def __init__(
        self,
        env: Env,
        config: Callable[[], ProxyConfig],
        find: Callable[[str], Volume],
        received: Callable[[Volume], None],
    ) -> None:
        """`config()` is what counts now; `find(name)` returns a volume, a Clear one for an unknown name;
        `received(volume)` queues its sends."""
        self._env = env
        self._config = config
        self._find = find
        self._received = received
        self._promised_b: list[int] = []  # log that may still come, for each reception

    @property
    def running(self) -> int:
        """How many wlogs are being received."""
        return len(self._promised_b)

    async def serve(self, conn: Connection, offer: WlogOffer) -> Ok:
        """Conduct one transfer; the Ok that is returned is the acknowledgement."""
        if conn.peer.kind is not Kind.STORAGE:
            raise Refused("wlogs are taken from storages only", peer=conn.peer.node, kind=str(conn.peer.kind))
        if offer.pbs not in PBS_VALUES:
            raise Refused("no log has this size of physical blocks", pbs=offer.pbs, known=str(PBS_VALUES))
        volume = self._find(offer.volume)
        with self._slot(offer.log_max_pb * offer.pbs):
            await self._check_space()
            volume.check(Command.RECEIVE)
            try:
                async with volume.machine.transition(Command.RECEIVE, nothing_to_save):
                    await volume.unless_forced(self._receive(conn, offer, volume))
            finally:
                self._received(volume)  # also after a failure: what has its name is linked by the next send
        # The volume can take the next wlog now; the storage may send it as soon as it has the acknowledgement.
        with disk_errors(volume.received_path, "acknowledge"):
            failpoints.hit(FP_BEFORE_ACK)
        return Ok()

    @contextmanager
    def _slot(self, promised_b: int) -> Iterator[None]:
        if self.running >= self._config().receives_max:
            raise Busy(
                "too many wlogs are being received",
                hint="try another proxy, or later",
                receives_max=self._config().receives_max,
            )
        self._promised_b.append(promised_b)
        try:
            yield
        finally:
            self._promised_b.remove(promised_b)

    async def _check_space(self) -> None:
        """Raise DiskFull unless all the log that was promised would fit, even if nothing of it can be packed."""
        base = Path(self._config().base_dir)
        free_b = await self._env.pools.run(Pool.RECORD, self._env.fs.free_b, base)
        wanted_b = sum(self._promised_b) + self._config().free_reserve_b
        if free_b < wanted_b:
            raise DiskFull(
                "there is not enough space for the wlog",
                hint="free space on the disk of the proxy; wdiffs wait there for archives that do not take them",
                path=str(base),
                free_b=free_b,
                wanted_b=wanted_b,
            )

    async def _receive(self, conn: Connection, offer: WlogOffer, volume: Volume) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        source = f"wlog of {offer.volume} from {conn.peer.node}"
        converter = WlogConverter(self._env.fs, volume.received_path, offer, source)
        try:
            await self._env.pools.run(Pool.RECEIVE, converter.begin)
            await conn.send(WlogAccepted())
            end = await self._convert(conn, converter)
            stored = await with_filler(conn, self._commit(converter, end, offer, volume))
        finally:
            await self._env.pools.run(Pool.RECEIVE, converter.close)
        log.info(
            "wlog.received",
            volume=volume.name,
            diff=str(stored),
            lsid=offer.lsid,
            lsid_end=converter.lsid,
            packs=converter.n_packs,
            wlog_b=converter.wlog_b,
            wdiff_b=stored.size_b,
            elapsed_s=round(loop.time() - started, 3),
        )

    async def _convert(self, conn: Connection, converter: WlogConverter) -> WlogEnd:
        """Take chunks until the end; one is converted while the next one comes, and no more are held."""
        async with Pipeline(0) as pipeline:
            while True:
                message, payload = await conn.receive()
                if isinstance(message, WlogEnd) and not payload:
                    await pipeline.drain()
                    return message
                if not isinstance(message, WlogChunk):
                    raise conn.unexpected(message, WlogChunk, WlogEnd)
                work = self._env.pools.run(Pool.RECEIVE, converter.add, message, payload)
                await pipeline.push(work, len(payload))

    async def _commit(self, converter: WlogConverter, end: WlogEnd, offer: WlogOffer, volume: Volume) -> Diff:
        await self._env.pools.run(Pool.RECEIVE, converter.finish, end)
        return await volume.commit_receipt(converter, end.diff, offer.size_lb)
