"""What the doctor finds on hosts that are not as they should be: clock, version, disk, work that hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit import disks
from tests.kit.as_if import other
from tests.kit.doctored import Doctored
from tests.kit.group import WAIT_S, Group, wait_until
from walbd.controller.doctor import Finding
from walbd.errors import WalbError
from walbd.protocol.base import JobState


def look(group: Group) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in group.doctor().look():
        found.setdefault(finding.code, []).append(finding)
    return found


def test_clock_and_version_of_another_host(tmp_path: Path) -> None:
    """They are named, harm nothing, and are gone when the host is as it should be."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    with Doctored(tmp_path, storages=2, proxies=2) as group:
        volume = group.protect()
        other(group.processes["p1"], clock=clock, version="9.9.9")
        group.processes["p1"].restart()
        # At its start a proxy has to be found again by the storages: that is another finding, and passes.
        found = {f["code"]: f for f in group.findings()}
        assert "9.9.9: p1" in found["version-mismatch"]["text"]
        assert found["version-mismatch"]["evidence"]["p1"] == "9.9.9"
        assert "clock-skew" not in found

        for ahead_s, word in ((3600, "ahead"), (-3600, "behind")):
            clock.write_text(str(ahead_s))
            found = {f["code"]: f for f in group.findings()}
            skew = found["clock-skew"]
            assert (skew["server"], skew["word"]) == ("p1", "warn")
            assert skew["text"].endswith(word)
            assert abs(skew["evidence"]["off_by_s"] - ahead_s) <= 30
            assert "NTP" in skew["by_hand"]

        # It is the better one's turn to be away: everything goes through the host with the wrong clock.
        group.kill("p0")
        volume.scribble()
        gid = group.snapshot(volume)
        group.check(volume, gid, group.a[0])
        group.start("p0")
        clock.write_text("0")
        group.processes["p1"].program = ["-m", "walbd.cli"]
        group.processes["p1"].restart()
        wait_until(lambda: not group.codes(), "nothing to be found")


def small_disk(directory: Path, name: str) -> dict[str, int]:
    """Return a small disk for a daemon, where this machine lets us mount one; else its reserve will grow."""
    try:
        with disks.mounted(Path("walbd-test"), directory / "mounted", "-t", "tmpfs", "-o", "size=1m"):
            return {name: 64 << 20}
    except disks.Failed:
        return {}


@pytest.mark.parametrize("name", ["p0", "a0"])
def test_full_disk(tmp_path: Path, name: str) -> None:
    """What cannot be taken waits at the hop before, the doctor says why, and it goes on when there is room."""
    options = {name: ["--free-reserve-b", "4m"]}
    with Doctored(tmp_path, options=options, disks=small_disk(tmp_path, name)) as group:
        volume = group.protect()
        group.fill(name)
        volume.scribble()
        full = group.wait_for_code("disk-full")
        assert (full["server"], full["word"]) == (name, "error")
        assert "below its reserve" in full["text"]
        assert full["evidence"]["free_b"] < full["evidence"]["free_reserve_b"]
        assert f"make room in {tmp_path / name}" in full["by_hand"]
        volume.flush()
        before = group.mark(volume)
        code, text = group.walbc("doctor", "--fix", "--yes")  # it cannot make room, and takes no backup instead
        assert code == 6, text
        assert "hash-backup" not in text
        assert before not in group.ctl.get_restorable_gid(group.a[0], "vol0")
        group.unfill(name)
        group.ctl.wait_for_restorable(group.a[0], "vol0", before, timeoutS=WAIT_S)
        wait_until(lambda: not group.codes(), "nothing to be found")
        group.check_all(volume)


def test_backup_that_does_not_go_on(tmp_path: Path) -> None:
    """Its archive hangs: the work is there and does not move. It is stuck when that has lasted, and not before."""
    clock = tmp_path / "clock"
    clock.write_text("0")
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0", size_b=8 << 20)
        volume.scribble()
        for process in (group.processes["s0"], group.processes["p0"], group.processes["a0"]):
            other(process, clock=clock)
            process.restart()
        wait_until(lambda: not look(group).keys() & {"proxy-unreachable", "device-down"}, "the group to be there")
        link = group.link("s0", "a0")
        link.stall_after(100_000)
        group.ctl.full_backup(group.s[0], "vol0", block=False)
        wait_until(lambda: link.sent_b >= 100_000, "the copy to have begun")
        assert "stuck" not in look(group)

        clock.write_text("3600")  # of all servers, not of the one who looks: it is theirs that counts
        stuck = look(group)["stuck"]
        assert {(f.server, f.volume) for f in stuck} == {("s0", "vol0"), ("a0", "vol0")}
        assert all("full-backup has made no progress" in f.text for f in stuck)
        assert "systemctl restart walbd-storage" in next(f.by_hand for f in stuck if f.server == "s0")

        group.kill("s0")  # as it is told
        link.heal()
        group.start("s0")
        wait_until(lambda: "stuck" not in look(group), "nothing to be stuck")
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        group.snapshot(volume)
        group.check_all(volume)


def test_passing_state_that_nobody_works_at(tmp_path: Path) -> None:
    """The storage is gone in the middle of a backup, and its archive cannot know: there is no job any more."""
    with Group(tmp_path, options={"archive": ["--io-timeout-s", "600"]}) as group:
        volume = group.add_volume("vol0", size_b=8 << 20)
        volume.scribble()
        link = group.link("s0", "a0")
        link.stall_after(100_000)
        group.ctl.full_backup(group.s[0], "vol0", block=False)
        wait_until(lambda: link.sent_b >= 100_000, "the copy to have begun")
        link.blackhole()
        group.processes["s0"].restart()
        assert group.ctl.get_state(group.a[0], "vol0") == "FullSync"
        (stuck,) = wait_until(lambda: look(group).get("stuck"), "the doctor to find it")
        assert (stuck.server, stuck.volume) == ("a0", "vol0")
        assert stuck.text.endswith("no job is at work")
        assert "systemctl restart walbd-archive" in stuck.by_hand

        group.kill("a0")  # as it is told
        link.heal()
        group.start("a0")
        wait_until(lambda: "stuck" not in look(group), "nothing to be stuck")
        _until_taken(group)
        group.snapshot(volume)
        group.check_all(volume)


def _until_taken(group: Group) -> None:
    """Give the backup again until it is taken."""

    def taken() -> bool:
        try:
            group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        except WalbError:
            running = [job for job in group.ctl.get_jobs(group.s[0]) if job.state is JobState.RUNNING]
            assert not running
            return False
        return True

    wait_until(taken, "the backup to be taken")
