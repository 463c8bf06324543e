"""What a storage refuses, and that nothing has changed then: requests, neighbours that talk nonsense, odd logs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.kit.fake_device import FakeDevice
from tests.kit.process import free_port
from tests.kit.storage_rig import DEVICE, VOL, FakeArchive, FakeProxy, Rig
from walbd.daemon.conn import Connection, Me
from walbd.daemon.net import Address
from walbd.daemon.record import RECORD_NAME
from walbd.daemon.scheduler import ASK_AGAIN_S
from walbd.daemon.server import Server
from walbd.errors import Busy, ConnectError, Refused, RemoteError, RemoteProtocolError
from walbd.format.meta import LogPoint, Snapshot
from walbd.fs import OsFileSystem
from walbd.ids import NO_GID, Gid, Lsid
from walbd.protocol.base import Kind
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    HashBackup,
    Kick,
    ResetVol,
    Resize,
    Role,
    Start,
    Stop,
    StopHow,
    StorageInitVol,
    TakeSnapshot,
)
from walbd.protocol.maintenance import Retarget
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import (
    BackupAccepted,
    BackupDone,
    FullBackupOffer,
    GatheredLatest,
    GatherLatest,
    LatestRow,
    WlogOffer,
)
from walbd.storage import record as records
from walbd.storage.proxies import Proxies
from walbd.storage.transfer import _connect


async def refused(ask: Awaitable[Any]) -> str:
    """Return the code and the message of a refusal."""
    with pytest.raises(RemoteError) as caught:
        await ask
    return f"{caught.value.remote_code}: {caught.value.message}"


def on_disk(rig: Rig) -> bytes:
    return (rig.base_dir / VOL / RECORD_NAME).read_bytes()


# Requests


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Start(volume=VOL), "usage: a storage needs to know the role"),
        (Stop(volume=VOL, how=StopHow.EMPTY), "usage: a storage cannot be emptied"),
        (ResetVol(volume=VOL, gid=NO_GID >> 1), "usage: that generation leaves no room"),
        (Resize(volume=VOL, size_b=1 << 30, zero=True), "usage: zeroing what is new is for archives"),
        (Kick(volume=VOL, archive="a0"), "usage: a storage kicks volumes"),
        (Retarget(), "usage: neither an archive nor proxies"),
        (Retarget(proxies=["h:0"]), "usage: a server has no port 0"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Request) else "",
)
async def test_requests_that_make_no_sense(tmp_path: Path, request_: Request[Any], says: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.stop_volume()
        before, size_b, uuid = on_disk(rig), len(rig.device.data), rig.device.uuid
        assert (await refused(rig.call(request_))).startswith(says)
        assert await rig.state() == "Stopped"
        assert (on_disk(rig), len(rig.device.data), rig.device.uuid) == (before, size_b, uuid)


async def test_the_last_generation_that_a_reset_takes(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.stop_volume()
        await rig.call(ResetVol(volume=VOL, gid=(NO_GID >> 1) - 1))
        assert rig.server.volumes[VOL].record.done.gid == (NO_GID >> 1) - 1


# Neighbours


class Disguised(FakeProxy):
    """Takes logs, and is no proxy."""

    async def serve(self, env: Any, tasks: asyncio.TaskGroup) -> None:
        await super().serve(env, tasks)
        assert self.server is not None
        await self.server.stop(force=True)
        self.server = Server(env, Me(node="a9", kind=Kind.ARCHIVE), self.server._handlers)
        await self.server.listen(tasks, [self.address])


async def test_no_log_goes_to_what_is_no_proxy(tmp_path: Path) -> None:
    """Although it says of itself that it is one: what counts is who has shaken hands."""
    rig = Rig(tmp_path / "s")
    rig.proxies = [Disguised("a9", rig.pieces)]
    async with rig.running():
        await rig.target()
        volume = rig.server.volumes[VOL]
        await rig.until(lambda: "is no proxy" in volume.send_error)
        assert rig.pieces == []
        assert rig.proxy.offers == 0


class Listed(Proxies):
    """Says that these are there."""

    def __init__(self, *addresses: Address) -> None:
        self.addresses = addresses
        self.suspected: list[Address] = []

    def available(self) -> list[Address]:
        return list(self.addresses)

    def suspect(self, address: Address) -> None:
        self.suspected.append(address)


async def test_whether_a_proxy_is_gone_or_refuses(tmp_path: Path) -> None:
    """Who refuses is asked again soon; of those who are gone a probe says when they are back."""
    rig = Rig(tmp_path / "s", n_proxies=2)
    async with rig.running():
        shared, gone = rig.server.shared, Address("127.0.0.1", free_port())
        offer = WlogOffer(volume="v", uuid=b"u" * 16, pbs=512, salt=1, size_lb=8, lsid=Lsid(0), log_max_pb=9)
        with pytest.raises(ConnectError, match="no proxy is available"):
            await _connect(shared, Listed(), offer)
        with pytest.raises(ConnectError, match="no proxy can be reached"):
            await _connect(shared, proxies := Listed(gone), offer)
        assert proxies.suspected == [gone]
        rig.proxies[1].refusal = Busy("not now")
        with pytest.raises(Refused, match="no proxy takes the log") as caught:
            await _connect(shared, proxies := Listed(gone, rig.proxies[1].address), offer)
        assert caught.value.retry_max_s == ASK_AGAIN_S
        assert f"{rig.proxies[1].address}: not now" in str(caught.value.facts["reasons"])
        assert proxies.suspected == [gone]
        addresses = [gone, rig.proxies[1].address, rig.proxy.address]
        stack, _, tried = await _connect(shared, Listed(*addresses), offer)
        assert tried == addresses
        await stack.aclose()


class Confused(FakeArchive):
    """Accepts every backup, as if it had `latest`."""

    def __init__(self, rig: Rig, accepted: BackupAccepted) -> None:
        super().__init__(rig.pieces)
        self.accepted = accepted
        self.asked = 0

    async def serve(self, env: Any, tasks: asyncio.TaskGroup) -> None:
        handlers = {FullBackupOffer: self._accept, HashBackupOffer: self._accept, GatherLatest: self._latest}
        await self._serve(env, tasks, "a0", Kind.ARCHIVE, handlers)

    async def _accept(self, conn: Connection, _offer: Request[Any]) -> BackupDone:
        self.asked += 1
        await conn.send(self.accepted)
        await conn.receive()  # the storage goes away: nothing more must come
        raise AssertionError("the backup goes on")


@pytest.mark.parametrize(
    ("accepted", "how"),
    [
        (BackupAccepted(latest=Snapshot.clean(3)), "full"),
        (BackupAccepted(size_lb=2048), "full"),
        (BackupAccepted(size_lb=2048), "hash"),
        (BackupAccepted(latest=Snapshot(NO_GID, NO_GID), size_lb=2048), "hash"),
        (BackupAccepted(latest=Snapshot.clean(Gid(NO_GID >> 1)), size_lb=2048), "hash"),
        (BackupAccepted(latest=Snapshot.clean(3), size_lb=2047), "hash"),
    ],
)
async def test_an_archive_that_accepts_something_else(tmp_path: Path, accepted: BackupAccepted, how: str) -> None:
    """It is found out before the log is wiped."""
    rig = Rig(tmp_path / "s")
    rig.archive = archive = Confused(rig, accepted)
    async with rig.running():
        await rig.init()
        rig.device.scribble(3)
        before, uuid = on_disk(rig), rig.device.uuid
        asks = rig.full_backup() if how == "full" else rig.call(HashBackup(volume=VOL))
        assert (await refused(asks)).startswith("remote-protocol: the archive")
        assert archive.asked == 1
        assert await rig.state() == "SyncReady"
        assert (on_disk(rig), rig.device.uuid) == (before, uuid)
        assert "reset_wal" not in rig.device.calls


class Elsewhere(FakeArchive):
    """Answers for another volume than it was asked for."""

    async def _latest(self, _conn: Connection, request: GatherLatest) -> GatheredLatest:
        return GatheredLatest(rows=[LatestRow(volume="other", gid=9, timestamp=5) for _ in request.volumes])


async def test_an_archive_that_answers_for_other_volumes(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.archive = Elsewhere(rig.pieces)
    async with rig.running():
        await rig.target()
        with pytest.raises(RemoteProtocolError, match="other volumes"):
            await rig.server.lag.compare()
        assert rig.server.lag.rows == []


# Devices


async def test_a_device_that_belongs_to_a_volume_whose_device_does_not_answer(tmp_path: Path) -> None:
    """The record knows the log: a second path to the device is found out, another device is not refused."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.stop_volume()
        rig.devices["/fake/alias"] = rig.devices.pop(DEVICE)
        rig.devices["/fake/other"] = FakeDevice(seed=5)
        answer = await refused(rig.call(StorageInitVol(volume="vol1", device="/fake/alias")))
        assert answer.startswith("already-exists: the device belongs to another volume")
        assert not (rig.base_dir / "vol1").exists()
        await rig.init("vol2", "/fake/other")
        rig.devices[DEVICE] = rig.devices.pop("/fake/alias")


async def test_an_implicit_snapshot_is_taken_while_writes_go_on(tmp_path: Path) -> None:
    """The log is never permanent up to its end: a snapshot is where it was when the snapshot was due."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        device, volume = rig.device, rig.server.volumes[VOL]
        device.permanent_at_once = False
        device.scribble(1)
        some = device.latest
        device.scribble(1)
        due, image = device.latest, bytes(device.data)
        device.permanent = some
        device.changed.set()
        await rig.until(lambda: volume.candidate is not None and volume.candidate.lsid == due)
        device.scribble(1)
        device.permanent = device.latest
        device.scribble(1)
        device.changed.set()
        await rig.until(lambda: volume.record.done.lsid == due)
        assert device.latest > due
        assert rig.archive.restore(rig.archive.latest()) == image
        device.sync()
        await rig.until_delivered()


async def test_a_proxy_that_dies_in_a_transfer_is_looked_at_now(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"proxy_check_interval_s": 3600.0, "probe_interval_s": 3600.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.until(lambda: rig.proxy.host_type_calls == 1)
        rig.proxy.abort_after_chunks = 1
        rig.device.scribble(1)
        await rig.until_delivered()
        await rig.until(lambda: rig.proxy.host_type_calls == 2)


async def test_a_kick_looks_for_proxies(tmp_path: Path) -> None:
    """Although it is long until the next look: what is back is used at once; what is not, is not waited for."""
    rig = Rig(tmp_path / "s", options={"proxy_check_interval_s": 3600.0, "probe_interval_s": 3600.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        proxies = rig.server.proxies
        await rig.proxy.stop()
        rig.device.scribble(1)
        await rig.until(lambda: not proxies.available())
        await rig.call(Kick(volume=VOL))
        assert not proxies.available()
        await rig.restart_proxy(rig.proxy)
        await rig.call(Kick(volume=VOL))
        assert proxies.available() == [rig.proxy.address]
        await rig.until_delivered()


# Logs


async def change_record(rig: Rig, change: Callable[[records.VolumeRecord], records.VolumeRecord]) -> None:
    """Start again with another record."""
    await rig.die()
    fs, directory = OsFileSystem(), rig.base_dir / VOL
    records.save(fs, directory, change(records.load(fs, directory)))
    await rig.start()


async def test_a_snapshot_in_the_middle_of_a_pack_is_never_delivered(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.write(0, bytes(range(256)) * 8)
        gid = (await rig.call(TakeSnapshot(volume=VOL))).gid

        def earlier(record: records.VolumeRecord) -> records.VolumeRecord:
            (point,) = record.queue
            assert point.gid == gid
            return msgspec.structs.replace(record, queue=(LogPoint(Lsid(point.lsid - 1), point.gid, False, 5),))

        await change_record(rig, earlier)
        n, done = len(rig.pieces), rig.server.volumes[VOL].record.done
        await rig.start_volume(Role.TARGET)
        volume = rig.server.volumes[VOL]
        await rig.until(lambda: "reaches beyond the place of a snapshot" in volume.send_error)
        assert len(rig.pieces) == n
        assert volume.record.done == done
        assert volume.record.queue[0].gid == gid


async def test_a_snapshot_at_a_device_that_has_failed(tmp_path: Path) -> None:
    """Its log would never become permanent: the snapshot is refused, at once, and no generation is used up."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        before = on_disk(rig)
        rig.device.permanent_at_once = False
        rig.device.scribble(1)
        rig.device.read_only = "a write failed"
        assert (await refused(rig.call(TakeSnapshot(volume=VOL)))).startswith("read-only-device: the device")
        assert on_disk(rig) == before


async def test_a_history_that_changes_during_a_transfer_is_not_continued(tmp_path: Path) -> None:
    """Whoever changed it: what a proxy has acknowledged is not what the record goes on from."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        volume = rig.server.volumes[VOL]
        rig.proxy.hold = hold = asyncio.Event()
        chunks = rig.proxy.chunks
        rig.device.scribble(1)
        await rig.until(lambda: rig.proxy.chunks > chunks)

        def other(record: records.VolumeRecord) -> records.VolumeRecord:
            return msgspec.structs.replace(record, uuid_hex="ab" * 16)

        await volume.update(other)
        done = volume.record.done
        rig.proxy.hold = None
        hold.set()
        await rig.until(lambda: "the history changed during a transfer" in volume.send_error)
        assert volume.record.done == done
