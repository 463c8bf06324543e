"""Kill -9 at every failpoint of the storage daemon: nothing acknowledged is lost, and backup goes on by itself.

A crash is modelled by `Rig.mark_dead` at the failpoint: nothing the daemon does afterwards reaches its disk or its
device. The invariants are those of docs/storage.md, "What always holds".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import walbd.storage.server  # noqa: F401 - registers the failpoints
from tests.kit.storage_rig import VOL, Killed, Rig
from walbd.errors import WalbError
from walbd.fs import failpoints
from walbd.protocol.base import JobState
from walbd.protocol.control import ClearVol, ResetVol, Role, TakeSnapshot
from walbd.protocol.maintenance import Retarget

POINTS = sorted(name for name in failpoints.registered() if name.startswith("storage."))


class Killer:
    """Stands in for `failpoints.hit`: kills the daemon of a rig at the n-th hit of one failpoint."""

    def __init__(self, rig: Rig, name: str, skip: int) -> None:
        self.rig = rig
        self.name = name
        self.skip = skip
        self.fired = False

    def __call__(self, name: str) -> None:
        if name != self.name or self.fired or self.rig.dead:
            return
        if self.skip:
            self.skip -= 1
            return
        self.fired = True
        self.rig.mark_dead()
        raise OSError(5, "killed", name)


@dataclass
class Driver:
    """Goes through everything an operator does, and begins again wherever a crash left the volume."""

    rig: Rig
    answered: dict[int, bytes] = field(default_factory=dict)  # explicit snapshots of the present history
    history: bytes = b""

    async def snapshot(self) -> None:
        image = bytes(self.rig.device.data)
        gid = (await self.rig.call(TakeSnapshot(volume=VOL))).gid
        assert gid not in self.answered
        self.answered[gid] = image

    async def round(self) -> None:
        rig = self.rig
        state = await rig.state()
        if state == "Clear":
            await rig.init()
            state = "SyncReady"
        if state == "SyncReady":
            rig.device.scribble(5)
            self.answered.clear()
            info = await rig.full_backup()
            if info.state is not JobState.DONE:
                raise Killed(info.error)
        if state == "Stopped":
            await self.snapshot()
            await rig.start_volume()
        rig.device.scribble(5)
        await self.snapshot()
        rig.device.scribble(5)
        await self.snapshot()
        await self.snapshot()  # nothing in between: an empty diff
        await rig.until(lambda: rig.delivered())
        await self.check()
        info = await rig.stop_volume()
        if info.state is not JobState.DONE:
            raise Killed(info.error)

    async def forget(self) -> None:
        """What ends a history."""
        rig = self.rig
        state = await rig.state()
        if state == "Stopped":
            self.answered.clear()
            await rig.call(ResetVol(volume=VOL, gid=7))
        if state == "Standby":
            await rig.stop_volume()
        await rig.start_volume(Role.STANDBY)
        await rig.until(lambda: rig.device.oldest == rig.device.latest)
        info = await rig.stop_volume()
        if info.state is not JobState.DONE:
            raise Killed(info.error)
        await rig.call(ClearVol(volume=VOL))

    async def retarget(self) -> None:
        """Use other proxies besides, and then what is configured again."""
        configured = [str(proxy.address) for proxy in self.rig.proxies]
        for proxies in ([*configured, "127.0.0.1:1"], configured):
            await self.rig.call(Retarget(proxies=proxies))
            assert [row.address for row in self.rig.server.proxies.health()] == proxies

    async def run(self) -> None:
        """Two rounds and the end of the history."""
        await self.round()
        await self.retarget()
        await self.round()
        await self.forget()

    async def check(self) -> None:
        """Everything answered can be restored, and the archive converges to the device."""
        rig = self.rig
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        chain = rig.archive.history()
        ends = {piece.diff.end.gid_b for piece in chain}
        for gid, image in self.answered.items():
            assert gid in ends
            assert rig.archive.restore(gid) == image


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("point", POINTS)
async def test_kill_at_each_failpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, skip: int
) -> None:
    rig = Rig(tmp_path / "s", options={"wlog_send_size_max": 40 * 512})  # so that some stretches are cut
    rig.device.before_set_oldest = lambda lsid: check_done_is_durable(rig, lsid)
    killer = Killer(rig, point, skip)
    monkeypatch.setattr(failpoints, "hit", killer)
    driver = Driver(rig)
    async with rig.running():
        for _ in range(skip + 1):
            try:
                await driver.run()
            except (WalbError, Killed):
                assert killer.fired
                break
            if killer.fired:
                break
        assert killer.fired, "the scenario does not reach this failpoint"
        await rig.restart()
        if await rig.state() == "Stopped":
            try:
                await driver.snapshot()  # is refused when a reset was cut off
            except WalbError:
                driver.answered.clear()
                await rig.call(ResetVol(volume=VOL))
        await driver.run()
        assert await rig.state() == "Clear"
        assert not (rig.base_dir / VOL).exists()


def check_done_is_durable(rig: Rig, lsid: int) -> None:
    """The log is erased only below a `done` that is on disk."""
    record = json.loads((rig.base_dir / VOL / "volume.json").read_text())["record"]
    if record["state"] in ("Target", "Stopped"):
        assert record["uuid_hex"] == rig.device.uuid.hex()
        assert lsid <= record["done"]["lsid"]
