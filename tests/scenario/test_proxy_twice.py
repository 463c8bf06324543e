"""What a proxy gets twice while it cannot link it, and what it remembers of a volume that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.fake_archive import FakeArchive
from tests.kit.logs import image_of
from tests.kit.proxy_rig import VOL, ProxyRig, StorageSide, proxy, write
from tests.scenario.test_proxy_crash import NoLinks
from walbd.errors import RemoteError
from walbd.protocol.control import DeleteArchiveInfo, GetVolumes
from walbd.proxy.store import QUARANTINED


async def without_links(rig: ProxyRig, a0: FakeArchive) -> tuple[NoLinks, StorageSide]:
    """Begin on a disk that takes no links from now on, so that what is received stays in received/."""
    await rig.crash()
    disk = rig.env.fs = NoLinks()
    await rig.up()
    await rig.begin(a0)
    disk.full = True
    return disk, StorageSide(rig)


@pytest.mark.parametrize("crash", [False, True])
async def test_what_comes_again_under_another_name_replaces_what_waits(tmp_path: Path, crash: bool) -> None:
    """The storage got no answer and sends the stretch again, now as an explicit snapshot: only that counts."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        disk, storage = await without_links(rig, a0)
        for packs, mergeable in (([write(0, seed=1)], True), ([write(0, seed=2)], False)):
            with pytest.raises(RemoteError) as caught:
                await storage.send(packs, mergeable=mergeable)
            assert caught.value.remote_code == "disk-full"
        names = rig.files("received")
        assert [name.endswith(QUARANTINED) for name in names] == [False, True]
        assert "-M" in names[1]  # the implicit one
        assert await rig.waiting() == ["|0|-->|1|"]
        if crash:
            await rig.restart()
        disk.full = False
        await rig.emptied()
        assert a0.diffs == ["|0|-->|1|"]
        assert a0.image == image_of(bytes(a0.size_b), [write(0, seed=2)])
        assert rig.files() == [f"received/{names[1]}", "volume.json"]


async def test_what_comes_again_under_the_same_name_takes_its_place(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        disk, storage = await without_links(rig, a0)
        for seed in (1, 2):
            with pytest.raises(RemoteError):
                await storage.send([write(0, seed=seed)])
        (name,) = rig.files("received")
        assert not name.endswith(QUARANTINED)
        disk.full = False
        await rig.emptied()
        assert a0.image == image_of(bytes(a0.size_b), [write(0, seed=2)])
        assert rig.files() == ["volume.json"]


async def test_nothing_is_remembered_once_the_last_archive_is_gone(tmp_path: Path) -> None:
    async with FakeArchive() as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await StorageSide(rig).send([write(0)])
        await rig.drained()
        await rig.stop_volume()
        await rig.call(DeleteArchiveInfo(volume=VOL, archive="a0"))
        assert (await rig.call(GetVolumes())).names == []
        await rig.begin(a1)
        status = await rig.status()
        assert (status.size_lb, [hop.dest for hop in status.hops]) == (0, ["a1"])
        await rig.restart()
        assert [hop.dest for hop in (await rig.status()).hops] == ["a1"]
