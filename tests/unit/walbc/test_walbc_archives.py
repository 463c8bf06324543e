"""`walbc`: hash backups, diffs, copies, scans, sizes and settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Cli
from tests.kit.fake_group import NOW, FakeGroup
from tests.kit.walbc_cli import Make, ask_json, says
from walbd.errors import ConfigError
from walbd.protocol import control as c
from walbd.protocol import maintenance as m


@pytest.fixture
def big(group_file: Make) -> Iterator[FakeGroup]:
    """vol0 is backed up from s0 to a0, which has the generations 1 and 2."""
    with FakeGroup(storages=2, proxies=2, archives=2) as made:
        group_file(made, '[volumes.vol0]\ntarget = "s0"\n')
        made.ctl.init_storage(made.s[0], "vol0", "/dev/x")
        made.ctl.full_backup(made.s[0], "vol0")
        made.ctl.snapshot(made.s[0], "vol0", made.a[:1])
        made.requests.clear()
        yield made


def test_hash_backup(ready: FakeGroup, walbc: Cli) -> None:
    assert "stop it first: walbc stop s0 vol0" in walbc.fails("hash-backup", "vol0", code=5)
    says(walbc, "stop", "s0", "vol0")
    assert says(walbc, "hash-backup", "vol0", "--bulk", "64k", "--compress", "lz4") == "3"
    assert ("s0", c.HashBackup(volume="vol0", bulk_b=65536)) in ready.requests
    assert ready.volume("p0").infos["a0"].compress == "lz4:0"
    says(walbc, "stop", "s0", "vol0")
    assert ask_json(walbc, "hash-backup", "vol0") == {"volume": "vol0", "storage": "s0", "gid": 4}
    says(walbc, "stop", "s0", "vol0")
    ready.hold("hash-backup")
    assert says(walbc, "hash-backup", "vol0", "--no-wait") == "the backup of vol0 has begun at s0"
    assert "from 512 bytes" in walbc.fails("hash-backup", "vol0", "--bulk", "1", code=2)


def test_diffs(ready: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "get-num-diff", "vol0") == "2"
    assert says(walbc, "get-num-diff", "vol0", "1", "9") == "1"
    assert ask_json(walbc, "get-total-diff-size", "vol0") == {"value": 8192}
    assert says(walbc, "enable-snapshot", "vol0", "1") == ""
    assert "walbc disable-snapshot vol0 1 --archive a0" in walbc.fails("merge", "vol0", "0", "2", code=5)
    assert ask_json(walbc, "disable-snapshot", "vol0", "1", "2")["gids"] == [1, 2]
    assert says(walbc, "merge", "vol0", "0", "2") == "one diff leads from 0 to 2"
    assert says(walbc, "get-num-diff", "vol0") == "1"
    assert "Missing argument" in walbc.fails("enable-snapshot", "vol0", code=2)


def test_cold_images(ready: FakeGroup, walbc: Cli) -> None:
    ready.volume("a0").colds = [1]
    assert says(walbc, "cold", "vol0") == "1"
    assert says(walbc, "del-cold", "vol0", "1") == ""
    assert ask_json(walbc, "cold", "vol0") == {"gids": []}


def test_gaps(ready: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "gaps", "vol0").split() == ["GIDB", "FROM", "GIDE", "TO", "CAUSE"]
    ready.volume("a0").gaps = [m.Gap(begin=NOW, end=0, gid_b=2, gid_e=0, cause="hash-backup")]
    assert says(walbc, "gaps", "vol0").splitlines()[1].split() == [
        "2", "2027-01-15T08:00:00", "-", "open", "hash-backup",
    ]  # fmt: skip
    assert ask_json(walbc, "gaps", "vol0")["gaps"][0]["gid_b"] == 2


def test_hashes_and_scrubs(ready: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "block-hash", "vol0", "2") == f"{2:032x}"
    assert ask_json(walbc, "block-hash", "vol0", "2", "--bulk", "32k")["hash"] == f"{2:032x}"
    assert says(walbc, "scrub", "vol0").splitlines()[:2] == ["wdiffs 3", "damaged 0"]
    ready.volume("a0").damage = "base"
    result = walbc("scrub", "vol0")
    assert result.code == 1
    assert "damaged_files base" in result.out


def test_scan(ready: FakeGroup, walbc: Cli, tmp_path: Path) -> None:
    ready.volume("a0").image = image = bytes(4096) + b"walb" * 1024
    path = tmp_path / "image"
    assert says(walbc, "scan", "vol0", "2", str(path)) == f"{path}: 8.0 KiB"
    assert path.read_bytes() == image
    assert "--force" in walbc.fails("scan", "vol0", "2", str(path), code=5)
    options = ["--force", "--size", "4k", "--rest", "5", "--bulk", "4k"]
    value = ask_json(walbc, "scan", "vol0", "2", str(path), *options)
    assert value["size_b"] == path.stat().st_size == 4096


def test_scan_to_a_device_asks(
    ready: FakeGroup, walbc: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(8192))
    ready.volume("a0").image = b"walb" * 1024
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == path)
    assert "say --yes" in walbc.fails("scan", "vol0", "2", str(path), code=2)
    assert path.read_bytes() == bytes(8192)
    says(walbc, "scan", "vol0", "2", str(path), "--yes")
    assert path.read_bytes() == b"walb" * 1024 + bytes(4096)


# Copies


def test_copies(big: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "replicate", "vol0", "a1", "--gid", "1", "--dont-merge") == "1"
    assert says(walbc, "replicate", "vol0", "a1", "--compress", "lz4", "--merge-size", "2m", "--bulk", "8k") == "2"
    request = [r for _, r in big.requests if isinstance(r, m.Replicate)][-1]
    assert (request.compress, request.merge_size_max_b, request.bulk_b) == ("lz4:0", 2 << 20, 8192)
    assert says(walbc, "synchronize", "vol0", "a1") == "vol0 is sent to a1"
    assert ask_json(walbc, "replicate", "vol0", "a1", "--sync", "--resync") == {
        "volume": "vol0", "source": "a0", "archive": "a1", "gid": 2, "synchronizing": True,
    }  # fmt: skip
    assert says(walbc, "is-synchronizing", "vol0", "--archive", "a1") == "1"
    assert "leave --gid out" in walbc.fails("replicate", "vol0", "a1", "--sync", "--gid", "1", code=2)
    assert "itself" in walbc.fails("replicate", "vol0", "a0", code=2)
    assert "servers here: a0, a1" in walbc.fails("replicate", "vol0", "a9", code=2)
    assert says(walbc, "replicate", "vol0", "a0", "--from", "a1") == "2"


def test_replicas(ready: FakeGroup, walbc: Cli) -> None:
    row = m.ReplicaPosition(node="b0", address="h:1", gid=2, timestamp=NOW, seen=NOW, failures=1, error="away")
    ready.volume("a0").replicas = [row]
    assert says(walbc, "replicas", "vol0").splitlines()[1].split() == [
        "b0", "h:1", "2", "2027-01-15T08:00:00", "2027-01-15T08:00:00", "1", "away",
    ]  # fmt: skip
    assert ask_json(walbc, "replicas", "vol0")["rows"][0]["node"] == "b0"
    assert says(walbc, "forget-replica", "vol0", "b0") == ""
    walbc.fails("forget-replica", "vol0", "b0", code=5)


# Sizes and settings


def test_resize(big: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "resize", "vol0", "17m") == "vol0 has 17.0 MiB"
    assert big.changes() == ["a0 resize vol0", "s0 resize vol0"]
    assert says(walbc, "resize", "vol0", "18m", "--zero", "--at", "a0") == "vol0 has 18.0 MiB at a0"
    assert ("a0", c.Resize(volume="vol0", size_b=18 << 20, zero=True)) in big.requests
    assert "the size of its data device" in says(walbc, "resize", "vol0", "0", "--at", "s0")
    assert "whole number of MiB" in walbc.fails("resize", "vol0", "1k", code=2)
    assert "smaller" in walbc.fails("resize", "vol0", "1m", code=2)
    assert "storage or archive" in walbc.fails("resize", "vol0", "20m", "--at", "p0", code=2)


def test_reload(big: FakeGroup, walbc: Cli) -> None:
    out = says(walbc, "reload").splitlines()
    assert out[:2] == ["s0 applied log_level", "s1 applied log_level"]
    assert "p1 needs-restart port" in out
    assert ask_json(walbc, "reload", "a0") == {"a0": {"applied": ["log_level"], "needs_restart": []}}
    big.fail("s1", m.Reload, ConfigError("bad value", hint="write a number"))
    result = walbc("reload", "s0", "s1")
    assert (result.code, result.out) == (2, "s0 applied log_level\n")
    assert "bad value" in result.err
    big.kill("p0")
    big.kill("a1")
    result = walbc("reload")
    assert result.code == 3
    assert "a0 applied log_level" in result.out
    assert "a1: " in result.err


def test_retarget(big: FakeGroup, walbc: Cli) -> None:
    says(walbc, "retarget")
    proxies = [p.get_host_port() for p in big.p]
    request = m.Retarget(archive=big.a[0].get_host_port(), proxies=proxies)
    assert [r for r in big.requests if isinstance(r[1], m.Retarget)] == [("s0", request), ("s1", request)]
    says(walbc, "retarget", "s1", "--archive", "a1", "--proxy", "p1", "--proxy", "p0")
    request = m.Retarget(archive=big.a[1].get_host_port(), proxies=proxies[::-1])
    assert big.requests[-1] == ("s1", request)
    big.kill("s1")
    big.requests.clear()
    walbc.fails("retarget", code=3)
    assert big.changes() == []


def test_dump_log_header(ready: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "dump-log-header", "s0", "vol0", "5") == ""
    assert ready.requests[-1] == ("s0", m.DumpLogHeader(volume="vol0", lsid=5))
    walbc.fails("dump-log-header", "a0", "vol0", "5", code=2)
