"""`walbc` against a group of fakes: text, JSON, exit codes, defaults, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.kit.cli import Cli
from tests.kit.fake_group import FakeGroup, FakeVolume
from tests.kit.walbc_cli import Make, ask_json, results, says
from walbd.cli.walbc import COMMANDS
from walbd.cli.walbc_progress import ProgressView
from walbd.controller import Controller, Progress
from walbd.errors import Refused
from walbd.protocol import control as c

# The way of a volume


def test_from_nothing_to_a_restored_image(group: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "init-storage", "vol0", "/dev/x") == "vol0 is Standby at s0"
    assert says(walbc, "full-backup", "vol0") == "1"
    assert says(walbc, "snapshot", "vol0") == "2"
    assert says(walbc, "restorable", "vol0") == "1 2027-01-15T08:00:01 0\n2 2027-01-15T08:00:02 1"
    assert says(walbc, "restore", "vol0", "latest") == "/images/vol0/2"
    assert says(walbc, "restore", "vol0", "1") == "/images/vol0/1"
    assert says(walbc, "restored", "vol0") == "1 /images/vol0/1\n2 /images/vol0/2"
    assert says(walbc, "get-restored-path", "vol0", "1") == "/images/vol0/1"
    assert says(walbc, "del-restored", "vol0", "1") == ""
    assert says(walbc, "apply", "vol0", "2") == "the base of vol0 at a0 is at 2"
    assert says(walbc, "get-base", "vol0") == "<|2|>-20270115080000"
    assert says(walbc, "is-overflow", "vol0") == "0"
    assert says(walbc, "stop", "s0", "vol0") == "vol0 is Stopped at s0"
    assert says(walbc, "start", "s0", "vol0") == "vol0 is Target at s0"
    assert says(walbc, "clear", "a0", "vol0", "--yes") == "vol0 is Clear at a0"


def test_results_as_json(ready: FakeGroup, walbc: Cli) -> None:
    s0, a0 = ready.s[0], ready.a[0]
    assert ask_json(walbc, "snapshot", "vol0") == {"volume": "vol0", "gid": 3, "archives": ["a0"]}
    assert ask_json(walbc, "snapshot", "vol0", "--no-wait") == {"volume": "vol0", "gid": 4, "archives": []}
    assert ask_json(walbc, "restore", "vol0", "2") == {
        "volume": "vol0", "archive": "a0", "gid": 2, "path": "/images/vol0/2",
    }  # fmt: skip
    assert ask_json(walbc, "restored", "vol0") == [{"gid": 2, "path": "/images/vol0/2"}]
    assert [p["gid"] for p in ask_json(walbc, "restorable", "vol0", "--all")["points"]] == [1, 2, 3, 4]
    assert ask_json(walbc, "is-overflow", "vol0") == {"value": False}
    assert ask_json(walbc, "is-synchronizing", "vol0") == {"value": True}
    assert ask_json(walbc, "get-state", "s0", "vol0") == {"value": "Target"}
    assert ask_json(walbc, "get-state-all", "vol0") == {"s0": "Target", "p0": "Started", "a0": "Archived"}
    assert ask_json(walbc, "get-vol-list", "a0") == {"names": ["vol0"]}
    assert ask_json(walbc, "get-base", "vol0")["base"]["begin"] == {"gid_b": 0, "gid_e": 0}
    assert len(ask_json(walbc, "get-diff-list", "vol0")["diffs"]) == 4
    assert ask_json(walbc, "get-diff-list", "vol0") == ask_json(walbc, "get-applicable-diff-list", "vol0")
    assert ask_json(walbc, "archive-info", "list", "vol0") == {
        "p0": [{"archive": "a0", "address": a0.get_host_port(), "compress": "zstd:1", "delay_s": 0}]
    }
    assert ask_json(walbc, "ping", "s0") == [
        {"server": "s0", "kind": "storage", "address": s0.get_host_port(), "alive": True}
    ]
    assert ask_json(walbc, "version")["a0"]["python"] == "3.11.2"
    jobs = ask_json(walbc, "jobs", "a0")["a0"]["jobs"]
    assert [(job["name"], job["state"]) for job in jobs] == [("restore", "done")]
    assert ask_json(walbc, "wait", "a0", "1")["result"] == {}
    assert ask_json(walbc, "get-ts-delta", "s0")[0]["ts_delta"] == 3
    assert ask_json(walbc, "gc-diff", "vol0") == {"value": 2}
    assert ask_json(walbc, "stop", "s0", "vol0") == {"server": "s0", "volume": "vol0", "state": "Stopped"}
    assert ask_json(walbc, "on", "a0", "get", "vol-size", "vol0") == {"value": 1 << 15}


def test_other_commands_as_text(ready: FakeGroup, walbc: Cli) -> None:
    a0 = ready.a[0]
    assert says(walbc, "get-uuid", "s0", "vol0") == says(walbc, "get-archive-uuid", "vol0") == "00" * 15 + "07"
    assert (
        says(walbc, "get-diff-list", "vol0", "0", "1").splitlines()[0] == "|0|-->|1| M- 2027-01-15T08:00:00 4096"
    )
    assert says(walbc, "is-wdiff-send-error", "p0", "vol0") == "0"
    assert says(walbc, "kick-all") == ""
    assert says(walbc, "kick-all", "p0") == ""
    assert says(walbc, "kick-proxy", "vol0") == ""
    assert says(walbc, "set-full-scan-bps", "s0", "10m") == ""
    assert (
        says(walbc, "start-synchronizing", "a0", "vol0", "--compress", "lz4:3", "--delay", "9")
        == "vol0 is sent to a0"
    )
    assert says(walbc, "archive-info", "get", "p0", "vol0", "a0") == f"{a0.get_host_port()} lz4:3:1 9"
    table = says(walbc, "archive-info", "list", "vol0").splitlines()
    assert table[0].split() == ["PROXY", "ARCHIVE", "ADDRESS", "COMPRESS", "DELAY"]
    assert table[1].split() == ["p0", "a0", a0.get_host_port(), "lz4:3:1", "9"]
    assert says(walbc, "stop", "p0", "vol0", "empty") == "vol0 is Stopped at p0"
    assert says(walbc, "archive-info", "update", "p0", "vol0", "a0", "--delay", "3") == ""
    assert says(walbc, "archive-info", "get", "p0", "vol0", "a0") == f"{a0.get_host_port()} lz4:3:1 3"
    assert says(walbc, "archive-info", "delete", "p0", "vol0", "a0") == "p0 does not send vol0 to a0 any more"
    assert says(walbc, "archive-info", "add", "p0", "vol0", "a0", "--no-start") == "p0 sends vol0 to a0"
    assert says(walbc, "get-state", "p0", "vol0") == "Stopped"
    assert says(walbc, "stop-synchronizing", "a0", "vol0") == "vol0 is not sent to a0 any more"
    assert says(walbc, "stop", "s0", "vol0", "force", "--no-wait") == "vol0 was Target at s0"
    assert says(walbc, "ping").splitlines()[0] == f"s0 storage {ready.s[0].get_host_port()} ok"
    assert says(walbc, "version", "s0") == "server:s0\tversion:0.1.0\tlog_version:2\tpython:3.11.2"
    assert says(walbc, "jobs", "--volume", "vol1").split() == [
        "SERVER", "JOB", "NAME", "VOLUME", "STATE", "STARTED", "NOTE",
    ]  # fmt: skip
    assert says(walbc, "wait", "s0", "1").startswith("1 done stop vol0")
    assert says(walbc, "on", "s0", "get", "is-overflow", "vol0") == "0"


def test_archive_info_copy(walbc: Cli, group_file: Make) -> None:
    with FakeGroup(proxies=2) as group:
        group_file(group, "")
        group.ctl.add_archive_to_proxy(group.p[0], "vol0", group.a[0])
        assert says(walbc, "archive-info", "copy", "p0", "vol0", "p1") == "p1 sends vol0 as p0 does"
        assert says(walbc, "get-state", "p1", "vol0") == "Started"


def test_full_backup_options(group: FakeGroup, walbc: Cli) -> None:
    says(walbc, "init-storage", "vol0", "/dev/x")
    args = ["--bulk", "64k", "--compress", "lz4", "--no-wait", "--json"]
    group.hold("full-backup")
    assert ask_json(walbc, "full-backup", "vol0", *args) == {"volume": "vol0", "storage": "s0", "gid": None}
    assert ("s0", c.FullBackup(volume="vol0", bulk_b=65536)) in group.requests
    assert group.volume("p0").infos["a0"].compress == "lz4:0"


# Which storage is meant


def test_storage_is_found(walbc: Cli, group_file: Make) -> None:
    with FakeGroup(storages=2) as group:
        group_file(group, "")
        assert "--storage NAME; there are: s0, s1" in walbc.fails("is-overflow", "vol0", code=2)
        group.servers["s1"].volumes["vol0"] = FakeVolume("Stopped")
        assert says(walbc, "is-overflow", "vol0") == "0"  # only s1 knows it
        group.servers["s0"].volumes["vol0"] = FakeVolume("Target", overflow=True)
        assert says(walbc, "is-overflow", "vol0") == "1"  # s0 is the target
        assert says(walbc, "is-overflow", "vol0", "--storage", "s1") == "0"
        group.volume("s1").state = "Target"
        walbc.fails("is-overflow", "vol0", code=2)
        group_file(group, '[volumes.vol0]\ntarget = "s1"\n')
        assert says(walbc, "is-overflow", "vol0") == "0"
        group_file(group, "")
        group.volume("s0").state = "Standby"
        group.kill("s0")  # it might be a target, too
        walbc.fails("is-overflow", "vol0", code=2)


def test_device_of_the_group_file(walbc: Cli, group_file: Make) -> None:
    with FakeGroup(storages=2) as group:
        group_file(group, '[volumes.vol0]\ndevices = { s1 = "/dev/y" }\n')
        assert says(walbc, "init-storage", "vol0") == "vol0 is Standby at s1"
        assert group.volume("s1").device == "/dev/y"
        assert "device is missing" in walbc.fails("init-storage", "vol0", "--storage", "s0", code=2)
        assert says(walbc, "init-storage", "vol0", "/dev/z", "--storage", "s0") == "vol0 is Standby at s0"


def test_snapshot_waits_at_every_archive_that_is_fed(walbc: Cli, group_file: Make) -> None:
    with FakeGroup(archives=2) as group:
        group_file(group, "")
        group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
        group.ctl.full_backup(group.s[0], "vol0")
        assert ask_json(walbc, "snapshot", "vol0")["archives"] == ["a0"]
        group.ctl.start_synchronizing(group.a[1], "vol0")
        group.servers["a1"].volumes["vol0"] = FakeVolume("Archived")
        assert ask_json(walbc, "snapshot", "vol0")["archives"] == ["a0", "a1"]
        assert ask_json(walbc, "snapshot", "vol0", "--archive", "a1")["archives"] == ["a1"]


# Errors and exit codes


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["get-state", "s9", "vol0"], 2, "servers here: s0, p0, a0"),
        (["get-state", "s0", "vol_0"], 2, "1 to 64 letters"),
        (["restorable", "vol_0"], 2, "1 to 64 letters"),
        (["restorable", "vol0", "--archive", "s0"], 2, "no such server"),
        (["statsu"], 2, "did you mean status?"),
        (["zzz"], 2, "see `walbc --help`"),
        (["start"], 2, "Missing argument"),
        (["restore", "vol0", "x"], 2, "no generation"),
        (["restore", "vol0", "99999999999999999999"], 2, "no generation"),
        (["stop", "s0", "vol0", "empty"], 2, "graceful or force"),
        (["full-backup", "vol0"], 5, "walbc init-storage"),
        (["full-backup", "vol0", "--bulk", "100"], 2, "from 512 bytes"),
        (["full-backup", "vol0", "--compress", "zip"], 2, "snappy"),
        (["start", "s0", "vol0"], 5, "state=Clear"),
        (["info", "vol0"], 5, "walbc status"),
        (["status", "vol0"], 5, "walbc status"),
        (["wait", "s0", "7"], 5, "no such job"),
        (["shutdown"], 2, "--all"),
        (["shutdown", "s0", "--all"], 2, "--all"),
        (["on", "s0", "restore", "vol0", "1"], 2, "it is for: archive"),
        (["on", "s0", "nonsense"], 2, "unknown command"),
        (["set-full-scan-bps", "s0", "fast"], 2, "not a size"),
        (["-a", "127.0.0.1", "get", "state", "vol0"], 2, "go together"),
        (["-retry", "3", "ping"], 2, "need -a HOST"),
        (["--group", "/no/such/file", "ping"], 2, "cannot read the group file"),
    ],
)  # fmt: skip
def test_errors(args: list[str], code: int, words: str, group: FakeGroup, walbc: Cli) -> None:
    assert words in walbc.fails(*args, code=code)
    assert group.changes() in ([], ["s0 start vol0"])


def test_errors_of_the_network(ready: FakeGroup, walbc: Cli) -> None:
    ready.kill("a0")
    assert "server=a0" in walbc.fails("restorable", "vol0", code=3)
    result = walbc("ping")
    assert result.code == 3
    assert "a0 archive" in result.out
    assert "cannot connect" in result.out
    assert walbc("jobs").code == 0  # of those that answer
    assert walbc("jobs", "a0").code == 3
    ready.frozen = True
    assert "servers=a0" in walbc.fails("snapshot", "vol0", "--archive", "a0", code=3)
    ready.revive("a0")
    assert "walbc status" in walbc.fails("snapshot", "vol0", "--timeout", "0.01", code=4)


def test_errors_as_json(ready: FakeGroup, walbc: Cli) -> None:
    for args in (["start", "s0", "vol0", "--json"], ["--json", "start", "s0", "vol0"]):
        result = walbc(*args)
        assert (result.code, results(result.out)) == (5, "")
        error = json.loads(result.err)["error"]
        assert (error["code"], error["exit_code"]) == ("bad-state", 5)
        assert error["facts"] == {"server": "s0", "volume": "vol0", "state": "Target"}
        assert error["hint"] == "allowed in: Stopped"


@pytest.mark.parametrize(
    "args",
    [
        ["snapshot", "--json"],
        ["--json", "nonsense"],
        ["restore", "vol0", "x", "--json"],
        ["scan", "vol0", "x", "-", "--json"],
        ["--json", "status", "--x"],
    ],
)
def test_wrong_arguments_as_json(args: list[str], ready: FakeGroup, walbc: Cli) -> None:
    result = walbc(*args)
    assert (result.code, results(result.out)) == (2, "")
    (line,) = result.err.splitlines()
    error = json.loads(line)["error"]
    assert (error["code"], error["exit_code"]) == ("usage", 2)
    assert "--help" in error["hint"]


def test_job_that_fails(ready: FakeGroup, walbc: Cli) -> None:
    ready.fail_job("restore", Refused("no space", hint="make room"))
    err = walbc.fails("restore", "vol0", "1", code=5)
    assert "no space" in err
    assert "hint: make room" in err
    walbc.fails("wait", "a0", "1", code=5)


@pytest.mark.parametrize(
    "args", [["clear", "a0", "vol0"], ["reset", "a0", "vol0"], ["go-standby", "vol0"], ["shutdown", "--all"]]
)
def test_what_destroys_must_be_meant(args: list[str], ready: FakeGroup, walbc: Cli) -> None:
    assert "say --yes" in walbc.fails(*args, code=2)
    assert ready.changes() == []


def test_asking_on_a_terminal(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda *_, **__: True)
    ready.ctl.stop(ready.a[0], "vol0")
    assert says(walbc, "reset", "a0", "vol0") == "vol0 is SyncReady at a0"


def test_shutdown(ready: FakeGroup, walbc: Cli) -> None:
    assert says(walbc, "shutdown", "p0") == ""
    ready.kill("a0")
    err = walbc("shutdown", "--all", "--yes", "--mode", "force")
    assert err.code == 3
    assert ("s0", c.Shutdown(how=c.ShutdownHow.FORCE)) in ready.requests


# Screens


def test_status(ready: FakeGroup, walbc: Cli) -> None:
    out = says(walbc, "status")
    assert out.splitlines()[0] == "ok  group             3 servers, 1 volume, no alarms"
    assert all(line.startswith("ok") for line in out.splitlines())
    assert walbc("status", "--check").code == 0
    assert ask_json(walbc, "status", "vol0")["word"] == "ok"
    ready.kill("p0")
    assert walbc("status").code == 0
    result = walbc("status", "--check")
    assert result.code == 6
    assert result.out.splitlines()[0].startswith("down")
    assert result.err == ""


def test_status_in_colour(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbd.cli.walbc_server.use_colour", lambda: True)
    assert says(walbc, "status").startswith("\x1b[32mok\x1b[0m  group")


def test_table_of_jobs(ready: FakeGroup, walbc: Cli) -> None:
    out = says(walbc, "jobs", "s0").splitlines()
    assert [line.split()[:5] for line in out[1:]] == [
        ["s0", "1", "stop", "vol0", "done"],
        ["s0", "2", "full-backup", "vol0", "done"],
    ]
    assert out[2].endswith("gid=1")


def test_interrupt_says_what_goes_on(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.hold("restore")

    def interrupted(self: Controller, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    real = Controller._progress_of

    def seen(*args: Any) -> Any:
        monkeypatch.setattr(Controller, "ask", interrupted)
        return real(*args)

    monkeypatch.setattr(Controller, "_progress_of", staticmethod(seen))
    result = walbc("restore", "vol0", "1")
    assert result.code == 130
    assert result.err == "interrupted, but restore vol0 goes on; `walbc wait a0 1` waits\n"


def test_interrupted_snapshot_says_so(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no job to wait for."""

    def interrupted(self: Controller, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Controller, "get_restorable_gid", lambda *_: [])
    monkeypatch.setattr(ProgressView, "__call__", _remember_and(interrupted))
    result = walbc("snapshot", "vol0")
    assert result.code == 130
    assert "nobody waits for generation 3 to be restorable at a0; see `walbc status vol0`" in result.err


def test_interrupted_scan_says_nothing(ready: FakeGroup, walbc: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with us: nothing goes on, and nothing is left."""

    def interrupted(self: Controller, *_: Any) -> None:
        self.progress(Progress(what="scan", volume="vol0", server="a0", done=1, total=2))
        raise KeyboardInterrupt

    monkeypatch.setattr(Controller, "virt_full_scan", interrupted)
    result = walbc("scan", "vol0", "2", "/nowhere/image")
    assert (result.code, result.err) == (130, "")


def _remember_and(then: Callable[..., None]) -> Callable[..., None]:
    def shown(view: ProgressView, progress: Progress) -> None:
        view.last = progress
        then(view)

    return shown


def test_versions_of_those_that_answer(ready: FakeGroup, walbc: Cli) -> None:
    ready.kill("p0")
    result = walbc("version")
    assert result.code == 3
    assert [line.partition("\t")[0] for line in results(result.out).splitlines()] == ["server:s0", "server:a0"]
    assert result.err.startswith("p0: cannot connect")
    result = walbc("version", "--json")
    assert result.code == 3
    told = json.loads(results(result.out))
    assert told["p0"]["error"]["code"] == "connect"
    assert told["s0"]["version"] == "0.1.0"


# Help


def test_every_command_has_help(walbc: Cli) -> None:
    out = walbc.good("--help")
    for name, late in COMMANDS.items():
        assert re.search(rf"^  {name} ", out, re.MULTILINE), name
        text = walbc.good(name, "--help")
        assert text.startswith(f"Usage: walbc {name}")
        assert len(late.help) < 90
        if "COMMAND [ARGS]" not in text:  # those below a group have it
            assert "--json" in text


def test_version(walbc: Cli) -> None:
    assert re.fullmatch(r"walbc \d+\.\d+\.\d+\n", walbc.good("--version"))


def test_debug_shows_requests(ready: FakeGroup, walbc: Cli) -> None:
    result = walbc("-debug", "get-state", "s0", "vol0")
    assert "s0 <- GetState(volume='vol0')" in result.err
