"""What all `walbc` commands share: the group file, the controller, names of servers, and how results are told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from walbd.cli.output import note, print_json, print_json_error, print_table
from walbd.cli.walbc_progress import ProgressView, progress_view
from walbd.controller.constants import UINT64_MAX, sClear, sTarget
from walbd.controller.controller import Controller
from walbd.controller.layout import GroupLayout, find_layout
from walbd.controller.servers import Server, get_server
from walbd.controller.verify import verify_volume
from walbd.errors import UsageError, WalbError, exit_code_of
from walbd.protocol.codec import to_json_ready
from walbd.protocol.control import GetState

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class App:
    """One run of `walbc`."""

    group_path: Path | None = None
    as_json: bool = False
    debug: bool = False
    timeout_s: float = 0.0
    _layout: GroupLayout | None = field(default=None, repr=False)
    _ctl: Controller | None = field(default=None, repr=False)
    _view: ProgressView | None = field(default=None, repr=False)

    @property
    def layout(self) -> GroupLayout:
        """The group, from its file."""
        if self._layout is None:
            self._layout = find_layout(self.group_path)
        return self._layout

    @property
    def ctl(self) -> Controller:
        """The controller of the group."""
        if self._ctl is None:
            layout = self.layout
            self._view = progress_view(quiet=self.as_json)
            self._ctl = layout.controller(isDebug=self.debug, progress=self._view)
            if self.timeout_s:
                self._ctl.timeoutS = self.timeout_s
        return self._ctl

    def close(self) -> None:
        """End what runs for this object."""
        self.end_progress()
        if self._ctl is not None:
            self._ctl.close()

    def end_progress(self) -> None:
        """Take the progress bar away, before something is printed."""
        if self._view is not None:
            self._view.close()

    # Servers by name

    def server(self, name: str) -> Server:
        """Return any server of the group."""
        return self.layout.server(name)

    def servers(self, names: Sequence[str]) -> list[Server]:
        """Return the named servers; all when none is named."""
        return [self.server(name) for name in names] or self.layout.servers.get_all()

    def archive(self, name: str | None) -> Server:
        """Return the named archive, or the primary one."""
        servers = self.layout.servers
        return get_server(name, servers.archiveL) if name else servers.get_primary_archive()

    def proxy(self, name: str) -> Server:
        """Return the named proxy."""
        return get_server(name, self.layout.servers.proxyL)

    def storage(self, name: str | None, vol: str) -> Server:
        """Return the named storage, or the one that has the volume.

        Without a name: the only storage, or the target that the group file names for the volume, or the one
        that says it is the target, or the only one that knows the volume.
        """
        verify_volume(vol)
        storages = self.layout.servers.storageL
        if name:
            return get_server(name, storages)
        if len(storages) == 1:
            return storages[0]
        entry = self.layout.volumes.get(vol)
        if entry is not None and entry.target is not None:
            return entry.target
        replies = self.ctl.ask_each(storages, GetState(volume=vol))
        states = {s: r.value for s, r in replies.items() if not isinstance(r, WalbError)}
        for found in (
            [s for s, state in states.items() if state == sTarget],
            [s for s, state in states.items() if state != sClear],
        ):
            if len(found) == 1 and len(states) == len(storages):
                return found[0]
        raise UsageError(
            "it is not clear which storage is meant",
            hint=f"say --storage NAME; there are: {', '.join(s.name for s in storages)}",
            volume=vol,
        )

    def device(self, vol: str, s: Server) -> str:
        """Return the device that the group file names for a volume at a storage."""
        entry = self.layout.volumes.get(vol)
        path = entry.devices.get(s.name) if entry is not None else None
        if not path:
            raise UsageError(
                "the device is missing",
                hint="name it after the volume, or in the group file under [volumes]",
                volume=vol,
                storage=s.name,
            )
        return path

    # Results

    def tell(self, value: object, text: str | None = None) -> None:
        """Print a result: `text` for people (None: `value` itself, empty: nothing), or `value` as JSON."""
        self.end_progress()
        if self.as_json:
            print_json(to_json_ready(value))
        elif text != "":
            print(value if text is None else text)

    def tell_lines(self, value: object, rows: Sequence[object]) -> None:
        """Print a result that is one line for each of `rows`, none when there are none."""
        self.tell(value, "\n".join(str(row) for row in rows))

    def tell_table(
        self, value: object, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()
    ) -> None:
        """Print a result as a table, with the columns `right` aligned to the right; or `value` as JSON."""
        if self.as_json:
            self.tell(value)
        else:
            self.end_progress()
            print_table(columns, rows, right=right)

    def tell_interrupted(self) -> None:
        """Say on stderr which work goes on although nobody waits for it any more."""
        self.end_progress()
        last = self._view.last if self._view is not None else None
        if last is None or last.ended:
            return
        if last.job:
            note(
                f"interrupted, but {last.what} {last.volume} goes on; `walbc wait {last.server} {last.job}` waits"
            )
        elif last.what == "wait":
            see = f"walbc status {last.volume}".rstrip()
            note(f"interrupted; what was begun goes on, and nobody waits for {last.phase}; see `{see}`")

    def tell_error(self, error: WalbError) -> None:
        """Print an error as one line of JSON on stderr."""
        self.end_progress()
        print_json_error(error)


class WalbcCommand(click.Command):
    """A command that has `--json` and `--group`, and tells its errors accordingly."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--json"],
                is_flag=True,
                expose_value=False,
                callback=_set_json,
                help="Print the result (and errors) as JSON.",
            ),
            click.Option(
                ["--group"],
                type=click.Path(path_type=Path, dir_okay=False),
                expose_value=False,
                callback=_set_group,
                help="The group file.",
            ),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        app = ctx.ensure_object(App)
        try:
            return super().invoke(ctx)
        except WalbError as exc:
            if not app.as_json:
                app.end_progress()
                raise
            app.tell_error(exc)
            raise click.exceptions.Exit(exit_code_of(exc)) from exc
        except KeyboardInterrupt:
            app.tell_interrupted()
            raise
        finally:
            app.close()


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(App).as_json = True


def _set_group(ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.ensure_object(App).group_path = value


def command(name: str) -> Callable[[F], click.Command]:
    """Make a function `f(app, ...)` a command of `walbc`."""

    def declare(function: F) -> click.Command:
        return click.command(name, cls=WalbcCommand)(click.make_pass_decorator(App)(function))

    return declare


VOL = click.argument("vol", metavar="VOL")
SERVER = click.argument("server", metavar="SERVER")
SERVERS = click.argument("servers", metavar="[SERVER]...", nargs=-1)


class Gid(click.ParamType[Any]):
    """A generation; with `latest` that word, too, which gives None."""

    name = "gid"

    def __init__(self, *, latest: bool = False) -> None:
        self._latest = latest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if self._latest and value == "latest":
            return None
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= UINT64_MAX:
            return int(text)
        may = "write a number, or latest" if self._latest else "write a number"
        self.fail(f"{value!r} is no generation: {may}", param, ctx)


GID = click.argument("gid", metavar="GID", type=Gid())
POINT = click.argument("gid", metavar="GID|latest", type=Gid(latest=True))
STORAGE = click.option("--storage", metavar="NAME", help="The storage; not needed where it is clear.")
ARCHIVE = click.option("--archive", metavar="NAME", help="The archive.  [default: the primary one]")
TIMEOUT = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=86400.0,
    help="Wait no longer.",
)


def checked(vol: str) -> str:
    """Return the name of a volume; raises UsageError before anything is asked."""
    verify_volume(vol)
    return vol


def sure(app: App, yes: bool, what: str) -> None:
    """Return when the user is sure of something that destroys data; raises UsageError or click.Abort otherwise."""
    if yes:
        return
    if app.as_json or not sys.stdin.isatty():
        raise UsageError(f"{what}: are you sure?", hint="say --yes")
    click.confirm(f"{what}: are you sure?", abort=True, err=True)


YES = click.option("--yes", is_flag=True, help="Do not ask.")
