"""Programs, block devices and userspace devices of a host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from walbd.controller import Device, exists_file, printL, run_local_command
from walbd.errors import Refused, TimedOut, UsageError, WalbError


def test_run_local_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_local_command([sys.executable, "-c", "print(' hello ')"]) == "hello"
    assert run_local_command([sys.executable, "-c", "print(1)"], putMsg=True) == "1"
    assert "run: " in capfd.readouterr().err
    failing = [sys.executable, "-c", "import sys; sys.exit('why')"]
    with pytest.raises(WalbError) as caught:
        run_local_command(failing)
    assert caught.value.facts["status"] == 1
    assert "why" in capfd.readouterr().err
    with pytest.raises(WalbError):
        run_local_command(failing, quietErr=True)
    assert capfd.readouterr().err == ""
    with pytest.raises(WalbError, match="cannot run"):
        run_local_command(["/no/such/program"])
    with pytest.raises(TypeError):
        run_local_command("ls")  # type: ignore[arg-type]


def test_exists_file(tmp_path: Path) -> None:
    plain = tmp_path / "a 'b'"
    plain.touch()
    assert not exists_file(str(plain))  # a block device is asked for
    asked: list[list[str]] = []

    def run(args: list[str], putMsg: bool = False) -> str:
        asked.append(args)
        return "1\n"

    assert exists_file("/dev/x", run)
    assert asked[0][-1] == "if [ -b /dev/x ]; then echo 1; else echo 0; fi"


def test_print_list(capsys: pytest.CaptureFixture[str]) -> None:
    printL([1, "a"])
    assert capsys.readouterr().out == "1\na\n"


class Tool:
    """Stands in for the program."""

    def __init__(self, *facts: dict[str, Any]) -> None:
        self.calls: list[list[str]] = []
        self.facts = list(facts)

    def __call__(self, args: list[str], putMsg: bool = False) -> str:
        self.calls.append(args)
        return json.dumps(self.facts.pop(0)) if self.facts else ""


def test_device_runs_the_device_tool() -> None:
    tool = Tool()
    dev = Device("vol0", "/l", "/d", "/usr/bin/walbd", tool, baseDir="/base")
    assert dev.path == "/base/vol0"
    assert str(dev) == "vol0, /l, /d, /usr/bin/walbd"
    dev.create("1g", "64m", 4096, force=True)
    dev.resize(2048)
    dev.delete()
    assert [" ".join(args[2:]) for args in tool.calls] == [
        "create vol0 --base-dir /base --ldev /l --ddev /d --size 1g --ldev-size 64m --pbs 4096 --force",
        "resize vol0 2048m --base-dir /base",
        "delete vol0 --base-dir /base",
    ]
    assert all(args[:2] == ["/usr/bin/walbd", "device"] for args in tool.calls)


def test_device_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbd.controller.local.POLL_S", 0)
    served = {"size_lb": 4096, "capacity_pb": 100, "pbs": 4096, "lsids": {"completed": 9, "oldest": 5}}
    empty = served | {"lsids": {"completed": 9, "oldest": 9}}
    dev = Device("vol0", runCommand=Tool(served, served, served | {"size_lb": 1}, served, served, empty))
    assert dev.get_size_lb() == 4096
    assert dev.get_size_mb() == 2
    with pytest.raises(Refused):
        dev.get_size_mb()
    assert dev.get_log_size_lb() == 800
    dev.wait_for_log_empty(10)
    with pytest.raises(TimedOut):
        Device("vol0", runCommand=Tool(served)).wait_for_log_empty(0)
    with pytest.raises(Refused, match="not served"):
        Device("vol0", runCommand=Tool(served | {"lsids": {"oldest": 0}})).wait_for_log_empty(0)


def test_device_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Device("a/b")
    with pytest.raises(TypeError):
        Device("a", 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Device("a", runCommand="ls")  # type: ignore[arg-type]
    dev = Device.at(str(tmp_path / "vol0"))
    assert (dev.name, dev.baseDir) == ("vol0", str(tmp_path))
    assert not dev.exists()
    (tmp_path / "vol0").mkdir()
    (tmp_path / "vol0" / "device.toml").touch()
    assert dev.exists()
    with pytest.raises(WalbError):
        dev.reset()  # nobody serves it


def test_device_made_by_the_real_tool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = str(Path(sys.executable).parent / "walbd")
    dev = Device("vol0", str(tmp_path / "l"), str(tmp_path / "d"), program, baseDir=str(tmp_path / "dev"))
    dev.create("4m", "2m", 512)
    assert dev.exists()
    assert dev.get_size_mb() == 4
    dev.resize(8)
    assert dev.get_size_mb() == 8
    with pytest.raises(WalbError):
        dev.create("4m", "2m")
    assert "exists" in capfd.readouterr().err
    dev.delete()
    assert not dev.exists()
