"""`walbc`: copies of volumes at other archives."""

from __future__ import annotations

import click

from walbd.cli.walbc_app import ARCHIVE, TIMEOUT, VOL, App, checked, command
from walbd.cli.walbc_volume import DELAY
from walbd.controller.constants import UINT64_MAX
from walbd.controller.data import SyncOpt, create_compress_opt_from_str
from walbd.controller.servers import Server, get_server
from walbd.controller.words import check_bulk
from walbd.errors import UsageError
from walbd.protocol import maintenance as m
from walbd.units import format_time, parse_size

DEST = click.argument("dest", metavar="ARCHIVE")
SOURCE = click.option("--from", "source", metavar="NAME", help="Copy from here.  [default: the primary archive]")
COMPRESS = click.option(
    "--compress", metavar="KIND[:LEVEL]", help="How diffs are packed on the way.  [default: zstd:1]"
)
MERGE_SIZE = click.option("--merge-size", metavar="SIZE", help="Merge diffs on the way up to this.  [default: 1g]")
BULK = click.option("--bulk", metavar="SIZE", help="Compare in pieces of this size.  [default: 64k]")


def _opt(compress: str | None, merge_size: str | None, bulk: str | None, delay_s: int | None) -> SyncOpt:
    if bulk is not None:
        check_bulk(parse_size(bulk))
    kind = create_compress_opt_from_str(compress) if compress is not None else None
    return SyncOpt(kind, delay_s or 0, merge_size or "1G", bulk or "64K")


def _dest(app: App, name: str) -> Server:
    return get_server(name, app.layout.servers.archiveL)


@command("replicate")
@VOL
@DEST
@SOURCE
@click.option("--sync", "synchronizing", is_flag=True, help="Then let the proxies feed ARCHIVE, too.")
@click.option("--resync", is_flag=True, help="Compare everything; what ARCHIVE holds of another lineage goes.")
@click.option("--dont-merge", is_flag=True, help="Send diffs as they are, so that all snapshots arrive.")
@click.option(
    "--gid", type=click.IntRange(0, UINT64_MAX), metavar="GID", help="Only up to here.  [default: the latest]"
)
@COMPRESS
@MERGE_SIZE
@BULK
@DELAY
@TIMEOUT
def replicate(
    app: App,
    vol: str,
    dest: str,
    source: str | None,
    synchronizing: bool,
    resync: bool,
    dont_merge: bool,
    gid: int | None,
    compress: str | None,
    merge_size: str | None,
    bulk: str | None,
    delay_s: int | None,
    timeout_s: float,
) -> None:
    """Bring the volume at another archive up to date, and print the generation that it has then.

    What is sent is decided by what ARCHIVE holds: everything, what differs, or the diffs that it lacks.

    Example: walbc replicate vol0 a1 --sync
    """
    ax, ay = app.archive(source), _dest(app, dest)
    if synchronizing and gid is not None:
        raise UsageError("--sync goes to the latest", hint="leave --gid out")
    opt = _opt(compress, merge_size, bulk, delay_s)
    if synchronizing:
        reached = app.ctl.replicate(ax, vol, ay, True, timeout_s, resync, dont_merge, opt)
    else:
        reached = app.ctl.replicate_once(ax, vol, ay, timeout_s, resync, dont_merge, opt, gid)
    value = {"volume": vol, "source": ax.name, "archive": ay.name, "gid": reached, "synchronizing": synchronizing}
    app.tell(value, str(reached))


@command("synchronize")
@VOL
@DEST
@SOURCE
@COMPRESS
@MERGE_SIZE
@BULK
@DELAY
@TIMEOUT
def synchronize(
    app: App,
    vol: str,
    dest: str,
    source: str | None,
    compress: str | None,
    merge_size: str | None,
    bulk: str | None,
    delay_s: int | None,
    timeout_s: float,
) -> None:
    """Make the proxies feed another archive, too, without a gap in what it holds.

    The proxies stand still while the rest is replicated. `walbc replicate VOL ARCHIVE` before makes that short;
    `--sync` there does both.
    """
    ax, ay = app.archive(source), _dest(app, dest)
    app.ctl.synchronize(ax, vol, ay, timeout_s, _opt(compress, merge_size, bulk, delay_s))
    app.tell({"volume": vol, "source": ax.name, "archive": ay.name, "value": True}, f"{vol} is sent to {ay.name}")


@command("replicas")
@VOL
@ARCHIVE
def replicas(app: App, vol: str, archive: str | None) -> None:
    """List to where an archive has replicated the volume: it keeps the diffs that these still need."""
    reply = app.ctl.ask(app.archive(archive), m.GetReplicaPositions(volume=checked(vol)))
    rows = [
        (
            row.node,
            row.address,
            row.gid,
            format_time(row.timestamp),
            format_time(row.seen),
            row.failures,
            row.error,
        )
        for row in reply.rows
    ]
    columns = ["ARCHIVE", "ADDRESS", "GID", "TIME", "SEEN", "FAILURES", "ERROR"]
    app.tell_table(reply, columns, rows, right=["GID", "FAILURES"])


@command("forget-replica")
@VOL
@click.argument("name", metavar="ARCHIVE_NAME")
@ARCHIVE
def forget_replica(app: App, vol: str, name: str, archive: str | None) -> None:
    """Do not keep anything for the copy at ARCHIVE_NAME any more; it need not be in the group file."""
    ax = app.archive(archive)
    app.ctl.forget_replica(ax, vol, name)
    app.tell({"volume": vol, "archive": ax.name, "replica": name}, "")
