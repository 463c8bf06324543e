"""Running `walbc` in this process against a group of fakes: the group file, results as text and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.kit.cli import Cli
from tests.kit.fake_group import FakeGroup

Make = Callable[[FakeGroup, str], None]


def group_toml(group: FakeGroup) -> str:
    kinds = (("storage", group.s), ("proxy", group.p), ("archive", group.a))
    return "timeout_s = 60\n" + "".join(
        f'[[{kind}]]\nname = "{s.name}"\nhost = "{s.address}"\nport = {s.port}\n' for kind, sL in kinds for s in sL
    )


def ask_json(walbc: Cli, *args: str) -> Any:
    """Run a command with --json and return what it printed, without the lines of the fakes' logs."""
    return json.loads(results(walbc.good(*args, "--json")))


def results(out: str) -> str:
    """Drop the log lines of the fakes, which run in this process."""
    return "".join(line for line in out.splitlines(keepends=True) if not re.match(r"\d{4}-\d\d-\d\d \d\d:", line))


def says(walbc: Cli, *args: str) -> str:
    return results(walbc.good(*args)).removesuffix("\n")
