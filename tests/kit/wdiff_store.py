"""Real wdiff files for `tests.kit.history`: logs go through logpacks, and every image is made in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.kit.history import DiffStore, Kind, Record
from walbd.ext.checksum import checksum
from walbd.ext.logpack import Stop, scan
from walbd.format.compress import CompressOpt
from walbd.format.compress import Kind as CompressKind
from walbd.format.logpack import FLAG_DISCARD, FLAG_EXIST, make_header, pack_header, records_max
from walbd.format.meta import Diff, diff_name, parse_diff_name
from walbd.format.virtual import VirtualImage
from walbd.format.wdiff_merge import merge
from walbd.format.wdiff_read import WdiffReader, open_wdiff
from walbd.format.wdiff_write import IndexedWdiffWriter, SortedWdiffWriter
from walbd.fs.disk import File, OsFileSystem
from walbd.fs.wdiff_apply import apply

PBS: Final = 512
SALT: Final = 0x5EED
KINDS: Final = (CompressKind.NONE, CompressKind.LZ4, CompressKind.ZSTD, CompressKind.SNAPPY)


class FilePool:
    """Empty files to use: making and removing thousands of them would take most of the time."""

    def __init__(self, directory: Path) -> None:
        self.fs = OsFileSystem()
        self._directory = directory
        self._free: list[File] = []
        self._count = 0

    def take(self, path: Path) -> File:
        """Return an open, empty file named `path`."""
        if not self._free:
            self._count += 1
            self._free.append(self.fs.open(self._directory / f"free{self._count}", write=True, create=True))
        file = self._free.pop()
        self.rename(file, path)
        return file

    def give_back(self, file: File) -> None:
        """Empty a file and take its name away."""
        self._count += 1
        self.rename(file, self._directory / f"free{self._count}")
        file.truncate(0)
        self._free.append(file)

    def rename(self, file: File, path: Path) -> None:
        """Give an open file another name."""
        file.path.rename(path)
        file.path = path

    def close(self) -> None:
        """Close the files; those in use must have been given back."""
        for file in self._free:
            file.close()


class WdiffStore:
    """A directory of wdiff files; log diffs are indexed, hash backups and merged ones sorted."""

    def __init__(self, directory: Path, pool: FilePool) -> None:
        self._pool = pool
        self._directory = directory
        pool.fs.make_dir(directory, parents=True)
        self._image = pool.take(directory.with_suffix(".image"))
        self._open: dict[str, File] = {}  # by name

    def put(self, diff: Diff, records: Sequence[Record], uuid: bytes) -> Diff:
        """See DiffStore."""
        file = self._create(diff)
        if diff.is_clean:
            indexed = IndexedWdiffWriter(file, uuid, _compress(diff), index_limit_lb=2)
            for part in (records[: len(records) // 2], records[len(records) // 2 :]):
                log = make_log(part)
                found = bytearray()
                result = scan(log, PBS, SALT, 0, records=found)
                assert (result.stop, result.consumed_b, result.n_records) == (Stop.MORE, len(log), len(part))
                indexed.add_log(log, found)
            indexed.finish()
        else:
            writer = SortedWdiffWriter(file, uuid, _compress(diff))
            for record in records:
                if record.kind is Kind.DATA:
                    writer.add_data(record.begin_lb, record.data)
                else:
                    writer.add_zero(record.begin_lb, record.n_lb)
            writer.finish()
        return parse_diff_name(diff_name(diff), size_b=file.size())

    def put_merged(self, diff: Diff, source: DiffStore, parts: Sequence[Diff], uuid: bytes) -> Diff:
        """See DiffStore."""
        assert isinstance(source, WdiffStore)
        file, at = self._create(diff), 0
        for piece in merge(source._read(parts), _compress(diff), uuid=uuid):
            file.pwrite(piece, at)
            at += len(piece)
        return parse_diff_name(diff_name(diff), size_b=at)

    def uuid_of(self, diff: Diff) -> bytes:
        """See DiffStore."""
        return self._read([diff])[0].header.uuid

    def rename(self, old: Diff, new: Diff) -> None:
        """See DiffStore."""
        file = self._open.pop(diff_name(old))
        self._pool.rename(file, self._path(new))
        self._open[diff_name(new)] = file

    def erase(self, diff: Diff) -> None:
        """See DiffStore."""
        self._pool.give_back(self._open.pop(diff_name(diff)))

    def close(self) -> None:
        """See DiffStore."""
        for file in (*self._open.values(), self._image):
            self._pool.give_back(file)
        self._open.clear()

    def load(self) -> list[Diff]:
        """See DiffStore."""
        return [
            parse_diff_name(name, size_b=self._pool.fs.size_of(self._directory / name))
            for name in self._pool.fs.list_names(self._directory)
        ]

    def overlay(self, image: bytes, diffs: Sequence[Diff]) -> bytes:
        """See DiffStore; applies to a file and reads virtually, which must agree."""
        self._image.pwrite(image, 0)
        readers = self._read(diffs)
        virtual = VirtualImage(self._image, readers, len(image)).read(0, len(image))
        apply(readers, self._image, discard="zero")
        applied = self._image.pread(len(image), 0)
        assert applied == virtual
        return applied

    def _path(self, diff: Diff) -> Path:
        return self._directory / diff_name(diff)

    def _create(self, diff: Diff) -> File:
        file = self._pool.take(self._path(diff))
        self._open[diff_name(diff)] = file
        return file

    def _read(self, diffs: Sequence[Diff]) -> list[WdiffReader]:
        return [open_wdiff(self._open[diff_name(diff)]) for diff in diffs]


def make_log(records: Sequence[Record]) -> bytes:
    """Return logpacks holding `records` in order, the first at lsid 0."""
    log = bytearray()
    for first in range(0, len(records), records_max(PBS)):
        pack = records[first : first + records_max(PBS)]
        items, data = [], []
        for record in pack:
            if record.kind is Kind.DISCARD:
                items.append((record.begin_lb, record.n_lb, FLAG_EXIST | FLAG_DISCARD, 0))
            else:
                data.append(record.contents())
                items.append((record.begin_lb, record.n_lb, FLAG_EXIST, checksum(data[-1], SALT)))
        log += pack_header(make_header(len(log) // PBS, PBS, items), pbs=PBS, salt=SALT)
        log += b"".join(data)
    return bytes(log)


def _compress(diff: Diff) -> CompressOpt:
    return CompressOpt(KINDS[diff.end.gid_b % len(KINDS)])
