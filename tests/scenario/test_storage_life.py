"""A volume's life at a storage daemon: backup, logs, snapshots, stops and starts, over real sockets."""

from __future__ import annotations

from pathlib import Path

from tests.kit.storage_rig import VOL, Rig
from walbd.protocol.base import JobState
from walbd.protocol.control import TakeSnapshot


async def test_backup_logs_snapshot(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.device.scribble(20)
    async with rig.running():
        await rig.target()
        assert await rig.state() == "Target"
        rig.device.scribble(10)
        truth = bytes(rig.device.data)
        gid = (await rig.call(TakeSnapshot(volume=VOL))).gid
        rig.device.scribble(10)
        await rig.until_delivered()
        assert rig.archive.restore(gid) == truth
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        assert rig.device.oldest == rig.device.latest
        info = await rig.stop_volume()
        assert info.state is JobState.DONE, info
        assert await rig.state() == "Stopped"
