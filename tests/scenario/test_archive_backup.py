"""Full backups: what is checked before a storage throws its log away, bad streams, and what a failure leaves."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.kit.feeder import NOW, PROXY, STORAGE, ArchiveRig, Feed, send_chunk, send_full_backup
from walbd.daemon.conn import Connection
from walbd.daemon.main import ShutdownMode
from walbd.errors import RemoteError
from walbd.format.meta import Snapshot
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol.base import End, Ok
from walbd.protocol.transfer import (
    BackupAccepted,
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    FullChunk,
    LogReset,
    Packing,
)

VOL = "vol0"
UUID = b"u" * 16
IMAGE = bytes(8192) + b"\x07" * 8192 + bytes(16384)
OFFER = FullBackupOffer(volume=VOL, size_lb=len(IMAGE) // 512, started=NOW, bulk_b=4096)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ArchiveRig]:
    async with ArchiveRig(tmp_path) as rig:
        await rig.call(c.ArchiveInitVol(volume=VOL))
        yield rig


async def test_backup_diffs_restore_apply_restart(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.init()
        feed.scribble()
        done = await feed.full_backup(dirty=2)
        assert done.archive_uuid == (await rig.call(c.GetArchiveUuid(volume=VOL))).value
        assert feed.uuid == (await rig.call(c.GetUuid(volume=VOL))).value
        base = (await rig.call(c.GetBase(volume=VOL))).base
        assert (base.begin, base.timestamp) == (Snapshot(Gid(0), Gid(2)), NOW)
        assert await feed.check() == []  # dirty: nothing can be restored yet
        assert await feed.send() == [Ok(), Ok()]
        await feed.step(3)
        assert await feed.check() == [2, 3, 4, 5]
        await rig.done(c.Apply(volume=VOL, gid=4))
        assert await feed.check() == [4, 5]
        await rig.restart()
        assert await feed.check() == [4, 5]
        await feed.step()
        assert await feed.check() == [4, 5, 6]


async def test_zeros_of_a_fresh_image_are_holes(rig: ArchiveRig, tmp_path: Path) -> None:
    async with rig.dial(STORAGE) as conn:
        image = bytes(4 << 20) + b"\x01" * 4096 + bytes(4 << 20)
        await send_full_backup(conn, VOL, image, UUID, Snapshot.clean(0), chunk_b=1 << 20)
    path = tmp_path / VOL / "base.img"
    assert path.read_bytes() == image
    assert os.stat(path).st_blocks * 512 <= 1 << 20


async def test_used_image_is_zeroed_where_zeros_come(rig: ArchiveRig, tmp_path: Path) -> None:
    """A backup that failed has left other data in the image."""
    async with rig.dial(STORAGE) as conn:
        await conn.call(OFFER)
        await conn.call(LogReset(uuid=UUID))
        await send_chunk(conn, 0, b"\x55" * len(IMAGE), lz4_packed=True)
        await conn.send(End())
        await conn.expect(Ok)
        conn.abort()
    await rig.settled()
    assert await rig.state(VOL) == "SyncReady"
    assert (tmp_path / VOL / "base.img").read_bytes() == b"\x55" * len(IMAGE)
    async with rig.dial(STORAGE) as conn:
        await send_full_backup(conn, VOL, IMAGE, UUID, Snapshot.clean(0))
    assert (tmp_path / VOL / "base.img").read_bytes() == IMAGE


async def test_one_record_says_it_all(rig: ArchiveRig, tmp_path: Path) -> None:
    async with rig.dial(STORAGE) as conn:
        done = await send_full_backup(conn, VOL, IMAGE, UUID, Snapshot(Gid(0), Gid(4)), started=77)
    record = json.loads((tmp_path / VOL / "volume.json").read_text())["record"]
    expected = {
        "state": "Archived",
        "size_lb": len(IMAGE) // 512,
        "base": {"begin": {"gid_b": 0, "gid_e": 4}, "end": None, "timestamp": 77},
        "uuid": UUID.hex(),
        "archive_uuid": done.archive_uuid.hex(),
        "colds": {},
        "began": {},
        "gaps": [],
        "pending": None,
        "full_progress": None,
    }
    assert {key: record[key] for key in expected} == expected


async def test_progress_counts_what_is_written(rig: ArchiveRig) -> None:
    async with rig.dial(STORAGE) as conn:
        await conn.call(OFFER)
        assert await rig.state(VOL) == "FullSync"
        await conn.call(LogReset(uuid=UUID))
        await send_chunk(conn, 0, IMAGE[:16384], lz4_packed=True)
        volume = rig.volume(VOL)
        async with asyncio.timeout(60):
            while (await rig.call(c.GetProgress(volume=VOL))).value < 32:
                pass
        assert volume.progress_lb == 32
        await send_chunk(conn, 16384, IMAGE[16384:], lz4_packed=True)
        await conn.send(End())
        await conn.expect(Ok)
        await conn.call(BackupEnd(snapshot=Snapshot.clean(0)))
    assert (await rig.call(c.GetProgress(volume=VOL))).value == 0


# --- refused before anything is lost


async def refused(rig: ArchiveRig, offer: FullBackupOffer, me: Any = STORAGE) -> str:
    with pytest.raises(RemoteError) as caught:
        await rig.call(offer, me)
    assert caught.value.hint or caught.value.remote_code in ("refused", "usage")
    return caught.value.remote_code


async def test_refused_offers(rig: ArchiveRig, tmp_path: Path) -> None:
    assert await refused(rig, OFFER, PROXY) == "refused"
    assert await refused(rig, FullBackupOffer(volume=VOL, size_lb=0, started=1, bulk_b=512)) == "usage"
    assert await refused(rig, FullBackupOffer(volume="nobody", size_lb=8, started=1, bulk_b=512)) == "bad-state"
    assert await rig.state(VOL) == "SyncReady"
    assert sorted(os.listdir(tmp_path / VOL)) == ["volume.json"]


async def test_two_backups_of_one_volume(rig: ArchiveRig) -> None:
    async with rig.dial(STORAGE) as conn:
        assert await conn.call(OFFER) == BackupAccepted()
        assert await refused(rig, OFFER) == "busy"
        conn.abort()
    await rig.settled()


async def test_more_backups_than_allowed(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, backups_max=1) as rig:
        for name in (VOL, "vol1"):
            await rig.call(c.ArchiveInitVol(volume=name))
        async with rig.dial(STORAGE) as conn:
            await conn.call(OFFER)
            other = FullBackupOffer(volume="vol1", size_lb=8, started=1, bulk_b=512)
            assert await refused(rig, other) == "busy"
            assert await rig.state("vol1") == "SyncReady"
            conn.abort()
        await rig.settled()
        async with rig.dial(STORAGE) as conn:
            await conn.call(other)


async def test_no_room(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, free_reserve_b=1 << 60) as rig:
        await rig.call(c.ArchiveInitVol(volume=VOL))
        assert await refused(rig, OFFER) == "disk-full"
        assert await rig.state(VOL) == "SyncReady"


# --- streams that go wrong


Bad = Callable[[Connection], Awaitable[Any]]


async def chunk(conn: Connection, at: int, size_b: int, payload: bytes = b"", **fields: Any) -> None:
    await conn.send(FullChunk(offset_b=at, size_b=size_b, **fields), *([payload] if payload else []))


async def all_chunks(conn: Connection) -> None:
    for at in range(0, len(IMAGE), 4096):
        await send_chunk(conn, at, IMAGE[at : at + 4096], lz4_packed=False)


async def bad_end(conn: Connection, snapshot: Snapshot) -> None:
    await all_chunks(conn)
    await conn.send(End())
    await conn.expect(Ok)
    await conn.send(BackupEnd(snapshot=snapshot))


BAD_STREAMS: dict[str, tuple[Bad, str]] = {
    "gap": (lambda conn: chunk(conn, 4096, 4096), "remote-protocol"),
    "beyond": (lambda conn: chunk(conn, 0, len(IMAGE) + 512), "remote-protocol"),
    "empty": (lambda conn: chunk(conn, 0, 0), "remote-protocol"),
    "odd": (lambda conn: chunk(conn, 0, 100), "remote-protocol"),
    "checksum": (lambda conn: send_chunk(conn, 0, b"x" * 4096, lz4_packed=True, xxh=1), "corrupt-data"),
    "size": (lambda conn: chunk(conn, 0, 4096, b"x" * 100, xxh=1), "corrupt-data"),
    "lz4": (lambda conn: chunk(conn, 0, 4096, b"\xff" * 100, packing=Packing.LZ4, xxh=1), "corrupt-data"),
    "lz4-short": (
        lambda conn: chunk(
            conn,
            0,
            4096,
            b"\x10A",
            packing=Packing.LZ4,
            xxh=xxhash.xxh3_64_intdigest(b"A"),
        ),
        "corrupt-data",
    ),
    "early-end": (lambda conn: conn.send(End()), "remote-protocol"),
    "other-message": (lambda conn: conn.send(Ok()), "remote-protocol"),
    "end-not-from-0": (lambda conn: bad_end(conn, Snapshot(Gid(1), Gid(2))), "remote-protocol"),
    "end-none": (lambda conn: bad_end(conn, Snapshot(Gid(0), Gid((1 << 64) - 1))), "remote-protocol"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
async def test_bad_stream_leaves_sync_ready(rig: ArchiveRig, tmp_path: Path, name: str) -> None:
    bad, code = BAD_STREAMS[name]
    before = (tmp_path / VOL / "volume.json").read_bytes()
    async with rig.dial(STORAGE) as conn:
        await conn.call(OFFER)
        await conn.call(LogReset(uuid=UUID))
        await bad(conn)
        with pytest.raises(RemoteError) as caught:
            await conn.expect(Ok)
    assert caught.value.remote_code == code
    await rig.settled()
    assert await rig.state(VOL) == "SyncReady"
    assert (tmp_path / VOL / "volume.json").read_bytes() == before
    async with rig.dial(STORAGE) as conn:
        await send_full_backup(conn, VOL, IMAGE, UUID, Snapshot.clean(0))
    assert await rig.restored_image(VOL, 0) == IMAGE


async def test_storage_that_says_why_it_gives_up(rig: ArchiveRig) -> None:
    from walbd.errors import DiskFailed

    async with rig.dial(STORAGE) as conn:
        await conn.call(OFFER)
        await conn.call(LogReset(uuid=UUID))
        await conn.send_error(DiskFailed("cannot read"))
        with pytest.raises(RemoteError, match="cannot read"):
            await conn.expect(Ok)
    await rig.settled()
    assert await rig.state(VOL) == "SyncReady"


async def test_forced_shutdown_ends_a_backup(rig: ArchiveRig) -> None:
    async with rig.dial(STORAGE) as conn:
        await conn.call(OFFER)
        await conn.call(LogReset(uuid=UUID))
        await rig.stop(ShutdownMode.FORCE)
        conn.abort()
    await rig.up()
    assert await rig.state(VOL) == "SyncReady"


async def test_old_diffs_never_meet_a_new_history(rig: ArchiveRig, tmp_path: Path) -> None:
    """A reset whose removals were lost in a crash: the wdiffs come back, and must go before the backup."""
    feed = Feed(rig)
    await feed.full_backup()
    await feed.step(3)
    await rig.stopped(VOL)
    old = {path.name: path.read_bytes() for path in (tmp_path / VOL).glob("*.wdiff")}
    assert len(old) == 3
    await rig.call(c.ResetVol(volume=VOL))
    assert not list((tmp_path / VOL).glob("*.wdiff"))
    for when in ("now", "at start"):
        for name, data in old.items():
            (tmp_path / VOL / name).write_bytes(data)
        if when == "at start":
            await rig.crash()
            await rig.up()
        else:
            await feed.full_backup()
            await feed.step(1)
            assert await feed.check() == [0, 1]
            await rig.stopped(VOL)
            await rig.call(c.ResetVol(volume=VOL))
        assert not list((tmp_path / VOL).glob("*.wdiff"))
    await feed.full_backup()
    await feed.step(2)
    assert await feed.check() == [0, 1, 2]


async def test_done_is_said_when_the_volume_is_archived(rig: ArchiveRig) -> None:
    async with rig.dial(STORAGE) as conn:
        done = await send_full_backup(conn, VOL, IMAGE, UUID, Snapshot.clean(0))
        assert isinstance(done, BackupDone)
        assert rig.volume(VOL).machine.shown == "Archived"
