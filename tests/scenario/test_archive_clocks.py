"""A storage whose clock is set back: its snapshots neither grow old at once nor take the place of good ones."""

from __future__ import annotations

import asyncio

import pytest

from tests.kit.feeder import NOW
from tests.kit.hash_feed import HashFeed
from tests.kit.policy_rig import TimedFeed, VirtualArchive
from tests.kit.virtual import run
from walbd.archive.dating import SLACK_S, Dating
from walbd.format.meta import BaseState, Diff, DiffManager, Snapshot
from walbd.format.policy import Grid, Policy
from walbd.protocol import control as c
from walbd.protocol.policy import SetPolicy

VOL = "vol0"
HOUR, DAY, YEAR = 3600, 86_400, 31_536_000


class ShiftedFeed(TimedFeed):
    """A storage whose clock goes wrong by `shift_s`, and whose wdiffs come `late_s` late."""

    shift_s = 0

    def snapshot(self, *, mergeable: bool = True) -> Diff:
        clock = self.rig.env.clock
        real = clock.now
        try:
            clock.now = lambda: real() + self.shift_s  # type: ignore[method-assign]
            return super().snapshot(mergeable=mergeable)
        finally:
            clock.now = real  # type: ignore[method-assign]


async def quiet(rig: VirtualArchive) -> list[int]:
    rig.server.policy.reset(VOL)
    await asyncio.sleep(120)
    return await rig.points(VOL)


async def fed(rig: VirtualArchive, keep: str) -> ShiftedFeed:
    feed = ShiftedFeed(rig, VOL)
    await feed.init()
    await rig.call(SetPolicy(volume=VOL, policy=Policy(levels=(), keep=Grid.parse(keep), apply_interval_s=0)))
    await feed.full_backup()
    return feed


@pytest.mark.parametrize("restart", [False, True])
def test_points_of_a_clock_set_back_are_as_old_as_they_are(restart: bool) -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:
            feed = await fed(rig, "all=12h")
            for shift_s in (0, -50 * YEAR, 0):
                feed.shift_s = shift_s
                if restart:
                    await rig.restart()
                await feed.live(2 * HOUR, interval_s=600, explicit=1)
            points = await quiet(rig)
            assert len(points) == feed.gid + 1  # all of them are of today
            times = [p.timestamp for p in (await rig.call(c.GetRestorable(volume=VOL, all_points=True))).points]
            assert times == sorted(times)
            shown = dict(zip(points, times, strict=True))
            for gid, time in feed.times.items():
                wrong = 12 < gid <= 24
                assert abs(shown[gid] - time - 50 * YEAR * wrong) <= 600 * (1 + restart), gid
            assert await feed.check() == points

    run(main())


def test_no_point_takes_the_place_of_a_good_one_of_a_time_gone_by() -> None:
    """As one who has taken a storage over could wish: the backups of last days, one by one."""

    async def main() -> None:
        async with VirtualArchive() as rig:
            feed = await fed(rig, "daily=4")
            for _ in range(4):
                await feed.live(DAY, interval_s=DAY // 2, explicit=1)
            good = await quiet(rig)
            assert len(good) >= 4
            feed.shift_s = 10 * YEAR
            await feed.step(mergeable=False)  # ahead, so that everything after it is behind
            for day in range(5):
                now = rig.env.clock.now()
                feed.shift_s = -(now % DAY) - DAY * day - 2  # the last second of that day
                await feed.step(mergeable=False)
            feed.shift_s = 0
            await feed.step(mergeable=False)
            points = await quiet(rig)
            today = [gid for gid in good if feed.times.get(gid, NOW) // DAY == rig.env.clock.now() // DAY]
            assert set(good) - set(today) <= set(points)

    run(main())


def test_a_hash_backup_is_dated_like_the_others() -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:
            feed = HashFeed(rig, VOL)
            await feed.init()
            feed.now = rig.env.clock.now() - 2
            await feed.full_backup()
            await feed.step(2)
            feed.lose()
            feed.now -= 2 * YEAR
            await feed.hash_backup()
            await feed.send()
            times = [diff.timestamp for diff in rig.volume(VOL).diffs]
            assert max(times) - min(times) < 10

    run(main())


def diff(gid: int, timestamp: int) -> Diff:
    return Diff(Snapshot.clean(gid), Snapshot.clean(gid + 1), timestamp=timestamp)


def test_what_is_taken_for_a_wrong_clock() -> None:
    def ask(timestamp: int, now: int) -> int:
        return dating.dated(diff(9, timestamp), base, diffs, now).timestamp

    base = BaseState(Snapshot.clean(0), timestamp=NOW)
    diffs = DiffManager([diff(0, NOW + 5), diff(1, NOW + YEAR)])
    dating = Dating()
    assert ask(NOW + 10, NOW + 12) == NOW + 10
    assert ask(NOW + 10 - SLACK_S, NOW + 14) == NOW + 10 - SLACK_S  # clocks differ
    dating = Dating()
    assert ask(0, NOW + 12) == NOW + 5  # how late it is, nobody knows after a start
    assert ask(0, NOW + 19) == NOW + 12
    dating = Dating()
    assert ask(NOW + 100, NOW + 110) == NOW + 100
    assert ask(0, NOW + 130) == NOW + 120  # as late as the one before
    assert ask(NOW + 2 * YEAR, NOW + 135) == NOW + 2 * YEAR  # ahead: left alone
    assert ask(0, NOW + 140) == NOW + 130
    assert ask(NOW + 150, NOW + 160) == NOW + 150
    dating = Dating()
    assert ask(NOW + DAY, NOW - YEAR) == NOW + DAY  # ours is behind
    assert ask(NOW + DAY + 2, NOW + DAY + 3) == NOW + DAY + 2
    dating = Dating()
    assert ask(NOW + 7 * DAY, NOW + 14 * DAY) == NOW + 7 * DAY  # what waited at a proxy for a week,
    assert ask(0, NOW + 14 * DAY) == NOW + 7 * DAY  # among it some of a wrong clock
    assert ask(NOW + 7 * DAY + 60, NOW + 14 * DAY) == NOW + 7 * DAY + 60
