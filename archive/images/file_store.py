"""Images as sparse files: `VOL/base.img`, `VOL/restored/GID.img` and `VOL/cold/GID.img`.

A restore shares blocks with the base image where the file system can (XFS, btrfs), and otherwise copies the parts
that are not holes. What is all zero is a hole again. Unfinished copies are named `VOL/restored/tmp_GID.img`. Cold
images are made where blocks are shared, and nowhere else.
Source: docs/archive.md, "Images".
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from walbd.archive.images.store import PreparedImage, Tick
from walbd.errors import DiskFull
from walbd.fs import TMP_PREFIX, File, FileSystem
from walbd.units import MIB

BASE_NAME: Final = "base.img"
RESTORED_DIR: Final = "restored"
COLD_DIR: Final = "cold"
_IMAGE: Final = re.compile(r"(0|[1-9][0-9]{0,19})\.img")
_COPY_B: Final = 4 * MIB


class FileStore:
    """The `ImageStore` on a file system. `free_reserve_b` is what a copy must leave free."""

    def __init__(self, fs: FileSystem, base_dir: Path, *, free_reserve_b: int = 0) -> None:
        self._fs = fs
        self._base_dir = base_dir
        self.free_reserve_b = free_reserve_b
        self._shares = False  # the last copy shared the blocks of the image: others will

    def base_size(self, volume: str) -> int | None:
        path = self._base(volume)
        return self._fs.size_of(path) if self._fs.exists(path) else None

    def open_base(self, volume: str, *, write: bool = False) -> File:
        return self._fs.open(self._base(volume), write=write)

    def prepare_base(self, volume: str, size_b: int) -> PreparedImage:
        path = self._base(volume)
        fresh = not self._fs.exists(path)
        with ExitStack() as undo:
            file = undo.enter_context(self._fs.open(path, write=True, create=fresh))
            if file.size() != size_b:
                file.truncate(size_b)
            if fresh:
                self._fs.sync_dir(path.parent)
            undo.pop_all()
        return PreparedImage(file, reads_zero=fresh)

    def grow_base(self, volume: str, size_b: int) -> None:
        with self._fs.open(self._base(volume), write=True) as file:
            if file.size() < size_b:
                file.truncate(size_b)
                file.sync()

    def remove_base(self, volume: str) -> None:
        self._fs.unlink(self._base(volume))

    def clone_base(self, volume: str, gid: int, tick: Tick, *, cold: int | None = None) -> File:
        self._make_dir(self._directory(volume))
        path = self._unfinished(volume, gid)
        self._fs.unlink(path)
        with ExitStack() as undo:
            file = self._fs.open(path, create=True)
            undo.callback(self._fs.unlink, path)
            undo.enter_context(file)
            base = self._base(volume)
            source = base if cold is None else self._cold(volume, cold)
            self._shares = self._fs.clone(source, file)
            if not self._shares:
                self._check_room(source)
                with self._fs.open(source) as opened:
                    self._copy(opened, file, tick)
            if cold is not None and file.size() < (size_b := self._fs.size_of(base)):
                file.truncate(size_b)  # the volume was grown since
            undo.pop_all()
        return file

    def finish_clone(self, volume: str, gid: int) -> None:
        self._fs.rename(self._unfinished(volume, gid), self.restored_path(volume, gid))

    def abandon_clone(self, volume: str, gid: int) -> None:
        self._fs.unlink(self._unfinished(volume, gid))

    def restored(self, volume: str) -> list[int]:
        return self._gids(self._directory(volume))

    def restored_path(self, volume: str, gid: int) -> Path:
        return self._directory(volume) / f"{gid}.img"

    def remove_restored(self, volume: str, gid: int) -> None:
        self._remove(self.restored_path(volume, gid))

    def remove_unfinished(self, volume: str) -> None:
        for directory in (self._directory(volume), self._cold_directory(volume)):
            for name in self._names(directory):
                if name.startswith(TMP_PREFIX):
                    self._fs.unlink(directory / name)

    def make_cold(self, volume: str, gid: int) -> bool:
        if not self._shares:
            return False
        path = self._cold(volume, gid)
        self._make_dir(path.parent)
        with self._fs.temp_file(path.parent) as file:
            if not self._fs.clone(self._unfinished(volume, gid), file):
                return False
            file.commit(path)
        return True

    def colds(self, volume: str) -> list[int]:
        return self._gids(self._cold_directory(volume))

    def open_cold(self, volume: str, gid: int) -> File:
        return self._fs.open(self._cold(volume, gid))

    def remove_cold(self, volume: str, gid: int) -> None:
        self._remove(self._cold(volume, gid))

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

    def _check_room(self, source: Path) -> None:
        need_b, free_b = self._fs.allocated_of(source), self._fs.free_b(source.parent)
        if free_b - need_b < self.free_reserve_b:
            raise DiskFull(
                "no room for a copy of the image",
                hint="free space, or keep the archive on a file system that shares blocks, such as XFS",
                path=str(source.parent),
                need_b=need_b,
                free_b=free_b,
                reserve_b=self.free_reserve_b,
            )

    def _names(self, directory: Path) -> list[str]:
        return self._fs.list_names(directory) if self._fs.is_dir(directory) else []

    def _gids(self, directory: Path) -> list[int]:
        matches = (_IMAGE.fullmatch(name) for name in self._names(directory))
        return sorted(int(match[1]) for match in matches if match)

    def _make_dir(self, directory: Path) -> None:
        if not self._fs.is_dir(directory):
            self._fs.make_dir(directory)

    def _remove(self, path: Path) -> None:
        if self._fs.is_dir(path.parent):
            self._fs.unlink(path)
            self._fs.sync_dir(path.parent)

    def _base(self, volume: str) -> Path:
        return self._base_dir / volume / BASE_NAME

    def _cold_directory(self, volume: str) -> Path:
        return self._base_dir / volume / COLD_DIR

    def _cold(self, volume: str, gid: int) -> Path:
        return self._cold_directory(volume) / f"{gid}.img"

    def _directory(self, volume: str) -> Path:
        return self._base_dir / volume / RESTORED_DIR

    def _unfinished(self, volume: str, gid: int) -> Path:
        return self._directory(volume) / f"{TMP_PREFIX}_{gid}.img"
