"""A diff that is damaged on a proxy's disk: the doctor proves the hole, and one command closes it."""

from __future__ import annotations

from pathlib import Path

from tests.kit.doctored import Doctored
from tests.kit.group import Volume, wait_until


def damage_what_waits(group: Doctored, volume: Volume) -> None:
    """Let three diffs wait for a0, damage the second one, and let a0 take what it can."""
    directory = group.root / "p0" / volume.name / "sendto" / "a0"
    group.ctl.stop(group.a[0], volume.name)
    for _ in range(3):
        volume.scribble(5)
        deliver(group, volume)
    wait_until(
        lambda: all(not hop.diffs or hop.dest == "a0" for hop in group.status(group.p[0], volume.name).hops),
        "the other archives to have everything",
    )
    waiting = sorted(directory.glob("*.wdiff"))
    assert len(waiting) >= 3
    waiting[1].write_bytes(waiting[1].read_bytes()[:-1])
    group.ctl.start(group.a[0], volume.name)
    wait_until(lambda: group.status(group.p[0], volume.name).hops[0].damaged, "the damage to be found")


def deliver(group: Doctored, volume: Volume) -> None:
    """Take a snapshot, and wait until the proxy has everything up to it."""
    gid = group.mark(volume)
    wait_until(lambda: group.status(group.s[0], volume.name).done_gid >= gid, "the proxy to have it")


def test_a_hash_backup_closes_the_hole(tmp_path: Path) -> None:
    with Doctored(tmp_path) as group:
        volume = group.protect()
        damage_what_waits(group, volume)
        found = group.wait_for_code("wdiff-damaged")
        assert (found["word"], found["server"], found["volume"]) == ("error", "p0", "vol0")
        assert found["evidence"]["damaged"]
        assert "walbc hash-backup vol0 --storage s0" in found["by_hand"]
        gap = group.wait_for_code("gap")
        assert gap["evidence"]["missing"] == found["evidence"]["damaged"]
        code, text = group.walbc("status")
        assert "damaged" in text, (code, text)
        group.kill("p0")
        group.start("p0")
        assert {"wdiff-damaged", "gap"} <= group.codes()
        code, text = group.walbc("doctor", "--fix")  # without --yes no volume is read
        assert code == 6, text
        assert "hash-backup" in group.mend(volume)


def test_another_archive_has_what_is_missing(tmp_path: Path) -> None:
    with Doctored(tmp_path, archives=2) as group:
        volume = group.protect(replicas=True)
        damage_what_waits(group, volume)
        assert group.wait_for_code("gap")["evidence"]["filled_from"] == "a1"
        assert "wdiff-damaged" in group.codes()
        told = group.json("doctor", "--fix", "--yes", "--json")
        commands = [step["command"] for step in told["taken"]]
        assert commands == ["walbc replicate vol0 a0 --from a1", "walbc kick-proxy vol0 --archive a0"]
        group.mend(volume, archives=[0, 1])
