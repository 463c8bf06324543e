"""Hash backups at an archive: what differs becomes a diff, and the history goes on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import PROXY, STORAGE, ArchiveRig, offer_wdiff
from tests.kit.hash_feed import HashFeed
from walbd.daemon import hash_sync
from walbd.errors import ConnectError, RemoteError
from walbd.format.meta import Snapshot
from walbd.fs import failpoints
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import End, JobAccepted, JobState, Ok
from walbd.protocol.codec import Message
from walbd.protocol.sync import HashWanted
from walbd.protocol.transfer import BackupEnd, LogReset, Verdict
from walbd.units import LB

VOL = "vol0"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ArchiveRig]:
    async with ArchiveRig(tmp_path) as rig:
        yield rig


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges and packs in a small volume."""
    monkeypatch.setattr(hash_sync, "RANGE_B", 16 * LB)
    monkeypatch.setattr(hash_sync, "PACK_B", 16 * LB)


async def backed_up(rig: ArchiveRig, *, steps: int = 3, seed: int = 1, size_lb: int = 64) -> HashFeed:
    """Return a volume with a full backup and some diffs."""
    feed = HashFeed(rig, seed=seed, size_lb=size_lb)
    feed.scribble(20)
    await feed.init()
    await feed.full_backup()
    await feed.step(steps)
    return feed


async def gaps(rig: ArchiveRig) -> list[m.Gap]:
    return (await rig.call(m.GetGaps(volume=VOL))).gaps


def leftovers(rig: ArchiveRig) -> list[str]:
    return [path.name for path in (rig.base / VOL).iterdir() if path.name.startswith("tmp")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dirty", [0, 4])
async def test_the_history_goes_on(rig: ArchiveRig, dirty: int, seed: int) -> None:
    """Restore points from before stay; the first one after is where the logs of the scan lead to."""
    feed = await backed_up(rig, seed=seed)
    old = await feed.check()
    before = (await rig.status(VOL)).archive_uuid
    feed.lose(3)
    done = await feed.hash_backup(dirty=dirty)
    assert done.archive_uuid.hex() == before
    status = await rig.status(VOL)
    assert status.state == "Archived"
    assert status.uuid == feed.uuid.hex()
    assert await feed.check() == old  # nothing new is clean yet
    assert all(isinstance(word, Ok) for word in await feed.send())
    points = await feed.check()
    assert points == [*old, feed.gid]
    await feed.step(3)
    await rig.restart()
    assert await feed.check() == [*points, feed.gid - 2, feed.gid - 1, feed.gid]
    await rig.done(c.Apply(volume=VOL, gid=feed.gid))
    assert await feed.check() == [feed.gid]


async def test_only_what_differs_is_sent(rig: ArchiveRig) -> None:
    feed = await backed_up(rig)
    feed.write(0, 64)
    feed.snapshot()
    await feed.send()
    await feed.hash_backup()
    assert feed.found is not None
    assert feed.found.differing_b == 0
    feed.write(17, 1)
    feed.write(40, 2, "zero")
    await feed.hash_backup()
    assert feed.found.differing_b == 2 * 4 * LB
    (diff, _) = [d for d in (await rig.call(c.GetDiff(volume=VOL))).diffs if not d.end.is_clean]
    assert diff.size_b is not None
    await feed.send()
    await feed.check()


async def test_a_lost_answer_needs_nobody(rig: ArchiveRig) -> None:
    """The archive has the backup, the storage does not know: it runs another one, on the dirty snapshot."""
    feed = await backed_up(rig)
    feed.lose()
    failpoints.arm("archive.hash.before_done=eio")
    with pytest.raises(RemoteError):
        await feed.hash_backup(dirty=2)
    latest = rig.volume(VOL).latest.begin
    assert not latest.is_clean
    feed.lose()
    await feed.hash_backup(dirty=2)
    assert rig.volume(VOL).latest.begin.gid_b == latest.gid_e + 1
    await feed.send()
    points = await feed.check()
    assert points[-1] == feed.gid
    (gap,) = await gaps(rig)
    assert (gap.gid_b, gap.gid_e) == (points[-2], feed.gid)


async def test_diffs_meanwhile(rig: ArchiveRig) -> None:
    """Those of either history wait during the backup; afterwards only the new one counts."""
    feed = await backed_up(rig)
    feed.scribble()
    old = feed.snapshot()
    old_uuid, old_data = feed.uuid, feed._unsent[0][1]

    async def offer(uuid: bytes) -> Verdict | Ok:
        async with rig.dial(PROXY) as conn:
            return await offer_wdiff(conn, VOL, old, old_data, uuid=uuid, size_lb=feed.size_lb)

    async def mid_scan() -> None:
        assert await offer(old_uuid) is Verdict.SYNCING
        assert await offer(feed.uuid) is Verdict.SYNCING

    await feed.hash_backup(mid_scan=mid_scan)
    assert await offer(old_uuid) is Verdict.DIFFERENT_UUID
    assert all(isinstance(word, Ok) for word in await feed.send())
    await feed.check()


async def test_a_larger_device(rig: ArchiveRig, tmp_path: Path) -> None:
    feed = await backed_up(rig)
    feed.size_lb += 40
    feed.image += feed.rng.randbytes(40 * LB)
    with pytest.raises(RemoteError) as caught:
        await feed.hash_backup()
    assert caught.value.remote_code == "refused"
    assert "auto_resize" in caught.value.hint
    assert (await rig.status(VOL)).state == "Archived"
    rig.settings["auto_resize"] = True
    await rig.restart()
    await feed.hash_backup()
    await feed.send()
    assert (await rig.status(VOL)).size_lb == feed.size_lb
    assert await rig.restored_image(VOL, feed.gid) == bytes(feed.image)


async def test_a_smaller_device(rig: ArchiveRig) -> None:
    """What it does not have is zero in the new snapshot, and still there in the old ones."""
    feed = await backed_up(rig, size_lb=64)
    feed.write(40, 24)
    feed.snapshot()
    await feed.send()
    before = feed.gid
    feed.size_lb = 50
    del feed.image[50 * LB :]
    await feed.hash_backup()
    await feed.send()
    assert await rig.restored_image(VOL, feed.gid) == bytes(feed.image) + bytes(14 * LB)
    assert await rig.restored_image(VOL, before) == feed.images[before]


# --- refused, before the storage does anything


@pytest.mark.parametrize(
    ("why", "code"),
    [
        ("clear", "bad-state"),
        ("sync-ready", "bad-state"),
        ("stopped", "bad-state"),
        ("apply", "busy"),
        ("restore", "busy"),
        ("another", "busy"),
        ("larger", "refused"),
        ("empty", "usage"),
        ("proxy", "refused"),
        ("too-many-files", "not-reachable"),
        ("damaged", "corrupt-data"),
        ("no-room", "disk-full"),
        ("too-many-backups", "busy"),
        ("no-image", "not-found"),
    ],
)
async def test_refused_before_anything_happened(
    rig: ArchiveRig, why: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = HashFeed(rig)
    me, fields = STORAGE, dict[str, Any]()
    if why not in ("clear", "sync-ready"):
        feed = await backed_up(rig)
    before = await rig.status(VOL)
    ending = ExitStack()
    match why:
        case "sync-ready":
            await feed.init()
        case "stopped":
            await rig.stopped(VOL)
        case "apply" | "restore":
            ending.enter_context(rig.volume(VOL).machine.action(why.capitalize(), 1))
        case "another":
            rig.volume(VOL).machine.during = "WdiffRecv"
            ending.callback(rig.volume(VOL).machine.leave)
        case "larger":
            fields["size_lb"] = feed.size_lb + 1
        case "empty":
            fields["size_lb"] = 0
        case "proxy":
            me = PROXY
        case "too-many-files":
            rig.settings["scan_files_max"] = 2
            await rig.restart()
        case "damaged":
            path = sorted((rig.base / VOL).glob("*.wdiff"))[0]
            data = bytearray(path.read_bytes())
            data[32 + 20] ^= 1
            path.write_bytes(data)
        case "no-room":
            rig.settings["free_reserve_b"] = 1 << 60
            await rig.restart()
        case "too-many-backups":
            rig.server._backups.n_max = 0
        case "no-image":
            (rig.base / VOL / "base.img").rename(rig.base / VOL / "gone")
    async with rig.dial(me) as conn:
        with pytest.raises(RemoteError) as caught:
            await conn.call(feed.hash_offer(**fields))
    assert caught.value.remote_code == code
    ending.close()
    if why not in ("clear", "sync-ready"):
        assert rig.volume(VOL).record.uuid == before.uuid
        assert rig.volume(VOL).machine.at_rest
        assert not leftovers(rig)


# --- cut short


class Cut(Exception):
    """The storage ends the connection here."""


async def cut_at(rig: ArchiveRig, feed: HashFeed, message_no: int) -> bool:
    """Run a backup whose connection breaks at a message of the storage; tell whether it got that far."""
    count = itertools.count()
    async with rig.dial(STORAGE) as conn:
        send = conn.send

        async def send_or_cut(message: Message, *payload: Any) -> None:
            if next(count) == message_no:
                conn.abort()
                raise Cut
            await send(message, *payload)

        conn.send = send_or_cut  # type: ignore[method-assign]
        try:
            await feed.hash_backup(dirty=1, conn=conn)
        except (Cut, ConnectError):
            return True
    return False


async def test_the_connection_breaks_at_every_message(rig: ArchiveRig) -> None:
    """The volume is Archived in its old history, as if nothing had been; the next backup succeeds."""
    feed = await backed_up(rig)
    old_uuid, cuts = rig.volume(VOL).record.uuid, 0
    points = await feed.check()
    latest = rig.volume(VOL).latest
    images = feed.images
    for number in itertools.count():
        feed.lose()
        feed.images = dict(images)
        if not await cut_at(rig, feed, number):
            break
        cuts += 1
        await rig.settled()
        assert rig.volume(VOL).latest == latest
        assert rig.volume(VOL).record.uuid == old_uuid
        assert not leftovers(rig)
        assert not await gaps(rig)
    assert cuts > 8
    assert rig.volume(VOL).record.uuid == feed.uuid.hex()
    await feed.send()
    assert await feed.check() == [*points, feed.gid]


async def test_the_old_history_goes_on_after_a_failure(rig: ArchiveRig) -> None:
    feed = await backed_up(rig)
    feed.scribble()
    diff = feed.snapshot()
    uuid, data = feed.uuid, feed._unsent[0][1]
    image = feed.images[feed.gid]
    await cut_at(rig, feed, 5)
    await rig.settled()
    async with rig.dial(PROXY) as conn:
        assert isinstance(await offer_wdiff(conn, VOL, diff, data, uuid=uuid, size_lb=feed.size_lb), Ok)
    assert await rig.restored_image(VOL, diff.end.gid_b) == image


@pytest.mark.parametrize("why", ["same-uuid", "no-gid", "gid-below", "early-end", "ends-at-once"])
async def test_a_storage_that_does_wrong(rig: ArchiveRig, why: str) -> None:
    feed = await backed_up(rig)
    uuid = bytes.fromhex(rig.volume(VOL).record.uuid)
    latest = rig.volume(VOL).latest.begin
    async with rig.dial(STORAGE) as conn:
        if why == "same-uuid":
            await conn.call(feed.hash_offer())
            with pytest.raises(RemoteError) as caught:
                await conn.call(LogReset(uuid=uuid))
        elif why == "early-end":
            await conn.call(feed.hash_offer())
            await conn.call(LogReset(uuid=bytes(range(16))))
            await conn.send(HashWanted(offset_b=0, size_b=4 * LB))
            await conn.receive()
            await conn.send(End())
            with pytest.raises(RemoteError) as caught:
                await conn.expect(Ok)
        else:
            call = conn.call
            wrong = {
                "no-gid": Snapshot(Gid(latest.gid_e + 1), Gid(1 << 63)),
                "gid-below": Snapshot(Gid(latest.gid_e), Gid(latest.gid_e + 2)),
                "ends-at-once": Snapshot.clean(latest.gid_e + 1),
            }[why]

            async def lie(request: Any, *payload: Any, **options: Any) -> Any:
                return await call(BackupEnd(snapshot=wrong) if isinstance(request, BackupEnd) else request)

            conn.call = lie  # type: ignore[method-assign]
            with pytest.raises(RemoteError) as caught:
                await feed.hash_backup(conn=conn)
    assert caught.value.remote_code == "remote-protocol"
    assert rig.volume(VOL).latest.begin == latest
    assert rig.volume(VOL).record.uuid == uuid.hex()
    assert not leftovers(rig)


async def test_forced_and_graceful_stop(rig: ArchiveRig) -> None:
    feed = await backed_up(rig)
    uuid = feed.uuid
    jobs: list[int] = []
    forcing: list[asyncio.Task[JobAccepted]] = []

    async def stop_by_force() -> None:
        """The scan may fail, and cancel us, before the answer to the stop is here."""
        forcing.append(asyncio.create_task(rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))))
        await asyncio.shield(forcing[0])

    with pytest.raises((RemoteError, ConnectError)):
        await feed.hash_backup(mid_scan=stop_by_force)
    assert (await rig.ended((await forcing[0]).job)).state is JobState.DONE
    assert (await rig.status(VOL)).state == "Stopped"
    assert rig.volume(VOL).record.uuid == uuid.hex()
    assert not leftovers(rig)

    await rig.call(c.Start(volume=VOL))

    async def stop() -> None:
        jobs.append((await rig.call(c.Stop(volume=VOL))).job)
        assert (await rig.status(VOL)).state == "HashSync"

    await feed.hash_backup(mid_scan=stop)
    assert (await rig.ended(jobs[0])).state is JobState.DONE
    assert rig.volume(VOL).record.uuid == feed.uuid.hex()
    await rig.call(c.Start(volume=VOL))
    await feed.send()
    await feed.check()


async def test_work_beside_the_scan(rig: ArchiveRig) -> None:
    """The image that is compared stays what it was: nothing is applied; merges and restores do no harm."""
    feed = await backed_up(rig, steps=5)
    feed.lose()
    gid = feed.gid

    async def beside() -> None:
        with pytest.raises(RemoteError) as caught:
            await rig.call(c.Apply(volume=VOL, gid=gid))
        assert caught.value.remote_code == "busy"
        for command in (c.ResetVol(volume=VOL), c.ClearVol(volume=VOL), c.Start(volume=VOL)):
            with pytest.raises(RemoteError):
                await rig.call(command)
        await rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=gid - 1))
        assert await rig.restored_image(VOL, gid) == feed.images[gid]
        await rig.call(m.EnableSnapshot(volume=VOL, gids=[gid - 1]))
        assert (await rig.status(VOL)).state == "HashSync"

    await feed.hash_backup(dirty=3, mid_scan=beside)
    await feed.send()
    await feed.check()
    await rig.done(c.Apply(volume=VOL, gid=feed.gid))
    assert await feed.check() == [feed.gid]


async def test_progress_and_action(rig: ArchiveRig) -> None:
    feed = await backed_up(rig)
    seen: list[int] = []

    async def look() -> None:
        seen.append((await rig.call(c.GetProgress(volume=VOL))).value)

    await feed.hash_backup(before_end=look)
    assert seen == [feed.size_lb]
    assert (await rig.call(c.GetProgress(volume=VOL))).value == 0


# --- crashes and disks that fail


HASH_POINTS = [name for name in failpoints.registered() if name.startswith("archive.hash.")]
COMMIT_POINTS = [
    "archive.wdiff.before_commit",
    "archive.wdiff.after_commit",
    "archive.record.before_save",
    "archive.record.after_save",
    "archive.record.before_save=eio@1",
    "archive.record.after_save=eio@1",
]


@pytest.mark.parametrize("after", ["crash", "go-on"])
@pytest.mark.parametrize("point", [*HASH_POINTS, *COMMIT_POINTS])
async def test_a_disk_that_fails(rig: ArchiveRig, point: str, after: str) -> None:
    """All or nothing: the old history without the backup, or the new one with it, now and after a restart."""
    feed = await backed_up(rig)
    old = rig.volume(VOL).record.uuid
    old_points = await feed.check()
    feed.lose(2)
    armed = point if "=" in point else f"{point}=eio"

    async def arm() -> None:
        failpoints.arm(armed)

    if point.startswith("archive.hash."):
        await arm()
        backup = feed.hash_backup(dirty=1)
    else:
        backup = feed.hash_backup(dirty=1, before_end=arm)
    with pytest.raises(RemoteError) as caught:
        await backup
    assert caught.value.remote_code == "disk-failed"
    failpoints.disarm()
    if after == "crash":
        await rig.restart()
    volume = rig.volume(VOL)
    assert str(volume.machine.state) == "Archived"
    if volume.record.uuid == old:
        assert volume.latest.begin.is_clean
        assert not volume.record.gaps
    else:
        assert volume.record.uuid == feed.uuid.hex()
        assert not volume.latest.begin.is_clean
        assert len(volume.record.gaps) == 1
        await feed.send()
        await feed.check()
    assert volume.record.pending is None
    feed.lose()
    await feed.hash_backup(dirty=1)
    await feed.send()
    await rig.restart()
    points = await feed.check()
    assert points[: len(old_points)] == old_points
    assert points[-1] == feed.gid
    assert len(await gaps(rig)) in (1, 2)


# --- gaps


async def test_gaps(rig: ArchiveRig) -> None:
    """A gap goes from the last clean snapshot to the first after it, and vanishes with the points around it."""
    feed = await backed_up(rig)
    first = feed.gid
    begin_s = (await rig.status(VOL)).latest_time
    assert await gaps(rig) == []
    feed.now += 100
    await feed.hash_backup(dirty=2)
    expected = m.Gap(begin=begin_s, end=0, gid_b=first, gid_e=0, cause="hash-backup")
    assert await gaps(rig) == [expected]
    await feed.hash_backup(dirty=1)  # nothing clean came between: it is the same gap
    assert await gaps(rig) == [expected]
    await feed.send()
    after = feed.gid
    (gap,) = await gaps(rig)
    assert (gap.begin, gap.gid_b, gap.gid_e) == (begin_s, first, after)
    assert gap.end == (await rig.status(VOL)).latest_time > gap.begin
    await rig.restart()
    assert await gaps(rig) == [gap]
    await feed.step(2)
    second = feed.gid
    await feed.hash_backup()
    await feed.send()
    assert [(g.gid_b, g.gid_e) for g in await gaps(rig)] == [(first, after), (second, feed.gid)]
    await rig.done(c.Apply(volume=VOL, gid=after))
    assert [(g.gid_b, g.gid_e) for g in await gaps(rig)] == [(second, feed.gid)]
    third = feed.gid
    await feed.hash_backup()  # the record forgets, too, when it changes
    assert [g.gid_b for g in rig.volume(VOL).record.gaps] == [second, third]
    await rig.stopped(VOL)
    await rig.call(c.ResetVol(volume=VOL))
    await feed.full_backup()
    assert await gaps(rig) == []


async def test_no_gap_without_a_restore_point(rig: ArchiveRig) -> None:
    """A full backup that never became clean could not be restored before, either."""
    feed = HashFeed(rig)
    await feed.init()
    feed.scribble()
    await feed.full_backup(dirty=2)
    await feed.hash_backup(dirty=1)
    assert await gaps(rig) == []
    await feed.send()
    assert await feed.check() == [feed.gid]
    assert await gaps(rig) == []


async def test_gaps_of_an_unknown_volume(rig: ArchiveRig) -> None:
    with pytest.raises(RemoteError) as caught:
        await gaps(rig)
    assert caught.value.remote_code == "bad-state"
