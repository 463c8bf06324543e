"""A storage daemon in this process, with fake devices and small fake neighbours that keep what they are sent.

`Rig` starts the real daemon on a loopback port. `Rig.die` models kill -9: from then on nothing that this daemon
does reaches its disk or its devices, and its connections break. The fakes do what the real proxy and archive
promise, and the faults they can be told to have.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import lz4.block
import xxhash

from tests.kit.fake_device import FakeDevice, FakeHandle
from tests.kit.process import free_port, release_ports
from walbd.daemon.conn import Connection, Me, call, with_filler
from walbd.daemon.env import Env, Pools, ThreadPools
from walbd.daemon.main import Shutdown, ShutdownMode, supervise
from walbd.daemon.net import Address, Network, OsNetwork
from walbd.daemon.server import Server
from walbd.errors import ConnectError, DiskFailed, Refused, WalbError
from walbd.ext.logpack import Stop as ScanStop
from walbd.ext.logpack import scan
from walbd.format.logpack import FLAG_DISCARD, FLAG_PADDING, LOG_RECORD
from walbd.format.meta import Diff, Snapshot
from walbd.fs import FileSystem, OsFileSystem
from walbd.ids import NO_GID
from walbd.protocol.base import End, JobInfo, JobState, Kind, Ok, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.protocol.control import (
    FullBackup,
    GetHostType,
    GetState,
    HostType,
    Role,
    Start,
    Stop,
    StopHow,
    StorageInitVol,
)
from walbd.protocol.transfer import (
    BackupAccepted,
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    FullChunk,
    GatheredLatest,
    GatherLatest,
    LatestRow,
    LogReset,
    Packing,
    WlogAccepted,
    WlogChunk,
    WlogEnd,
    WlogOffer,
)
from walbd.storage.config import StorageConfig
from walbd.storage.server import StorageServer
from walbd.units import LB

R = TypeVar("R", bound=Message)

DEADLINE_S = 20.0  # of whoever waits for a peer
WAIT_S = 60.0  # of whoever waits for a condition: a busy machine must not reach it
VOL = "vol0"
DEVICE = "/fake/dev0"


class Killed(Exception):
    """The daemon under test is not there any more."""


async def some_turns() -> None:
    """Let the loop do what it has begun."""
    for _ in range(20):
        await asyncio.sleep(0)


class ManualClock:
    """Wall-clock time that a test moves."""

    def __init__(self) -> None:
        self.time = 1_700_000_000

    def now(self) -> int:
        return self.time


class MortalFs(OsFileSystem):
    """A disk that a killed daemon cannot change any more; not `synced`: quick, for what loses no power."""

    def __init__(self, dead: Callable[[], bool], *, synced: bool = True) -> None:
        self._dead = dead
        self._synced = synced

    def _check(self, path: Path) -> None:
        if self._dead():
            raise DiskFailed("the daemon is dead", path=str(path))

    def replace_durably(self, path: Path, data: bytes) -> None:
        self._check(path)
        if self._synced:
            super().replace_durably(path, data)
            return
        unfinished = path.with_name("tmp-quick")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    def make_dir(self, path: Path, *, parents: bool = False) -> None:
        self._check(path)
        super().make_dir(path, parents=parents)

    def remove_tree(self, path: Path) -> None:
        self._check(path)
        super().remove_tree(path)

    def unlink(self, path: Path) -> None:
        self._check(path)
        super().unlink(path)


@dataclass(frozen=True)
class Piece:
    """One delivered stretch of log."""

    offer: WlogOffer
    lsid_end: int
    diff: Diff
    ops: list[tuple[int, int, bytes | None]]  # offset_lb, size_lb, data or discard
    proxy: str


class FakePeer:
    """A server of the test's own."""

    server: Server | None = None
    address = Address()

    async def _serve(
        self, env: Env, tasks: asyncio.TaskGroup, name: str, kind: Kind, handlers: dict[type[Request[Any]], Any]
    ) -> None:
        """Listen, at the same port as before if there was one."""
        self.server = Server(env, Me(node=name, kind=kind, io_timeout_s=DEADLINE_S), handlers)
        port = self.address.port
        if not port and isinstance(env.net, OsNetwork):
            port = free_port()  # that nobody else gets while we are stopped
        await self.server.listen(tasks, [Address("127.0.0.1", port)])
        self.address = self.server.addresses[0]

    async def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            await server.stop(force=True)


class FakeProxy(FakePeer):
    """Takes wlogs as the real one promises: verified, whole packs, in one list."""

    def __init__(self, name: str, pieces: list[Piece]) -> None:
        self.name = name
        self.pieces = pieces
        self.refusal: WalbError | None = None
        self.kind = Kind.PROXY
        self.abort_after_chunks: int | None = None  # break the connection in the middle, once
        self.lose_acks = 0  # take so many pieces and break the connection instead of acknowledging
        self.hold: asyncio.Event | None = None  # wait for it before acknowledging
        self.says_it_works = False  # while it waits for that, it sends fillers
        self.offers = 0
        self.host_type_calls = 0
        self.chunks = 0

    async def serve(self, env: Env, tasks: asyncio.TaskGroup) -> None:
        await self._serve(env, tasks, self.name, Kind.PROXY, {GetHostType: self._host_type, WlogOffer: self._take})

    async def _host_type(self, _conn: Connection, _request: GetHostType) -> HostType:
        self.host_type_calls += 1
        return HostType(kind=self.kind)

    async def _take(self, conn: Connection, offer: WlogOffer) -> Ok | None:
        self.offers += 1
        if self.refusal is not None:
            raise self.refusal
        await conn.send(WlogAccepted())
        lsid, n_chunks = offer.lsid, 0
        ops: list[tuple[int, int, bytes | None]] = []
        while True:
            message, payload = await conn.receive()
            if isinstance(message, WlogEnd):
                break
            assert isinstance(message, WlogChunk)
            assert message.lsid == lsid
            lsid += self._read_chunk(offer, message, payload, ops)
            n_chunks += 1
            self.chunks += 1
            if self.abort_after_chunks is not None and n_chunks >= self.abort_after_chunks:
                self.abort_after_chunks = None
                conn.abort()
                raise ConnectError("the fake proxy dies in the middle")
        assert message.lsid == lsid
        assert lsid - offer.lsid <= offer.log_max_pb
        if self.hold is not None:
            await (with_filler(conn, self.hold.wait()) if self.says_it_works else self.hold.wait())
        self.pieces.append(Piece(offer, lsid, message.diff, ops, self.name))
        if self.lose_acks:
            self.lose_acks -= 1
            conn.abort()
            raise ConnectError("the fake proxy loses an acknowledgement")
        return Ok()

    @staticmethod
    def _read_chunk(
        offer: WlogOffer, chunk: WlogChunk, payload: memoryview, ops: list[tuple[int, int, bytes | None]]
    ) -> int:
        data = bytes(payload)
        if chunk.packing is Packing.LZ4:
            data = lz4.block.decompress(data, uncompressed_size=chunk.size_b)
        assert len(data) == chunk.size_b
        records = bytearray()
        found = scan(data, offer.pbs, offer.salt, chunk.lsid, records=records)
        assert found.stop is ScanStop.MORE, found.fault
        assert found.consumed_b == len(data), "a chunk must hold whole packs"
        for _, offset_lb, data_b, size_lb, flags, _, _ in LOG_RECORD.iter_unpack(records):
            if flags & FLAG_PADDING:
                continue
            if flags & FLAG_DISCARD:
                ops.append((offset_lb, size_lb, None))
            else:
                ops.append((offset_lb, size_lb, data[data_b : data_b + size_lb * LB]))
        return chunk.size_b // offer.pbs


@dataclass
class Base:
    """What the fake archive holds of a volume."""

    image: bytearray
    snapshot: Snapshot
    uuid: bytes


class FakeArchive(FakePeer):
    """Takes full backups, and answers for the newest snapshot it could restore."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.bases: dict[str, Base] = {}
        self.refusal: Refused | None = None
        self.hold: asyncio.Event | None = None  # wait for it before taking chunks
        self.abort_at_chunk: int | None = None
        self.fail_at_end: Refused | None = None
        self.zero_chunks = 0
        self.offers: list[FullBackupOffer] = []

    async def serve(self, env: Env, tasks: asyncio.TaskGroup) -> None:
        await self._serve(
            env, tasks, "a0", Kind.ARCHIVE, {FullBackupOffer: self._take, GatherLatest: self._latest}
        )

    async def _latest(self, _conn: Connection, request: GatherLatest) -> GatheredLatest:
        rows = []
        for volume in request.volumes:
            base = self.bases.get(volume)
            gid = self.latest(volume) if base is not None else NO_GID
            rows.append(LatestRow(volume=volume, gid=gid, timestamp=5))
        return GatheredLatest(rows=rows)

    async def _take(self, conn: Connection, offer: FullBackupOffer) -> BackupDone:
        self.offers.append(offer)
        if self.refusal is not None:
            raise self.refusal
        await conn.send(BackupAccepted())
        uuid = (await conn.expect(LogReset)).uuid
        await conn.send(Ok())
        image, at, n_chunks = bytearray(offer.size_lb * LB), 0, 0
        if self.hold is not None:
            await self.hold.wait()
        while True:
            message, payload = await conn.receive()
            if isinstance(message, End):
                break
            assert isinstance(message, FullChunk)
            assert message.offset_b == at
            n_chunks += 1
            if n_chunks == self.abort_at_chunk:
                self.abort_at_chunk = None
                conn.abort()
                raise ConnectError("the fake archive dies in the middle")
            image[at : at + message.size_b] = self._unpack(message, payload)
            at += message.size_b
        assert at == len(image)
        await conn.send(Ok())
        if self.fail_at_end is not None:
            raise self.fail_at_end
        snapshot = (await conn.expect(BackupEnd)).snapshot
        self.bases[offer.volume] = Base(image, snapshot, uuid)
        return BackupDone(archive_uuid=bytes(range(16)))

    def _unpack(self, chunk: FullChunk, payload: memoryview) -> bytes:
        if not payload:
            self.zero_chunks += 1
            return bytes(chunk.size_b)
        data = bytes(payload)
        if chunk.packing is Packing.LZ4:
            data = lz4.block.decompress(data, uncompressed_size=chunk.size_b)
        assert xxhash.xxh3_64_intdigest(data) == chunk.xxh
        return data

    def history(self, volume: str = VOL) -> list[Piece]:
        """Return the delivered pieces that continue the base, duplicates dropped, in order of generations."""
        base = self.bases[volume]
        gid = 0
        chain: list[Piece] = []
        # What a proxy does: pieces of another uuid go, equal labels replace each other, too old ones go.
        mine = [p for p in self.pieces if p.offer.volume == volume and p.offer.uuid == base.uuid]
        while True:
            usable = [p for p in mine if p.diff.begin.gid_b <= gid < p.diff.end.gid_b]
            if not usable:
                return chain
            best = max(usable, key=lambda p: (p.diff.end.gid_b, p.diff.begin.gid_b))
            chain.append(best)
            gid = best.diff.end.gid_b

    def latest(self, volume: str = VOL) -> int:
        """Return the newest generation that the logs lead to."""
        chain = self.history(volume)
        return chain[-1].diff.end.gid_b if chain else 0

    def restore(self, gid: int, volume: str = VOL) -> bytes:
        """Return the image of a generation, which must be the end of a piece at or after the base's."""
        base = self.bases[volume]
        assert gid >= base.snapshot.gid_e, "not clean yet"
        image = bytearray(base.image)
        for piece in self.history(volume):
            if piece.diff.end.gid_b > gid:
                break
            for offset_lb, size_lb, data in piece.ops:
                end_b = (offset_lb + size_lb) * LB
                if end_b > len(image):
                    image.extend(bytes(end_b - len(image)))
                image[offset_lb * LB : end_b] = data if data is not None else bytes(size_lb * LB)
            if piece.diff.end.gid_b == gid:
                return bytes(image)
        raise AssertionError(f"generation {gid} is the end of no piece")


@dataclass
class Rig:
    """The daemon and its surroundings; `start` and `die` may follow each other."""

    base_dir: Path
    n_proxies: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    net: Network = field(default_factory=OsNetwork)
    pools: Pools | None = None
    deadline_s: float = WAIT_S  # of waits for conditions
    poll_s: float = 0.002

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.devices: dict[str, FakeDevice] = {DEVICE: FakeDevice()}
        self.pieces: list[Piece] = []
        self.proxies = [FakeProxy(f"p{i}", self.pieces) for i in range(self.n_proxies)]
        self.archive = FakeArchive(self.pieces)
        self.peer_env = Env(net=self.net, pools=self.pools or ThreadPools())
        self.me = Me(node="ctl", kind=Kind.CONTROL, io_timeout_s=DEADLINE_S)
        self.daemon: StorageServer | None = None
        self.dead = False
        self._life: asyncio.Task[None] | None = None
        self._kill: Callable[[], None] = lambda: None
        self._shutdown = Shutdown()
        self._peers: asyncio.TaskGroup | None = None

    @property
    def device(self) -> FakeDevice:
        return self.devices[DEVICE]

    @property
    def proxy(self) -> FakeProxy:
        return self.proxies[0]

    @property
    def server(self) -> StorageServer:
        assert self.daemon is not None
        return self.daemon

    async def reread(self) -> StorageConfig:
        """What a reload finds."""
        return self.config()

    def config(self) -> StorageConfig:
        values: dict[str, Any] = {
            "base_dir": str(self.base_dir),
            "node_id": "s0",
            "port": 0,
            "archive": str(self.archive.address),
            "proxy": [str(proxy.address) for proxy in self.proxies],
            "io_timeout_s": DEADLINE_S,
            "connect_timeout_s": DEADLINE_S,
            "retry_delay_min_s": 0.01,
            "retry_delay_max_s": 0.05,
            "gather_delay_s": 0.0,
            "settle_delay_max_s": 0.01,
            "probe_interval_s": 0.02,
            "proxy_check_interval_s": 0.05,
        }
        return StorageConfig(**(values | self.options))

    @asynccontextmanager
    async def running(self, *, start: bool = True) -> AsyncIterator[Rig]:
        """Run the neighbours, and the daemon, until the end of the block."""
        async with asyncio.TaskGroup() as tasks:
            self._peers = tasks
            for proxy in self.proxies:
                await proxy.serve(self.peer_env, tasks)
            await self.archive.serve(self.peer_env, tasks)
            try:
                if start:
                    await self.start()
                yield self
            finally:
                await self.stop(ShutdownMode.FORCE)
                await some_turns()  # connections that are just being accepted
                for proxy in self.proxies:
                    await proxy.stop()
                await self.archive.stop()
                await some_turns()
        if self.pools is None:
            self.peer_env.pools.close()
        release_ports(peer.address.port for peer in (*self.proxies, self.archive))

    async def start(self) -> None:
        """Start a daemon on the directory, as a new process would."""
        assert self._life is None
        self.dead = False
        killed = asyncio.Event()  # this very daemon; the next one has its own
        self._kill = killed.set
        fs = MortalFs(killed.is_set, synced=self.pools is None)
        env = Env(
            fs=cast(FileSystem, fs),
            net=self.net,
            clock=self.clock,
            rng=random.Random(1),
            pools=self.pools or ThreadPools(),
        )

        def open_device(path: str) -> FakeHandle:
            if path not in self.devices:
                raise ConnectError("no such device", device=path)
            return FakeHandle(self.devices[path], killed.is_set)

        self._shutdown = Shutdown()
        self.daemon = StorageServer(self.config(), env, self._shutdown, open_device=open_device, read=self.reread)
        ready = asyncio.Event()
        daemon = self.daemon

        async def live() -> None:
            try:
                await supervise(daemon, self._shutdown, ready.set)
            finally:
                if self.pools is None:
                    env.pools.close()

        self._life = asyncio.create_task(live())
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._life, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._life.done():
            life_task, self._life = self._life, None
            await life_task

    async def stop(self, mode: ShutdownMode = ShutdownMode.GRACEFUL) -> None:
        """End the daemon as an operator does."""
        if self._life is not None:
            self._shutdown.request(mode)
            life, self._life = self._life, None
            await life

    def mark_dead(self) -> None:
        """From now on nothing that the daemon does has an effect."""
        self.dead = True
        self._kill()

    async def die(self) -> None:
        """Kill the daemon."""
        self.mark_dead()
        if self._life is not None:
            life, self._life = self._life, None
            life.cancel()
            await asyncio.wait({life})
            await self.server.server.stop(force=True)  # the kernel would close its sockets

    async def restart(self) -> None:
        """Kill -9 and start again."""
        await self.die()
        await self.start()

    async def restart_proxy(self, proxy: FakeProxy) -> None:
        assert self._peers is not None
        await proxy.serve(self.peer_env, self._peers)

    # what an operator does

    async def call(self, request: Request[R]) -> R:
        """Ask the daemon. Raises RemoteError."""
        return await call(self.peer_env, self.me, self.server.server.addresses[0], request)

    async def job(self, number: int) -> JobInfo:
        """Wait for the end of a job."""
        while True:
            info = await self.call(WaitJob(job=number, wait_s=5))
            if info.state is not JobState.RUNNING:
                return info

    async def init(self, volume: str = VOL, device: str = DEVICE) -> None:
        await self.call(StorageInitVol(volume=volume, device=device))

    async def full_backup(self, volume: str = VOL, **kwargs: Any) -> JobInfo:
        """Run a full backup to its end."""
        return await self.job((await self.call(FullBackup(volume=volume, **kwargs))).job)

    async def stop_volume(self, how: StopHow = StopHow.GRACEFUL, volume: str = VOL) -> JobInfo:
        return await self.job((await self.call(Stop(volume=volume, how=how))).job)

    async def start_volume(self, role: Role = Role.TARGET, volume: str = VOL) -> None:
        await self.call(Start(volume=volume, role=role))

    async def state(self, volume: str = VOL) -> str:
        return (await self.call(GetState(volume=volume))).value

    async def target(self) -> None:
        """Bring a new volume to Target."""
        await self.init()
        info = await self.full_backup()
        assert info.state is JobState.DONE, info

    async def until(self, condition: Callable[[], Any], what: str = "condition") -> None:
        """Wait for a condition with a deadline; raises Killed when the daemon was killed meanwhile."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.deadline_s
        while not condition():
            if self.dead:
                raise Killed("the daemon was killed")
            if loop.time() > deadline:
                raise AssertionError(f"waited too long for {what}")
            await asyncio.sleep(self.poll_s)

    def delivered(self, volume: str = VOL, device: FakeDevice | None = None) -> bool:
        """Say whether everything permanent in the log is delivered and recorded so."""
        known = self.server.volumes.get(volume)
        return (
            known is not None
            and known.has_record
            and (known.record.done.lsid == (device or self.device).permanent and not known.record.queue)
        )

    async def until_idle(self) -> None:
        """Wait until nothing is being sent or erased: a delivery is recorded before its work has ended."""
        async with asyncio.timeout(self.deadline_s):
            await self.server.scheduler.idle()

    async def until_delivered(self, volume: str = VOL, device: FakeDevice | None = None) -> None:
        await self.until(lambda: self.delivered(volume, device), "delivery")
