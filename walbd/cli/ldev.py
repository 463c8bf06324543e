"""`walbd ldev`: what one can do with a log device that no process serves."""

from __future__ import annotations

import random
from pathlib import Path

import click

from walbd.cli.files import OUT, output_file
from walbd.cli.output import note, print_facts, print_json
from walbd.errors import CorruptData
from walbd.format.superblock import Superblock
from walbd.fs import OsFileSystem
from walbd.storage.device.superblocks import OpenedSuperblock

LDEV = click.argument("ldev_path", metavar="LDEV", type=click.Path(path_type=Path))
DDEV = click.argument("ddev_path", metavar="DDEV", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def ldev() -> None:
    """Log devices: format, look inside, extract, replay, check.

    LDEV is the log device and DDEV the data device of one volume: block devices, or plain files.
    """


def superblock_facts(sb: Superblock) -> dict[str, object]:
    """Return a superblock as it is shown."""
    return {
        "name": sb.name,
        "uuid": sb.uuid.hex(),
        "pbs": sb.pbs,
        "salt": f"{sb.salt:08x}",
        "device_size_lb": sb.device_size_lb,
        "ring_offset_pb": sb.ring_offset_pb,
        "ring_size_pb": sb.ring_size_pb,
        "metadata_size_pb": sb.metadata_size_pb,
        "oldest_lsid": sb.oldest_lsid,
        "written_lsid": sb.written_lsid,
    }


def _print(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


def _warn_of_copy(opened: OpenedSuperblock) -> None:
    if opened.problem is not None:
        note(f"walbd: {opened.problem}; superblock 1 is used instead")


@ldev.command("format")
@LDEV
@DDEV
@click.option(
    "--pbs",
    type=click.Choice(["512", "4096"]),
    default=None,
    help="Physical block size; by default that of the devices, 512 for files.",
)
@click.option("--name", default="", help="Name of the volume, at most 31 bytes.")
@click.option("--force", is_flag=True, help="Format what is a log device already; its log is lost.")
@JSON
def format_(ldev_path: Path, ddev_path: Path, pbs: str | None, name: str, force: bool, as_json: bool) -> None:
    """Make LDEV the empty log device of DDEV."""
    from walbd.storage.device.offline import format_ldev

    fs = OsFileSystem()
    with fs.open(ldev_path, write=True, lock=True) as ldev_file, fs.open(ddev_path, lock=True) as ddev_file:
        sb = format_ldev(
            ldev_file,
            ddev_file,
            pbs=int(pbs) if pbs else None,
            name=name,
            force=force,
            rng=random.SystemRandom(),
        )
    _print(superblock_facts(sb), as_json)


@ldev.command()
@LDEV
@JSON
def info(ldev_path: Path, as_json: bool) -> None:
    """Show the superblock of LDEV."""
    from walbd.storage.device.offline import open_ldev

    with open_ldev(OsFileSystem(), ldev_path) as (_, opened):
        _warn_of_copy(opened)
        sb = opened.superblock
    facts = {
        **superblock_facts(sb),
        "superblock": 0 if opened.problem is None else 1,
        "overflow": sb.written_lsid - sb.oldest_lsid > sb.ring_size_pb,
    }
    _print(facts, as_json)


@ldev.command()
@LDEV
@OUT
@click.option("--from", "begin", metavar="LSID", type=int, help="First logpack; by default the oldest.")
@click.option("--to", "end", metavar="LSID", type=int, help="Lsid after the last logpack; by default the end.")
@JSON
def cat(ldev_path: Path, out: Path, begin: int | None, end: int | None, as_json: bool) -> None:
    """Copy the log of LDEV to a wlog file.

    Example: walbd ldev cat /dev/vg/vol0-log -o vol0.wlog --from 4096
    """
    from walbd.storage.device.offline import extract_wlog, open_ldev

    fs = OsFileSystem()
    with open_ldev(fs, ldev_path) as (file, opened):
        _warn_of_copy(opened)
        with output_file(fs, out) as new:
            reached = extract_wlog(file, opened.superblock, new, begin=begin, end=end)
        first = opened.superblock.oldest_lsid if begin is None else begin
    if as_json:
        print_json({"wlog": str(out), "begin_lsid": first, "end_lsid": reached})
    else:
        print(f"{out}: lsid {first} to {reached}")


@ldev.command()
@LDEV
@DDEV
@JSON
def redo(ldev_path: Path, ddev_path: Path, as_json: bool) -> None:
    """Bring DDEV up to the end of the log of LDEV, and make the log end there.

    What a device does when it starts after a crash. A torn last logpack is cut down to its good records.
    """
    from walbd.storage.device.offline import open_ldev
    from walbd.storage.device.redo import redo as redo_log

    fs = OsFileSystem()
    with open_ldev(fs, ldev_path, write=True) as (ldev_file, opened):
        _warn_of_copy(opened)
        with fs.open(ddev_path, write=True, lock=True) as ddev_file:
            done = redo_log(ldev_file, ddev_file, opened.superblock)
    torn = done.end.torn
    if as_json:
        print_json(
            {
                "begin_lsid": done.begin_lsid,
                "end_lsid": done.end.lsid,
                "packs": done.n_packs,
                "records": done.n_records,
                "torn": None if torn is None else {"lsid": torn.lsid, "records_kept": torn.record},
                "removed_lsids": list(done.forgotten),
            }
        )
        return
    print(f"{ddev_path}: applied lsid {done.begin_lsid} to {done.end.lsid}, {done.n_packs} packs")
    if torn is not None:
        print(f"{ldev_path}: cut the torn logpack at lsid {torn.lsid} to {torn.record} records")
    if done.forgotten:
        print(f"{ldev_path}: removed {len(done.forgotten)} logpacks above the end of the log")


@ldev.command()
@LDEV
@JSON
def check(ldev_path: Path, as_json: bool) -> None:
    """Check LDEV without changing it: superblocks, ring, every logpack from the oldest to the end."""
    from walbd.storage.device.offline import check_ldev, open_ldev

    with open_ldev(OsFileSystem(), ldev_path) as (file, opened):
        report = check_ldev(file, opened)
    sb = report.superblock
    end_lsid = report.end.lsid if report.end else None
    if as_json:
        print_json(
            {
                "oldest_lsid": sb.oldest_lsid,
                "written_lsid": sb.written_lsid,
                "end_lsid": end_lsid,
                "end_reason": report.end.reason if report.end else None,
                "problems": report.problems,
                "notes": report.notes,
            }
        )
    else:
        print(f"oldest lsid {sb.oldest_lsid}, written lsid {sb.written_lsid}, log ends at {end_lsid}")
        for text in report.notes:
            print(f"note: {text}")
    if report.problems:
        raise CorruptData(
            "; ".join(report.problems),
            hint="if log is lost, reset it and resynchronise the volume with a hash or full backup",
            path=str(ldev_path),
        )
    if not as_json:
        print("good")
