"""`walbd wlog`: what one can do with log files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from walbd.cli.app import Late, LateGroup
from walbd.cli.output import print_json
from walbd.errors import CorruptData
from walbd.ext.logpack import Fault, bad_records
from walbd.format.logpack import LOG_RECORD, LOG_RECORD_B, LogRecord, PackHeader, corrupt_pack, parse_header
from walbd.format.logscan import Batch
from walbd.format.wlog import WLOG_VERSION, WlogHeader, WlogReader
from walbd.fs import OsFileSystem
from walbd.ids import INVALID_LSID

FILE = click.argument("file", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
DISCARD = click.option(
    "--discard",
    type=click.Choice(["ignore", "zero"]),
    default="zero",
    show_default=True,
    help="What discarded ranges become: zeros, or what was there before.",
)


@click.group(
    cls=LateGroup,
    late={"to-wdiff": Late("walbd.cli.wdiff:to_wdiff", "Convert wlogs to one diff.")},
)
def wlog() -> None:
    """Log files: show, verify, replay, convert to diffs."""


class PackWalk:
    """Goes through the packs of a wlog for showing: unlike other readers, past bad data.

    `damage` is then the first bad data found, and `n_bad` how many records have some. Damaged headers end the
    walk with CorruptData, as always.
    """

    def __init__(self, reader: WlogReader) -> None:
        self.reader = reader
        self.damage: CorruptData | None = None
        self.n_bad = 0

    def __iter__(self) -> Iterator[tuple[int, PackHeader]]:
        """Yield (offset in the file, header) of each pack."""
        inside = 0  # bytes still to come of a pack that is handed out in parts
        for batch in self.reader.batches(verify_data=False):
            self._look_at_data(batch)
            offset_b, pbs = self.reader.offset_of(batch.lsid), self.reader.header.pbs
            at = min(inside, len(batch.data))
            inside -= at
            while at < len(batch.data):
                header = parse_header(
                    batch.data[at : at + pbs],
                    pbs=pbs,
                    salt=self.reader.header.salt,
                    source=self.reader.path,
                    offset=offset_b + at,
                )
                yield offset_b + at, header
                at += (1 + header.total_io_size_pb) * pbs
            inside = max(inside, at - len(batch.data))

    def _look_at_data(self, batch: Batch) -> None:
        for index in bad_records(batch.data, self.reader.header.salt, batch.records):
            self.n_bad += 1
            if self.damage is None:
                lsid, _, data_b, _, _, _, _ = LOG_RECORD.unpack_from(batch.records, index * LOG_RECORD_B)
                offset = self.reader.offset_of(batch.lsid) + data_b
                self.damage = corrupt_pack(
                    Fault.DATA_CHECKSUM, source=self.reader.path, offset=offset, hint=_HINT, lsid=lsid
                )

    def finish(self) -> None:
        """Raise the first damage, if any."""
        if self.damage is not None:
            self.damage.facts["bad_records"] = self.n_bad
            raise self.damage


_HINT = "take another copy of this wlog, or extract it again from the log device"


def record_columns(header: PackHeader, record: LogRecord) -> list[object]:
    """Return a record as it is shown: lsid, lsid_local, offset, size, flags, checksum."""
    flags = ("P" if record.is_padding else "-") + ("D" if record.is_discard else "-")
    return [
        header.lsid + record.lsid_local,
        record.lsid_local,
        record.offset_lb,
        record.io_size_lb,
        "E" + flags,
        f"{record.checksum:08x}",
    ]


def header_facts(header: WlogHeader) -> dict[str, object]:
    """Return the file header as it is shown."""
    return {
        "version": WLOG_VERSION,
        "pbs": header.pbs,
        "salt": f"{header.salt:08x}",
        "uuid": header.uuid.hex(),
        "begin_lsid": header.begin_lsid,
        "end_lsid": header.end_lsid,
    }


def pack_facts(header: PackHeader) -> dict[str, object]:
    """Return a pack as it is shown in JSON."""
    return {
        "lsid": header.lsid,
        "total_io_size": header.total_io_size_pb,
        "n_records": len(header.records),
        "n_padding": header.n_padding,
        "checksum": f"{header.checksum:08x}",
        "records": [record_columns(header, record) for record in header.records],
    }


@wlog.command()
@FILE
@JSON
def show(file: Path, as_json: bool) -> None:
    """Show the packs and records of a log file.

    Everything that can be read is shown; if something in the file is damaged, the command fails in the end.
    """
    with OsFileSystem().open(file) as opened:
        walk = PackWalk(WlogReader(opened))
        if as_json:
            _show_json(walk)
        else:
            _show_text(walk)
        walk.finish()


def _show_json(walk: PackWalk) -> None:
    import json

    # Written piece by piece: a log file may be larger than memory.
    print(f'{{"header": {json.dumps(header_facts(walk.reader.header))},\n "packs": [', end="")
    separator = "\n  "
    try:
        for _, header in walk:
            print(separator + json.dumps(pack_facts(header)), end="")
            separator = ",\n  "
    finally:
        print("]}")


def _show_text(walk: PackWalk) -> None:
    header = walk.reader.header
    end = "unknown" if header.end_lsid == INVALID_LSID else header.end_lsid
    print(
        f"wlog  pbs {header.pbs}  salt {header.salt:08x}  uuid {header.uuid.hex()}  "
        f"begin_lsid {header.begin_lsid}  end_lsid {end}"
    )
    n_packs = 0
    for offset, pack in walk:
        n_packs += 1
        print(
            f"pack  lsid {pack.lsid}  total_io_size {pack.total_io_size_pb}  n_records {len(pack.records)}  "
            f"n_padding {pack.n_padding}  checksum {pack.checksum:08x}  at {offset}"
        )
        for record in pack.records:
            lsid, local, offset_lb, io_size_lb, flags, csum = record_columns(pack, record)
            print(f"  {lsid:>12} {local:>5} {offset_lb:>14} {io_size_lb:>10} {flags} {csum}")
    print(f"end   lsid {walk.reader.lsid}  packs {n_packs}")


@wlog.command()
@FILE
@JSON
def verify(file: Path, as_json: bool) -> None:
    """Check every checksum and rule of a log file.

    Fails at the first thing that is wrong, also when the file does not end properly.
    """
    with OsFileSystem().open(file) as opened:
        reader = WlogReader(opened)
        begin = reader.lsid
        n_packs = sum(batch.n_packs for batch in reader.batches(collect=False))
    if as_json:
        print_json({"file": str(file), "begin_lsid": begin, "end_lsid": reader.lsid, "packs": n_packs})
    else:
        print(f"{file}: good, lsid {begin} to {reader.lsid}, {n_packs} packs")


@wlog.command()
@FILE
@click.argument("image", type=click.Path(path_type=Path))
@DISCARD
@JSON
def redo(file: Path, image: Path, discard: str, as_json: bool) -> None:
    """Replay a log file on a disk image or block device.

    Every pack is verified before it is applied. If the log is damaged, IMAGE gets what stands before the damage
    and nothing behind it, and the command fails.
    """
    from walbd.fs.apply import apply_wlog

    fs = OsFileSystem()
    with fs.open(file) as opened:
        reader = WlogReader(opened)
        with fs.open(image, write=True, lock=True) as target:
            begin = reader.lsid
            end = apply_wlog(reader, target, zero_discards=discard == "zero")
    if as_json:
        print_json({"image": str(image), "begin_lsid": begin, "end_lsid": end})
    else:
        print(f"{image}: applied lsid {begin} to {end}")
