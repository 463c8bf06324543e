"""`walbc shell`: Python, with the servers of the group and the controller as variables.

    walbc.is_overflow(s0, vol)
    walbc.kick_all([s0])

Lines from a pipe (or `-c`) are run like a script; the first exception ends it with a status other than 0.
"""

from __future__ import annotations

import ast
import builtins
import code
import keyword
import re
import sys
import traceback
from pathlib import Path
from typing import Any, Final

import click

import walbd.controller as library
from walbd import __version__
from walbd.cli.output import error_lines
from walbd.cli.walbc_app import App, command
from walbd.controller import Device
from walbd.controller.servers import Server
from walbd.errors import WalbError, exit_code_of
from walbd.protocol.control import GetState, GetVolumes, TextValue

_PROMPTS: Final = re.compile(r"^(?:(?:python>|walbc>|>>>) +|\.\.\. )")  # of lines that are pasted from a document
_HISTORY: Final = Path("~/.walbc_history")
_PROBE_S: Final = 2.0  # for servers to say which volumes there are


@command("shell")
@click.option("-c", "script", metavar="CODE", help="Run this instead of reading lines.")
def shell(app: App, script: str | None) -> int:
    """Python, with the servers and the controller as variables.

    Servers have their names (s0, p0, a0, ...), `walbc` is the Controller, `sLayout` the layout, `vol` the volume
    when there is exactly one. All of walbd.controller is imported.

    Example: walbc shell -c 'walbc.get_state_all(vol)'
    """
    names, remarks = variables(app)
    if script is not None:
        return run_script(script, names)
    if not sys.stdin.isatty():
        return run_script(sys.stdin.read(), names)
    _use_history()
    sys.ps1, sys.ps2 = "walbc> ", "  ...> "
    console = Console(app, names)
    console.interact(banner="\n".join(banner(app, names, remarks)), exitmsg="")
    return 0


# Variables


def variables(app: App) -> tuple[dict[str, Any], list[str]]:
    """Return what the user finds defined, and remarks on names that are not as in the group file."""
    names: dict[str, Any] = {name: getattr(library, name) for name in library.__all__}
    taken = set(names) | {"walbc", "sLayout", "vol", "wdev"}
    remarks = []
    servers: dict[str, Server] = {}
    for s in app.layout.servers.get_all():
        name = identifier(s.name, taken | set(servers))
        if name != s.name:
            remarks.append(f"server {s.name} is the variable {name}")
        servers[name] = s
    names |= {"__name__": "__console__", "__doc__": None, "walbc": app.ctl, "sLayout": app.layout.servers}
    names |= servers
    volumes = volume_names(app)
    for name, sL in (
        ("sx", app.layout.servers.storageL),
        ("px", app.layout.servers.proxyL),
        ("ax", app.layout.servers.archiveL),
    ):
        if len(sL) == 1:
            names.setdefault(name, sL[0])
    if len(volumes) == 1:
        names["vol"] = volumes[0]
        entry = app.layout.volumes.get(volumes[0])
        target = entry.target if entry is not None else None
        if "sx" not in names and (target := target or _target(app, volumes[0])) is not None:
            names["sx"] = target
        paths = dict(entry.devices) if entry is not None else {}
        source = names.get("sx")
        path = paths.get(source.name) if isinstance(source, Server) else None
        if path is None and len(set(paths.values())) == 1:
            path = next(iter(paths.values()))
        if path is not None:
            names["wdev"] = Device.at(path)
    elif volumes:
        remarks.append(f"volumes: {', '.join(volumes)}")
    return names, remarks


def identifier(name: str, taken: set[str]) -> str:
    """Turn the name of a server into that of a variable that is not taken."""
    made = re.sub(r"\W", "_", name, flags=re.ASCII)
    if not made[:1].isalpha() and not made.startswith("_"):
        made = f"_{made}"
    while keyword.iskeyword(made) or made in taken or hasattr(builtins, made):
        made += "_"
    return made


def volume_names(app: App) -> list[str]:
    """Return the volumes that the group file names; when it names none, those that servers know."""
    if app.layout.volumes:
        return sorted(app.layout.volumes)
    replies = app.ctl.ask_each(app.layout.servers.get_all(), GetVolumes(), _PROBE_S)
    return sorted({name for reply in replies.values() if not isinstance(reply, WalbError) for name in reply.names})


def _target(app: App, vol: str) -> Server | None:
    """Return the only storage that says that it backs a volume up; None when there is none, or none answers."""
    replies = app.ctl.ask_each(app.layout.servers.storageL, GetState(volume=vol), _PROBE_S)
    found = [s for s, r in replies.items() if isinstance(r, TextValue) and r.value == library.sTarget]
    return found[0] if len(found) == 1 else None


def banner(app: App, names: dict[str, Any], remarks: list[str]) -> list[str]:
    """Say what there is."""
    rows = [f"walbc {__version__}, Python {sys.version.split()[0]}"]
    for name, value in names.items():
        if isinstance(value, Server) and name not in ("sx", "px", "ax"):
            rows.append(f"  {name:<8} {value}")
    rows.append(f"  {'walbc':<8} the controller: help(walbc), walbc.status()")
    short = [f"{name} = {names[name].name}" for name in ("sx", "px", "ax") if isinstance(names.get(name), Server)]
    rows += [f"  {row}" for row in short]
    if "vol" in names:
        rows.append(f"  {'vol':<8} {names['vol']!r}")
    if "wdev" in names:
        rows.append(f"  {'wdev':<8} {names['wdev'].path}")
    where = f" of {app.layout.path}" if app.layout.path is not None else ""
    rows.append(f"  {'sLayout':<8} the layout{where}")
    return rows + [f"note: {remark}" for remark in remarks]


# Running


class Console(code.InteractiveConsole):
    """The interactive loop; errors of walbd are printed as such, not as tracebacks."""

    def __init__(self, app: App, names: dict[str, Any]) -> None:
        super().__init__(names)
        self._app = app

    def raw_input(self, prompt: str = "") -> str:
        return without_prompt(super().raw_input(prompt))

    def showtraceback(self) -> None:
        self._app.end_progress()
        error = sys.exc_info()[1]
        if isinstance(error, KeyboardInterrupt):
            self._app.tell_interrupted()
            self.write("\nKeyboardInterrupt\n")
        elif error is not None and not print_walbd_error(error):
            super().showtraceback()


def without_prompt(line: str) -> str:
    """Return a line without the prompt before it, so that lines of a document can be pasted."""
    return _PROMPTS.sub("", line, count=1)


def print_walbd_error(error: BaseException) -> bool:
    """Print an error of walbd, or of wrong arguments to it; False for any other."""
    if isinstance(error, WalbError):
        for line in error_lines(error, "walbc"):
            print(line, file=sys.stderr)
        return True
    return False


def run_script(text: str, names: dict[str, Any]) -> int:
    """Run statements one after the other, printing the values of expressions; return the exit status."""
    text = "\n".join(map(without_prompt, text.splitlines())) + "\n"
    try:
        statements = ast.parse(text, "<stdin>").body
    except (SyntaxError, ValueError):
        traceback.print_exc(limit=0)
        return 2
    for statement in statements:
        try:
            exec(compile(ast.Interactive([statement]), "<stdin>", "single"), names)  # noqa: S102 - that is a shell
        except SystemExit as exc:
            return exc.code if isinstance(exc.code, int) else 1 if exc.code else 0
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises is told and ends the script
            sys.stdout.flush()
            if not print_walbd_error(exc):
                ours = exc.__traceback__
                traceback.print_exception(type(exc), exc, ours.tb_next if ours is not None else None)
            return exit_code_of(exc) if isinstance(exc, WalbError) else 1
    return 0


def _use_history() -> None:
    """Edit lines and keep them for next time, where Python has readline."""
    try:
        import readline
        import rlcompleter
    except ImportError:
        return
    import atexit

    path = _HISTORY.expanduser()
    del rlcompleter  # it has registered itself
    readline.parse_and_bind("tab: complete")
    try:
        readline.read_history_file(path)
    except OSError:
        pass  # none yet

    def save() -> None:
        try:
            readline.set_history_length(1000)
            readline.write_history_file(path)
        except OSError:
            pass  # a home that cannot be written to is no reason to complain

    atexit.register(save)
