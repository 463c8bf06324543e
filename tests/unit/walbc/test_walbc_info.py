"""`walbc info`: intervals, gaps, replicas, restore points, and what is wrong."""

from __future__ import annotations

import re

import pytest

from tests.kit.cli import Cli
from tests.kit.fake_group import NOW, FakeGroup
from tests.kit.walbc_cli import Make, ask_json, says
from walbd.cli.walbc_info import recoverable
from walbd.format.meta import RestorePoint
from walbd.ids import Gid
from walbd.protocol import maintenance as m


def test_info(ready: FakeGroup, walbc: Cli) -> None:
    ready.ctl.restore(ready.a[0], "vol0", 1)
    assert says(walbc, "info", "vol0").splitlines() == [
        "ok  vol0: 16.0 MiB, backed up from s0",
        "",
        "a0: Archived, 1 diff of 4.0 KiB",
        "    recoverable: 2027-01-15T08:00:01 (gid 1) -> 2027-01-15T08:00:02 (gid 2), nothing missing",
        "    policy: all=48h daily=7; next: nothing",
        "    restored: 1 /images/vol0/1",
        "GID  TIME                 KIND",
        "  1  2027-01-15T08:00:01  implicit",
        "  2  2027-01-15T08:00:02  explicit",
    ]
    ready.volume("a0").points += range(10, 40)
    assert "the newest 20 of 32 points" in says(walbc, "info", "vol0")
    assert len(says(walbc, "info", "vol0", "--all").splitlines()) == 39
    ready.volume("a0").policy = False
    assert "    policy: off, 1 trouble: see `walbc policy show`" in says(walbc, "info", "vol0")
    about = ask_json(walbc, "info", "vol0")
    assert about["archives"][0]["policy"]["enabled"] is False
    assert about["archives"][0]["restored"] == [{"gid": 1, "path": "/images/vol0/1"}]
    assert about["archives"][0]["lag_s"] == 0


def test_info_shows_gaps_and_replicas(ready: FakeGroup, walbc: Cli) -> None:
    at = NOW
    ready.volume("a0").points = [1, 2, 8]
    ready.volume("a0").gaps = [m.Gap(begin=at + 2, end=at + 8, gid_b=2, gid_e=8, cause="hash-backup")]
    ready.volume("a0").replicas = [
        m.ReplicaPosition(node="b0", address="h:1", gid=2, timestamp=at - 30, seen=at, failures=2, error="no room")
    ]
    out = says(walbc, "info", "vol0").splitlines()
    assert (
        "    recoverable: 2027-01-15T08:00:01 (gid 1) -> 2027-01-15T08:00:02,"
        " GAP 2027-01-15T08:00:02 -> 2027-01-15T08:00:08 (hash-backup),"
        " 2027-01-15T08:00:08 -> 2027-01-15T08:00:08 (gid 8), nothing missing"
    ) in out
    assert "    replica b0: gid 2, 1 diff, 30 s 4.0 KiB missing, seen 2027-01-15T08:00:00" in out
    assert any("cannot replicate to b0: no room - put it right, then: walbc replicate vol0 b0" in s for s in out)
    status = says(walbc, "status", "vol0")
    assert "warn  vol0     a0 > b0  replica, gid 2, 1 diff, 30 s 4.0 KiB missing" in status
    about = ask_json(walbc, "info", "vol0")["archives"][0]
    assert about["gaps"][0]["cause"] == "hash-backup"
    assert about["replicas"][0]["dest"] == "b0"


@pytest.mark.parametrize(
    ("gaps", "text"),
    [
        ([], "T1 (gid 1) -> T9 (gid 9)"),
        ([(0, 1)], "T1 (gid 1) -> T9 (gid 9)"),  # nothing before the gap is kept
        ([(0, 4)], "GAP T0 -> T4 (x), T4 -> T9 (gid 9)"),
        ([(2, 3), (5, 6)], "T1 (gid 1) -> T2, GAP T2 -> T3 (x), T3 -> T5, GAP T5 -> T6 (x), T6 -> T9 (gid 9)"),
        ([(5, 0)], "T1 (gid 1) -> T5, GAP T5 -> now (x)"),
    ],
)
def test_recoverable_intervals(gaps: list[tuple[int, int]], text: str) -> None:
    points = [RestorePoint(Gid(gid), NOW + gid, True) for gid in (1, 9)]
    found = recoverable(
        points, [m.Gap(begin=NOW + b, end=NOW + e if e else 0, gid_b=b, gid_e=e, cause="x") for b, e in gaps]
    )
    assert re.sub(r"2027-01-15T08:00:0(\d)", r"T\1", found) == text


def test_info_when_something_is_wrong(walbc: Cli, group_file: Make) -> None:
    with FakeGroup(archives=2) as group:
        group_file(group, "")
        group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
        group.ctl.full_backup(group.s[0], "vol0")
        group.ctl.stop(group.a[0], "vol0")
        group.kill("a1")
        out = says(walbc, "info", "vol0")
        assert "    warn: a0: stopped: takes no diffs - walbc start a0 vol0" in out
        assert "a0: Stopped" in out
        assert "nothing can be restored" in out
        assert "a1: does not answer (Connection refused)" in out
