"""`walbd wdiff`: what one can do with diff files; and the conversion of logs to diffs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import click

from walbd.cli.files import COMPRESS, OUT, output_file
from walbd.cli.output import print_error, print_json
from walbd.errors import CorruptData, WalbError
from walbd.format.compress import CompressOpt, Kind
from walbd.format.wdiff import INDEX_RECORD, RECORD, RECORD_B, VERSION, WdiffHeader, corrupt, flags_text
from walbd.format.wdiff_read import SortedReader, WdiffReader, open_wdiff
from walbd.fs import OsFileSystem
from walbd.units import LB

FILE = click.argument("file", type=click.Path(path_type=Path))
FILES = click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

Record = list[int | str]


@click.group()
def wdiff() -> None:
    """Diff files: show, verify, merge, apply."""


@wdiff.command()
@FILE
@JSON
def show(file: Path, as_json: bool) -> None:
    """Show the header and the records of a diff.

    Data is checked against its checksums. Everything that can be read is shown; if something in the file is
    damaged, the command fails in the end.
    """
    with OsFileSystem().open(file) as opened:
        reader = open_wdiff(opened)
        walk = RecordWalk(reader)
        if as_json:
            _show_json(reader.header, walk)
        else:
            _show_text(reader.header, walk)
        walk.finish()


class RecordWalk:
    """Goes through the records of a diff for showing: past bad data, which the record tells in its last column."""

    def __init__(self, reader: WdiffReader) -> None:
        from walbd.format.wdiff_batch import Batcher

        self._reader = reader
        self._batcher = Batcher([reader.file])
        self._damage: CorruptData | None = None
        self._n_bad = 0

    def __iter__(self) -> Iterator[Record]:
        if isinstance(self._reader, SortedReader):
            for pack in self._reader.packs():
                at = range(16, 16 + RECORD_B * len(pack.extents) // 40, RECORD_B)
                rows: Iterable[Record] = (_sorted_columns(RECORD.unpack_from(pack.header, i)) for i in at)
                yield from self._checked(rows, pack.extents)
        else:
            for part in self._reader.index():
                rows = (_indexed_columns(fields) for fields in INDEX_RECORD.iter_unpack(part.records))
                yield from self._checked(rows, part.extents)

    def _checked(self, rows: Iterable[Record], extents: bytes) -> Iterator[Record]:
        bad = self._batcher.find_bad(extents)
        for i, row in enumerate(rows):
            if i in bad:
                data_b, computed = bad[i]
                row.append(f"invalid data checksum: {computed:08x}")
                self._n_bad += 1
                if self._damage is None:
                    self._damage = corrupt(
                        "the checksum of stored data does not match", self._reader.file.path, data_b
                    )
            yield row

    def finish(self) -> None:
        """Raise the first damage, if any."""
        if self._damage is not None:
            self._damage.facts["bad_records"] = self._n_bad
            raise self._damage


def header_facts(header: WdiffHeader) -> dict[str, str]:
    """Return the file header as it is shown."""
    return {
        "checksum": f"{header.checksum:08x}",
        "version": str(VERSION),
        "type": header.type.text,
        "uuid": header.uuid.hex(),
    }


def _kind_text(kind: int, flags: int) -> str:
    return Kind.NONE.text if flags & 6 else Kind(kind).text


def _sorted_columns(fields: tuple[int, ...]) -> Record:
    address_lb, blocks_lb, flags, kind, _, offset_b, size_b, checksum, _ = fields
    return [
        address_lb,
        blocks_lb,
        _kind_text(kind, flags),
        offset_b,
        size_b,
        f"{checksum:08x}",
        flags_text(flags),
    ]


def _indexed_columns(fields: tuple[int, ...]) -> Record:
    address_lb, blocks_lb, flags, kind, _, data_b, size_b, offset_lb, orig_lb, _, checksum, record_checksum = (
        fields
    )
    return [
        address_lb,
        blocks_lb,
        _kind_text(kind, flags),
        data_b,
        size_b,
        orig_lb,
        offset_lb,
        f"{checksum:08x}",
        f"{record_checksum:08x}",
        flags_text(flags),
    ]


def _show_json(header: WdiffHeader, records: Iterable[Record]) -> None:
    # Written piece by piece: a diff may be larger than memory.
    print(f'{{"header": {json.dumps(header_facts(header))},\n "records": [', end="")
    separator = "\n  "
    try:
        for record in records:
            print(separator + json.dumps(record), end="")
            separator = ",\n  "
    finally:
        print("]}")


def _show_text(header: WdiffHeader, records: Iterable[Record]) -> None:
    facts = header_facts(header)
    print(f"wdiff  {facts['type']}  uuid {facts['uuid']}  checksum {facts['checksum']}")
    if header.type.text == "sorted":
        print("     address     blocks flags kind    offset       size checksum")
    else:
        print("     address     blocks flags kind       offset       size  image   part checksum")
    count = 0
    for record in records:
        count += 1
        address_lb, blocks_lb, kind, offset_b, size_b = record[:5]
        line = f"{address_lb:>12} {blocks_lb:>10}"
        if header.type.text == "sorted":
            checksum, flags, *error = record[5:]
            line += f" {flags:>5} {kind:<6} {offset_b:>7} {size_b:>10} {checksum}"
        else:
            orig_lb, offset_lb, checksum, _, flags, *error = record[5:]
            line += f" {flags:>5} {kind:<6} {offset_b:>10} {size_b:>10} {orig_lb:>6} {offset_lb:>6} {checksum}"
        print(line, *error)
    print(f"end    records {count}")


@wdiff.command()
@FILES
@JSON
def verify(files: tuple[Path, ...], as_json: bool) -> None:
    """Check diffs: structure, order, every checksum in use, and that all data decompresses."""
    from walbd.format.wdiff_merge import verify as verify_reader

    fs = OsFileSystem()
    results: list[dict[str, Any]] = []
    failed = 0
    for file in files:
        try:
            with fs.open(file) as opened:
                reader = open_wdiff(opened)
                count = verify_reader(reader)
        except WalbError as exc:
            failed = max(failed, exc.exit_code)
            print_error(exc, "walbd")
            results.append({"file": str(file), "good": False, "code": exc.code, "message": str(exc)})
            continue
        kind, uuid = reader.header.type.text, reader.header.uuid.hex()
        results.append({"file": str(file), "good": True, "type": kind, "uuid": uuid, "records": count})
        if not as_json:
            print(f"{file}: good, {kind}, {count} records")
    if as_json:
        print_json(results)
    if failed:
        raise click.exceptions.Exit(failed)


@wdiff.command()
@FILES
@OUT
@COMPRESS
def merge(files: tuple[Path, ...], out: Path, compress: str) -> None:
    """Merge diffs, given oldest first, into one sorted diff.

    Where they overlap, the later one wins. OUT gets the uuid of the newest.

    Example: walbd wdiff merge old.wdiff new.wdiff -o both.wdiff
    """
    from walbd.format.wdiff_merge import merge as merge_readers

    opt = CompressOpt.parse(compress)
    fs = OsFileSystem()
    with ExitStack() as stack:
        readers = [open_wdiff(stack.enter_context(fs.open(file))) for file in files]
        _write_pieces(fs, out, merge_readers(readers, opt))


@wdiff.command()
@FILES
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--discard",
    type=click.Choice(["ignore", "zero"]),
    default="zero",
    show_default=True,
    help="What discarded ranges become: zeros, or what was there before.",
)
def apply(files: tuple[Path, ...], image: Path, discard: str) -> None:
    """Write diffs, given oldest first, to a disk image or block device.

    All diffs are verified before IMAGE is touched; a record that ends beyond IMAGE is an error.

    Example: walbd wdiff apply old.wdiff new.wdiff disk.img
    """
    from walbd.format.wdiff_merge import verify as verify_reader
    from walbd.fs.wdiff_apply import apply as apply_readers

    fs = OsFileSystem()
    with ExitStack() as stack:
        readers = [open_wdiff(stack.enter_context(fs.open(file))) for file in files]
        target = stack.enter_context(fs.open(image, write=True, lock=True))
        size_lb = target.size() // LB
        for reader in readers:
            verify_reader(reader, decode=False, size_lb=size_lb)
        count = apply_readers(readers, target, discard=cast(Literal["ignore", "zero"], discard), size_lb=size_lb)
        target.sync()
    print(f"{image}: applied {count} records")


@click.command("to-wdiff")
@FILES
@OUT
@click.option(
    "--format",
    "container",
    type=click.Choice(["sorted", "indexed"]),
    default="sorted",
    show_default=True,
    help="Sorted diffs can be read as a stream; indexed ones are made in one pass.",
)
@COMPRESS
def to_wdiff(files: tuple[Path, ...], out: Path, container: str, compress: str) -> None:
    """Convert wlogs to one diff; several wlogs must continue each other.

    Example: walbd wlog to-wdiff a.wlog b.wlog -o ab.wdiff --compress lz4
    """
    from walbd.format.wdiff_log import indexed_from_wlogs, sorted_from_wlogs

    opt = CompressOpt.parse(compress)
    fs = OsFileSystem()
    with ExitStack() as stack:
        opened = [stack.enter_context(fs.open(file)) for file in files]

        def scratch() -> Any:
            return stack.enter_context(fs.temp_file(out.parent))

        if container == "sorted":
            _write_pieces(fs, out, sorted_from_wlogs(opened, opt, scratch=scratch))
        else:
            with output_file(fs, out) as target:
                indexed_from_wlogs(opened, target, opt, scratch=scratch)


def _write_pieces(fs: OsFileSystem, out: Path, pieces: Iterable[bytes]) -> None:
    """Write the pieces of a file one after the other."""
    with output_file(fs, out) as target:
        at = 0
        for piece in pieces:
            target.pwrite(piece, at)
            at += len(piece)
