"""Replication between real archives: what each kind leaves at the destination, byte for byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.replicas import VOL, Group
from walbd.archive import replicate_in, replicate_out
from walbd.archive.image_receiver import ImageReceiver
from walbd.archive.states import Command
from walbd.archive.wdiff_sink import take_stream
from walbd.errors import RemoteError
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol.base import JobState, Ok
from walbd.protocol.maintenance import ForgetReplica, GetGaps, GetReplicaPositions, Merge
from walbd.protocol.sync import ReplicateState
from walbd.protocol.transfer import Verdict
from walbd.units import LB, MIB


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    async with Group(tmp_path) as group:
        yield group


# --- kinds


async def test_full_then_rounds(group: Group) -> None:
    feed = await group.feed(dirty=2)
    await feed.send()
    await feed.step(3)
    await group.init(1)
    info = await group.replicate(0, 1)
    assert (info.result["kind"], info.result["gid"]) == ("full", 5)
    assert await group.check(feed, 1) == [5]
    old, new = group.volume(0), group.volume(1)
    assert (new.record.archive_uuid, new.record.uuid) == (old.record.archive_uuid, old.record.uuid)
    assert new.base == old.base
    assert new.record.full_progress is None
    await feed.step(2)
    info = await group.replicate(0, 1, dont_merge=True)
    assert (info.result["kind"], info.result["rounds"]) == ("rounds", 2)
    assert await group.check(feed, 1) == [5, 6, 7]
    assert (await group.replicate(0, 1)).result["rounds"] == 0


async def test_dirty_base_without_diffs(group: Group) -> None:
    feed = await group.feed(dirty=2)
    await group.init(1)
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == []
    await feed.send()
    await feed.step()
    await group.replicate(0, 1)
    assert (await group.check(feed, 1))[-1] == 3


async def test_merged_up_to_a_limit(group: Group) -> None:
    feed = await group.feed()
    await feed.step(6)
    await group.init(1)
    total = group.volume(0).diffs.size_b
    assert total < MIB
    info = await group.replicate(0, 1, merge_size_max_b=MIB)
    assert info.result["rounds"] == 1


async def test_explicit_snapshots_survive(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    await feed.step(mergeable=False)  # protects 2
    await feed.step(2)
    await group.init(1)
    info = await group.replicate(0, 1)
    assert info.result["rounds"] == 2
    assert await group.check(feed, 1) == [0, 2, 5]
    points = (await group[1].call(c.GetRestorable(volume=VOL))).points
    assert [point.gid for point in points if point.explicit] == [2, 5]


async def test_base_in_the_middle_of_an_apply(group: Group) -> None:
    """The image sent is the base with what the apply was about to write."""
    feed = await group.feed()
    await feed.step(4)
    failpoints.arm("archive.apply.mid_write=eio")
    info = await group[0].job(c.Apply(volume=VOL, gid=3))
    assert info.state is JobState.FAILED
    assert group.volume(0).base.is_applying
    await group.init(1)
    await group.replicate(0, 1)
    assert not group.volume(1).base.is_applying
    assert await group.check(feed, 1) == [3, 4]
    await group[0].done(c.Apply(volume=VOL, gid=3))
    assert await group.check(feed, 0) == [3, 4]


async def test_comparing_when_the_diffs_are_gone(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(4)
    await group[0].done(c.Apply(volume=VOL, gid=5))
    info = await group.replicate(0, 1)
    assert (info.result["kind"], info.result["rounds"]) == ("rounds", 2)
    assert await group.check(feed, 1) == [0, 2, 5, 6]
    (compared,) = [diff for diff in group.volume(1).diffs if diff.comp]
    assert (compared.begin.gid_b, compared.end.gid_b, compared.mergeable) == (2, 5, True)
    (gap,) = (await group[1].call(GetGaps(volume=VOL))).gaps
    assert (gap.gid_b, gap.gid_e, gap.cause) == (2, 5, "hash-replication")
    await group[1].restart()
    assert await group.check(feed, 1) == [0, 2, 5, 6]


async def test_resync_of_another_lineage(group: Group) -> None:
    feed = await group.feed(size_lb=2048)
    feed.write(0, 2048)
    await feed.step(2)
    other = await group.feed(1, seed=2, size_lb=2048, image=bytes(feed.image))
    other.write(100, 8)
    await other.step()
    await group[1].done(c.Restore(volume=VOL, gid=1))
    with pytest.raises(RemoteError, match="another lineage") as caught:
        await group.replicate(0, 1)
    assert "resync" in caught.value.hint
    assert await group[1].points(VOL) == [0, 1]
    await group[0].done(c.Apply(volume=VOL, gid=2))
    info = await group.replicate(0, 1, resync=True, bulk_b=4096)
    assert info.result["kind"] == "resync"
    assert int(str(info.result["wire_b"])) < 128 << 10  # of 1 MiB, most of which is equal
    volume = group.volume(1)
    assert volume.restored == set()
    assert volume.record.archive_uuid == group.volume(0).record.archive_uuid
    assert await group.check(feed, 1) == [2]
    await feed.step()
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [2, 3]


async def test_resync_on_demand_and_after_a_failure(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    await group.replicate(0, 1)
    path = group[1].base / VOL / "base.img"
    path.write_bytes(b"\x77" * 4096 + path.read_bytes()[4096:])  # nobody knows of it
    for name, state in [
        ("archive.repl_resync.after_reset", "SyncReady"),
        ("archive.repl_resync.mid_write", "SyncReady"),
    ]:
        failpoints.arm(f"{name}=eio")
        info = await group.failing(0, 1, resync=True, bulk_b=512)
        assert "Input/output error" in info.error
        await group[1].settled()
        assert await group[1].state(VOL) == state
        assert not group.volume(1).diffs
    with pytest.raises(RemoteError, match="not allowed"):
        await group[1].call(c.Apply(volume=VOL, gid=1))
    info = await group.replicate(0, 1, resync=True)
    assert info.result["kind"] == "resync"
    assert await group.check(feed, 1) == [0, 2]


async def test_sync_ready_is_filled_by_a_full_copy_unless_resync_is_asked_for(group: Group) -> None:
    feed = await group.feed()
    await group.init(1)
    assert (await group.replicate(0, 1, resync=True)).result["kind"] == "full"  # there is no image
    assert await group.check(feed, 1) == [0]


async def test_three_in_a_row(tmp_path: Path) -> None:
    """A replica is the source of another one, and brings what it has got by comparing, too."""
    async with Group(tmp_path, 3) as group:
        feed = await group.feed()
        await feed.step(2)
        await group.init(1, 2)
        await group.replicate(0, 1)
        await group.replicate(1, 2)
        await feed.step(3)
        await group[0].done(c.Apply(volume=VOL, gid=4))
        await group.replicate(0, 1)
        assert any(diff.comp for diff in group.volume(1).diffs)
        info = await group.replicate(1, 2, dont_merge=True)
        assert info.result["rounds"] == 2
        assert any(diff.comp for diff in group.volume(2).diffs)
        assert await group.check(feed, 2) == await group.check(feed, 1) == [0, 2, 4, 5]
        gaps = [(await group[n].call(GetGaps(volume=VOL))).gaps for n in (1, 2)]
        assert gaps[0] == gaps[1] != []


# --- where it ends


async def test_up_to_a_generation(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    await feed.step(4, mergeable=False)
    info = await group.replicate(0, 1, gid=4)
    assert info.result["gid"] == 4
    assert await group.check(feed, 1) == [0, 2, 3, 4]
    assert (await group.replicate(0, 1, gid=3)).result["rounds"] == 0


async def test_until_little_is_left(group: Group) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(4)
    diffs = list(group.volume(0).diffs)
    left_b = sum(diff.size_b for diff in diffs)
    assert (await group.replicate(0, 1, size_b=left_b)).result["rounds"] == 0
    last_b = sum(diff.size_b for diff in diffs[2:])
    info = await group.replicate(0, 1, size_b=last_b, dont_merge=True)
    assert info.result["rounds"] == 2
    assert (await group.replicate(0, 1, size_b=0)).result["gid"] == 4
    assert await group.check(feed, 1) == [0, 1, 2, 4]


Hook = Callable[[], Awaitable[Any]]


def at_each_look(monkeypatch: pytest.MonkeyPatch, *hooks: Hook | None) -> None:
    """Do something each time the source has heard what the destination has."""
    waiting = list(hooks)
    real = replicate_out.Replication._note

    async def note(self: replicate_out.Replication, state: ReplicateState) -> None:
        await real(self, state)
        hook = waiting.pop(0) if waiting else None
        if hook is not None:
            await hook()

    monkeypatch.setattr(replicate_out.Replication, "_note", note)


async def test_what_arrives_meanwhile(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    at_each_look(monkeypatch, feed.step, feed.step, feed.step)
    info = await group.replicate(0, 1, size_b=0)
    assert info.result["gid"] == 5
    at_each_look(monkeypatch, feed.step, feed.step)
    info = await group.replicate(0, 1, dont_merge=True)
    assert info.result["gid"] == 5  # what was the latest at the beginning
    at_each_look(monkeypatch, None)
    await group.replicate(0, 1)
    assert (await group.check(feed, 1))[-1] == feed.gid == 7


async def test_merges_and_restores_beside_it(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging leaves the place where the destination stands, and an apply is kept out."""
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(4)

    async def beside() -> None:
        assert (await group[0].job(Merge(volume=VOL, gid_b=2, gid_e=6))).state is JobState.DONE
        with pytest.raises(RemoteError, match="must be kept"):
            await group[0].call(Merge(volume=VOL, gid_b=0, gid_e=6))
        with pytest.raises(RemoteError, match="excludes"):
            await group[0].call(c.Apply(volume=VOL, gid=2))
        assert await group[0].restored_image(VOL, 2) == feed.images[2]

    at_each_look(monkeypatch, beside)
    info = await group.replicate(0, 1, dont_merge=True)
    assert info.result["rounds"] == 1
    assert await group.check(feed, 1) == [0, 2, 6]


async def test_proxies_send_to_the_destination_between_rounds(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(4)

    async def sent() -> None:
        assert await feed.send_to(group[1], 0, 2) == [Ok(), Ok()]

    at_each_look(monkeypatch, sent)  # after the source has looked: its first round is not accepted
    info = await group.replicate(0, 1)
    assert (info.result["rounds"], info.result["gid"]) == (1, 4)
    assert await group.check(feed, 1) == [0, 1, 2, 4]
    feed.scribble()
    feed.snapshot()
    assert await feed.send_to(group[1], 4) == [Ok()]
    info = await group.replicate(0, 1)
    assert (info.result["rounds"], info.result["gid"]) == (0, 5)  # it is ahead


async def test_wdiffs_of_proxies_wait_for_a_round_and_rounds_for_them(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    volume = group.volume(1)
    step = volume.enter(Command.WDIFF_TRANSFER)  # a wdiff is being received
    number = (await group[0].call(group.request(1))).job
    await group.volume(0).machine.changed.wait_for(lambda: bool(group.volume(0).record.replicas[0].seen))
    words: list[object] = []
    real = take_stream

    async def take(*args: Any) -> None:
        assert volume.machine.shown == "ReplSyncAsServer"
        words.extend(await feed.send_to(group[1], 0, 1))
        await real(*args)

    monkeypatch.setattr(replicate_in, "take_stream", take)
    assert step.during == "WdiffRecv"
    volume.machine.leave()
    info = await group[0].ended(number)
    assert info.state is JobState.DONE, info
    assert words == [Verdict.NOT_READY]
    assert await group.check(feed, 1) == [0, 2]


# --- copies that were cut


SIZE_LB = 4 * MIB // LB
PACKED_B = 180_000  # what the data of a feed of that size is packed to


async def big(tmp_path: Path) -> Group:
    return Group(tmp_path, fsync_interval_b=MIB)


@pytest.mark.parametrize(("writes", "resumed_b"), [(0, 0), (1, 2 * MIB)])
async def test_full_copy_goes_on_where_it_was_cut(tmp_path: Path, writes: int, resumed_b: int) -> None:
    async with await big(tmp_path) as group:
        feed = await group.feed(size_lb=SIZE_LB)
        feed.write(0, SIZE_LB)
        await feed.step()
        await group[0].done(c.Apply(volume=VOL, gid=1))
        await group.init(1)
        failpoints.arm(f"archive.full.mid_write=eio@{writes}")
        await group.failing(0, 1)
        await group[1].settled()
        assert await group[1].state(VOL) == "SyncReady"
        progress = group.volume(1).record.full_progress
        assert (progress.offset_b if progress else 0) == resumed_b
        await group[1].restart()
        info = await group.replicate(0, 1)
        assert info.result["wire_b"] == pytest.approx(PACKED_B * (1 - resumed_b / 4 / MIB), rel=0.1)
        assert await group.check(feed, 1) == [1]


async def test_full_copy_that_was_complete(tmp_path: Path) -> None:
    async with await big(tmp_path) as group:
        feed = await group.feed(size_lb=SIZE_LB)
        feed.write(0, SIZE_LB)
        await feed.step()
        await group[0].done(c.Apply(volume=VOL, gid=1))
        await group.init(1)
        failpoints.arm("archive.repl_full.before_commit=eio")
        await group.failing(0, 1)
        info = await group.replicate(0, 1)
        assert info.result["wire_b"] == 0
        assert await group.check(feed, 1) == [1]


@pytest.mark.parametrize("between", ["apply", "backup", "reset"])
async def test_full_copy_of_something_else_begins_anew(tmp_path: Path, between: str) -> None:
    async with await big(tmp_path) as group:
        feed = await group.feed(size_lb=SIZE_LB)
        feed.write(0, SIZE_LB)
        await feed.step()
        await group[0].done(c.Apply(volume=VOL, gid=1))
        await group.init(1)
        failpoints.arm("archive.repl_full.before_commit=eio")
        await group.failing(0, 1)
        await group[1].settled()
        if between == "apply":
            feed.write(0, SIZE_LB)
            await feed.step()
            await group[0].done(c.Apply(volume=VOL, gid=2))
        elif between == "reset":
            await group[1].call(c.ResetVol(volume=VOL))
        else:
            other = type(feed)(group[1], seed=8, size_lb=SIZE_LB)
            other.write(0, SIZE_LB)
            failpoints.arm("archive.full.before_commit=eio")
            with pytest.raises(RemoteError):
                await other.full_backup()
            await group[1].settled()
            assert group.volume(1).record.full_progress is None
        info = await group.replicate(0, 1)
        assert info.result["wire_b"] == pytest.approx(PACKED_B, rel=0.1)
        assert await group.check(feed, 1) == [feed.gid]


# --- stopping


async def test_forced_stop_at_either_side_in_the_middle_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Group(tmp_path, io_timeout_s=5.0) as group:
        await forced_stops_of_a_copy(group, monkeypatch)


async def forced_stops_of_a_copy(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    never = asyncio.Event()
    began = asyncio.Event()

    async def stuck(*_args: Any) -> None:
        began.set()
        await never.wait()

    for side in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(ImageReceiver, "_take", stuck)
            began.clear()
            number = (await group[0].call(group.request(1))).job
            await began.wait()
            if side == 0:
                await group[0].done(c.Stop(volume=VOL, how=c.StopHow.FORCE))
            else:  # SyncReady cannot be stopped: the daemon is
                group[1].server._forced = True
                group.volume(1).machine.changed.set()
            info = await group[0].ended(number)
            assert info.state is JobState.FAILED
            assert info.error_code == "force-stopped"
            await group[1].settled()
            assert await group[1].state(VOL) == "SyncReady"
        if side == 0:
            await group[0].call(c.Start(volume=VOL))
        else:
            await group[1].restart()
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [0, 2]


async def test_forced_stop_at_either_side_in_the_middle_of_a_round(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    never, began = asyncio.Event(), asyncio.Event()

    async def stuck(*_args: Any, **_options: Any) -> None:
        began.set()
        await never.wait()

    places = (replicate_out, "send_wdiff"), (replicate_in, "take_stream")
    for side in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(*places[side], stuck)
            began.clear()
            number = (await group[0].call(group.request(1))).job
            await began.wait()
            await group[side].done(c.Stop(volume=VOL, how=c.StopHow.FORCE))
            info = await group[0].ended(number)
            assert info.state is JobState.FAILED
            await group[1].settled()
            if side == 1:
                assert await group[1].state(VOL) == "Stopped"
                with pytest.raises(RemoteError, match="not allowed"):
                    await group.replicate(0, 1)
            await group[side].call(c.Start(volume=VOL))
    assert [name for name in (group[1].base / VOL).iterdir() if name.name.startswith("tmp")] == []
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [0, 2]


async def test_destination_goes_away_and_comes_back(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(4, mergeable=False)
    at_each_look(monkeypatch, None, None, group[1].crash)
    info = await group.failing(0, 1)
    assert info.error_code in ("connect", "timed-out")
    (row,) = (await group[0].call(GetReplicaPositions(volume=VOL))).rows
    assert (row.gid, row.failures) == (2, 1)
    assert row.error
    with pytest.raises(RemoteError) as caught:  # nothing listens there: not even accepted
        await group[0].call(group.request(1))
    assert caught.value.remote_code == "connect"
    await group[1].up()
    await group[1].call(c.GetState(volume=VOL))
    at_each_look(monkeypatch)
    info = await group.replicate(0, 1)
    assert info.result["rounds"] == 2
    assert await group.check(feed, 1) == [0, 1, 2, 3, 4]


# --- positions


async def test_positions_are_kept_shown_and_forgotten(group: Group) -> None:
    feed = await group.feed()
    await feed.step(3)
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    await group[0].restart()
    (row,) = (await group[0].call(GetReplicaPositions(volume=VOL))).rows
    assert (row.node, row.gid, row.failures, row.error) == ("a1", 3, 0, "")
    assert group.volume(0).replica_gids() == [3]
    (lag,) = (await group[0].call(c.GetTsDelta())).rows
    assert (lag.dest, lag.gid, lag.dest_gid, lag.delta_s) == ("a1", 5, 3, 2)
    (hop,) = (await group[0].status(VOL)).hops
    assert (hop.dest, hop.diffs, hop.gid_b, hop.gid_e, hop.error, hop.sending) == ("a1", 2, 3, 5, False, False)
    with pytest.raises(RemoteError) as caught:
        await group[0].call(ForgetReplica(volume=VOL, node="a7"))
    assert caught.value.remote_code == "not-found"
    await group[0].call(ForgetReplica(volume=VOL, node="a1"))
    assert group.volume(0).replica_gids() == []
    assert (await group[0].call(c.GetTsDelta())).rows == []


async def test_a_refusal_is_noted_where_the_destination_is_known(group: Group) -> None:
    await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await group[1].stopped(VOL)
    with pytest.raises(RemoteError):
        await group[0].call(group.request(1))
    (hop,) = (await group[0].status(VOL)).hops
    assert hop.error
    assert "not allowed in this state" in hop.error_text
    await group[1].call(c.Start(volume=VOL))
    await group.replicate(0, 1)
    (hop,) = (await group[0].status(VOL)).hops
    assert not hop.error


# --- histories


async def test_a_new_history_is_replicated(group: Group) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    feed.write(3, 5)
    await feed.hash_backup()
    await feed.send()
    await feed.step(2)
    info = await group.replicate(0, 1)
    assert not any(diff.comp for diff in group.volume(1).diffs), info.result
    assert group.volume(1).record.uuid == feed.uuid.hex()
    points = await group.check(feed, 1)
    assert points[-1] == feed.gid
    (gap,) = (await group[1].call(GetGaps(volume=VOL))).gaps
    assert gap.cause == "hash-backup"
    feed.scribble()
    feed.snapshot()
    assert await feed.send_to(group[1], -1) == [Ok()]  # proxies go on there in the new history


async def test_a_destination_that_is_ahead_in_an_abandoned_history(group: Group) -> None:
    """It got wdiffs that never came to us before the log was lost. Generations repeat; only comparing helps."""
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    old, truth = feed.uuid, dict(feed.images)
    for _ in range(4):
        feed.scribble()
        feed.snapshot()
        truth = dict(feed.images)
    assert await feed.send_to(group[1]) == [Ok()] * 6
    assert await group.check(feed, 1) == [0, 1, 2, 3, 4, 5, 6]
    await feed.hash_backup()  # from 2 at archive 0: its generations begin at 3 again
    assert feed.uuid != old
    await feed.send()
    info = await group.failing(0, 1)
    assert info.error_code == "history-broken"
    assert "ahead" in info.error
    await feed.step(6)
    assert Verdict.DIFFERENT_UUID in await feed.send_to(group[1], -1)
    await group.replicate(0, 1)
    images = dict(feed.images)
    feed.images = truth | {gid: images[gid] for gid in images if gid > 6}
    points = await group.check(feed, 1)
    assert points[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert points[-1] == feed.gid
    assert [diff.begin.gid_b for diff in group.volume(1).diffs if diff.comp] == [6]
    assert group.volume(1).record.uuid == feed.uuid.hex()
