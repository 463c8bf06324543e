"""docs/controller.md says what is there: methods, commands, exit codes, the group file."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from walbd.cli.walbc import COMMANDS
from walbd.cli.walbc_server import NOT_OK
from walbd.controller import Controller
from walbd.controller.commands import COMMANDS as ONE_SERVER
from walbd.controller.layout import parse_layout
from walbd.errors import ConnectError, InternalError, Refused, TimedOut, UsageError, WalbError

DOC = (Path(__file__).parents[2] / "docs" / "controller.md").read_text()


def test_every_method_is_described() -> None:
    names = [name for name, _ in inspect.getmembers(Controller, inspect.isfunction) if not name.startswith("_")]
    plumbing = {"say", "put"}
    assert [name for name in names if name not in plumbing and not re.search(rf"\b{name}\b", DOC)] == []


def test_every_method_has_a_docstring() -> None:
    for name, method in inspect.getmembers(Controller, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(method), name


def test_every_command_is_described() -> None:
    table = DOC[DOC.index("| command | does |") : DOC.index("## Status")]
    assert [name for name in COMMANDS if not re.search(rf"`{name}[ `]", table)] == []
    table = DOC[DOC.index("## One server") : DOC.index("## The library")]
    words = {word for cmd in ONE_SERVER for word in cmd.name.split()}
    assert [word for word in words if word not in table] == []


def test_exit_codes() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+) \|$", DOC, re.MULTILINE))
    for cls, word in (
        (WalbError, "another error"),
        (UsageError, "wrong arguments"),
        (ConnectError, "reached"),
        (TimedOut, "longer"),
        (Refused, "refused"),
        (InternalError, "defect"),
    ):
        assert word in table[str(cls.exit_code)]
    assert "--check" in table[str(NOT_OK)]


def test_group_file_of_the_documentation() -> None:
    text = DOC[DOC.index("```toml\n") + 8 :]
    layout = parse_layout(text[: text.index("```")], Path("doc"))
    assert [s.name for s in layout.servers.get_all()] == ["s0", "p0", "a0"]
    assert layout.volumes["vol0"].devices == {"s0": "/var/lib/walbd/device/vol0"}
