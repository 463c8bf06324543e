"""Write the pages that are generated from the code: docs/{states,configuration,cli,python-api,messages}.md.

.venv/bin/python scripts/generate_docs.py           write them
.venv/bin/python scripts/generate_docs.py --check   fail if they are not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from docs_messages import messages_page
from docs_reference import cli_page, python_api_page

from walbd.archive.config import ArchiveConfig
from walbd.archive.states import TABLE as ARCHIVE
from walbd.daemon.config import DaemonConfig, Setting, settings
from walbd.daemon.states import ALL, StateTable
from walbd.proxy.config import ProxyConfig
from walbd.proxy.states import TABLE as PROXY
from walbd.storage.config import StorageConfig
from walbd.storage.states import TABLE as STORAGE
from walbd.units import format_size

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def states_page() -> str:
    text = """# States

Generated from the tables in `storage/states.py`, `proxy/states.py` and `archive/states.py` by
`scripts/generate_docs.py`.

A *steady* state is what is on disk. A command that moves a volume does so in one *step*: while it is at work the
*passing* state is shown and the disk still says the old one; when it has succeeded the new one is written durably
and shown. A failure or a crash leads back to the old state. Only one step runs at a time for a volume.

*Actions* are work that moves nothing. *Excluded by* names the actions that must not be running. A refused command
changes nothing; the error's hint names the states in which it is allowed.
"""
    for states in (STORAGE, PROXY, ARCHIVE):
        text += f"\n## {states.name.capitalize()}\n\n" + states_section(states)
    return text


def states_section(states: StateTable[Any, Any]) -> str:
    text = table(["steady state", "meaning"], ([f"`{state}`", why] for state, why in states.meanings.items()))
    text += "\nSteps:\n\n"
    text += table(
        ["from", "command", "passing", "to"],
        (
            [f"`{old}`", str(command), f"`{step.during}`", f"`{step.to}`"]
            for (old, command), step in states.steps.items()
        ),
    )
    text += "\nWhat is allowed when:\n\n"
    commands: list[StrEnum] = []
    for command in [*(command for _, command in states.steps), *states.rules]:
        if command not in commands:
            commands.append(command)
    rows = []
    for command in commands:
        rule = states.rule_of(command)
        allowed = [f"`{state}`" for state in states.meanings if state in rule.states]
        if rule.while_moving:
            passing = "any step" if rule.during is None else ", ".join(f"`{name}`" for name in sorted(rule.during))
        else:
            passing = "-"
        excludes = "any action" if rule.excludes is ALL else ", ".join(sorted(rule.excludes)) or "-"
        rows.append([str(command), ", ".join(allowed), passing, excludes, "yes" if rule.while_stopping else "no"])
    text += table(["command", "in", "also during", "excluded by", "while stopping"], rows)
    if states.actions:
        text += "\nActions: " + ", ".join(f"`{action}`" for action in states.actions) + ".\n"
    return text


def configuration_page() -> str:
    text = """# Configuration

Generated from the configuration classes by `scripts/generate_docs.py`.

A daemon reads one TOML file (`--config FILE`); every setting is also an option that overrides the file
(`io_timeout_s` is `--io-timeout-s`). Sizes are bytes, or text with a binary suffix: `"128MiB"`. Lists on the
command line are separated by commas. Unknown settings are refused. Samples: `packaging/*.sample.toml`.

*Live* settings are changed in the running daemon by `walbc reload` or SIGHUP; the others count from the next start
on ([operations.md](operations.md), "Changing settings").

## All daemons

"""
    common = {row.name for row in settings(DaemonConfig)}
    text += settings_table(settings(DaemonConfig))
    for name, cls in (("Storage", StorageConfig), ("Proxy", ProxyConfig), ("Archive", ArchiveConfig)):
        text += f"\n## {name}\n\n"
        text += settings_table([row for row in settings(cls) if row.name not in common])
    return text


def settings_table(rows: list[Setting]) -> str:
    def default(row: Setting) -> str:
        if row.required:
            return "required"
        if row.is_size:
            return format_size(row.default) if row.default else "0"
        if isinstance(row.default, bool):
            return str(row.default).lower()
        return str(row.default) if row.default not in ("", []) else "-"

    return table(
        ["setting", "default", "live", "meaning"],
        ([f"`{row.name}`", default(row), "live" if row.live else "-", row.description] for row in rows),
    )


PAGES = {
    "states.md": states_page,
    "configuration.md": configuration_page,
    "cli.md": cli_page,
    "python-api.md": python_api_page,
    "messages.md": messages_page,
}


def stale() -> list[str]:
    """Return the pages that are not what the code says now."""
    return [
        name for name, make in PAGES.items() if not (DOCS / name).exists() or (DOCS / name).read_text() != make()
    ]


def main() -> None:
    if "--check" in sys.argv:
        if names := stale():
            sys.exit(f"not up to date: {', '.join(names)}; run scripts/generate_docs.py")
        return
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())


if __name__ == "__main__":
    main()
