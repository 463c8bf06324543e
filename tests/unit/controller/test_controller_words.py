"""One server's commands as words: `run_ctl`."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import NOW, FakeGroup
from walbd.controller import K_ARCHIVE, Controller
from walbd.controller.commands import find_command
from walbd.errors import BadState, UsageError
from walbd.format.meta import BaseState, Snapshot
from walbd.protocol import maintenance as m


@pytest.mark.parametrize(
    ("server", "words", "text"),
    [
        ("s0", "get state vol0", "Target"),
        ("s0", "get host-type", "storage"),
        ("s0", "get vol", "vol0"),
        ("s0", "get is-overflow vol0", "0"),
        ("s0", "get log-usage vol0", "name:vol0\tusage_pb:10\tcapacity_pb:1000\tpbs:4096"),
        ("s0", "get uuid vol0", "00" * 15 + "07"),
        ("s0", "get latest-snap", "name:vol0\tkind:storage\tgid:3\tlsid:0\ttimestamp:2027-01-15T07:59:55"),
        ("s0", "get num-action vol0 WlogSend", "0"),
        ("s0", "get all-actions", "vol0 Apply 0 2027-01-15T07:59:00"),
        ("s0", "snapshot vol0", "4"),
        ("s0", "kick", "1"),
        ("s0", "set-full-scan-bps 1m", ""),
        ("s0", "version", "version:0.1.0\tlog_version:2\tprotocol:1-1\tpython:3.11.2"),
        ("p0", "archive-info list vol0", "a0"),
        ("p0", "get is-wdiff-send-error vol0 a0", "0"),
        ("p0", "kick vol0 a0", "1"),
        ("p0", "get proxy-diff vol0", ""),
        (
            "a0",
            "get restorable vol0 all",
            "1 2027-01-15T08:00:01 0\n2 2027-01-15T08:00:02 1\n3 2027-01-15T08:00:03 1",
        ),
        ("a0", "get num-diff vol0 0 2", "2"),
        ("a0", "get total-diff-size vol0", "12288"),
        ("a0", "get diff vol0", None),
        ("a0", "get exists-diff vol0 1 1 2 2", "1"),
        ("a0", "get exists-diff vol0 1 1 3 3", "0"),
        ("a0", "get base-all", "name:vol0\tmetastate:<|0|>-20270115080000"),
        ("a0", "get volume-group", ""),
        ("a0", "get thinpool", ""),
        ("a0", "get cold vol0", ""),
        ("a0", "merge vol0 1 gid 3", "1"),
        ("a0", "merge vol0 1 size 30", "1"),
        ("a0", "enable-snapshot vol0 1 2 3", ""),
        ("a0", "disable-snapshot vol0 1", ""),
        ("a0", "resize vol0 20m zeroclear", ""),
        ("s0", "resize vol0 0", ""),
        ("s0", "dbg-dump-logpack-header vol0 9", ""),
        ("s0", "retarget 127.0.0.1:1 127.0.0.1:2,127.0.0.1:3", "applied archive\napplied proxies"),
        ("a0", "get base vol0", "<|0|>-20270115080000"),
        ("a0", "get meta-snap vol0 3", "|3|"),
        ("a0", "get meta-state vol0 1", "<|0|>-20270115080000"),
        ("a0", "get restored vol0", ""),
        ("a0", "get exists-base-image vol0", "1"),
        ("a0", "gc-diff vol0", "2"),
        ("a0", "get vol-size vol0", "32768"),
        ("a0", "restore vol0 2", "1"),
        ("a0", "status vol0", None),
        ("a0", "get jobs", ""),
    ],
)
def test_run_ctl(server: str, words: str, text: str | None, ready: FakeGroup) -> None:
    s = next(s for s in ready.layout.get_all() if s.name == server)
    found = ready.ctl.run_ctl(s, words.split())
    assert found == text if text is not None else found


@pytest.mark.parametrize(
    "words",
    ["", "get", "nonsense", "get nonsense", "get state", "get state vol0 more", "restore vol0 1", "init-vol vol0",
     "start vol0 nothing", "stop vol0 gently", "full-bkp vol0 1k1", "full-bkp vol0 100", "reset-vol vol0 x",
     "reset-vol vol0 99999999999999999999", "kick vol0", "set-full-scan-bps many", "get state vol_0", "wait-job x",
     "wait-job 1 99", "shutdown empty", "hash-bkp vol0 1", "resize vol0", "resize vol0 1m zeroclear",
     "dbg-dump-logpack-header vol0 x", "retarget", "retarget h", "retarget h:1 h", "retarget h:1 h:2,"],
)  # fmt: skip
def test_run_ctl_refuses_bad_words(words: str, group: FakeGroup) -> None:
    with pytest.raises(UsageError):
        group.ctl.run_ctl(group.s[0], words.split())
    assert group.requests == []


@pytest.mark.parametrize(
    "words",
    ["archive-info add vol0 a0", "archive-info add vol0 a0 host", "archive-info add vol0 a0 host:0",
     "archive-info add vol0 a0 h:1 zip", "archive-info add vol0 a0 h:1 zstd:1:1 -1",
     "archive-info add vol0 a_/0 h:1"],
)  # fmt: skip
def test_run_ctl_refuses_bad_archive_infos(words: str, group: FakeGroup) -> None:
    with pytest.raises(UsageError):
        group.ctl.run_ctl(group.p[0], words.split())
    assert group.requests == []


@pytest.mark.parametrize(
    "words",
    ["merge vol0 1 gid", "merge vol0 1 to 3", "merge vol0 1 size x", "replicate vol0 gid 1",
     "replicate vol0 to 1 h:1", "replicate vol0 gid 1 h", "replicate vol0 gid 1 h:1 2",
     "replicate vol0 gid 1 h:1 0 y", "replicate vol0 gid 1 h:1 0 0 zip", "replicate vol0 gid 1 h:1 0 0 lz4 1k",
     "replicate vol0 gid 1 h:1 0 0 lz4 1m 1", "resize vol0 1m zero", "enable-snapshot vol0",
     "disable-snapshot vol0 x", "bhash vol0", "bhash vol0 1 64k 100", "bhash vol0 1 64k 1m 100",
     "virt-full-scan x vol0 1 64k 1m 100",
     "get exists-diff vol0 2 1 3 3", "get exists-diff vol0 1 1 1", "dbg-set-uuid vol0 12", "dbg-set-base vol0 x"],
)  # fmt: skip
def test_run_ctl_refuses_bad_words_for_archives(words: str, group: FakeGroup) -> None:
    with pytest.raises(UsageError):
        group.ctl.run_ctl(group.a[0], words.split())
    assert group.requests == []


def test_run_ctl_replicate(ready: FakeGroup) -> None:
    words = f"replicate vol0 gid 3 {ready.a[0].get_host_port()} 1 0 lz4:2:9 2g 128k"
    ready.volume("a0").replicas.clear()
    ready.ctl.run_ctl(ready.a[0], words.split())
    assert ready.requests[-1][1] == m.Replicate(
        volume="vol0",
        dest=ready.a[0].get_host_port(),
        gid=3,
        resync=True,
        compress="lz4:2",
        merge_size_max_b=2 << 30,
        bulk_b=128 << 10,
    )
    cmd, args = find_command(["replicate", "vol0", "size", "5", "h:1"], K_ARCHIVE)
    assert cmd.request(args) == m.Replicate(volume="vol0", dest="h:1", size_b=5 << 20)


def test_commands_that_need_a_hand() -> None:
    for words, request in (
        ("dbg-reload-metadata v", m.DbgReloadMetadata(volume="v")),
        (f"dbg-set-uuid v {'12' * 16}", m.DbgSetUuid(volume="v", uuid=b"\x12" * 16)),
        ("dbg-set-state v Stopped", m.DbgSetState(volume="v", state="Stopped")),
        (
            "dbg-set-base v <|3|>-20270115080000",
            m.DbgSetBase(volume="v", base=BaseState(Snapshot.clean(3), timestamp=NOW)),
        ),
        ("merge v 1 size 2", m.Merge(volume="v", gid_b=1, size_max_b=2 << 20)),
        ("forget-replica v a1", m.ForgetReplica(volume="v", node="a1")),
    ):
        cmd, args = find_command(words.split(), K_ARCHIVE)
        assert cmd.request(args) == request


def test_run_ctl_archive_info(group: FakeGroup) -> None:
    run, p0 = group.ctl.run_ctl, group.p[0]
    assert run(p0, ["archive-info", "add", "vol0", "a0", "h:1", "lz4:2:3", "60"]) == ""
    assert run(p0, ["archive-info", "get", "vol0", "a0"]) == "h:1 lz4:2:1 60"
    assert run(p0, ["archive-info", "update", "vol0", "a0", "h:2"]) == ""
    assert run(p0, ["archive-info", "get", "vol0", "a0"]) == "h:2 zstd:1:1 0"
    assert run(p0, ["archive-info", "delete", "vol0", "a0"]) == ""
    assert run(p0, ["archive-info", "list", "vol0"]) == ""


def test_run_ctl_messages(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.ctl.run_ctl(group.s[0], ["get", "host-type"], putMsg=True)
    with pytest.raises(BadState):
        group.ctl.run_ctl(group.s[0], ["snapshot", "vol0"], putMsg=True)
    err = capsys.readouterr().err.splitlines()
    assert err[:2] == ["s0: get host-type", "storage"]
    assert err[-1].startswith("s0: not allowed in this state")
    with Controller("", group.layout, isDebug=True) as ctl:
        ctl.get_host_type(group.s[0])
        ctl.get_alive_server()
    assert "s0 <- GetHostType()" in capsys.readouterr().err
