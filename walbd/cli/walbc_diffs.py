"""`walbc`: what archives keep beside restore points: diffs, gaps, cold images; hashes and scans of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from walbd.cli.walbc_app import ARCHIVE, GID, POINT, TIMEOUT, VOL, YES, App, checked, command, sure
from walbd.cli.walbc_image import number_of
from walbd.controller.constants import UINT64_MAX
from walbd.errors import AlreadyExists
from walbd.protocol import maintenance as m
from walbd.protocol.codec import to_json_ready
from walbd.units import format_size, format_time

GIDS = click.argument("gids", metavar="GID...", nargs=-1, required=True, type=click.IntRange(0, UINT64_MAX))
GID_RANGE = (
    click.argument("gid0", metavar="[GIDB]", type=click.IntRange(0, UINT64_MAX), default=0),
    click.argument("gid1", metavar="[GIDE]", type=click.IntRange(0, UINT64_MAX), default=UINT64_MAX),
)
BULK = click.option("--bulk", metavar="SIZE", help="Work in pieces of this size.  [default: 64k]")
REST = click.option(
    "--rest",
    "rest_percent",
    metavar="PERCENT",
    type=click.IntRange(0, 99),
    default=0,
    help="Share of the time in which the archive rests.",
)
SIZE = click.option("--size", metavar="SIZE", help="Only the beginning of the volume.")


@command("merge")
@VOL
@click.argument("gid_b", metavar="GIDB", type=click.IntRange(0, UINT64_MAX))
@click.argument("gid_e", metavar="GIDE", type=click.IntRange(0, UINT64_MAX))
@ARCHIVE
@TIMEOUT
def merge(app: App, vol: str, gid_b: int, gid_e: int, archive: str | None, timeout_s: float) -> None:
    """Make one diff of those from GIDB to GIDE: the snapshots between them vanish.

    Snapshots that are protected must be disabled first; diffs that come from a comparison cannot be merged.

    Example: walbc merge vol0 10 20
    """
    ax = app.archive(archive)
    app.ctl.merge(ax, vol, gid_b, gid_e, timeout_s)
    value = {"volume": vol, "archive": ax.name, "gid_b": gid_b, "gid_e": gid_e}
    app.tell(value, f"one diff leads from {gid_b} to {gid_e}")


@command("enable-snapshot")
@VOL
@GIDS
@ARCHIVE
def enable_snapshot(app: App, vol: str, gids: tuple[int, ...], archive: str | None) -> None:
    """Protect snapshots from merging: all that are named, or none when one is unknown."""
    ax = app.archive(archive)
    app.ctl.enable_snapshot(ax, vol, list(gids))
    app.tell({"volume": vol, "archive": ax.name, "gids": list(gids)}, "")


@command("disable-snapshot")
@VOL
@GIDS
@ARCHIVE
def disable_snapshot(app: App, vol: str, gids: tuple[int, ...], archive: str | None) -> None:
    """Let merging remove snapshots: all that are named, or none when one is unknown."""
    ax = app.archive(archive)
    app.ctl.disable_snapshot(ax, vol, list(gids))
    app.tell({"volume": vol, "archive": ax.name, "gids": list(gids)}, "")


@command("get-num-diff")
@VOL
@GID_RANGE[0]
@GID_RANGE[1]
@ARCHIVE
def get_num_diff(app: App, vol: str, gid0: int, gid1: int, archive: str | None) -> None:
    """Count the diffs that begin from GIDB up to, not including, GIDE."""
    value = app.ctl.get_num_diff(app.archive(archive), vol, gid0, gid1)
    app.tell({"value": value}, str(value))


@command("get-total-diff-size")
@VOL
@GID_RANGE[0]
@GID_RANGE[1]
@ARCHIVE
def get_total_diff_size(app: App, vol: str, gid0: int, gid1: int, archive: str | None) -> None:
    """Add up the sizes of the diffs that begin from GIDB up to, not including, GIDE [byte]."""
    value = app.ctl.get_total_diff_size(app.archive(archive), vol, gid0, gid1)
    app.tell({"value": value}, str(value))


@command("cold")
@VOL
@ARCHIVE
def cold(app: App, vol: str, archive: str | None) -> None:
    """List the generations of which there is a cold image: one that was a base, and is kept."""
    gids = app.ctl.get_cold(app.archive(archive), vol)
    app.tell_lines({"gids": gids}, gids)


@command("del-cold")
@VOL
@GID
@ARCHIVE
def del_cold(app: App, vol: str, gid: int, archive: str | None) -> None:
    """Remove a cold image."""
    ax = app.archive(archive)
    app.ctl.del_cold(ax, vol, gid)
    app.tell({"volume": vol, "archive": ax.name, "gid": gid}, "")


@command("gaps")
@VOL
@ARCHIVE
def gaps(app: App, vol: str, archive: str | None) -> None:
    """List the intervals for which no restore point can exist, and why."""
    reply = app.ctl.ask(app.archive(archive), m.GetGaps(volume=checked(vol)))
    rows = [
        (
            gap.gid_b,
            format_time(gap.begin),
            gap.gid_e if gap.end else "-",
            format_time(gap.end) if gap.end else "open",
            gap.cause,
        )
        for gap in reply.gaps
    ]
    app.tell_table(reply, ["GIDB", "FROM", "GIDE", "TO", "CAUSE"], rows, right=["GIDB", "GIDE"])


@command("block-hash")
@VOL
@POINT
@ARCHIVE
@BULK
@SIZE
@REST
@TIMEOUT
def block_hash(
    app: App,
    vol: str,
    gid: int | None,
    archive: str | None,
    bulk: str | None,
    size: str | None,
    rest_percent: int,
    timeout_s: float,
) -> None:
    """Print a hash of the image of a snapshot: equal at archives that hold the same.

    Hashes can be compared only when --bulk and --size were the same.
    """
    ax = app.archive(archive)
    number = number_of(app, ax, vol, gid)
    value = app.ctl.get_block_hash(ax, vol, number, bulk or "64k", size, timeout_s, rest_percent)
    app.tell({"volume": vol, "archive": ax.name, "gid": number, "hash": value}, value)


@command("scrub")
@VOL
@ARCHIVE
@TIMEOUT
def scrub(app: App, vol: str, archive: str | None, timeout_s: float) -> int:
    """Have an archive read and verify everything that it stores of the volume; exit 1 when something is damaged.

    Nothing is changed or removed.
    """
    ax = app.archive(archive)
    found = app.ctl.scrub(ax, vol, timeout_s)
    app.tell(found, "\n".join(f"{name} {value}" for name, value in found.items()))
    return int(bool(found.get("damaged")))


@command("scan")
@VOL
@POINT
@click.argument("dest", metavar="FILE|DEVICE|-")
@ARCHIVE
@BULK
@SIZE
@REST
@click.option("--force", is_flag=True, help="Replace a FILE that exists.")
@YES
def scan(
    app: App,
    vol: str,
    gid: int | None,
    dest: str,
    archive: str | None,
    bulk: str | None,
    size: str | None,
    rest_percent: int,
    force: bool,
    yes: bool,
) -> None:
    """Write the image of a snapshot to a file or device of this host, or to stdout, without restoring it.

    A new file has its name only when it is complete, and holes where the image is zero.

    Example: walbc scan vol0 15 - | gzip > vol0.gz
    """
    ax = app.archive(archive)
    if dest == "-":
        app.ctl.virt_full_scan(ax, vol, number_of(app, ax, vol, gid), sys.stdout.buffer, bulk, size, rest_percent)
        return
    path = Path(dest)
    if path.is_block_device():
        sure(app, yes, f"{path} is overwritten")
    elif path.exists() and not force:
        raise AlreadyExists("the file exists", hint="say --force to replace it", path=dest)
    number = number_of(app, ax, vol, gid)
    size_b = app.ctl.virt_full_scan(ax, vol, number, path, bulk, size, rest_percent)
    value: dict[str, Any] = {"volume": vol, "archive": ax.name, "gid": number, "path": dest, "size_b": size_b}
    app.tell(to_json_ready(value), f"{dest}: {format_size(size_b)}")
