"""Every section of docs/recovery.md with real processes: break it, look, mend it with one command, restore."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.doctored import Doctored
from tests.kit.group import WAIT_S, Volume, run_walbd, wait_until
from walbd.format.policy import Policy
from walbd.protocol.control import Apply


def overflow(group: Doctored, volume: Volume) -> None:
    """Write until the log of the volume has overflowed, with all proxies killed."""
    group.kill(*(p.name for p in group.p))
    while not group.ctl.is_overflow(group.s[0], volume.name):
        volume.scribble(50)


def test_a_healthy_group(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2, proxies=2) as group:
        volume = group.protect(replicas=True)
        assert group.findings() == []
        assert group.findings("vol0") == []
        assert group.walbc("doctor", "vol9")[0] == 5
        code, text = group.walbc("doctor", "--fix")
        assert (code, "nothing is wrong" in text) == (0, True)
        group.mend(volume)


# Storage


def test_what_is_down_goes_on_by_itself_when_it_is_started(tmp_path: Path) -> None:
    with Doctored(tmp_path, proxies=2) as group:
        volume = group.protect()
        codes = {"s0": "storage-down", "dev-vol0": "device-down", "p0": "proxy-down", "a0": "archive-down"}
        for name, code in codes.items():
            group.kill(name)
            if name != "dev-vol0":
                volume.scribble()
            found = group.wait_for_code(code)
            assert found["word"] == "down"
            assert "systemctl restart walbd-" in found["by_hand"]
            exit_code, text = group.walbc("doctor", "--fix", "--yes")
            assert exit_code == 6, text
            group.start(name)
            volume.disconnect()
            wait_until(lambda: not group.codes(), f"the group to be well again after {name}")
        group.kill("p0", "p1")
        volume.scribble()
        assert "until it overflows" in group.wait_for_code("all-proxies-down")["text"]
        group.start("p0", "p1")
        group.mend(volume)


@pytest.mark.parametrize("stopped", [False, True], ids=["before it stopped itself", "after it stopped itself"])
def test_overflow(tmp_path: Path, stopped: bool) -> None:
    """The second time with a replica, which is fed again in the end."""
    n = 1 + stopped
    with Doctored(tmp_path, archives=n) as group:
        volume = group.protect(log_b=2 << 20, replicas=True)
        overflow(group, volume)
        group.start("p0")
        if stopped:
            wait_until(lambda: group.ctl.get_state(group.s[0], "vol0") == "Stopped", "the volume to be stopped")
        found = group.wait_for_code("overflow")
        assert "walbc hash-backup vol0 --storage s0" in [step["command"] for step in found["steps"]]
        assert found["consent"] == "yes"
        code, text = group.walbc("doctor", "--fix")  # without --yes no volume is read
        assert code == 6, text
        assert "hash-backup" in text
        assert group.ctl.is_overflow(group.s[0], "vol0")
        assert "hash-backup" in group.mend(volume, archives=list(range(n)))


def test_overflow_in_standby_needs_no_backup(tmp_path: Path) -> None:
    with Doctored(tmp_path, storages=2) as group:
        volume = group.protect(log_b=2 << 20, mirror=1)
        group.kill("s1")
        while volume.legs[1].process.running and not _overflowed(group, volume):
            volume.scribble(50)
        group.start("s1")
        wait_until(
            lambda: not group.ctl.is_overflow(group.s[1], "vol0") or "overflow-standby" in group.codes(),
            "the overflow to be found, or mended by the storage itself",
        )
        text = group.mend(volume)
        assert "hash-backup" not in text


def _overflowed(group: Doctored, volume: Volume) -> bool:
    directory = volume.legs[1].directory
    done = run_walbd("device", "info", volume.name, "--base-dir", directory.parent, "--json")
    return bool(json.loads(done.stdout)["overflow"])


# Proxies


def test_proxy_data_lost_and_nothing_is_missing(tmp_path: Path) -> None:
    with Doctored(tmp_path, proxies=2) as group:
        volume = group.protect()
        group.wait_fresh(volume)
        group.wipe("p0")
        group.start("p0")
        found = group.wait_for_code("proxy-data-lost")
        assert "no backup is needed" in found["text"]
        assert "nothing is missing" in found["evidence"]["proof"]
        assert "gap" not in group.codes()
        told = group.json("doctor", "--fix", "--json")  # no --yes is needed
        assert told["findings"] == []
        assert [step["command"] for step in told["taken"]] == ["walbc archive-info copy p1 vol0 p0"]
        assert told["verified"][0]["gid"] in group.ctl.get_restorable_gid(group.a[0], "vol0")
        group.mend(volume)


@pytest.mark.parametrize("proxies", [1, 2])
def test_wdiffs_lost_at_a_proxy(tmp_path: Path, proxies: int) -> None:
    with Doctored(tmp_path, proxies=proxies) as group:
        volume = group.protect()
        group.kill("a0")
        volume.scribble()
        volume.flush()
        wait_until(lambda: not group.status(group.s[0], "vol0").lag_lb, "the proxy to have everything")
        assert group.status(group.p[0], "vol0").diffs
        group.wipe("p0")
        group.start("p0", "a0")
        found = group.wait_for_code("gap")
        assert found["evidence"]["delivered_gid"] > found["evidence"]["archive_gid"]
        assert "hash-backup" in group.mend(volume)


def test_a_dead_proxy_may_hold_what_is_missing(tmp_path: Path) -> None:
    with Doctored(tmp_path, proxies=2) as group:
        volume = group.protect()
        group.kill("a0")
        volume.scribble()
        volume.flush()
        wait_until(lambda: not group.status(group.s[0], "vol0").lag_lb, "the proxy to have everything")
        group.kill("p0")
        group.start("a0")
        found = group.wait_for_code("possible-gap")
        assert found["steps"] == []
        assert "gap" not in group.codes()
        code, text = group.walbc("doctor", "--fix", "--yes")
        assert code == 6, text
        assert "hash-backup" not in text
        group.start("p0")
        wait_until(lambda: not group.codes(), "the diffs of the proxy to arrive")
        group.mend(volume)


# Archives


def test_diffs_wait_for_an_archive(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.kill("a0")
        volume.scribble()
        volume.flush()
        wait_until(lambda: group.status(group.p[0], "vol0").diffs, "diffs to wait")
        found = group.wait_for_code("archive-down")
        assert found["evidence"]["waiting_diffs"] > 0
        group.start("a0")
        wait_until(lambda: not group.codes(), "the diffs to arrive by themselves")
        group.mend(volume)


def test_things_left_stopped_and_an_image_that_is_too_small(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        for server, code in (
            (group.s[0], "storage-stopped"),
            (group.p[0], "proxy-stopped"),
            (group.a[0], "archive-stopped"),
        ):
            group.ctl.stop(server, "vol0")
            volume.scribble()
            group.wait_for_code(code)
            code_of_exit, text = group.walbc("doctor", "--fix")  # nothing is read: no --yes is needed
            assert code_of_exit == 0, text
        group.grow_device(volume, 12 << 20)
        group.ctl.resize_storage(group.s[0], "vol0", 0)
        volume.scribble()
        assert "resize_archive" in group.wait_for_code("archive-smaller")["steps"][0]["python"]
        group.mend(volume)


# Data lost at archives


def test_case_1_a_secondary_has_lost_its_data(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        group.wipe("a1")
        group.start("a1")
        volume.scribble()
        found = group.wait_for_code("secondary-data-lost")
        assert found["server"] == "a1"
        group.mend(volume, archives=[0, 1])


def test_case_2_the_secondary_becomes_primary(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2, proxies=2) as group:
        volume = group.protect(replicas=True)
        group.wipe("a0")
        volume.scribble()
        group.start("a0")
        found = group.wait_for_code("primary-data-lost")
        assert found["evidence"]["good_copies"] == ["a1"]
        assert "no backup is needed" in found["text"]
        text = group.mend(volume, "--write", archives=[0, 1])
        assert "hash-backup" not in text
        assert "full-backup" not in text
        assert [a.name for a in group.group.servers.archiveL] == ["a1", "a0"]
        assert group.status(group.s[0], "vol0").state == "Target"


def test_case_2_with_the_archive_gone_for_good(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        group.kill("a0")
        volume.scribble()
        assert "--lost a0" in group.wait_for_code("archive-down")["by_hand"]
        code, text = group.walbc("doctor", "--fix", "--yes", "--lost", "a0", "--write")
        assert code == 6, text  # there is one copy less than wanted
        assert [a.name for a in group.group.servers.archiveL] == ["a1", "a0"]
        volume.scribble()
        group.snapshot(volume, archives=[1])
        group.check_all_at(volume, "a1")
        group.wipe("a0")
        group.start("a0")  # a new one under its name
        group.mend(volume, archives=[0, 1])


def test_one_volume_of_several_is_copied_back(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        other = group.protect("vol1", replicas=True)
        group.wipe("a0", "vol0")
        group.start("a0")
        group.wait_for_code("primary-data-lost")
        text = group.mend(volume, archives=[0, 1])
        assert "walbc replicate vol0 a0 --from a1" in text
        group.mend(other, archives=[0, 1])


def test_case_3_a_full_backup_and_the_replica_again(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.wipe("a0")
        group.start("a0")
        volume.scribble()
        found = group.wait_for_code("primary-data-lost")
        assert "only a full backup" in found["text"]
        volume.points.clear()  # generations begin anew
        assert "full-backup" in group.mend(volume)


def test_case_3_with_an_old_copy_is_a_hash_backup(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        group.ctl.stop_synchronizing(group.a[1], "vol0")
        volume.scribble()
        group.snapshot(volume)
        kept = group.ctl.get_restorable_gid(group.a[1], "vol0", "all")
        group.wipe("a0")
        group.start("a0")
        found = group.wait_for_code("primary-data-lost")
        assert found["evidence"]["old_copies"] == ["a1"]
        text = group.mend(volume, "--write")
        assert "hash-backup" in text
        assert "full-backup" not in text
        assert set(kept) <= set(group.ctl.get_restorable_gid(group.a[1], "vol0", "all"))


# Storages that have lost what they knew


def test_metadata_lost_at_the_storage(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.wipe("s0")
        group.start("s0")
        volume.scribble()
        found = group.wait_for_code("storage-metadata-lost")
        assert [step["python"].split("(")[0] for step in found["steps"]] == [
            "walbc.init_storage",
            "walbc.hash_backup",
        ]
        group.mend(volume)


def test_metadata_lost_at_a_standby_storage_needs_no_backup(tmp_path: Path) -> None:
    with Doctored(tmp_path, storages=2) as group:
        volume = group.protect(mirror=1)
        group.wipe("s1")
        group.start("s1")
        found = group.wait_for_code("storage-metadata-lost")
        assert found["server"] == "s1"
        assert "backup vol0" not in group.mend(volume)
        assert group.ctl.get_state(group.s[1], "vol0") == "Standby"


def test_the_log_was_reset_behind_the_storage(tmp_path: Path) -> None:
    from walbd.controller import Device

    with Doctored(tmp_path) as group:
        volume = group.protect()
        Device.at(str(volume.legs[0].directory)).reset()
        volume.scribble()
        found = group.wait_for_code("orphan")
        assert found["evidence"]["history_uuid"] != found["evidence"]["device_log_uuid"]
        assert "hash-backup" in group.mend(volume)


def test_backup_that_was_cut_off(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.add_volume("vol0")
        volume.scribble()
        group.write_file()
        group.ctl.set_full_scan_bps(group.s[0], "1m")
        group.ctl.full_backup(group.s[0], "vol0", block=False)
        group.processes["s0"].restart()
        found = group.wait_for_code("no-target")
        assert "full-backup" in found["steps"][-1]["command"]
        group.mend(volume)


def test_broken_data_of_an_archive_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.kill("a0")
        record = group.root / "a0" / "vol0" / "volume.json"
        record.write_text("{")
        group.start("a0")
        found = group.wait_for_code("archive-broken")
        assert found["consent"] == "lose"
        code, text = group.walbc("doctor", "--fix", "--yes")
        assert code == 6, text
        assert record.read_text() == "{"
        volume.points.clear()
        text = group.mend(volume, "--yes-lose", "vol0")
        assert "full-backup" in text


# Replacement


def test_replace_proxy(tmp_path: Path) -> None:
    with Doctored(tmp_path, proxies=2) as group:
        volume = group.protect()
        new = group.add_server(1)
        with volume.load():
            code, text = group.walbc(
                "replace-proxy", "p0", f"{new.name}={new.get_host_port()}", "--yes", "--write"
            )
        assert code == 0, text
        assert [p.name for p in group.group.servers.proxyL] == [new.name, "p1"]
        wait_until(lambda: not group.processes["p0"].running, "the old proxy to end")
        group.ctl.set_server_layout(group.group.servers)
        group.mend(volume)


def test_replace_a_proxy_that_is_gone_with_diffs(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.kill("a0")
        volume.scribble()
        volume.flush()
        wait_until(lambda: not group.status(group.s[0], "vol0").lag_lb, "the proxy to have everything")
        group.kill("p0")
        group.start("a0")
        new = group.add_server(1)
        place = f"{new.name}={new.get_host_port()}"
        code, text = group.walbc("replace-proxy", "p0", place, "--yes", "--write")
        assert code == 3, text
        assert "--gone" in text
        code, text = group.walbc("replace-proxy", "p0", place, "--yes", "--write", "--gone")
        assert code == 6, text  # the diffs that it held are lost: the snapshot does not become restorable
        group.ctl.set_server_layout(group.group.servers)
        assert "gap" in group.codes()
        assert "hash-backup" in group.mend(volume)


def test_replace_primary_archive_and_go_on_after_an_interruption(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        new = group.add_server(2)
        place = f"{new.name}={new.get_host_port()}"
        code, text = group.walbc("replace-archive", "a0", place)
        assert code == 2, text  # shown, not done
        assert "[ ] walbc replicate vol0 a2 --from a0 --sync" in text
        group.kill("s0")
        code, text = group.walbc("replace-archive", "a0", place, "--yes", "--write")
        assert code == 3, text  # all must answer before anything is done
        group.start("s0")
        group.ctl.replicate(group.a[0], "vol0", new, True, WAIT_S)  # as a run that was cut off had done
        with volume.load():
            code, text = group.walbc("replace-archive", "a0", place, "--yes", "--write")
        assert code == 0, text
        assert "done already" in text
        assert [a.name for a in group.group.servers.archiveL] == ["a2", "a1"]
        wait_until(lambda: not group.processes["a0"].running, "the old archive to end")
        group.ctl.set_server_layout(group.group.servers)
        group.mend(volume, archives=[1, 2])


def test_replace_secondary_archive(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        new = group.add_server(2)
        code, text = group.walbc(
            "replace-archive", "a1", f"{new.name}={new.get_host_port()}", "--yes", "--write", "--clear"
        )
        assert code == 0, text
        assert [a.name for a in group.group.servers.archiveL] == ["a0", "a2"]
        group.ctl.set_server_layout(group.group.servers)
        group.mend(volume, archives=[0, 2])


def test_replace_storage(tmp_path: Path) -> None:
    with Doctored(tmp_path, storages=2) as group:
        volume = group.protect(mirror=1)
        group.ctl.clear(group.s[1], "vol0")  # s1 is new
        code, text = group.walbc("replace-storage", "s0", "s1", "--yes", "--write")
        assert code == 0, text
        assert [s.name for s in group.group.servers.storageL] == ["s1"]
        assert group.group.volumes["vol0"].target == group.s[1]
        group.ctl.set_server_layout(group.group.servers)
        volume.legs.reverse()
        assert group.ctl.get_state(group.s[1], "vol0") == "Target"
        group.mend(volume)


def test_replace_an_archive_that_a_cut_off_run_left_fed_and_behind(tmp_path: Path) -> None:
    """It is not taken for done: the old archive may have been the only one that has what the new one lacks."""
    with Doctored(tmp_path) as group:
        volume = group.protect()
        new = group.add_server(2)
        group.ctl.replicate(group.a[0], "vol0", new, False, WAIT_S)
        volume.scribble()
        group.snapshot(volume)
        volume.scribble()
        group.snapshot(volume)
        group.wait_fresh(volume)
        group.ctl.add_archive_to_proxy(group.p[0], "vol0", new)
        volume.scribble()
        group.snapshot(volume)
        code, text = group.walbc(
            "replace-archive", "a0", f"{new.name}={new.get_host_port()}", "--yes", "--write", "--clear"
        )
        assert code == 0, text
        assert "[ ] walbc replicate vol0 a1" in text
        group.ctl.set_server_layout(group.group.servers)
        group.mend(volume, archives=[1])


@pytest.mark.parametrize("new", ["a1", "a2"], ids=["by the replica", "by a new one"])
def test_replace_a_primary_archive_that_is_gone(tmp_path: Path, new: str) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        place = new
        if new == "a2":
            place = f"a2={group.add_server(2).get_host_port()}"
        group.kill("a0")
        volume.scribble()
        code, text = group.walbc("replace-archive", "a0", place, "--yes", "--write", "--gone")
        assert code == 0, text
        group.ctl.set_server_layout(group.group.servers)
        assert [a.name for a in group.group.servers.archiveL] == (["a1"] if new == "a1" else ["a2", "a1"])
        group.mend(volume, archives=[1] if new == "a1" else [1, 2])


def test_replace_a_secondary_archive_that_is_gone(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        new = group.add_server(2)
        group.kill("a1")
        volume.scribble()
        code, text = group.walbc(
            "replace-archive", "a1", f"a2={new.get_host_port()}", "--yes", "--write", "--gone"
        )
        assert code == 0, text
        group.ctl.set_server_layout(group.group.servers)
        group.mend(volume, archives=[0, 2])


def test_replace_a_storage_that_is_gone(tmp_path: Path) -> None:
    with Doctored(tmp_path, storages=2, archives=2) as group:
        volume = group.protect(mirror=1, replicas=True)
        group.kill("s0")
        code, text = group.walbc("replace-storage", "s0", "s1", "--yes", "--write")
        assert code == 3, text
        code, text = group.walbc("replace-storage", "s0", "s1", "--yes", "--write", "--gone")
        assert code == 0, text
        assert [s.name for s in group.group.servers.storageL] == ["s1"]
        group.ctl.set_server_layout(group.group.servers)
        volume.legs.reverse()
        group.mend(volume, archives=[0, 1])


def test_the_group_file_is_behind_a_promotion(tmp_path: Path) -> None:
    """Neither mending nor a replacement sends storages back to an archive that has been left behind."""
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        group.kill("a0")
        volume.scribble()
        code, text = group.walbc("doctor", "--fix", "--yes", "--lost", "a0")  # not --write
        assert code == 6, text
        group.start("a0")  # it was not lost at all
        found = group.wait_for_code("wrong-primary")
        assert [step["python"] for step in found["steps"]] == ["walbc.promote_archive(a1)"]
        new = group.add_server(1)
        code, text = group.walbc("replace-proxy", "p0", f"{new.name}={new.get_host_port()}", "--yes")
        assert code == 5, text
        assert "wrong-primary" in text
        text = group.mend(volume, "--write", archives=[0, 1])
        assert [a.name for a in group.group.servers.archiveL] == ["a1", "a0"]
        assert "hash-backup" not in text
        assert "retarget" not in text


# Codes that seldom come


def test_a_replica_that_is_not_fed_and_a_storage_that_uses_another_archive(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        group.ctl.stop_synchronizing(group.a[1], "vol0")
        volume.scribble()
        group.snapshot(volume)
        assert group.wait_for_code("replica-not-fed")["server"] == "a1"
        assert "walbc replicate vol0 a1 --from a0 --sync" in group.mend(volume, archives=[0, 1])
        group.ctl.retarget(group.s[0], group.a[1])
        assert group.codes() == {"wrong-primary"}
        assert "walbc retarget s0 --archive a0" in group.mend(volume, archives=[0, 1])


def test_two_targets(tmp_path: Path) -> None:
    with Doctored(tmp_path, storages=2) as group:
        volume = group.protect(mirror=1)
        group.ctl.set_server_layout(group.layout.replace(storageL=group.s[1:]))  # which does not see s0
        group.ctl.hash_backup(group.s[1], "vol0", timeoutS=WAIT_S)
        group.ctl.set_server_layout(group.layout)
        found = group.wait_for_code("two-targets")
        assert found["evidence"]["targets"] == ["s0", "s1"]
        text = group.mend(volume)
        assert "hash-backup vol0 --storage s0" in text
        assert [group.ctl.get_state(s, "vol0") for s in group.s] == ["Target", "Standby"]


@pytest.mark.parametrize("failpoint", ["archive.apply.after_begin", "archive.apply.before_done"])
def test_an_apply_that_was_cut_off(tmp_path: Path, failpoint: str) -> None:
    """A policy finishes it by itself; so there is none."""
    with Doctored(tmp_path) as group:
        volume = group.protect()
        group.ctl.set_policy(group.a[0], "vol0", Policy(enabled=False))
        volume.scribble()
        gid = group.snapshot(volume)
        process = group.processes["a0"]
        process.restart(failpoints=f"{failpoint}=crash")
        group.ctl.ask(group.a[0], Apply(volume="vol0", gid=gid))
        process.wait_killed()
        process.start()
        found = group.wait_for_code("apply-interrupted")
        assert [step["python"] for step in found["steps"]] == [f"walbc.apply(a0, 'vol0', {gid})"]
        group.mend(volume)


def test_a_busy_group_is_silent(tmp_path: Path) -> None:
    """Write load, snapshots, applies and replications all the time: nothing of that is taken for a fault."""
    with Doctored(tmp_path, storages=2, proxies=2, archives=2) as group:
        volume = group.protect(replicas=True, mirror=1)
        with volume.load():
            for i in range(20):
                gid = group.ctl.snapshot(group.s[0], "vol0", group.a)
                assert group.findings() == []
                if i % 5 == 4:
                    group.ctl.apply(group.a[i // 5 % 2], "vol0", gid)
                    assert group.findings() == []
            group.ctl.replicate(group.a[0], "vol0", group.a[1], True, WAIT_S)
            assert group.findings() == []
        group.mend(volume, archives=[0, 1])
