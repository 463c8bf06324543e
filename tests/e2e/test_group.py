"""The main job with real processes: protect a volume, back it up continuously, restore any snapshot."""

from pathlib import Path

import pytest

from tests.kit.group import WAIT_S, Group, wait_until


@pytest.mark.parametrize("pbs", [512, 4096])
def test_backup_snapshots_restore(tmp_path: Path, pbs: int) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0", pbs=pbs)
        s0, a0 = group.s[0], group.a[0]
        volume.scribble(50)
        before = bytes(volume.model)
        first = group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
        assert first is not None
        assert group.restored(volume, first) == before

        points = {}
        for _ in range(4):
            volume.scribble(30)
            points[group.snapshot(volume)] = bytes(volume.model)
        for gid, model in points.items():
            assert group.restored(volume, gid) == model, gid
        assert set(points) <= set(group.ctl.get_restorable_gid(a0, "vol0"))

        gids = sorted(points)
        group.ctl.apply(a0, "vol0", gids[1], timeoutS=WAIT_S)
        assert group.ctl.get_restorable_gid(a0, "vol0")[0] == gids[1]
        for gid in gids[1:]:
            assert group.restored(volume, gid) == points[gid], gid
        assert volume.read_all() == volume.model


def test_backup_of_a_volume_that_is_written_meanwhile(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0", size_b=32 << 20, log_b=64 << 20)
        s0 = group.s[0]
        volume.scribble(50)
        group.ctl.set_full_scan_bps(s0, "16m")  # slow enough to be written to in the middle
        group.ctl.full_backup(s0, "vol0", block=False)
        while group.ctl.get_state(s0, "vol0") == "FullSync":
            volume.scribble(10)
        assert group.ctl.get_state(s0, "vol0") == "Target"
        gid = group.snapshot(volume)
        assert group.restored(volume, gid) == volume.model


def test_volumes_do_not_mix(tmp_path: Path) -> None:
    with Group(tmp_path, proxies=2) as group:
        volumes = [group.add_volume(f"vol{i}") for i in range(3)]
        for volume in volumes:
            volume.scribble()
            group.ctl.full_backup(group.s[0], volume.name, timeoutS=WAIT_S)
        for volume in volumes:
            volume.scribble()
        for volume in volumes:
            assert group.restored(volume, group.snapshot(volume)) == volume.model


def test_backup_goes_on_by_itself_after_each_daemon_was_away(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0")
        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        for name in ("a0", "p0", "s0"):
            group.processes[name].kill()
            volume.scribble()
            group.processes[name].start()
            assert group.restored(volume, group.snapshot(volume)) == volume.model, name
        group.processes["dev-vol0"].kill()
        volume.disconnect()
        group.processes["dev-vol0"].start()
        assert volume.read_all() == volume.model
        volume.scribble()
        wait_until(lambda: not group.ctl.is_overflow(group.s[0], "vol0"), "the device to be seen again")
        assert group.restored(volume, group.snapshot(volume)) == volume.model


def test_orderly_stop_and_start_of_everything(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0")
        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        volume.scribble()
        volume.nbd.flush()
        volume.disconnect()
        for process in group.processes.values():
            assert process.stop() == 0, process.tail()
        for process in group.processes.values():
            process.start()
        assert volume.read_all() == volume.model
        assert group.restored(volume, group.snapshot(volume)) == volume.model


def test_stop_start_empty_and_clear(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0")
        s0, p0, a0 = group.s[0], group.p[0], group.a[0]
        volume.scribble()
        group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
        group.ctl.stop(s0, "vol0")
        volume.scribble()
        group.ctl.stop(p0, "vol0", "empty")
        group.ctl.stop(a0, "vol0")
        assert [group.ctl.get_state(s, "vol0") for s in (s0, p0, a0)] == ["Stopped"] * 3
        for server in (a0, p0, s0):
            group.ctl.start(server, "vol0")
        assert group.restored(volume, group.snapshot(volume)) == volume.model
        for server in (s0, p0, a0):
            group.ctl.clear(server, "vol0")
        assert [group.ctl.get_vol_list(s) for s in (s0, p0, a0)] == [[], [], []]


def test_overflow_stops_the_volume_loudly_and_a_full_backup_mends_it(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0", log_b=2 << 20)
        s0, a0 = group.s[0], group.a[0]
        volume.scribble()
        gid = group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
        assert gid is not None
        model = bytes(volume.model)
        group.processes["p0"].kill()
        while not group.ctl.is_overflow(s0, "vol0"):
            volume.scribble(50)
        group.processes["p0"].start()
        wait_until(lambda: group.ctl.get_state(s0, "vol0") == "Stopped", "the volume to be stopped")
        assert group.restored(volume, gid) == model
        assert volume.read_all() == volume.model
        group.ctl.clear(a0, "vol0")
        group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
        volume.scribble()
        assert group.restored(volume, group.snapshot(volume)) == volume.model
