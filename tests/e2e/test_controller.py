"""The controller's operations at archives against real daemons: each does what it says, images compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.group import WAIT_S, Group, Volume
from walbd.controller import Mebi
from walbd.errors import BadState, Refused, WalbError

SIZE_MB = 4


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """One group for all tests: each has a volume of its own, and leaves the daemons as they were."""
    with Group(tmp_path_factory.mktemp("group"), archives=2) as made:
        yield made


@pytest.fixture
def volume(group: Group) -> Volume:
    """A volume that is backed up to a0, with snapshots that must be kept."""
    made = group.add_volume(f"vol{len(group.volumes)}", size_b=SIZE_MB * Mebi)
    made.scribble()
    group.ctl.full_backup(group.s[0], made.name, timeoutS=WAIT_S)
    for _ in range(4):
        made.scribble(5)
        group.snapshot(made)
    return made


def test_diffs_hashes_scans_and_sizes(group: Group, volume: Volume, tmp_path: Path) -> None:
    ctl, s0, a0 = group.ctl, group.s[0], group.a[0]
    gids = ctl.get_restorable_gid(a0, volume.name)
    diffs = ctl.get_diff_list(a0, volume.name)
    assert ctl.get_num_diff(a0, volume.name) == len(diffs)
    assert ctl.get_total_diff_size(a0, volume.name) == sum(diff.dataSize for diff in diffs)
    first, second = [diff for diff in diffs if diff.B.gidB >= gids[0]][:2]  # some may end at implicit snapshots
    assert (first.B.gidB, second.B.gidB) == (gids[0], first.E.gidB)
    assert ctl.exists_diff(a0, volume.name, first.B.gidB, first.E.gidB)
    assert not ctl.exists_diff(a0, volume.name, first.B.gidB, second.E.gidB)

    image = tmp_path / "image"
    assert ctl.virt_full_scan(a0, volume.name, gids[-1], image) == SIZE_MB * Mebi
    assert image.read_bytes() == volume.model
    hashes = [ctl.get_block_hash(a0, volume.name, gid) for gid in gids]
    assert len(set(hashes)) == len(hashes)
    assert ctl.run_ctl(a0, ["bhash", volume.name, str(gids[-1])]) == hashes[-1]
    assert ctl.scrub(a0, volume.name)["damaged"] == 0

    with pytest.raises(Refused, match="protected"):
        ctl.merge(a0, volume.name, gids[0], gids[-1])
    ctl.disable_snapshot(a0, volume.name, gids[1:-2])
    ctl.merge(a0, volume.name, gids[0], gids[-2])
    kept = [gids[0], *gids[-2:]]
    assert [gid for gid in gids if gid in ctl.get_restorable_gid(a0, volume.name, "all")] == kept
    assert [ctl.get_block_hash(a0, volume.name, gid) for gid in kept] == [hashes[gids.index(gid)] for gid in kept]
    assert group.restored(volume, gids[-1]) == volume.model

    group.grow_device(volume, 6 * Mebi)
    ctl.resize(volume.name, 6, True)
    assert ctl.get_vol_size_lb(a0, volume.name) * 512 == 6 * Mebi == group.status(s0, volume.name).size_lb * 512
    volume.scribble(5)
    assert group.restored(volume, group.snapshot(volume)) == volume.model


def test_copies(group: Group, volume: Volume) -> None:
    ctl, (a0, a1) = group.ctl, group.a
    assert ctl.replicate(a0, volume.name, a1, True, timeoutS=WAIT_S) == ctl.get_latest_clean_snapshot(
        a0, volume.name
    )
    assert ctl.is_synchronizing(a1, volume.name)
    volume.scribble(5)
    gid = group.snapshot(volume, archives=[0, 1])
    assert group.restored(volume, gid, archive=1) == volume.model
    assert ctl.get_block_hash(a1, volume.name, gid) == ctl.get_block_hash(a0, volume.name, gid)

    ctl.stop_synchronizing(a1, volume.name)
    volume.scribble(5)
    gid = group.snapshot(volume)
    assert gid not in ctl.get_restorable_gid(a1, volume.name)
    assert ctl.replicate_once(a0, volume.name, a1, timeoutS=WAIT_S) == gid  # by diffs
    assert ctl.get_replica_positions(a0, volume.name)[0].gid == gid
    assert group.restored(volume, gid, archive=1) == volume.model
    ctl.forget_replica(a0, volume.name, "a1")

    ctl.clear(a1, volume.name)
    ctl.run_ctl(a1, ["init-vol", volume.name])
    assert ctl.replicate_once(a0, volume.name, a1, timeoutS=WAIT_S, doResync=True) == gid
    assert group.restored(volume, gid, archive=1) == volume.model


def test_a_failed_synchronize_leaves_the_backup_running(group: Group, volume: Volume) -> None:
    ctl, (a0, a1), p0 = group.ctl, group.a, group.p[0]
    group.link("a0", "a1").cut()  # what the controller and the proxies see is whole
    try:
        with pytest.raises(WalbError):
            ctl.synchronize(a0, volume.name, a1, timeoutS=5)
    finally:
        group.heal()
    assert ctl.get_archive_info_list(p0, volume.name) == ["a0"]
    volume.scribble(5)
    assert group.restored(volume, group.snapshot(volume)) == volume.model


def test_hash_backup_of_a_healthy_target_is_refused(group: Group, volume: Volume) -> None:
    with pytest.raises(BadState, match="misses nothing"):
        group.ctl.hash_backup(group.s[0], volume.name)
    volume.scribble(5)
    group.snapshot(volume)
    assert group.ctl.get_gaps(group.a[0], volume.name) == []
    group.ctl.stop(group.s[0], volume.name)
    volume.scribble(5)
    gid = group.ctl.hash_backup(group.s[0], volume.name, timeoutS=WAIT_S)
    assert gid is not None
    assert group.restored(volume, gid) == volume.model
    assert group.ctl.get_gaps(group.a[0], volume.name)[-1].gid_e == gid


def test_settings(group: Group, volume: Volume) -> None:
    ctl, s0 = group.ctl, group.s[0]
    assert set(ctl.reload_all()) == {"s0", "p0", "a0", "a1"}
    ctl.dump_log_header(s0, volume.name, 0)
    assert [path for path in (group.root / "s0" / volume.name).iterdir() if path.name != "volume.json"]
    ctl.retarget_all()
    volume.scribble(5)
    assert group.restored(volume, group.snapshot(volume)) == volume.model
