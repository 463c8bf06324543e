"""What a proxy refuses to take, and that nothing of it is left."""

import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_archive import FakeArchive, clean
from tests.kit.logs import Io, image_of
from tests.kit.proxy_rig import CONTROL, STORAGE, ProxyRig, StorageSide, proxy, write
from walbd.daemon.conn import Connection, dial
from walbd.errors import ConnectError, DiskFull, RemoteError, WalbError
from walbd.format.meta import Diff, Snapshot
from walbd.fs import Buf, OsFileSystem
from walbd.fs.disk import OsTempFile
from walbd.protocol.base import End
from walbd.protocol.control import Start
from walbd.protocol.transfer import Packing, Verdict, WlogAccepted, WlogChunk, WlogEnd

PACKS = [write(0), write(8, 8, 2), write(64, 4, 3)]


async def code_of_offer(rig: ProxyRig, storage: StorageSide, **fields: Any) -> str:
    """Offer a stretch that must be refused; return the code."""
    async with dial(rig.env, STORAGE, rig.address) as conn:
        await conn.send(storage.offer(**fields))
        with pytest.raises(RemoteError) as caught:
            await conn.expect(WlogAccepted)
        assert caught.value.hint or caught.value.facts
        return caught.value.remote_code


async def still_works(rig: ProxyRig, storage: StorageSide, a0: FakeArchive) -> None:
    """Nothing of the failed attempt is left, and the next one succeeds."""
    await rig.until(lambda: rig.volume.machine.at_rest)
    assert await rig.state() == "Started"
    assert rig.files() == ["volume.json"]
    assert rig.server.receiver.running == 0
    await storage.send(PACKS)
    await rig.drained()
    assert a0.image == image_of(bytes(a0.size_b), PACKS)


async def test_refusals_at_the_door(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        storage = StorageSide(rig)
        assert await code_of_offer(rig, storage) == "bad-state"  # unknown
        await rig.add(a0)
        assert await code_of_offer(rig, storage) == "bad-state"  # Stopped
        await rig.call(Start(volume="vol0"))
        assert await code_of_offer(rig, storage, pbs=1536) == "refused"
        assert await code_of_offer(rig, storage, log_max_pb=1 << 60) == "disk-full"
        async with dial(rig.env, CONTROL, rig.address) as conn:
            await conn.send(storage.offer())
            with pytest.raises(RemoteError, match="storages only"):
                await conn.expect(WlogAccepted)
        await still_works(rig, storage, a0)


async def test_one_wlog_of_a_volume_at_a_time(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await storage.stream(conn, PACKS)
            assert await rig.state() == "WlogRecv"
            assert await code_of_offer(rig, storage) == "busy"
            await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


async def test_no_more_receptions_than_allowed(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, receives_max=1) as rig:
        for name in ("vol0", "vol1"):
            await rig.begin(a0, volume=name)
        first, second = StorageSide(rig), StorageSide(rig, volume="vol1")
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await first.stream(conn, [])
            assert await code_of_offer(rig, second) == "busy"
            # the limit is looked at first: also for volumes that could not be received anyway
            assert await code_of_offer(rig, StorageSide(rig, volume="vol9")) == "busy"
            await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        await second.send(PACKS)


async def test_space_is_looked_at_before_the_state(tmp_path: Path) -> None:
    async with proxy(tmp_path, free_reserve_b=1 << 60) as rig:
        assert await code_of_offer(rig, StorageSide(rig)) == "disk-full"


async def test_log_that_runs_in_elsewhere_counts_against_the_free_space(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        for name in ("vol0", "vol1"):
            await rig.begin(a0, volume=name)
        free_pb = OsFileSystem().free_b(tmp_path) // 512
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await conn.send(StorageSide(rig).offer(log_max_pb=free_pb * 2 // 3))
            await conn.expect(WlogAccepted)
            other = StorageSide(rig, volume="vol1")
            assert await code_of_offer(rig, other, log_max_pb=free_pb * 2 // 3) == "disk-full"


Send = Callable[[Connection, StorageSide, list[bytes]], Coroutine[Any, Any, None]]


async def send_chunks(conn: Connection, storage: StorageSide, parts: list[bytes], lsid: int = 1000) -> int:
    for data in parts:
        message, payload = storage.chunk(lsid, data)
        await conn.send(message, payload)
        lsid += len(data) // storage.pbs
    return lsid


async def wrong_lsid(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, parts[1:], 1000)


async def chunk_left_out(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    lsid = await send_chunks(conn, storage, parts[:1])
    await send_chunks(conn, storage, parts[2:], lsid + len(parts[1]) // 512)


async def chunk_twice(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, [parts[0]])
    await send_chunks(conn, storage, [parts[0]])


async def pack_of_another_place(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, [parts[0], parts[0]])


async def bad_data(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    data = bytearray(parts[0])
    data[600] ^= 1
    await send_chunks(conn, storage, [bytes(data)])


async def bad_header(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    data = bytearray(parts[0])
    data[40] ^= 1
    await send_chunks(conn, storage, [bytes(data)])


async def half_a_pack(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, [parts[0] + parts[1][:1024]])


async def half_a_block(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, [parts[0][:700]])


async def no_lz4(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    message, _ = storage.chunk(1000, parts[0])
    await conn.send(message, b"\xff" * 100)


async def wrong_size(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    message, payload = storage.chunk(1000, parts[0])
    await conn.send(dataclasses.replace(message, size_b=message.size_b * 2), payload)


async def wrong_raw_size(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await conn.send(WlogChunk(lsid=1000, size_b=len(parts[0]), packing=Packing.NONE), parts[0][:-512])


async def empty_chunk(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await conn.send(WlogChunk(lsid=1000, size_b=0, packing=Packing.NONE))


async def more_than_announced(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    big = storage.build([[Io("write", 0, 1000, 5)]] * 2)
    await send_chunks(conn, storage, big)


async def outside_of_the_volume(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, storage.build([[Io("write", 2047, 2, 5)]]))


async def discard_outside(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, storage.build([[Io("discard", 0, 4096)]]))


async def another_message(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    await send_chunks(conn, storage, parts)
    await conn.send(End())


async def end_elsewhere(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    lsid = await send_chunks(conn, storage, parts)
    await conn.send(WlogEnd(lsid=lsid + 1, diff=clean(0, 1)))


async def dirty_diff(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    lsid = await send_chunks(conn, storage, parts)
    await conn.send(WlogEnd(lsid=lsid, diff=Diff(Snapshot.clean(0), Snapshot.parse("|1,3|"))))


async def compared_diff(conn: Connection, storage: StorageSide, parts: list[bytes]) -> None:
    lsid = await send_chunks(conn, storage, parts)
    await conn.send(WlogEnd(lsid=lsid, diff=dataclasses.replace(clean(0, 1), comp=True)))


BROKEN: dict[Send, str] = {
    wrong_lsid: "corrupt-data",
    chunk_left_out: "remote-protocol",
    chunk_twice: "remote-protocol",
    pack_of_another_place: "corrupt-data",
    bad_data: "corrupt-data",
    bad_header: "corrupt-data",
    half_a_pack: "corrupt-data",
    half_a_block: "remote-protocol",
    no_lz4: "corrupt-data",
    wrong_size: "corrupt-data",
    wrong_raw_size: "remote-protocol",
    empty_chunk: "remote-protocol",
    more_than_announced: "remote-protocol",
    outside_of_the_volume: "corrupt-data",
    discard_outside: "corrupt-data",
    another_message: "remote-protocol",
    end_elsewhere: "remote-protocol",
    dirty_diff: "remote-protocol",
    compared_diff: "remote-protocol",
}


@pytest.mark.parametrize("send", BROKEN, ids=lambda send: send.__name__)
async def test_broken_streams_leave_nothing(tmp_path: Path, send: Send) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await conn.send(storage.offer(log_max_pb=1500))
            await conn.expect(WlogAccepted)
            await send(conn, storage, storage.build(PACKS))
            # what a real storage does at its end; the error has come by then, or comes now
            try:
                await conn.send(WlogEnd(lsid=1, diff=clean(0, 1)))
            except ConnectError:
                pass
            with pytest.raises(RemoteError) as caught:
                await conn.receive()
        assert caught.value.remote_code == BROKEN[send], caught.value
        if caught.value.remote_code == "corrupt-data":
            assert {"offset"} <= set(caught.value.facts)
        await still_works(rig, storage, a0)


@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_stream_without_end_is_nothing(tmp_path: Path, chunks: int) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await storage.stream(conn, PACKS[:chunks])
            conn.abort()
        await still_works(rig, storage, a0)


async def test_storage_that_gives_up_says_so(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await storage.stream(conn, PACKS)
            await conn.send_error(WalbError("the device failed"))
        await still_works(rig, storage, a0)


class SmallDisk(OsFileSystem):
    """A disk that is full once a temporary file reaches a size."""

    def __init__(self) -> None:
        self.room_b = 1 << 40

    def temp_file(self, directory: Path) -> OsTempFile:
        file = super().temp_file(directory)
        pwrite = file.pwrite

        def small(data: Buf, offset_b: int) -> None:
            if offset_b + len(data) > self.room_b:
                raise DiskFull("no space left", path=str(file.path))
            pwrite(data, offset_b)

        file.pwrite = small  # type: ignore[method-assign]
        return file


async def test_disk_that_fills_up_in_the_middle(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.crash()
        disk = rig.env.fs = SmallDisk()
        await rig.up()
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send([write(100, 8, 9)])
        kept = rig.files()
        disk.room_b = 20_000
        with pytest.raises(RemoteError) as caught:
            await storage.send([[Io("write", 0, 100, 4)]])
        assert caught.value.remote_code == "disk-full"
        assert await rig.state() == "Started"
        assert rig.files() == kept
        disk.room_b = 1 << 40
        a0.refuse_all(None)
        await storage.send([[Io("write", 0, 100, 4)]])
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(100, 8, 9), [Io("write", 0, 100, 4)]])
