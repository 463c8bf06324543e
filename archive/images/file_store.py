"""Images as sparse files: `VOL/base.img` and `VOL/restored/GID.img`.

A restore shares blocks with the base image where the file system can (XFS, btrfs), and otherwise copies the parts
that are not holes. What is all zero is a hole again. Unfinished copies are named `VOL/restored/tmp_GID.img`.
Source: docs/archive.md, "Images".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from walbd.archive.images.store import PreparedImage, Tick
from walbd.errors import DiskFull
from walbd.fs import TMP_PREFIX, File, FileSystem
from walbd.units import MIB

BASE_NAME: Final = "base.img"
RESTORED_DIR: Final = "restored"
_RESTORED: Final = re.compile(r"(0|[1-9][0-9]{0,19})\.img")
_COPY_B: Final = 4 * MIB


class FileStore:
    """The `ImageStore` on a file system. `free_reserve_b` is what a copy must leave free."""

    def __init__(self, fs: FileSystem, base_dir: Path, *, free_reserve_b: int = 0) -> None:
        self._fs = fs
        self._base_dir = base_dir
        self._free_reserve_b = free_reserve_b

    def base_size(self, volume: str) -> int | None:
        path = self._base(volume)
        return self._fs.size_of(path) if self._fs.exists(path) else None

    def open_base(self, volume: str, *, write: bool = False) -> File:
        return self._fs.open(self._base(volume), write=write)

    def prepare_base(self, volume: str, size_b: int) -> PreparedImage:
        path = self._base(volume)
        fresh = not self._fs.exists(path)
        file = self._fs.open(path, write=True, create=fresh)
        try:
            if file.size() != size_b:
                file.truncate(size_b)
            if fresh:
                self._fs.sync_dir(path.parent)
        except BaseException:
            file.close()
            raise
        return PreparedImage(file, reads_zero=fresh)

    def grow_base(self, volume: str, size_b: int) -> None:
        with self._fs.open(self._base(volume), write=True) as file:
            if file.size() < size_b:
                file.truncate(size_b)
                file.sync()

    def remove_base(self, volume: str) -> None:
        self._fs.unlink(self._base(volume))

    def clone_base(self, volume: str, gid: int, tick: Tick) -> File:
        directory = self._directory(volume)
        if not self._fs.is_dir(directory):
            self._fs.make_dir(directory)
        path = self._unfinished(volume, gid)
        self._fs.unlink(path)
        file = self._fs.open(path, create=True)
        try:
            base = self._base(volume)
            if not self._fs.clone(base, file):
                self._check_room(base)
                with self._fs.open(base) as source:
                    self._copy(source, file, tick)
        except BaseException:
            file.close()
            self._fs.unlink(path)
            raise
        return file

    def finish_clone(self, volume: str, gid: int) -> None:
        self._fs.rename(self._unfinished(volume, gid), self.restored_path(volume, gid))

    def abandon_clone(self, volume: str, gid: int) -> None:
        self._fs.unlink(self._unfinished(volume, gid))

    def restored(self, volume: str) -> list[int]:
        matches = (_RESTORED.fullmatch(name) for name in self._names(volume))
        return sorted(int(match[1]) for match in matches if match)

    def restored_path(self, volume: str, gid: int) -> Path:
        return self._directory(volume) / f"{gid}.img"

    def remove_restored(self, volume: str, gid: int) -> None:
        directory = self._directory(volume)
        if self._fs.is_dir(directory):
            self._fs.unlink(self.restored_path(volume, gid))
            self._fs.sync_dir(directory)

    def remove_unfinished(self, volume: str) -> None:
        for name in self._names(volume):
            if name.startswith(TMP_PREFIX):
                self._fs.unlink(self._directory(volume) / name)

    def _copy(self, source: File, target: File, tick: Tick) -> None:
        """Copy what is not a hole; the target is new and empty."""
        size_b = source.size()
        target.truncate(size_b)
        buffer = memoryview(bytearray(min(_COPY_B, size_b)))
        done_b = 0
        for begin_b, range_b in self._fs.data_ranges(source):
            for at in range(begin_b, begin_b + range_b, _COPY_B):
                piece = buffer[: min(_COPY_B, begin_b + range_b - at)]
                target.pwrite(piece[: source.pread_into(piece, at)], at)
                done_b += len(piece)
                tick(done_b)

    def _check_room(self, base: Path) -> None:
        need_b, free_b = self._fs.allocated_of(base), self._fs.free_b(base.parent)
        if free_b - need_b < self._free_reserve_b:
            raise DiskFull(
                "no room for a copy of the image",
                hint="free space, or keep the archive on a file system that shares blocks, such as XFS",
                path=str(base.parent),
                need_b=need_b,
                free_b=free_b,
                reserve_b=self._free_reserve_b,
            )

    def _names(self, volume: str) -> list[str]:
        directory = self._directory(volume)
        return self._fs.list_names(directory) if self._fs.is_dir(directory) else []

    def _base(self, volume: str) -> Path:
        return self._base_dir / volume / BASE_NAME

    def _directory(self, volume: str) -> Path:
        return self._base_dir / volume / RESTORED_DIR

    def _unfinished(self, volume: str, gid: int) -> Path:
        return self._directory(volume) / f"{TMP_PREFIX}_{gid}.img"
