"""A proxy in this process, on real sockets and a real directory, and a storage that sends it logs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import lz4.block

from tests.kit.fake_archive import FakeArchive, clean, drop_connections
from tests.kit.logs import Io, build_pack
from tests.kit.mem_net import MemNetwork
from tests.kit.running import Running
from tests.kit.virtual import InlinePools, LoopClock, run
from walbd.daemon.conn import Connection, Me, call, dial
from walbd.daemon.env import Env
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.daemon.net import Address
from walbd.format.meta import Diff
from walbd.protocol.base import JobInfo, Kind, Ok, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.protocol.control import (
    AddArchiveInfo,
    ArchiveInfo,
    GetProxyDiff,
    GetState,
    GetStatus,
    Start,
    Stop,
    StopHow,
    VolumeStatus,
)
from walbd.protocol.transfer import Packing, WlogAccepted, WlogChunk, WlogEnd, WlogOffer
from walbd.proxy.config import ProxyConfig
from walbd.proxy.server import ProxyServer
from walbd.proxy.volume import Hop, Volume

M = TypeVar("M", bound=Message)

VOL = "vol0"
UUID = bytes(range(1, 17))
SALT = 0x1234
CONTROL = Me(node="ctl", kind=Kind.CONTROL, io_timeout_s=20)
STORAGE = Me(node="s0", kind=Kind.STORAGE, io_timeout_s=20)
WAIT_S = 60.0
REAL_DELAYS: dict[str, Any] = {
    "retry_delay_min_s": 1.0,
    "retry_delay_max_s": 30.0,
    "probe_interval_s": 1.0,
    "io_timeout_s": 30.0,
    "connect_timeout_s": 10.0,
}


class ProxyRig:
    """One proxy that can be crashed and started again on the same directory."""

    def __init__(self, base: Path, *, env: Env | None = None, **settings: Any) -> None:
        self.base = base
        self.settings: dict[str, Any] = {
            "node_id": "p0",
            "port": 0,
            "retry_delay_min_s": 0.005,
            "retry_delay_max_s": 0.02,
            "probe_interval_s": 0.01,
            "io_timeout_s": 20.0,
            "free_reserve_b": 0,
        } | settings
        self.env = env or Env()
        self.poll_s = 0.001
        self.shutdown = Shutdown()
        self.server = self._make()
        self._running = Running()

    @property
    def address(self) -> Address:
        return self.server.server.addresses[0]

    @property
    def volume(self) -> Volume:
        return self.server.volumes[VOL]

    def hop(self, archive: str = "a0") -> Hop:
        return self.volume.hop(archive)

    def _make(self) -> ProxyServer:
        return ProxyServer(self.config(), self.env, self.shutdown, read=self.reread)

    async def reread(self) -> ProxyConfig:
        """What a reload finds."""
        return self.config()

    def config(self) -> ProxyConfig:
        """What the settings say now."""
        return ProxyConfig(base_dir=str(self.base), **self.settings)

    async def up(self) -> None:
        """Start; raises what keeps the proxy from starting."""
        self.shutdown = Shutdown()
        self.server = self._make()
        await self._running.up(self.server.start, lambda: drop_connections(self.server.server))

    async def crash(self) -> None:
        """End everything that runs, at whatever place it is, and forget all that is in memory."""
        await self._running.crash()
        self.server.release()

    async def restart(self) -> None:
        await self.crash()
        await self.up()

    async def stop(self, mode: ShutdownMode) -> None:
        """End orderly."""
        await self.server.stop(mode)

    async def call(self, request: Request[M]) -> M:
        return await call(self.env, CONTROL, self.address, request, timeout_s=WAIT_S)

    async def add(
        self, archive: FakeArchive, *, volume: str = VOL, compress: str = "none", delay_s: int = 0
    ) -> Ok:
        info = ArchiveInfo(archive=archive.name, address=str(archive.address), compress=compress, delay_s=delay_s)
        return await self.call(AddArchiveInfo(volume=volume, info=info))

    async def begin(self, *archives: FakeArchive, volume: str = VOL, compress: str = "none") -> None:
        """Add archives and start the volume."""
        for archive in archives:
            await self.add(archive, volume=volume, compress=compress)
        await self.call(Start(volume=volume))

    async def state(self, volume: str = VOL) -> str:
        return (await self.call(GetState(volume=volume))).value

    async def status(self, volume: str = VOL) -> VolumeStatus:
        return (await self.call(GetStatus(volume=volume))).volumes[0]

    async def stop_volume(self, how: StopHow = StopHow.GRACEFUL, volume: str = VOL) -> JobInfo:
        job = (await self.call(Stop(volume=volume, how=how))).job
        return await self.call(WaitJob(job=job, wait_s=WAIT_S - 5))

    async def waiting(self, archive: str = "", volume: str = VOL) -> list[str]:
        """Labels of what waits for an archive, or of what was received and is nowhere else."""
        return [str(diff) for diff in (await self.call(GetProxyDiff(volume=volume, archive=archive))).diffs]

    async def until(
        self, condition: Callable[[], Any], what: str = "a condition", *, limit_s: float = WAIT_S
    ) -> None:
        """Wait for a condition that this process makes true."""
        try:
            async with asyncio.timeout(limit_s):
                while not condition():  # noqa: ASYNC110 - of many objects, which do not all tell of changes
                    await asyncio.sleep(self.poll_s)
        except TimeoutError:
            raise AssertionError(f"waited too long for {what}") from None

    async def drained(self, *archives: str, volume: str = VOL) -> None:
        """Wait until nothing waits for these archives (default: all)."""
        hops = [self.server.volumes[volume].hop(name) for name in archives or self.server.volumes[volume].hops]
        await self.until(lambda: not any(hop.diffs or hop.sending for hop in hops), "everything to be sent")

    async def emptied(self, volume: str = VOL) -> None:
        """Wait until nothing is left to be sent, and nothing is at work."""
        owner = self.server.volumes[volume]
        await self.until(lambda: not owner.unsent and owner.machine.at_rest, "everything to be sent")

    def files(self, below: str = "", volume: str = VOL) -> list[str]:
        """All files in the volume's directory, sorted."""
        root = self.base / volume / below
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@asynccontextmanager
async def proxy(base: Path, **settings: Any) -> AsyncIterator[ProxyRig]:
    """A running proxy."""
    rig = ProxyRig(base, **settings)
    await rig.up()
    try:
        yield rig
    finally:
        await rig.crash()
        rig.env.pools.close()


def play_proxy(
    base: Path,
    scenario: Callable[[ProxyRig, FakeArchive, StorageSide, MemNetwork], Awaitable[None]],
    **settings: Any,
) -> None:
    """Run a scenario with a volume that is fed and sent, on virtual time and with the real delays."""

    async def main() -> None:
        net = MemNetwork()
        env = Env(net=net, pools=InlinePools(random.Random(1)), clock=LoopClock())
        rig = ProxyRig(base / "p", env=env, **(REAL_DELAYS | settings))
        rig.poll_s = 0.05
        await rig.up()
        try:
            async with FakeArchive(env=env) as a0:
                await rig.begin(a0)
                await scenario(rig, a0, StorageSide(rig), net)
        finally:
            await rig.crash()

    run(main())


class StorageSide:
    """What a storage knows of one volume: where its log stands, and which generation that is."""

    def __init__(
        self, rig: ProxyRig, *, volume: str = VOL, uuid: bytes = UUID, pbs: int = 512, size_lb: int = 2048
    ) -> None:
        self.rig = rig
        self.volume = volume
        self.uuid = uuid
        self.pbs = pbs
        self.size_lb = size_lb
        self.lsid = 1000
        self.gid = 0

    def offer(self, log_max_pb: int = 1 << 16, **fields: Any) -> WlogOffer:
        """Return the offer of the next stretch."""
        values: dict[str, Any] = {
            "volume": self.volume,
            "uuid": self.uuid,
            "pbs": self.pbs,
            "salt": SALT,
            "size_lb": self.size_lb,
            "lsid": self.lsid,
            "log_max_pb": log_max_pb,
        } | fields
        return WlogOffer(**values)

    def build(self, packs: Iterable[Sequence[Io]]) -> list[bytes]:
        """Return the packs of the next stretch, each by itself."""
        out, lsid = [], self.lsid
        for ios in packs:
            out.append(build_pack(lsid, self.pbs, SALT, ios))
            lsid += len(out[-1]) // self.pbs
        return out

    def chunk(self, lsid: int, data: bytes, packing: Packing = Packing.LZ4) -> tuple[WlogChunk, bytes]:
        """Return the message and the payload for whole packs."""
        payload = lz4.block.compress(data, store_size=False) if packing is Packing.LZ4 else data
        return WlogChunk(lsid=lsid, size_b=len(data), packing=packing), payload

    def label(self, *, mergeable: bool = True) -> Diff:
        """Return the diff of the next stretch."""
        return clean(self.gid, self.gid + 1, mergeable=mergeable)

    async def send(
        self,
        packs: Sequence[Sequence[Io]] = (),
        *,
        mergeable: bool = True,
        packing: Packing = Packing.LZ4,
        diff: Diff | None = None,
    ) -> Diff:
        """Send a stretch of log, one chunk for each pack, and go on from there when it is acknowledged."""
        diff = diff if diff is not None else self.label(mergeable=mergeable)
        async with dial(self.rig.env, STORAGE, self.rig.address) as conn:
            lsid = await self.stream(conn, packs, packing=packing)
            await conn.call(WlogEnd(lsid=lsid, diff=diff))
        self.lsid, self.gid = lsid, diff.end.gid_b
        return diff

    async def stream(
        self, conn: Connection, packs: Sequence[Sequence[Io]], *, packing: Packing = Packing.LZ4
    ) -> int:
        """Offer and send all chunks, not the end; return the lsid behind them."""
        built = self.build(packs)
        await conn.send(self.offer())
        await conn.expect(WlogAccepted)
        lsid = self.lsid
        for data in built:
            message, payload = self.chunk(lsid, data, packing)
            await conn.send(message, payload)
            lsid += len(data) // self.pbs
        return lsid


def write(offset_lb: int, size_lb: int = 8, seed: int = 1) -> list[Io]:
    """Return a pack with one write; seed 0 writes zeros."""
    return [Io("write", offset_lb, size_lb, seed)]
