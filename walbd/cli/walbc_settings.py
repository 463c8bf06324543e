"""`walbc`: settings of daemons that run, and sizes of volumes."""

from __future__ import annotations

import sys
from typing import Any

import click

from walbd.cli.walbc_app import SERVERS, VOL, App, checked, command
from walbd.controller.constants import K_ARCHIVE, K_STORAGE, Mebi
from walbd.controller.replies import reloaded_lines
from walbd.controller.servers import Server, get_server, verify_server_kind
from walbd.errors import UsageError, WalbError
from walbd.protocol.base import error_reply
from walbd.protocol.codec import to_json_ready
from walbd.protocol.maintenance import Reload, Reloaded
from walbd.units import format_size, parse_size


@command("reload")
@SERVERS
def reload(app: App, servers: tuple[str, ...]) -> None:
    """Make daemons (default: all) read their configuration again; tell what counts now and what needs a restart.

    An error in a configuration changes nothing at that daemon.
    """
    _tell(app, app.ctl.ask_each(app.servers(servers), Reload()))


@command("retarget")
@click.argument("storages", metavar="[STORAGE]...", nargs=-1)
@click.option("--archive", metavar="NAME", help="The primary archive.  [default: the first of the group file]")
@click.option(
    "--proxy",
    "proxies",
    metavar="NAME",
    multiple=True,
    help="A proxy, the preferred one first; may be repeated.  [default: those of the group file]",
)
def retarget(app: App, storages: tuple[str, ...], archive: str | None, proxies: tuple[str, ...]) -> None:
    """Make storages (default: all) use the primary archive and the proxies of the group file, from now on.

    Durable, until a storage's own configuration names others. Nothing is changed unless all of them answer.

    Example: walbc retarget s0 --archive a1 --proxy p1 --proxy p0
    """
    layout = app.layout.servers
    chosen = [get_server(name, layout.storageL) for name in storages] or layout.storageL
    ax = app.archive(archive)
    pxL = [app.proxy(name) for name in proxies] or layout.proxyL
    for sx in chosen:
        app.ctl.get_host_type(sx)
    done: dict[Server, Reloaded | WalbError] = {}
    for sx in chosen:
        try:
            done[sx] = app.ctl.retarget(sx, ax, pxL)
        except WalbError as exc:
            done[sx] = exc
    _tell(app, done)


def _tell(app: App, replies: dict[Server, Any]) -> None:
    """Print what each server said; raises the first error after all of them."""
    value = {
        s.name: {"error": to_json_ready(error_reply(r))} if isinstance(r, WalbError) else to_json_ready(r)
        for s, r in replies.items()
    }
    rows = [
        f"{s.name} {row}"
        for s, r in replies.items()
        if not isinstance(r, WalbError)
        for row in reloaded_lines(r) or ["nothing changed"]
    ]
    app.tell_lines(value, rows)
    failed = {s: r for s, r in replies.items() if isinstance(r, WalbError)}
    for s, error in list(failed.items())[1:]:
        print(f"{s.name}: {error}", file=sys.stderr)
    if failed:
        raise next(iter(failed.values()))


@command("resize")
@VOL
@click.argument("size", metavar="SIZE")
@click.option("--zero", is_flag=True, help="Archives write zeros over what is new.")
@click.option(
    "--at", "server", metavar="SERVER", help="Only at this archive or storage; 0 there: size of the data device."
)
def resize(app: App, vol: str, size: str, zero: bool, server: str | None) -> None:
    """Grow the volume to SIZE: at all archives, then at all storages. Its data devices must have grown before.

    An archive that is larger than the storage is harmless; the reverse stops transfers.

    Example: walbc resize vol0 200g
    """
    size_b = parse_size(size)
    if size_b % Mebi:
        raise UsageError("a size is a whole number of MiB", size=size)
    size_mb = size_b // Mebi
    at = app.server(server) if server is not None else None
    if at is None:
        app.ctl.resize(checked(vol), size_mb, zero)
    elif at.kind == K_STORAGE:
        app.ctl.resize_storage(at, vol, size_mb)
    else:
        verify_server_kind(at, (K_STORAGE, K_ARCHIVE))
        app.ctl.resize_archive(at, vol, size_mb, zero)
    text = f"{vol} has {format_size(size_b) if size_b else 'the size of its data device'}"
    app.tell({"volume": vol, "size_b": size_b, "server": server or ""}, f"{text} at {server}" if server else text)


@command("dump-log-header")
@click.argument("storage", metavar="STORAGE")
@VOL
@click.argument("lsid", metavar="LSID", type=click.IntRange(0, (1 << 64) - 1))
def dump_log_header(app: App, storage: str, vol: str, lsid: int) -> None:
    """Keep the block at an lsid of the log as a file in the volume's directory at the storage, to look at."""
    sx = app.server(storage)
    verify_server_kind(sx, (K_STORAGE,))
    app.ctl.dump_log_header(sx, vol, lsid)
    app.tell({"storage": sx.name, "volume": vol, "lsid": lsid}, "")
