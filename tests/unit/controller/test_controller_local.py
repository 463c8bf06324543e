"""Programs and block devices of a host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from walbd.controller import exists_file, printL, run_local_command
from walbd.errors import WalbError


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
