"""`walbc -a HOST -p PORT`: one server by its address."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.cli import Cli
from tests.kit.fake_group import FakeGroup
from tests.kit.walbc_cli import ask_json, group_toml, says


def test_low_level_form(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WALBD_GROUP")
    at_s0 = ["-a", "127.0.0.1", "-p", str(ready.s[0].port), "-id", "ctl", "-to", "5"]
    at_a0 = ["-a", "127.0.0.1", "-p", str(ready.a[0].port)]
    assert says(walbc, *at_s0, "get", "state", "vol0") == "Target"
    assert says(walbc, *at_s0, "snapshot", "vol0") == "3"
    assert says(walbc, *at_s0, "stop", "vol0") == "3"  # the number of the job
    assert says(walbc, *at_a0, "get", "restorable", "vol0", "all").splitlines()[-1] == "3 2027-01-15T08:00:03 1"
    assert ask_json(walbc, *at_s0, "get", "state", "vol1") == {"value": "Clear"}
    assert "restored vol0" not in says(walbc, *at_a0, "status")
    assert "node a0" in says(walbc, *at_a0, "status", "vol0")
    assert "it is for: archive" in walbc.fails(*at_s0, "restore", "vol0", "1", code=2)
    assert "-retry is only for" in walbc.fails(*at_s0, "-retry", "1", "snapshot", "vol0", code=2)
    assert "Every server:" in says(walbc, *at_s0, "--help")
    assert "Missing command" in walbc.fails(*at_s0, code=2)


def test_low_level_checks_before_connecting(walbc: Cli) -> None:
    walbc.fails("-a", "127.0.0.1", "-p", "1", "get", "state", "vol_0", code=2)


def test_low_level_waits_for_a_job_longer_than_for_other_answers(ready: FakeGroup, walbc: Cli) -> None:
    ready.hold("restore")
    at_a0 = ["-a", "127.0.0.1", "-p", str(ready.a[0].port), "-to", "0.1"]
    job = says(walbc, *at_a0, "restore", "vol0", "1")
    assert says(walbc, *at_a0, "wait-job", job, "0.3").startswith(f"{job} running restore")
    ready.release("restore")
    assert says(walbc, *at_a0, "wait-job", job, "60").startswith(f"{job} done restore")


def test_low_level_waits_for_a_hash(ready: FakeGroup, walbc: Cli) -> None:
    at_a0 = ["-a", "127.0.0.1", "-p", str(ready.a[0].port)]
    assert says(walbc, *at_a0, "bhash", "vol0", "2") == f"{2:032x}"
    assert says(walbc, "on", "a0", "bhash", "vol0", "2") == f"{2:032x}"


def test_low_level_scan(ready: FakeGroup, walbc: Cli, tmp_path: Path) -> None:
    ready.volume("a0").image = image = bytes(4096) + b"walb" * 1024
    at_a0 = ["-a", "127.0.0.1", "-p", str(ready.a[0].port)]
    assert says(walbc, *at_a0, "virt-full-scan", str(tmp_path / "image"), "vol0", "2") == ""
    assert (tmp_path / "image").read_bytes() == image
    assert "walbc scan" in walbc.fails("on", "a0", "virt-full-scan", "x", "vol0", "2", code=2)


def test_low_level_retries_only_questions(walbc: Cli) -> None:
    nobody = ["-a", "127.0.0.1", "-p", "1"]
    for words, tries in ((["get", "vol"], 3), (["-retry", "1", "get", "vol"], 2), (["snapshot", "vol0"], 1)):
        options = [word for word in words[:2] if words[0] == "-retry"]
        result = walbc(*nobody, *options, *words[len(options) :])
        assert result.code == 3
        assert result.err.count("cannot connect") == tries
        assert result.err.endswith("hint: start the daemon, or correct the address\n")


def test_low_level_with_a_group_file(ready: FakeGroup, walbc: Cli, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text('group = "other"\n' + group_toml(ready))
    args = ["--group", str(path), "-a", "127.0.0.1", "-p", str(ready.s[0].port), "get", "vol"]
    err = walbc.fails(*args, code=5)
    assert "another backup group" in err
    assert 'hint: say group = "default"' in err
