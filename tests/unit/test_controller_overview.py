"""The status screen: what is judged how, and its text as it stands."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.kit.fake_group import NOW, FakeGroup, FakeVolume
from walbd.controller import Word, overview_lines
from walbd.controller.overview import Overview, make_overview, worst
from walbd.errors import Refused
from walbd.protocol import control as c
from walbd.protocol.base import JobInfo, JobList, JobState, Kind


@pytest.fixture
def group() -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        made.ctl.init_storage(made.s[0], "vol0", "/dev/x")
        made.ctl.full_backup(made.s[0], "vol0")
        made.ctl.snapshot(made.s[0], "vol0", made.a)
        yield made


def screen(view: Overview) -> str:
    """The text with ports, as they differ from run to run, replaced."""
    text = "\n".join(overview_lines(view))
    for line in text.splitlines():
        assert line.split()[0] in ("ok", "warn", "error", "down"), line
    return re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", text)


def codes(view: Overview) -> list[tuple[str, str, str]]:
    return [(str(a.word), a.code, a.server) for a in view.alarms]


def test_all_is_well(group: FakeGroup) -> None:
    view = group.ctl.overview()
    assert view.word is Word.OK
    assert screen(view) == (
        "ok  group             3 servers, 1 volume, no alarms\n"
        "ok  storage  s0       ADDRESS, 1 volume, walbd 0.1.0, pid 4242\n"
        "ok  proxy    p0       ADDRESS, 1 volume, walbd 0.1.0, pid 4242\n"
        "ok  archive  a0       ADDRESS, 1 volume, walbd 0.1.0, pid 4242\n"
        "ok  volume   vol0     16.0 MiB, backed up from s0, restorable until 2027-01-15T07:59:55,"
        " nothing missing\n"
        "ok  vol0     s0       Target, log 10% of 39.1 MiB, 0 s 0 B to send\n"
        "ok  vol0     p0 > a0  Started, 0 diffs, 0 s 0 B to send\n"
        "ok  vol0     a0       Archived, 2 points from 2027-01-15T07:50:00 to 2027-01-15T07:59:55,"
        " 1 diff 4.0 KiB, 0 s behind"
    )


def test_servers_are_down(group: FakeGroup) -> None:
    group.frozen = True
    group.volume("p0").waiting["a0"] = [3, 4]
    group.kill("a0")
    view = group.ctl.overview()
    assert screen(view) == (
        "down  group             3 servers, 1 volume, 2 alarms\n"
        "ok    storage  s0       ADDRESS, 1 volume, walbd 0.1.0, pid 4242\n"
        "ok    proxy    p0       ADDRESS, 1 volume, walbd 0.1.0, pid 4242\n"
        "down  archive  a0       ADDRESS, does not answer (Connection refused)\n"
        "down  volume   vol0     16.0 MiB, backed up from s0, waits for a0\n"
        "ok    vol0     s0       Target, log 10% of 39.1 MiB, 0 s 0 B to send\n"
        "warn  vol0     p0 > a0  Started, 2 diffs, 100 s 16.0 KiB to send\n"
        "down  alarm    a0       does not answer (Connection refused) - start the daemon\n"
        "warn  alarm    p0 vol0  100 s 16.0 KiB wait for a0"
    )
    group.kill("s0")
    group.kill("p0")
    view = group.ctl.overview()
    assert view.word is Word.DOWN
    assert view.volumes == []
    assert codes(view) == [("down", "unreachable", name) for name in ("s0", "p0", "a0")]


def test_jobs(group: FakeGroup) -> None:
    group.hold("restore")
    group.ctl.run_ctl(group.a[0], ["restore", "vol0", "1"])
    jobs = [" ".join(line.split()) for line in screen(group.ctl.overview()).splitlines() if " job " in line]
    assert jobs == ["ok job a0 1 restore vol0: write 0%"]
    group.release("restore")
    group.fail_job("apply", Refused("no space", hint="make room"))
    group.ctl.run_ctl(group.a[0], ["apply", "vol0", "2"])
    group.ctl.wait_until("the job", lambda: group.ctl.get_num_action(group.a[0], "vol0", "x") == 0 or None, 10)
    view = group.ctl.overview()
    assert [(v.word, v.job.name) for v in view.jobs] == [(Word.WARN, "apply")]
    assert view.alarms[0].code == "job-failed"
    assert "no space" in view.alarms[0].text
    group.ctl.apply(group.a[0], "vol0", 2)  # a later success makes the failure old news
    assert group.ctl.overview().jobs == []


@pytest.mark.parametrize(
    ("name", "code", "alarms"),
    [
        ("stop", "bad-state", []),
        ("virt-full-scan", "connect", []),
        ("stop", "disk-failed", ["job-failed"]),
        ("virt-full-scan", "corrupt-data", ["job-failed"]),
        ("replicate", "connect", ["job-failed"]),
    ],
)
def test_what_ended_as_somebody_wanted_alarms_nobody(
    group: FakeGroup, name: str, code: str, alarms: list[str]
) -> None:
    """A stop that ended a backup, a scan whose reader was interrupted. Other failures are told."""
    stop = JobInfo(job=1, name=name, volume="vol0", state=JobState.FAILED, started=1, ended=1, error_code=code)
    replies = group.ctl.ask_each(group.layout.get_all(), c.GetStatus())
    s0 = group.s[0]
    reply = replies[s0]
    assert isinstance(reply, c.StatusReply)
    job = dataclasses.replace(stop, started=reply.now - 5, ended=reply.now)
    view = make_overview(replies, {s0: JobList(jobs=[job])}, "", group.layout)
    assert [a.code for a in view.alarms] == alarms


def alarms_of(group: FakeGroup, kind: Kind, **fields: Any) -> list[tuple[str, str]]:
    """Change the status that servers of a kind give of vol0, and return the alarms."""
    replies = group.ctl.ask_each(group.layout.get_all(), c.GetStatus())
    changed = {}
    for s, reply in replies.items():
        assert isinstance(reply, c.StatusReply)
        volumes = reply.volumes
        if reply.kind is kind:
            names = volumes[0].__struct_fields__
            volumes = [c.VolumeStatus(**{name: getattr(volumes[0], name) for name in names} | fields)]
        changed[s] = c.StatusReply(
            node=reply.node, kind=reply.kind, version="", pid=1, now=NOW, volumes=volumes, proxies=reply.proxies
        )
    view = make_overview(changed, {}, "", group.layout)
    screen(view)
    return [(str(a.word), a.code) for a in view.alarms]


@pytest.mark.parametrize(
    ("kind", "fields", "alarms"),
    [
        (Kind.STORAGE, {}, []),
        (Kind.STORAGE, {"overflow": True}, [("error", "overflow")]),
        (Kind.STORAGE, {"device_error": "gone"}, [("down", "device-down")]),
        (Kind.STORAGE, {"device_error": "gone", "error": "gone"}, [("down", "device-down")]),
        (Kind.STORAGE, {"log_usage_pb": 7500}, [("warn", "log-fill")]),
        (Kind.STORAGE, {"log_usage_pb": 9500}, [("error", "log-fill")]),
        (Kind.STORAGE, {"log_usage_pb": 19500, "overflow": True}, [("error", "overflow")]),
        (Kind.STORAGE, {"state": "Stopped"}, [("warn", "stopped")]),
        (Kind.STORAGE, {"state": "SyncReady"}, [("warn", "not-started")]),
        (Kind.STORAGE, {"state": "Standby"}, [("warn", "no-target")]),
        (Kind.STORAGE, {"state": "Broken", "error": "bad record"}, [("error", "broken")]),
        (Kind.STORAGE, {"lag_lb": 8, "waiting_since": NOW - 61}, [("warn", "lag")]),
        (Kind.STORAGE, {"lag_lb": 8, "waiting_since": NOW - 5}, []),
        (Kind.STORAGE, {"uuid": "ff" * 16}, [("error", "other-history")]),
        (Kind.PROXY, {"state": "Stopped"}, [("warn", "stopped")]),
        (Kind.PROXY, {"hops": []}, [("error", "not-fed")]),
        (Kind.STORAGE, {"overflow": True, "error": "the log has overflowed"}, [("error", "overflow")]),
        (Kind.STORAGE, {"error": "no proxy takes the log"}, [("error", "trouble")]),
        (Kind.PROXY, {"error": "bad file"}, [("error", "trouble")]),
        (Kind.ARCHIVE, {"state": "Stopped"}, [("warn", "stopped")]),
        (Kind.ARCHIVE, {"state": "SyncReady", "restorable": 0}, [("warn", "not-started")]),
        (Kind.ARCHIVE, {"restorable": 0}, [("warn", "nothing-restorable")]),
        (Kind.ARCHIVE, {"state": "Clear"}, [("warn", "clear-archive")]),
        (Kind.ARCHIVE, {"state": "Broken"}, [("error", "broken")]),
    ],
)
def test_alarms(kind: Kind, fields: dict[str, Any], alarms: list[tuple[str, str]], group: FakeGroup) -> None:
    assert alarms_of(group, kind, **fields) == alarms


@pytest.mark.parametrize(("free_b", "word"), [(99, "error"), (150, "warn"), (200, None)])
def test_little_space(group: FakeGroup, free_b: int, word: str | None) -> None:
    replies = dict(group.ctl.ask_each(group.layout.get_all(), c.GetStatus()))
    replies[group.a[0]] = c.StatusReply(
        node="a0",
        kind=Kind.ARCHIVE,
        version="",
        pid=1,
        now=NOW,
        server={"free_b": free_b, "free_reserve_b": 100},
    )
    view = make_overview(replies, {}, "", group.layout)
    assert [str(a.word) for a in view.alarms if a.code == "disk-full"] == ([word] if word else [])


def test_send_error(group: FakeGroup) -> None:
    group.volume("p0").send_error = True
    group.frozen = True
    view = group.ctl.overview()
    assert codes(view) == [("error", "send-error", "p0")]
    assert view.alarms[0].text == "cannot send to a0: smaller-lv-size"
    assert "kick-all p0" in view.alarms[0].hint


@pytest.mark.parametrize(("behind", "found"), [(1, [("error", "wdiff-damaged", "p0")]), (0, [])])
def test_what_was_damaged_at_a_proxy(group: FakeGroup, behind: int, found: list[tuple[str, str, str]]) -> None:
    """It matters until the archive has got past it."""
    replies = dict(group.ctl.ask_each(group.layout.get_all(), c.GetStatus()))
    at_archive, at_proxy = replies[group.a[0]], replies[group.p[0]]
    assert isinstance(at_archive, c.StatusReply)
    assert isinstance(at_proxy, c.StatusReply)
    end = at_archive.volumes[0].latest_gid + behind
    (v,) = at_proxy.volumes
    hops = [
        msgspec.structs.replace(hop, error=True, error_text="damaged here: |0|-->|1|", damaged=[(0, end)])
        for hop in v.hops
    ]
    replies[group.p[0]] = dataclasses.replace(at_proxy, volumes=[msgspec.structs.replace(v, hops=hops)])
    view = make_overview(replies, {}, "", group.layout)
    assert codes(view) == found
    assert all("damaged here" in alarm.text for alarm in view.alarms)


def test_proxies_as_a_storage_sees_them(group: FakeGroup) -> None:
    replies = dict(group.ctl.ask_each(group.layout.get_all(), c.GetStatus()))
    for available, word in (([False, True], "warn"), ([False, False], "error"), ([True, True], None)):
        health = [c.ProxyHealth(address=f"h:{i}", available=a, next_check_s=1.0) for i, a in enumerate(available)]
        replies[group.s[0]] = c.StatusReply(
            node="s0", kind=Kind.STORAGE, version="", pid=1, now=NOW, proxies=health
        )
        view = make_overview(replies, {}, "", group.layout)
        assert [str(a.word) for a in view.alarms if a.code == "proxy-unavailable"] == ([word] if word else [])


def test_server_that_calls_itself_otherwise_and_has_errors(group: FakeGroup) -> None:
    replies = dict(group.ctl.ask_each(group.layout.get_all(), c.GetStatus()))
    bad = c.VolumeStatus(volume="v", state="Broken", error="bad record")
    replies[group.a[0]] = c.StatusReply(
        node="x9",
        kind=Kind.ARCHIVE,
        version="",
        pid=1,
        now=NOW,
        volumes=[bad],
        errors=["disk", "disk", "v: bad record"],
    )
    view = make_overview(replies, {}, "", group.layout)
    assert [a.text for a in view.alarms if a.server == "a0" and not a.volume] == ["disk", "calls itself x9"]


def test_several_storages_and_proxies() -> None:
    with FakeGroup(storages=2, proxies=2) as group:
        group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
        group.ctl.full_backup(group.s[0], "vol0")
        group.servers["s1"].volumes["vol0"] = FakeVolume("Target", uuid=group.volume("s0").uuid)
        del group.servers["p1"].volumes["vol0"]
        view = group.ctl.overview()
        assert [a.code for a in view.alarms] == ["two-targets", "half-fed"]
        assert view.alarms[1].text == "p1 does not send to a0"
        assert view.volumes[0].targets == ["s0", "s1"]


def test_one_volume_and_one_server(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.servers["s0"].volumes["vol1"] = FakeVolume("SyncReady")
    assert [v.volume for v in group.ctl.overview("vol0").volumes] == ["vol0"]
    assert [v.volume for v in group.ctl.overview().volumes] == ["vol0", "vol1"]
    assert group.ctl.overview("vol7").volumes == []
    group.ctl.status(group.s[0], "vol0")
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["group", "storage", "volume", "vol0"]
    group.ctl.status([group.p[0], group.a[0]])
    assert all(line.startswith("ok") for line in capsys.readouterr().out.splitlines())


def test_json(group: FakeGroup) -> None:
    ready = group.ctl.overview().to_json()
    assert ready["word"] == "ok"
    assert ready["servers"][0]["status"]["volumes"][0]["state"] == "Target"
    assert ready["volumes"][0]["parts"][1]["dest"] == "a0"


def test_worst() -> None:
    assert worst([]) is Word.OK
    assert worst([Word.WARN, Word.DOWN, Word.ERROR]) is Word.DOWN
