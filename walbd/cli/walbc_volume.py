"""`walbc`: the life of a volume, backups and snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from walbd.cli.walbc_app import SERVER, STORAGE, TIMEOUT, VOL, YES, App, command, sure
from walbd.controller.constants import K_ARCHIVE
from walbd.controller.data import SyncOpt, create_compress_opt_from_str
from walbd.controller.servers import Server, get_server
from walbd.controller.words import check_bulk
from walbd.errors import WalbError
from walbd.units import parse_size

F = TypeVar("F", bound=Callable[..., Any])

COMPRESS = click.option(
    "--compress", metavar="KIND[:LEVEL]", help="How proxies pack what they send.  [default: zstd:1, or as it was]"
)
DELAY = click.option(
    "--delay",
    "delay_s",
    type=click.IntRange(0, 86400),
    metavar="SECONDS",
    help="Let proxies wait, and merge more.",
)


def sync_opt(compress: str | None, delay_s: int | None) -> SyncOpt | None:
    """Return what the options say; None when they say nothing."""
    if compress is None and delay_s is None:
        return None
    opt = create_compress_opt_from_str(compress) if compress is not None else None
    return SyncOpt(opt, delay_s or 0)


@command("init-storage")
@VOL
@click.argument("device", required=False)
@STORAGE
def init_storage(app: App, vol: str, device: str | None, storage: str | None) -> None:
    """Take over a device under the name VOL at a storage, and stand by.

    DEVICE is the directory of a device made with `walbd device create`; it is not needed when the group file
    names it.

    Example: walbc init-storage vol0 /var/lib/walbd/device/vol0
    """
    entry = app.layout.volumes.get(vol)
    if storage is None and entry is not None and entry.target is None and len(entry.devices) == 1:
        storage = next(iter(entry.devices))
    sx = app.storage(storage, vol)
    app.ctl.init_storage(sx, vol, device or app.device(vol, sx))
    app.tell({"volume": vol, "storage": sx.name, "state": "Standby"}, f"{vol} is Standby at {sx.name}")


def backup_options(function: F) -> F:
    """Add the options that full and hash backups share."""
    for option in reversed(
        [
            VOL,
            STORAGE,
            click.option("--bulk", metavar="SIZE", help="Work in pieces of this size.  [default: 256k]"),
            COMPRESS,
            DELAY,
            click.option("--no-wait", is_flag=True, help="Return when the backup has begun."),
            TIMEOUT,
        ]
    ):
        function = option(function)
    return function


@command("full-backup")
@backup_options
def full_backup(app: App, vol: str, **options: Any) -> None:
    """Copy the whole volume to the primary archive, and back it up continuously from then on.

    Prints the first generation that can be restored. A volume that is Target must be stopped first; everything
    that is needed is checked before anything is changed.
    """
    _backup(app, vol, "full_backup", **options)


@command("hash-backup")
@backup_options
def hash_backup(app: App, vol: str, **options: Any) -> None:
    """Send what differs from the archive's latest image, and back the volume up continuously from then on.

    That continues a history whose log was lost, as after an overflow. Prints the new generation that can be
    restored. A volume that is Target must be stopped first, unless its log has overflowed.

    Example: walbc hash-backup vol0 --storage s1
    """
    _backup(app, vol, "hash_backup", **options)


def _backup(
    app: App,
    vol: str,
    method: str,
    *,
    storage: str | None,
    bulk: str | None,
    compress: str | None,
    delay_s: int | None,
    no_wait: bool,
    timeout_s: float,
) -> None:
    if bulk is not None:
        check_bulk(parse_size(bulk))
    sx = app.storage(storage, vol)
    gid = getattr(app.ctl, method)(sx, vol, timeout_s, not no_wait, bulk, sync_opt(compress, delay_s))
    begun = f"the backup of {vol} has begun at {sx.name}"
    app.tell({"volume": vol, "storage": sx.name, "gid": gid}, begun if gid is None else str(gid))


@command("snapshot")
@VOL
@STORAGE
@click.option(
    "--archive",
    "archives",
    metavar="NAME",
    multiple=True,
    help="Wait until it can be restored there; may be repeated.  [default: every archive that is fed]",
)
@click.option("--no-wait", is_flag=True, help="Do not wait for archives.")
@TIMEOUT
def snapshot(
    app: App, vol: str, storage: str | None, archives: tuple[str, ...], no_wait: bool, timeout_s: float
) -> None:
    """Take a snapshot of the volume now, and print its generation when archives can restore it."""
    sx = app.storage(storage, vol)
    if no_wait:
        gid = app.ctl.snapshot_nbk(sx, vol)
        app.tell({"volume": vol, "gid": gid, "archives": []}, str(gid))
        return
    wanted = [get_server(name, app.layout.servers.archiveL) for name in archives] or _fed(app, vol)
    gid = app.ctl.snapshot(sx, vol, wanted, timeout_s)
    app.tell({"volume": vol, "gid": gid, "archives": [ax.name for ax in wanted]}, str(gid))


def _fed(app: App, vol: str) -> list[Server]:
    """Return the archives that all proxies feed; the primary one when that cannot be said."""
    servers = app.layout.servers
    try:
        fed = [ax for ax in servers.archiveL if app.ctl.is_synchronizing(ax, vol)]
    except WalbError:
        fed = []
    return fed or [servers.get_primary_archive()]


@command("start")
@SERVER
@VOL
def start(app: App, server: str, vol: str) -> None:
    """Start a stopped volume at a server; at a storage it becomes the target."""
    s = app.server(server)
    app.ctl.start(s, vol)
    state = app.ctl.get_state(s, vol)
    app.tell({"server": s.name, "volume": vol, "state": state}, f"{vol} is {state} at {s.name}")


@command("stop")
@SERVER
@VOL
@click.argument("mode", type=click.Choice(["graceful", "force", "empty"]), default="graceful")
@click.option("--no-wait", is_flag=True, help="Return when the server has agreed.")
@TIMEOUT
def stop(app: App, server: str, vol: str, mode: str, no_wait: bool, timeout_s: float) -> None:
    """Stop a volume at a server.

    MODE graceful lets running work end, force ends it early, empty (proxies) first sends everything.

    Example: walbc stop p0 vol0 empty
    """
    s = app.server(server)
    before = app.ctl.stop_nbk(s, vol, mode)
    if no_wait:
        app.tell({"server": s.name, "volume": vol, "before": before}, f"{vol} was {before} at {s.name}")
        return
    app.ctl.wait_for_stopped(s, vol, before, timeout_s)
    state = app.ctl.get_state(s, vol)
    app.tell({"server": s.name, "volume": vol, "state": state}, f"{vol} is {state} at {s.name}")


@command("reset")
@SERVER
@VOL
@YES
def reset(app: App, server: str, vol: str, yes: bool) -> None:
    """Bring a stopped volume back to SyncReady: a storage wipes its log, an archive removes all its data."""
    s = app.server(server)
    what = "all backups of the volume at this archive are removed" if s.kind == K_ARCHIVE else "its log is wiped"
    sure(app, yes, f"{vol} at {s.name}: {what}")
    app.ctl.reset(s, vol)
    app.tell({"server": s.name, "volume": vol, "state": "SyncReady"}, f"{vol} is SyncReady at {s.name}")


@command("clear")
@SERVER
@VOL
@YES
def clear(app: App, server: str, vol: str, yes: bool) -> None:
    """Forget a volume at a server, and remove its files there; it is stopped first."""
    s = app.server(server)
    what = "all its backups there" if s.kind == K_ARCHIVE else "what is not sent yet"
    sure(app, yes, f"{vol} at {s.name} is forgotten, and {what} removed")
    app.ctl.clear(s, vol)
    app.tell({"server": s.name, "volume": vol, "state": "Clear"}, f"{vol} is Clear at {s.name}")


@command("go-standby")
@VOL
@STORAGE
@YES
def go_standby(app: App, vol: str, storage: str | None, yes: bool) -> None:
    """Make the volume Standby at a storage: its log is thrown away unsent.

    If it was the target, a backup from another storage has to follow.
    """
    sx = app.storage(storage, vol)
    sure(app, yes, f"{vol} at {sx.name}: what is not sent yet is lost to the archives")
    app.ctl.go_standby(sx, vol)
    app.tell({"volume": vol, "storage": sx.name, "state": "Standby"}, f"{vol} is Standby at {sx.name}")


@command("is-overflow")
@VOL
@STORAGE
def is_overflow(app: App, vol: str, storage: str | None) -> None:
    """Print 1 when the log of the volume has overflowed (then only a backup helps), else 0."""
    value = app.ctl.is_overflow(app.storage(storage, vol), vol)
    app.tell({"value": value}, str(int(value)))


@command("set-full-scan-bps")
@click.argument("storage")
@click.argument("size")
def set_full_scan_bps(app: App, storage: str, size: str) -> None:
    """Limit the speed of full scans at a storage, running ones included [byte/s]; 0: no limit.

    Example: walbc set-full-scan-bps s0 50m
    """
    sx = get_server(storage, app.layout.servers.storageL)
    app.ctl.set_full_scan_bps(sx, size)
    app.tell({"storage": sx.name, "bytes_per_s": parse_size(size)}, "")
