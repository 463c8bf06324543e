"""`walbc`: what archives hold, restoring it, and applying diffs."""

from __future__ import annotations

from typing import Any

import click

from walbd.cli.output import print_table
from walbd.cli.walbc_app import ARCHIVE, GID, SERVER, TIMEOUT, VOL, App, checked, command
from walbd.controller.constants import UINT64_MAX, aActive
from walbd.controller.overview import Overview, VolumeView
from walbd.controller.servers import Server
from walbd.errors import NotFound, WalbError
from walbd.format.meta import RestorePoint
from walbd.protocol import control as c
from walbd.protocol.codec import to_json_ready
from walbd.units import format_size, format_time

_POINTS_SHOWN = 20


class _Gid(click.ParamType[Any]):
    """A generation, or `latest`."""

    name = "gid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "latest":
            return None
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= UINT64_MAX:
            return int(text)
        self.fail(f"{value!r} is no generation: write a number, or latest", param, ctx)


POINT = click.argument("gid", metavar="GID", type=_Gid())


def _gid(app: App, ax: Server, vol: str, gid: int | None) -> int:
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
    rows = _restored(app, ax, vol, app.ctl.get_restored(ax, vol))
    app.tell_lines(rows, [f"{row['gid']} {row['path']}" for row in rows])


@command("restore")
@VOL
@POINT
@ARCHIVE
@TIMEOUT
def restore(app: App, vol: str, gid: int | None, archive: str | None, timeout_s: float) -> None:
    """Make a writable image of a snapshot on the archive's host, and print its path.

    GID `latest` is the newest one that can be restored.
    """
    ax = app.archive(archive)
    number = _gid(app, ax, vol, gid)
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


@command("info")
@VOL
@click.option("--all", "all_points", is_flag=True, help="List every restore point, implicit ones too.")
def info(app: App, vol: str, all_points: bool) -> None:
    """Show from when to when, and to which points, the volume can be restored; sizes and lag."""
    view = app.ctl.overview(checked(vol))
    volume = next((v for v in view.volumes if v.volume == vol), None)
    if volume is None:
        raise NotFound("no server that answers knows the volume", hint="see `walbc status`", volume=vol)
    archives = [_archive_info(app, s, vol, view, volume, all_points) for s in app.layout.servers.archiveL]
    if app.as_json:
        about = to_json_ready(volume) | {"archives": archives}
        about["alarms"] = [to_json_ready(a) for a in view.alarms if a.volume in ("", vol)]
        app.tell(about)
        return
    app.end_progress()
    source = f"backed up from {', '.join(volume.targets)}" if volume.targets else "not backed up"
    print(f"{volume.word}  {vol}: {format_size(volume.size_b)}, {source}")
    for alarm in view.alarms:
        if alarm.volume in ("", vol):
            where = f"{alarm.server}: " if alarm.server else ""
            print(f"    {alarm.word}: {where}{alarm.text}{f' - {alarm.hint}' if alarm.hint else ''}")
    for about in archives:
        _print_archive(about, all_points)


def _archive_info(
    app: App, s: Server, vol: str, view: Overview, volume: VolumeView, all_points: bool
) -> dict[str, Any]:
    """Ask one archive what it holds; an archive that cannot tell says why."""
    about: dict[str, Any] = {"archive": s.name}
    server = next(v for v in view.servers if v.name == s.name)
    mine = next((v for v in server.status.volumes if v.volume == vol), None) if server.status else None
    if mine is None:
        return about | {"state": "", "error": server.text}
    part = next((p for p in volume.parts if p.server == s.name), None)
    about |= {
        "state": mine.state,
        "diffs": mine.diffs,
        "diffs_b": mine.diffs_b,
        "lag_s": part.lag_s if part else None,
        "points": [],
        "restored": [],
    }
    if mine.state not in aActive:
        return about
    try:
        points = app.ctl.ask(s, c.GetRestorable(volume=vol, all_points=all_points)).points
        about["base"] = to_json_ready(app.ctl.ask(s, c.GetBase(volume=vol)).base)
        about["points"] = to_json_ready(points)
        about["restored"] = _restored(app, s, vol, mine.restored)
    except WalbError as exc:
        about["error"] = str(exc)
    return about


def _restored(app: App, ax: Server, vol: str, gids: list[int]) -> list[dict[str, Any]]:
    return [{"gid": gid, "path": app.ctl.get_restored_path(ax, vol, gid)} for gid in gids]


def _print_archive(about: dict[str, Any], all_points: bool) -> None:
    name = about["archive"]
    if about.get("error"):
        print(f"\n{name}: {about['error']}")
        return
    points = [RestorePoint(**point) for point in about["points"]]
    n = about["diffs"]
    print(f"\n{name}: {about['state']}, {n} diff{'s' * (n != 1)} of {format_size(about['diffs_b'])}")
    if not points:
        print("    nothing can be restored")
        return
    first, last = points[0], points[-1]
    behind = f", {about['lag_s']} s behind" if about["lag_s"] else ", nothing missing"
    print(
        f"    restorable from {format_time(first.timestamp)} (gid {first.gid})"
        f" to {format_time(last.timestamp)} (gid {last.gid}){behind}"
    )
    for row in about["restored"]:
        print(f"    restored: {row['gid']} {row['path']}")
    shown = points if all_points else points[-_POINTS_SHOWN:]
    if len(shown) < len(points):
        print(f"    the newest {len(shown)} of {len(points)} points (--all shows every one):")
    print_table(
        ["GID", "TIME", "KIND"],
        [(p.gid, format_time(p.timestamp), "explicit" if p.explicit else "implicit") for p in shown],
        right=["GID"],
    )
