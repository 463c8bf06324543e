"""`walbc replace-storage|replace-proxy|replace-archive`: one host takes the place of another. docs/recovery.md."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from walbd.cli.output import note
from walbd.cli.walbc_app import YES, App, command, sure
from walbd.cli.walbc_doctor import FOUND, tell_group_file
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.replace import ArchiveReplacement, ProxyReplacement, Replacement, StorageReplacement
from walbd.controller.servers import Server, ServerConnectionParam, get_server
from walbd.controller.verify import verify_volume
from walbd.daemon.net import parse_address
from walbd.errors import UsageError

OLD = click.argument("old", metavar="OLD")
NEW = click.argument("new", metavar="NEW")
WRITE = click.option("--write", is_flag=True, help="Replace the group file by one that names the new server.")
GONE = click.option("--gone", is_flag=True, help="OLD is lost for good; otherwise it must answer.")
NO_SHUTDOWN = click.option("--no-shutdown", is_flag=True, help="Leave the daemon of OLD running.")
_NEW_HELP: Final = "a server of the group file, or NAME=HOST:PORT"


@command("replace-storage")
@OLD
@NEW
@click.option(
    "--device", "devices", metavar="VOL=PATH", multiple=True, help="Device of a volume at NEW. May be repeated."
)
@GONE
@NO_SHUTDOWN
@WRITE
@YES
def replace_storage(
    app: App,
    old: str,
    new: str,
    devices: tuple[str, ...],
    gone: bool,
    no_shutdown: bool,
    write: bool,
    yes: bool,
) -> int:
    """Let storage NEW take over all volumes of storage OLD. NEW: a name of the group file, or NAME=HOST:PORT.

    NEW must run, with a device for each volume that holds a copy of it. OLD goes to standby, a hash backup from
    NEW continues the history, then OLD forgets the volumes and ends. Shows the plan first; can be run again.
    """
    paths = dict(map(_device, devices))
    old_s, new_s = _pair(app, old, new, K_STORAGE)

    def make() -> Replacement:
        return StorageReplacement(app.ctl, app.layout, old_s, new_s, gone=gone, devices=paths)

    return _replace(app, make, no_shutdown, write, yes)


@command("replace-proxy")
@OLD
@NEW
@GONE
@NO_SHUTDOWN
@WRITE
@YES
def replace_proxy(app: App, old: str, new: str, gone: bool, no_shutdown: bool, write: bool, yes: bool) -> int:
    """Let proxy NEW take the place of proxy OLD. NEW: a name of the group file, or NAME=HOST:PORT.

    NEW must run. It is told where to send, storages use it from then on, OLD delivers all that it holds, forgets
    the volumes and ends. Backup goes on meanwhile. Shows the plan first; can be run again.
    """
    old_p, new_p = _pair(app, old, new, K_PROXY)
    return _replace(
        app, lambda: ProxyReplacement(app.ctl, app.layout, old_p, new_p, gone=gone), no_shutdown, write, yes
    )


@command("replace-archive")
@OLD
@NEW
@click.option("--clear", is_flag=True, help="Remove the data of OLD, with restore points that NEW does not have.")
@GONE
@NO_SHUTDOWN
@WRITE
@YES
def replace_archive(
    app: App, old: str, new: str, clear: bool, gone: bool, no_shutdown: bool, write: bool, yes: bool
) -> int:
    """Let archive NEW take the place of archive OLD, primary or not. NEW: a name of the group file, or
    NAME=HOST:PORT.

    NEW must run. Every volume is replicated to it and sent there; if OLD is the primary archive, storages use NEW
    from then on; OLD gets nothing any more and ends. Backup goes on meanwhile. Shows the plan first; can be run
    again.
    """
    old_a, new_a = _pair(app, old, new, K_ARCHIVE)

    def make() -> Replacement:
        return ArchiveReplacement(app.ctl, app.layout, old_a, new_a, gone=gone, clear=clear)

    return _replace(app, make, no_shutdown, write, yes)


def _device(text: str) -> tuple[str, str]:
    vol, sep, path = text.partition("=")
    if not sep or not path:
        raise UsageError("not a device of a volume", hint="write VOL=PATH", text=text)
    verify_volume(vol)
    return vol, path


def _pair(app: App, old: str, new: str, kind: int) -> tuple[Server, Server]:
    layout = app.layout.servers
    servers: Sequence[Server] = (layout.storageL, layout.proxyL, layout.archiveL)[kind]
    name, sep, place = new.partition("=")
    if not sep:
        try:
            return get_server(old, servers), get_server(new, servers)
        except UsageError as exc:
            if exc.facts.get("server") != new:
                raise
            raise UsageError(exc.message, hint=f"give {_NEW_HELP}", **exc.facts) from exc
    address = parse_address(place)
    if not address.port:
        raise UsageError("a server needs HOST:PORT", text=new)
    return get_server(old, servers), ServerConnectionParam(name, address.host, address.port, kind)


def _replace(app: App, make: Callable[[], Replacement], no_shutdown: bool, write: bool, yes: bool) -> int:
    it = make()
    if no_shutdown:
        it.moves = [move for move in it.moves if not move.text.startswith("walbc shutdown ")]
    plan = it.plan()
    tell: Callable[[str], None] = lambda text: _tell(app, text)  # noqa: E731
    tell(f"to replace {it.old.name} by {it.new.name}:")
    for step in plan:
        tell(f"  [{'x' if step.is_done else ' '}] {step.text}" + (f"   # {step.note}" if step.note else ""))
    sure(app, yes, f"{it.old.name} is replaced by {it.new.name}")
    it.run(tell)
    problems = it.check(tell)
    app.end_progress()
    written = tell_group_file(app, it.after, write)
    result: dict[str, Any] = {
        "old": it.old.name,
        "new": it.new.name,
        "steps": [{"command": step.text, "was_done": step.is_done} for step in plan],
        "complete": not problems,
        "problems": problems,
        "group_file": it.after.to_toml(),
        "group_file_written": written,
    }
    lines = [f"not complete: {text}" for text in problems] or [f"{it.new.name} has replaced {it.old.name}"]
    app.tell_lines(result, lines)
    if problems:
        note("`walbc doctor` shows what is wrong")
    return FOUND if problems else 0


def _tell(app: App, text: str) -> None:
    app.end_progress()
    (note if app.as_json else print)(text)
    sys.stdout.flush()
