"""Devices: the userspace ones with the real tool, those of the kernel driver with a tool that is played."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from walbd.controller import Device
from walbd.errors import NotSupported, Refused, TimedOut, UsageError, WalbError


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
    dev.create(sizeU="1g", ldevSizeU="64m", pbs=4096, force=True)
    dev.resize(2048)
    dev.delete()
    assert [" ".join(args[2:]) for args in tool.calls] == [
        "create vol0 --base-dir /base --ldev /l --ddev /d --size 1g --ldev-size 64m --pbs 4096 --force",
        "resize vol0 2048m --base-dir /base",
        "delete vol0 --base-dir /base",
    ]
    assert all(args[:2] == ["/usr/bin/walbd", "device"] for args in tool.calls)


def test_device_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbd.controller.device.POLL_S", 0)
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
    dev.create(sizeU="4m", ldevSizeU="2m", pbs=512)
    assert dev.exists()
    assert dev.get_size_mb() == 4
    dev.resize(8)
    assert dev.get_size_mb() == 8
    with pytest.raises(WalbError):
        dev.create(sizeU="4m", ldevSizeU="2m")
    assert "exists" in capfd.readouterr().err
    dev.delete()
    assert not dev.exists()
    dev.format_ldev()
    dev.create(pbs=512)  # what this object has just formatted holds no log
    assert dev.exists()
    with pytest.raises(NotSupported):
        dev.create(maxl=1)


# The kernel driver


def test_kernel_device_runs_its_tool() -> None:
    tool = Tool()
    dev = Device("vol0", "/dev/l", "/dev/d", "/usr/local/bin/wdevc", tool)
    assert dev.path == "/dev/walb/vol0"
    assert str(dev) == "vol0, /dev/l, /dev/d, /usr/local/bin/wdevc"
    dev.format_ldev()
    dev.format_ldev(doDiscard=False)
    dev.create(maxl=1, bi=9)
    dev.create()
    dev.resize(3)
    dev.reset()
    dev.delete()
    assert dev.run_wdevc(["version"]) == ""
    assert [" ".join(args) for args in tool.calls] == [
        f"/usr/local/bin/wdevc {words}"
        for words in (
            "format-ldev /dev/l /dev/d",
            "format-ldev /dev/l /dev/d -nd",
            "create-wdev /dev/l /dev/d -n vol0 -maxl 1 -bi 9",
            "create-wdev /dev/l /dev/d -n vol0",
            "resize /dev/walb/vol0 6144",
            "reset-wal /dev/walb/vol0",
            "delete-wdev /dev/walb/vol0",
            "version",
        )
    ]
    for options in ({"sizeU": "1m"}, {"pbs": 512}, {"force": True}):
        with pytest.raises(NotSupported):
            dev.create(**options)
    with pytest.raises(NotSupported):
        dev.info()
    with pytest.raises(TypeError):
        dev.create(maxl="1")  # type: ignore[arg-type]


def test_kernel_device_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbd.controller.device.POLL_S", 0)
    lsids = iter(["oldest 5\ncompleted 9\n", "oldest 9\ncompleted 9\n", "oldest 5\ncompleted 9\n"])

    def run(args: list[str], putMsg: bool = False) -> str:
        if args == ["/bin/cat", "/sys/block/walb!vol0/size"]:
            return "4096\n"
        if args == ["/bin/cat", "/sys/block/walb!vol0/walb/lsids"]:
            return next(lsids)
        if args == ["/sbin/blockdev", "--getsz", "/dev/l"]:
            return "800\n"
        assert args[-1] == "if [ -b /dev/walb/vol0 ]; then echo 1; else echo 0; fi"
        return "1"

    dev = Device("vol0", "/dev/l", "/dev/d", "wdevc", run)
    assert dev.exists()
    assert (dev.get_size_lb(), dev.get_size_mb(), dev.get_log_size_lb()) == (4096, 2, 800)
    dev.wait_for_log_empty(10)
    with pytest.raises(TimedOut):
        dev.wait_for_log_empty(0)
