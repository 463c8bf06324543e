"""The NBD server over real sockets, in front of a real engine on real files."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme
import uvloop

from tests.kit.nbd import FUA, NbdClient, NbdError
from walbd.daemon.env import Env
from walbd.daemon.nbd_client import open_reader
from walbd.daemon.nbd_server import Budget, NbdServer
from walbd.daemon.net import Address
from walbd.daemon.tls import mutual_tls
from walbd.errors import ConnectError, DiskFailed, NotFound
from walbd.format.superblock import Superblock, ring_size_pb
from walbd.fs import OsFileSystem
from walbd.ids import Lsid
from walbd.storage.device.engine import Engine, Tuning
from walbd.storage.device.nbd_client import NbdVolume
from walbd.storage.device.start import open_device
from walbd.storage.device.superblocks import write_superblocks
from walbd.units import MIB

T = TypeVar("T")
SIZE_B = 8 * MIB
REQUEST = struct.Struct(">IHHQQI")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)


def format_files(directory: Path, *, size_b: int = SIZE_B, ldev_b: int = 4 * MIB, pbs: int = 512) -> None:
    (directory / "ldev").write_bytes(bytes(ldev_b))
    with (directory / "ddev").open("wb") as file:
        file.truncate(size_b)
    with OsFileSystem().open(directory / "ldev", write=True) as ldev:
        superblock = Superblock(
            pbs=pbs,
            salt=77,
            uuid=b"u" * 16,
            ring_size_pb=ring_size_pb(ldev_b, pbs),
            oldest_lsid=Lsid(0),
            written_lsid=Lsid(0),
            device_size_lb=size_b // 512,
        )
        write_superblocks(ldev, superblock)


class Rig:
    """A served device."""

    def __init__(self, directory: Path, engine: Engine, server: NbdServer) -> None:
        self.path = str(directory / "nbd.sock")
        self.engine = engine
        self.server = server

    def client(self) -> NbdClient:
        return NbdClient(self.path)

    async def on(self, work: Callable[[NbdClient], T]) -> T:
        """Run blocking work of a client in a thread."""

        def call() -> T:
            with self.client() as client:
                return work(client)

        return await asyncio.to_thread(call)

    async def raw(self, work: Callable[[socket.socket], T], *, structured: bool = False) -> T:
        """Run blocking work on a socket after the negotiation."""

        def call() -> T:
            with negotiated(self.path, structured=structured) as sock:
                return work(sock)

        return await asyncio.to_thread(call)


@asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[Rig]:
    """Serve the device in `directory`, formatting it first if it is not there."""
    if not (directory / "ldev").exists():
        format_files(directory)
    env = Env()
    tuning = options.pop("tuning", Tuning(pending_max_b=32 * MIB))
    opened = await asyncio.to_thread(open_device, env.fs, directory / "ldev", directory / "ddev")
    async with asyncio.TaskGroup() as tasks:
        engine = Engine(env, opened, tasks, name="vol0", tuning=tuning)
        server = NbdServer(engine, **options)
        addresses = [Address(path=str(directory / "nbd.sock"))]
        if server.tls is not None:
            addresses.append(Address(host="127.0.0.1", port=0))
        await server.listen(tasks, addresses)
        try:
            async with asyncio.timeout(240):
                yield Rig(directory, engine, server)
        finally:
            server.abort()
            await engine.stop()
            env.pools.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that sets no signal; the deadline is that of `serving`."""
    while not condition():  # noqa: ASYNC110 - a counter of the product, which needs no event
        await asyncio.sleep(0.001)


def take(sock: socket.socket, n: int) -> bytes:
    parts = bytearray()
    while len(parts) < n:
        part = sock.recv(n - len(parts))
        if not part:
            raise ConnectionError("closed")
        parts += part
    return bytes(parts)


def negotiated(path: str, *, structured: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(120)
        sock.connect(path)
        negotiate(sock, structured)
    except BaseException:
        sock.close()
        raise
    return sock


def negotiate(sock: socket.socket, structured: bool) -> None:
    take(sock, 18)
    sock.sendall(struct.pack(">I", 3))
    if structured:
        sock.sendall(b"IHAVEOPT" + struct.pack(">II", 8, 0))
        take(sock, 20)
        body = struct.pack(">II", 0, 1) + struct.pack(">I", 15) + b"base:allocation"
        sock.sendall(b"IHAVEOPT" + struct.pack(">II", 10, len(body)) + body)
        take(sock, 20 + 4 + 15 + 20)
    sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 0))
    assert struct.unpack(">Q", take(sock, 10)[:8])[0] == SIZE_B


def request(kind: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    return REQUEST.pack(0x25609513, flags, kind, cookie, offset, length)


def simple(sock: socket.socket) -> tuple[int, int]:
    magic, error, cookie = struct.unpack(">IIQ", take(sock, 16))
    assert magic == 0x67446698
    return error, cookie


def chunk(sock: socket.socket) -> tuple[int, int, int, bytes]:
    magic, flags, kind, cookie, length = struct.unpack(">IHHQI", take(sock, 20))
    assert magic == 0x668E33EF
    return flags, kind, cookie, take(sock, length)


def scribble(client: NbdClient, seed: int) -> None:
    """Random requests of one client against a model; every read must match."""
    rng = random.Random(seed)
    model = bytearray(client.read(0, client.size_b))
    for _ in range(150):
        size = rng.choice([512, 4096, 65536, 512 * rng.randint(1, 3000)])
        offset = rng.randrange((len(model) - size) // 512 + 1) * 512
        match rng.randrange(6):
            case 0 | 1 | 2:
                data = rng.randbytes(512) * (size // 512)
                client.write(offset, data, fua=rng.random() < 0.1)
                model[offset : offset + size] = data
            case 3:
                client.trim(offset, size)
                model[offset : offset + size] = bytes(size)
            case 4:
                client.write_zeroes(offset, size, no_hole=rng.random() < 0.5)
                model[offset : offset + size] = bytes(size)
            case 5:
                at = rng.randrange(len(model) - 1)
                n = min(len(model) - at, rng.randint(1, 100_000))  # reads need no alignment
                assert client.read(at, n) == model[at : at + n]
        if rng.random() < 0.1:
            client.flush()
    assert client.read(0, len(model)) == model


async def scribble_and_restart(directory: Path, seed: int, pbs: int) -> None:
    format_files(directory, pbs=pbs)
    for turn in range(2):
        async with serving(directory) as rig:
            await rig.on(lambda client, turn=turn: scribble(client, seed + turn))  # type: ignore[misc]
            before = await rig.on(lambda client: client.read(0, SIZE_B))
        assert (directory / "ddev").read_bytes() == before


@pytest.mark.parametrize("pbs", [512, 4096])
def test_random_requests_on_uvloop(tmp_path: Path, pbs: int) -> None:
    uvloop.run(scribble_and_restart(tmp_path, 1, pbs))


def test_random_requests_on_asyncio(tmp_path: Path) -> None:
    asyncio.run(scribble_and_restart(tmp_path, 2, 512))


async def test_a_burst_of_requests(tmp_path: Path) -> None:
    rng = random.Random(4)
    model = bytearray(SIZE_B)
    stream, kinds = b"", {}
    for cookie in range(600):
        offset, n = rng.randrange(1000) * 512, rng.choice([512, 1024, 4096])
        kind = rng.choice([WRITE, WRITE, TRIM, ZEROES, FLUSH])
        kinds[cookie] = kind
        data = rng.randbytes(n) if kind == WRITE else b""
        flags = FUA if rng.random() < 0.1 else 0
        stream += request(kind, cookie, 0 if kind == FLUSH else offset, 0 if kind == FLUSH else n, flags) + data
        if kind != FLUSH:
            model[offset : offset + n] = data or bytes(n)

    def burst(sock: socket.socket) -> None:
        sock.sendall(stream)
        answers = [simple(sock) for _ in kinds]
        assert sorted(cookie for _, cookie in answers) == sorted(kinds)
        assert {error for error, _ in answers} == {0}
        sock.sendall(request(READ, 7, 0, 600_000))
        assert simple(sock) == (0, 7)
        assert take(sock, 600_000) == model[:600_000]
        sock.sendall(request(DISC, 0))
        assert sock.recv(1) == b""

    async with serving(tmp_path) as rig:
        await rig.raw(burst)


async def test_one_byte_at_a_time(tmp_path: Path) -> None:
    def trickle(sock: socket.socket) -> None:
        stream = request(WRITE, 1, 512, 512) + b"w" * 512 + request(READ, 2, 512, 10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        for i in range(len(stream)):
            sock.send(stream[i : i + 1])
        first = simple(sock)
        if first == (0, 1):
            assert simple(sock) == (0, 2)
            assert take(sock, 10) == b"w" * 10
        else:  # neither waits for the other
            assert first == (0, 2)
            assert take(sock, 10) in (b"w" * 10, bytes(10))
            assert simple(sock) == (0, 1)

    async with serving(tmp_path) as rig:
        await rig.raw(trickle)


async def test_large_requests(tmp_path: Path) -> None:
    size = 32 * MIB
    format_files(tmp_path, size_b=2 * size)
    data = random.Random(1).randbytes(size)

    def work(client: NbdClient) -> None:
        client.write(4096, data)
        assert client.read(4096, size) == data
        with pytest.raises(NbdError) as caught:
            client.read(0, size + 512)
        assert caught.value.args[0] == 75
        client.trim(0, 2 * size)
        client.write_zeroes(0, 2 * size, no_hole=True)
        assert client.read(512, size) == bytes(size)

    # The log is an eighth of the request: it goes round several times.
    async with serving(tmp_path) as rig:
        await rig.on(work)


@pytest.mark.parametrize(
    ("kind", "offset", "length", "flags", "error"),
    [
        (READ, SIZE_B, 512, 0, 22),
        (READ, SIZE_B - 1, 2, 0, 22),
        (READ, 2**64 - 512, 1024, 0, 22),
        (READ, 0, 0, 0, 22),
        (READ, 0, 512, 2, 22),
        (WRITE, 1, 512, 0, 22),
        (WRITE, 0, 511, 0, 22),
        (WRITE, 0, 0, 0, 22),
        (WRITE, SIZE_B - 512, 1024, 0, 28),
        (WRITE, 2**63, 512, 0, 28),
        (WRITE, 0, 512, 16, 22),
        (TRIM, 0, 100, 0, 22),
        (TRIM, SIZE_B, 512, 0, 28),
        (ZEROES, 0, 512, 18, 95),
        (ZEROES, 0, 512, 4, 22),
        (FLUSH, 0, 0, 8, 22),
        (CACHE, 0, 512, 0, 22),
        (STATUS, 0, 512, 0, 22),  # no context was chosen
        (99, 0, 512, 0, 22),
    ],
)
async def test_refused_requests(
    tmp_path: Path, kind: int, offset: int, length: int, flags: int, error: int
) -> None:
    def refused(sock: socket.socket) -> None:
        data = b"x" * length if kind == WRITE else b""
        sock.sendall(request(kind, 5, offset, length, flags) + data + request(FLUSH, 6))
        assert sorted([simple(sock), simple(sock)]) == [(0, 6), (error, 5)]
        sock.close()

    async with serving(tmp_path) as rig:
        await rig.raw(refused)
        assert await rig.on(lambda client: client.read(0, 1 * MIB)) == bytes(MIB)
        assert rig.engine.core.lsids.latest == 0


@pytest.mark.parametrize(
    "stream",
    [
        b"\0" * 28,
        request(WRITE, 1, 0, 32 * MIB + 512),
        request(FLUSH, 1)[:-1] + b"\0" + b"garbage that is no request at all",
    ],
)
async def test_broken_streams_end_the_connection(tmp_path: Path, stream: bytes) -> None:
    def broken(sock: socket.socket) -> None:
        sock.sendall(stream)
        with pytest.raises((ConnectionError, OSError)):
            take(sock, 1 << 20)

    async with serving(tmp_path) as rig:
        await rig.raw(broken)
        assert await rig.on(lambda client: client.read(0, 512)) == bytes(512)


async def test_a_write_that_was_cut_off_is_not_done(tmp_path: Path) -> None:
    def cut(sock: socket.socket) -> None:
        sock.sendall(request(WRITE, 1, 0, 4096) + b"x" * 4095)
        sock.close()

    async with serving(tmp_path) as rig:
        await rig.raw(cut)
        await rig.server.changed.wait_for(lambda: not rig.server.connections)
        assert rig.engine.core.lsids.latest == 0
        assert rig.server.budget.used_b == 0


async def test_structured_replies_and_block_status(tmp_path: Path) -> None:
    def work(sock: socket.socket) -> None:
        sock.sendall(request(WRITE, 1, 65536, 4096) + b"d" * 4096)
        assert simple(sock) == (0, 1)
        sock.sendall(request(READ, 2, 65530, 10, 4))
        assert chunk(sock) == (1, 1, 2, struct.pack(">Q", 65530) + b"\0" * 6 + b"dddd")
        sock.sendall(request(READ, 3, SIZE_B, 1))
        assert chunk(sock) == (1, 0x8001, 3, struct.pack(">IH", 22, 0))
        sock.sendall(request(STATUS, 4, 0, 1 << 20))
        extents = struct.pack(">I6I", 1, 65536, 3, 4096, 0, MIB - 69632, 3)
        assert chunk(sock) == (1, 5, 4, extents)
        sock.sendall(request(STATUS, 5, 0, 1 << 20, 8))
        assert chunk(sock) == (1, 5, 5, struct.pack(">III", 1, 65536, 3))
        sock.sendall(request(STATUS, 6, SIZE_B, 512))
        assert chunk(sock) == (1, 0x8001, 6, struct.pack(">IH", 22, 0))

    async with serving(tmp_path) as rig:
        await rig.raw(work, structured=True)


async def test_a_flush_covers_all_connections(tmp_path: Path) -> None:
    async with serving(tmp_path, tuning=Tuning(flush_interval_s=3600)) as rig:

        def work(first: NbdClient) -> None:
            with rig.client() as second:
                first.write(0, b"a" * 512)
                assert rig.engine.core.lsids.permanent == 0
                second.flush()
                assert rig.engine.core.lsids.permanent == rig.engine.core.lsids.latest > 0

        await rig.on(work)


async def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    """Held writes stop the reading of the socket, not the memory; all are done in the end."""
    n, size = 64, 256 << 10

    def flood(sock: socket.socket) -> list[tuple[int, int]]:
        for cookie in range(n):
            sock.sendall(request(WRITE, cookie, cookie * 512, size) + bytes([cookie]) * size)
        return [simple(sock) for _ in range(n)]

    format_files(tmp_path)
    async with serving(tmp_path, inflight_max_b=1 * MIB) as rig:
        await rig.engine.freeze(0)
        work = asyncio.ensure_future(rig.raw(flood))
        await until(lambda: rig.server.budget.used_b >= 1 * MIB)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(work), 0.1)
        assert rig.server.budget.used_b <= 1 * MIB + 2 * size
        assert await rig.on(lambda client: client.read(0, 512)) == bytes(512), "others can read"
        rig.engine.melt()
        assert sorted(cookie for _, cookie in await work) == list(range(n))
        assert rig.server.budget.used_b == 0
        assert await rig.on(lambda client: client.read((n - 1) * 512, 1)) == bytes([n - 1])


async def test_many_requests_at_once_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes may ask for a lot: what is asked for counts, and not what was received."""
    n, limit_b = 48, 2 * MIB
    used: list[int] = []
    take_ = Budget.take

    def noted(self: Budget, size_b: int) -> None:
        take_(self, size_b)
        used.append(self.used_b)

    monkeypatch.setattr(Budget, "take", noted)

    def reads(sock: socket.socket) -> None:
        sock.sendall(b"".join(request(READ, cookie, 0, MIB) for cookie in range(n)))
        for _ in range(n):
            assert simple(sock)[0] == 0
            take(sock, MIB)

    def trims(sock: socket.socket) -> None:
        sock.sendall(b"".join(request(TRIM, cookie, cookie * 512, 512) for cookie in range(5000)))
        for _ in range(5000):
            assert simple(sock)[0] == 0

    async with serving(tmp_path, inflight_max_b=limit_b) as rig:
        await rig.raw(reads)
        assert max(used) <= limit_b + MIB + 2048
        await rig.engine.freeze(0)
        work = asyncio.ensure_future(rig.raw(trims))
        await until(lambda: rig.server.budget.used_b >= limit_b)
        rig.engine.melt()
        await work
        assert max(used) <= limit_b + MIB + 2048
        assert rig.server.budget.used_b == 0


async def test_writes_that_are_held_stop_no_readers(tmp_path: Path) -> None:
    def flood(sock: socket.socket) -> None:
        for cookie in range(8):
            sock.sendall(request(WRITE, cookie, 0, MIB) + bytes(MIB))
        for _ in range(8):
            assert simple(sock)[0] == 0

    def reads(client: NbdClient) -> None:
        for at in range(20):
            assert client.read(at * 4096, 4096) == bytes(4096)

    async with serving(tmp_path, inflight_max_b=2 * MIB) as rig:
        await rig.engine.freeze(0)
        work = asyncio.ensure_future(rig.raw(flood))
        await until(lambda: rig.server.budget.used_b >= 2 * MIB)
        await rig.on(reads)
        rig.engine.melt()
        await work


async def test_stop_answers_what_is_in_flight(tmp_path: Path) -> None:
    format_files(tmp_path)
    async with serving(tmp_path) as rig:
        await rig.engine.freeze(0)

        def work(sock: socket.socket) -> None:
            sock.sendall(request(WRITE, 9, 0, 512, FUA) + b"z" * 512)
            assert simple(sock) == (0, 9)
            assert sock.recv(1) == b""

        waiting = asyncio.ensure_future(rig.raw(work))
        await until(lambda: rig.server.budget.used_b > 0)
        rig.engine.refuse_writes()
        await rig.server.stop()
        await waiting
        assert rig.server.is_full()
        with pytest.raises(ConnectError):
            await open_reader(Address(path=rig.path))
    assert (tmp_path / "ddev").read_bytes()[:512] == b"z" * 512


async def test_connections_are_limited(tmp_path: Path) -> None:
    async with serving(tmp_path, connections_max=2) as rig:

        def work(first: NbdClient) -> None:
            with rig.client():
                with pytest.raises((ConnectionError, OSError)):
                    negotiated(rig.path)
                assert first.read(0, 512) == bytes(512)

        await rig.on(work)
        await rig.server.changed.wait_for(lambda: not rig.server.connections)
        await rig.on(lambda client: client.flush())


async def test_silent_clients_are_dropped(tmp_path: Path) -> None:
    async with serving(tmp_path, negotiation_timeout_s=0.05) as rig:

        def silent() -> bytes:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(120)
                sock.connect(rig.path)
                take(sock, 18)
                return sock.recv(1)

        assert await asyncio.to_thread(silent) == b""


async def test_reader(tmp_path: Path) -> None:
    format_files(tmp_path)
    data = random.Random(9).randbytes(SIZE_B)
    (tmp_path / "ddev").write_bytes(data)
    async with serving(tmp_path) as rig:
        await rig.on(lambda client: client.write(4096, b"new!" * 1024))
        data = data[:4096] + b"new!" * 1024 + data[8192:]
        reader = await open_reader(Address(path=rig.path), "vol0")
        assert reader.size_b == SIZE_B
        steps = range(0, SIZE_B, 65536)
        pieces = await asyncio.gather(*[reader.read(at, 65536) for at in steps])
        assert b"".join(pieces) == data
        with pytest.raises(DiskFailed):
            await reader.read(SIZE_B, 512)
        cancelled = asyncio.ensure_future(reader.read(0, 65536))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert await reader.read(100, 50) == data[100:150]
        await reader.close()
        await reader.close()
        with pytest.raises(ConnectError):
            await reader.read(0, 512)
        with pytest.raises(NotFound):
            await open_reader(Address(path=rig.path), "nothing")
        lost = await open_reader(Address(path=rig.path))
        rig.server.abort()
        with pytest.raises(ConnectError):
            await lost.read(0, 512)
    with pytest.raises(ConnectError):
        await open_reader(Address(path=rig.path))


async def test_blocking_client(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig:

        def work() -> None:
            with NbdVolume(rig.path) as volume:
                assert volume.size_b == SIZE_B
                volume.write(512, b"q" * 1024, fua=True)
                volume.trim(1024, 512)
                volume.flush()
                assert volume.read(512, 1024) == b"q" * 512 + bytes(512)
                with pytest.raises(DiskFailed):
                    volume.write(1, b"x" * 512)
                assert volume.read(512, 1) == b"q"

        await asyncio.to_thread(work)
    with pytest.raises(ConnectError):
        NbdVolume(rig.path)


async def test_read_errors_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DiskFailed("cannot read: simulated")

    monkeypatch.setattr("walbd.storage.device.engine.read_cached", fail)
    monkeypatch.setattr("walbd.storage.device.engine.read_data", fail)
    async with serving(tmp_path) as rig:

        def work(client: NbdClient) -> None:
            for size in (512, 1 * MIB):
                with pytest.raises(NbdError) as caught:
                    client.read(0, size)
                assert caught.value.args[0] == 5

        await rig.on(work)


def make_certificates(directory: Path) -> tuple[str, str, str]:
    """Make an authority and a certificate of it; return (cert, key, ca)."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key, ca = (directory / name for name in ("cert.pem", "key.pem", "ca.pem"))
    issued.private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    authority.cert_pem.write_to_path(str(ca))
    return str(cert), str(key), str(ca)


def tls_session(work: Callable[[Any], T], files: tuple[str, str, str], port: int) -> T:
    sock = socket.create_connection(("127.0.0.1", port), timeout=120)
    take(sock, 18)
    sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 3, 0))
    assert struct.unpack(">QIII", take(sock, 20))[2] == 0x80000005  # TLS is required
    assert take(sock, 20) == b"TLS is required here"
    sock.sendall(b"IHAVEOPT" + struct.pack(">II", 5, 0))
    assert struct.unpack(">QIII", take(sock, 20))[2] == 1
    context = mutual_tls(*files, server=False)
    with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        return work(tls)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_tls(tmp_path: Path, loop: str) -> None:
    files = make_certificates(tmp_path)

    def work(sock: Any) -> None:
        sock.sendall(b"IHAVEOPT" + struct.pack(">II", 1, 0))
        take(sock, 10)
        big = b"S" * (3 * MIB)
        sock.sendall(request(WRITE, 1, 512, len(big)) + big)
        assert simple(sock) == (0, 1)
        sock.sendall(request(READ, 2, 512, len(big)))
        assert simple(sock) == (0, 2)
        assert take(sock, len(big)) == big
        sock.sendall(request(DISC, 3))
        assert sock.recv(1) == b""

    async def main() -> None:
        async with serving(tmp_path, tls=mutual_tls(*files, server=True)) as rig:
            port = rig.server.addresses[1].port
            await asyncio.to_thread(tls_session, work, files, port)
            await rig.on(lambda client: client.flush())  # the unix socket needs none

    if loop == "uvloop":
        uvloop.run(main())
    else:
        asyncio.run(main())
