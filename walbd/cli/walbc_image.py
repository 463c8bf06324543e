"""`walbc`: what archives hold, restoring it, and applying diffs."""

from __future__ import annotations

from typing import Any

import click

from walbd.cli.walbc_app import ARCHIVE, GID, POINT, SERVER, TIMEOUT, VOL, App, checked, command
from walbd.controller.constants import UINT64_MAX
from walbd.controller.servers import Server
from walbd.protocol import control as c

_POINTS_SHOWN = 20


def number_of(app: App, ax: Server, vol: str, gid: int | None) -> int:
    """Return a generation; None is the newest one that can be restored."""
    return app.ctl.get_latest_clean_snapshot(ax, vol) if gid is None else gid


@command("restorable")
@VOL
@ARCHIVE
@click.option("--all", "all_points", is_flag=True, help="Implicit restore points, too.")
def restorable(app: App, vol: str, archive: str | None, all_points: bool) -> None:
    """List what can be restored: GID TIME EXPLICIT, oldest first."""
    ax = app.archive(archive)
    reply = app.ctl.ask(ax, c.GetRestorable(volume=checked(vol), all_points=all_points))
    app.tell_lines(reply, reply.points)


@command("restored")
@VOL
@ARCHIVE
def restored(app: App, vol: str, archive: str | None) -> None:
    """List restored images: GID PATH."""
    ax = app.archive(archive)
    rows = restored_rows(app, ax, vol, app.ctl.get_restored(ax, vol))
    app.tell_lines(rows, [f"{row['gid']} {row['path']}" for row in rows])


@command("restore")
@VOL
@POINT
@ARCHIVE
@TIMEOUT
def restore(app: App, vol: str, gid: int | None, archive: str | None, timeout_s: float) -> None:
    """Make a writable image of a snapshot on the archive's host, and print its path.

    `latest` is the newest one that can be restored.

    Example: walbc restore vol0 latest
    """
    ax = app.archive(archive)
    number = number_of(app, ax, vol, gid)
    app.ctl.restore(ax, vol, number, timeout_s)
    path = app.ctl.get_restored_path(ax, vol, number)
    app.tell({"volume": vol, "archive": ax.name, "gid": number, "path": path}, path)


@command("get-restored-path")
@VOL
@GID
@ARCHIVE
def get_restored_path(app: App, vol: str, gid: int, archive: str | None) -> None:
    """Print where a restored image is, on the archive's host."""
    app.tell({"path": (path := app.ctl.get_restored_path(app.archive(archive), vol, gid))}, path)


@command("del-restored")
@VOL
@GID
@ARCHIVE
def del_restored(app: App, vol: str, gid: int, archive: str | None) -> None:
    """Remove a restored image. The backup itself is not touched."""
    ax = app.archive(archive)
    app.ctl.del_restored(ax, vol, gid)
    app.tell({"volume": vol, "archive": ax.name, "gid": gid}, "")


@command("apply")
@VOL
@GID
@ARCHIVE
@TIMEOUT
def apply(app: App, vol: str, gid: int, archive: str | None, timeout_s: float) -> None:
    """Write the diffs up to a generation into the base image: all snapshots before it vanish."""
    ax = app.archive(archive)
    app.ctl.apply(ax, vol, gid, timeout_s)
    app.tell({"volume": vol, "archive": ax.name, "gid": gid}, f"the base of {vol} at {ax.name} is at {gid}")


@command("gc-diff")
@VOL
@ARCHIVE
def gc_diff(app: App, vol: str, archive: str | None) -> None:
    """Remove diffs that no restore point needs; print how many there were."""
    n = app.ctl.gc_diff(app.archive(archive), vol)
    app.tell({"value": n}, str(n))


@command("get-base")
@VOL
@ARCHIVE
def get_base(app: App, vol: str, archive: str | None) -> None:
    """Print the state of the base image."""
    reply = app.ctl.ask(app.archive(archive), c.GetBase(volume=checked(vol)))
    app.tell(reply, reply.base.describe())


@command("get-diff-list")
@VOL
@click.argument("gid0", metavar="[GIDB]", type=click.IntRange(0, UINT64_MAX), default=0)
@click.argument("gid1", metavar="[GIDE]", type=click.IntRange(0, UINT64_MAX), default=UINT64_MAX)
@ARCHIVE
def get_diff_list(app: App, vol: str, gid0: int, gid1: int, archive: str | None) -> None:
    """List diffs that begin from GIDB up to, not including, GIDE."""
    reply = app.ctl.ask(app.archive(archive), c.GetDiff(volume=checked(vol), gid_b=gid0, gid_e=gid1))
    app.tell_lines(reply, [diff.describe() for diff in reply.diffs])


@command("get-applicable-diff-list")
@VOL
@click.argument("gid", metavar="[GID]", type=click.IntRange(0, UINT64_MAX), default=UINT64_MAX)
@ARCHIVE
def get_applicable_diff_list(app: App, vol: str, gid: int, archive: str | None) -> None:
    """List the diffs that lead from the base to a generation (default: the newest)."""
    reply = app.ctl.ask(app.archive(archive), c.GetApplicableDiff(volume=checked(vol), gid=gid))
    app.tell_lines(reply, [diff.describe() for diff in reply.diffs])


@command("get-uuid")
@SERVER
@VOL
def get_uuid(app: App, server: str, vol: str) -> None:
    """Print the uuid of the log that a storage sends, or that an archive's history continues."""
    uuid = app.ctl.get_uuid(app.server(server), vol)
    app.tell({"value": uuid}, uuid)


@command("get-archive-uuid")
@VOL
@ARCHIVE
def get_archive_uuid(app: App, vol: str, archive: str | None) -> None:
    """Print the uuid of the lineage of images: equal at replicas."""
    uuid = app.ctl.get_archive_uuid(app.archive(archive), vol)
    app.tell({"value": uuid}, uuid)


def restored_rows(app: App, ax: Server, vol: str, gids: list[int]) -> list[dict[str, Any]]:
    """Return the restored images of a volume with their paths."""
    return [{"gid": gid, "path": app.ctl.get_restored_path(ax, vol, gid)} for gid in gids]
