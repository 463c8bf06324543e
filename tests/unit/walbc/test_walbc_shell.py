"""`walbc shell`: variables, lines of the recovery document, errors, pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_group import FakeGroup, FakeVolume
from tests.kit.walbc_cli import group_toml
from walbd.cli.shell import Console, banner, identifier, print_walbd_error, run_script, variables, without_prompt
from walbd.cli.walbc_app import App
from walbd.controller import Controller, Device, ServerLayout, load_layout
from walbd.errors import BadState


@pytest.fixture
def group() -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        made.ctl.init_storage(made.s[0], "vol0", "/dev/x")
        yield made


def app_of(group: FakeGroup, tmp_path: Path, more: str = "", text: str = "") -> App:
    path = tmp_path / "group.toml"
    path.write_text((text or group_toml(group)) + more)
    return App(group_path=path, _layout=load_layout(path), _ctl=group.ctl)


def pipe(group: FakeGroup, tmp_path: Path, lines: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a real `walbc shell` with these lines on its standard input."""
    path = tmp_path / "group.toml"
    path.write_text(group_toml(group))
    return subprocess.run(
        [sys.executable, "-m", "walbd.cli.walbc", "--group", str(path), "shell", *args],
        input=lines,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"NO_COLOR": "1"},
    )


# As a process


def test_lines_of_the_recovery_document(group: FakeGroup, tmp_path: Path) -> None:
    lines = """\
walbc.is_overflow(s0, vol)
python> isOverflow = walbc.is_overflow(sx, vol)
python> walbc.kick_all([s0])
python> walbc.kick_all([s0, p0])
walbc.start_synchronizing(a0, vol)
python> isWdiffSendError = walbc.is_wdiff_send_error(p0, vol, a0)
print(isOverflow, isWdiffSendError)
walbc.stop_synchronizing(a0, vol)
gid = walbc.full_backup(sx, vol)
gid
for s in sLayout.get_all():
    print(s.name)

    print(walbc.get_state(s, vol))
"""
    done = pipe(group, tmp_path, lines)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "False",
        "False False",
        "1",
        "s0",
        "Target",
        "p0",
        "Started",
        "a0",
        "Archived",
    ]
    assert done.returncode == 0


def test_first_error_ends_a_pipe(group: FakeGroup, tmp_path: Path) -> None:
    done = pipe(group, tmp_path, "print(1)\nwalbc.start(s0, vol)\nprint(2)\n")
    assert (done.returncode, done.stdout) == (5, "1\n")
    assert done.stderr.splitlines() == [
        "walbc: not allowed in this state (server=s0 volume=vol0 state=Standby)",
        "hint: allowed in: Stopped",
    ]


def test_code_as_an_option(group: FakeGroup, tmp_path: Path) -> None:
    done = pipe(group, tmp_path, "", "-c", "walbc.get_state(s0, vol)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "'Standby'\n", "")


# In this process


def script(group: FakeGroup, tmp_path: Path, text: str) -> int:
    names, _ = variables(app_of(group, tmp_path))
    return run_script(text, names)


@pytest.mark.parametrize(
    ("text", "status", "out", "err"),
    [
        ("1 + 1", 0, "2\n", ""),
        ("None", 0, "", ""),
        ("", 0, "", ""),
        ("raise SystemExit(3)", 3, "", ""),
        ("raise SystemExit", 0, "", ""),
        ("raise SystemExit('x')", 1, "", ""),
        ("1 / 0", 1, "", "ZeroDivisionError"),
        ("if", 2, "", "SyntaxError"),
        ("'\\0'\n\0", 2, "", "null bytes"),
        ("walbc.get_state(s0, 3)", 1, "", "TypeError"),
        ("walbc.get_state(s0, 'a_b')", 2, "", "bad volume name"),
        ("undefined", 1, "", "NameError"),
        ("Snapshot(3, 3).isDirty(), K_ARCHIVE, sTarget", 0, "(False, 2, 'Target')\n", ""),
    ],
)
def test_scripts(
    text: str,
    status: int,
    out: str,
    err: str,
    group: FakeGroup,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert script(group, tmp_path, text) == status
    said = capsys.readouterr()
    assert said.out == out
    assert err in said.err
    assert "shell.py" not in said.err  # tracebacks begin in the user's code


def test_interrupt_passes_through(group: FakeGroup, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        script(group, tmp_path, "raise KeyboardInterrupt")


def test_variables(group: FakeGroup, tmp_path: Path) -> None:
    device = '[volumes.vol9]\ndevices = { s0 = "/base/vol9" }\n'
    names, remarks = variables(app_of(group, tmp_path, device))
    assert [names[name].name for name in ("s0", "p0", "a0", "sx", "px", "ax")] == [
        "s0",
        "p0",
        "a0",
        "s0",
        "p0",
        "a0",
    ]
    assert isinstance(names["walbc"], Controller)
    assert isinstance(names["sLayout"], ServerLayout)
    assert names["vol"] == "vol9"  # what the group file says goes before what servers know
    assert isinstance(names["wdev"], Device)
    assert names["wdev"].path == "/base/vol9"
    assert remarks == []


def test_volume_is_found_at_servers(group: FakeGroup, tmp_path: Path) -> None:
    names, _ = variables(app_of(group, tmp_path))
    assert names["vol"] == "vol0"
    group.servers["a0"].volumes["vol1"] = FakeVolume("Archived")
    names, remarks = variables(app_of(group, tmp_path))
    assert "vol" not in names
    assert remarks == ["volumes: vol0, vol1"]
    for name in group.servers:
        group.kill(name)
    names, _ = variables(app_of(group, tmp_path))  # nobody answers: the shell opens all the same
    assert "vol" not in names


def test_the_storage_that_is_meant(tmp_path: Path) -> None:
    with FakeGroup(storages=2) as group:
        group.servers["s1"].volumes["vol0"] = FakeVolume("Standby")
        assert "sx" not in variables(app_of(group, tmp_path))[0]
        group.volume("s1").state = "Target"
        assert variables(app_of(group, tmp_path))[0]["sx"].name == "s1"
        more = '[volumes.vol0]\ntarget = "s0"\ndevices = { s0 = "/dev/a", s1 = "/dev/b" }\n'
        names, _ = variables(app_of(group, tmp_path, more))
        assert (names["sx"].name, names["wdev"].path) == ("s0", "/dev/a")
        group.servers["s0"].volumes["vol0"] = FakeVolume("Target")
        assert "sx" not in variables(app_of(group, tmp_path))[0]


def test_names_that_are_no_identifiers(tmp_path: Path) -> None:
    with FakeGroup(archives=2) as group:
        text = group_toml(group)
        for name, other in (("s0", "store-1"), ("p0", "4p"), ("a0", "walbc"), ("a1", "class")):
            text = text.replace(f'"{name}"', f'"{other}"')
        app = app_of(group, tmp_path, text=text)
        names, remarks = variables(app)
        assert [names[name].name for name in ("store_1", "_4p", "walbc_", "class_", "sx")] == [
            "store-1", "4p", "walbc", "class", "store-1",
        ]  # fmt: skip
        assert "ax" not in names
        assert remarks[0] == "server store-1 is the variable store_1"
        text = "\n".join(banner(app, names, remarks))
        assert "note: server 4p is the variable _4p" in text


@pytest.mark.parametrize(
    ("name", "taken", "made"),
    [
        ("s0", set(), "s0"),
        ("s0", {"s0"}, "s0_"),
        ("a.b-c", set(), "a_b_c"),
        ("0", set(), "_0"),
        ("print", set(), "print_"),
    ],
)
def test_identifiers(name: str, taken: set[str], made: str) -> None:
    assert identifier(name, taken) == made
    assert made.isidentifier()


def test_banner(group: FakeGroup, tmp_path: Path) -> None:
    app = app_of(group, tmp_path)
    lines = banner(app, *variables(app))
    assert lines[1].split()[:2] == ["s0", "s0,"]
    assert "  sx = s0" in lines
    assert "  vol      'vol0'" in lines


def test_prompts_are_cut_off() -> None:
    assert without_prompt("python> f()") == "f()"
    assert without_prompt(">>> f()") == "f()"
    assert without_prompt("python>  f()") == "f()"
    assert without_prompt("...     f()") == "    f()"
    assert without_prompt("    ...") == "    ..."
    assert without_prompt("f('python> ')") == "f('python> ')"


def test_console_prints_errors_of_walbd(
    group: FakeGroup, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["python> walbc.start(s0, vol)", "1 / 0", "raise KeyboardInterrupt", "x = 41", "x + 1"])

    def read(_prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    app = app_of(group, tmp_path)
    names, _ = variables(app)
    capsys.readouterr()
    Console(app, names).interact(banner="", exitmsg="")
    said = capsys.readouterr()
    assert "walbc: not allowed in this state (server=s0 volume=vol0 state=Standby)\n" in said.err
    assert "hint: allowed in: Stopped\n" in said.err
    assert "ZeroDivisionError" in said.err
    assert "\nKeyboardInterrupt\n" in said.err
    assert said.err.count("Traceback") == 1
    assert said.out.endswith("42\n")


def test_other_errors_are_left_alone() -> None:
    assert not print_walbd_error(ValueError("x"))
    assert print_walbd_error(BadState("x"))


def test_history_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atexit

    from walbd.cli.shell import _use_history

    saved: list[Any] = []
    monkeypatch.setattr(atexit, "register", saved.append)
    monkeypatch.setattr("walbd.cli.shell._HISTORY", tmp_path / "history")
    _use_history()
    saved[-1]()
    assert (tmp_path / "history").exists()
    monkeypatch.setattr("walbd.cli.shell._HISTORY", tmp_path / "no" / "history")
    _use_history()
    saved[-1]()  # a place that cannot be written to is no error
