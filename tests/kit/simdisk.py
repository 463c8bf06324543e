"""A disk in memory that forgets: what was not synced survives a crash piece by piece, or not.

A piece is 512 or 4096 bytes. At a crash each piece that was written since the last sync independently keeps
any of the contents it had since then, the synced one included. `SimDisk.crash_at` makes the disk die at the
n-th operation that changes it; every later one fails. `fail_at` makes one operation fail and the disk go on,
as a bad sector or a failed sync does; a failed sync forgets what it should have written, as kernels do.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from walbd.errors import Busy, DiskFailed, NotFound
from walbd.fs import Buf


class SimDisk:
    """Files by path, and one count of operations over all of them."""

    def __init__(self, piece_b: int = 512) -> None:
        self.piece_b = piece_b
        self.files: dict[Path, _Contents] = {}
        self.ops = 0
        self.crash_at: int | None = None
        self.fail_at: int | None = None
        self.crashed = False
        self.log: list[str] = []  # what was done, for messages of failing tests

    def make(self, path: Path, size_b: int) -> None:
        """Create a file of zeros, durably."""
        self.files[path] = _Contents(bytearray(size_b))

    def crash(self, rng: random.Random) -> SimDisk:
        """Return the disk as it is after a power failure now."""
        after = SimDisk(self.piece_b)
        keep = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        for path, contents in self.files.items():
            after.files[path] = _Contents(contents.survivor(self.piece_b, rng, keep))
        return after

    def restart(self) -> SimDisk:
        """Return the disk as a new process sees it when the machine did not crash."""
        after = SimDisk(self.piece_b)
        for path, contents in self.files.items():
            after.files[path] = contents
            contents.locked = False
        return after

    def step(self, what: str) -> str:
        """Count an operation; return "ok", "fail", or "crash"."""
        self.ops += 1
        self.log.append(f"{self.ops} {what}")
        if self.crashed:
            return "crash"
        if self.crash_at is not None and self.ops >= self.crash_at:
            self.crashed = True
            return "last"
        return "fail" if self.fail_at == self.ops else "ok"

    # the part of walbd.fs.FileSystem that a device uses

    def open(
        self, path: Path, *, write: bool = False, create: bool = False, direct: bool = False, lock: bool = False
    ) -> SimFile:
        contents = self.files.get(path)
        if contents is None:
            raise NotFound("no such simulated file", path=str(path))
        if lock:
            if contents.locked:
                raise Busy("the simulated file is in use", path=str(path))
            contents.locked = True
        return SimFile(self, path, contents, lock)

    def data_ranges(self, file: SimFile, begin_b: int = 0, end_b: int | None = None) -> Iterator[tuple[int, int]]:
        end = file.size() if end_b is None else min(end_b, file.size())
        for at in range(begin_b // 4096 * 4096, end, 4096):
            if any(file.contents.now[at : at + 4096]):
                first, last = max(at, begin_b), min(at + 4096, end)
                yield first, last - first


class _Contents:
    """One file: what is durable, what it reads as, and what each unsynced piece has been since the sync."""

    def __init__(self, data: bytearray) -> None:
        self.durable = data
        self.now = bytearray(data)
        self.versions: dict[int, list[bytes]] = {}
        self.locked = False
        self.mutex = threading.Lock()

    def survivor(self, piece_b: int, rng: random.Random, keep: float) -> bytearray:
        size = len(self.durable) if rng.random() < 0.5 else len(self.now)
        image = bytearray(self.durable[:size].ljust(size, b"\0"))
        for piece, versions in self.versions.items():
            if rng.random() < keep:
                at = piece * piece_b
                # Mostly the last content; sometimes one that was overwritten before the crash.
                data = versions[-1] if rng.random() < 0.8 else rng.choice(versions)
                image[at : at + len(data)] = data
                del image[size:]
        return image


class SimFile:
    """An open file of a SimDisk (walbd.fs.File)."""

    def __init__(self, disk: SimDisk, path: Path, contents: _Contents, locked: bool) -> None:
        self.path = path
        self.contents = contents
        self._disk = disk
        self._locked = locked
        self._sync_failed = False

    def _step(self, what: str) -> bool:
        """Return whether the disk dies with this operation; raise if it is dead, or fails this one."""
        fate = self._disk.step(f"{what} {self.path.name}")
        if fate in ("crash", "fail"):
            if what.startswith("sync"):
                self._forget()
            raise DiskFailed(f"cannot {what}: simulated", path=str(self.path), errno=errno.EIO)
        return fate == "last"

    def _forget(self) -> None:
        self._sync_failed = True
        self.contents.versions.clear()

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return bytes(self.contents.now[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        data = self.contents.now[offset_b : offset_b + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, data: Buf, offset_b: int) -> None:
        self.pwritev([data], offset_b)

    def pwritev(self, buffers: Sequence[Buf], offset_b: int) -> None:
        data = b"".join(map(bytes, buffers))
        with self.contents.mutex:
            last = self._step(f"write {offset_b}+{len(data)}")
            self._put(data, offset_b)
        if last:
            raise DiskFailed("simulated crash", path=str(self.path))

    def _put(self, data: bytes, offset_b: int) -> None:
        contents, piece_b = self.contents, self._disk.piece_b
        end = offset_b + len(data)
        assert end <= len(contents.now), "write behind the end of the simulated file"
        contents.now[offset_b:end] = data
        for piece in range(offset_b // piece_b, -(-end // piece_b)):
            at = piece * piece_b
            contents.versions.setdefault(piece, []).append(bytes(contents.now[at : at + piece_b]))

    def zero(self, offset_b: int, size_b: int) -> None:
        with self.contents.mutex:
            last = self._step(f"zero {offset_b}+{size_b}")
            size_b = max(0, min(size_b, len(self.contents.now) - offset_b))
            self._put(bytes(size_b), offset_b)
        if last:
            raise DiskFailed("simulated crash", path=str(self.path))

    def size(self) -> int:
        return len(self.contents.now)

    def truncate(self, size_b: int) -> None:
        last = self._step(f"truncate {size_b}")
        now = self.contents.now
        now[:] = now[:size_b].ljust(size_b, b"\0")
        if last:
            raise DiskFailed("simulated crash", path=str(self.path))

    def allocate(self, size_b: int) -> None:
        if self.size() < size_b:
            self.truncate(size_b)

    def sync(self) -> None:
        with self.contents.mutex:
            if self._sync_failed:
                raise DiskFailed("an earlier sync failed", path=str(self.path))
            if self._step("sync"):  # dies in the middle: nothing is sure
                raise DiskFailed("simulated crash", path=str(self.path))
            contents, piece_b = self.contents, self._disk.piece_b
            contents.durable = contents.durable[: len(contents.now)].ljust(len(contents.now), b"\0")
            for piece in contents.versions:
                at = piece * piece_b
                contents.durable[at : at + piece_b] = contents.now[at : at + piece_b]
            contents.versions.clear()

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        if self._locked:
            self._locked = False
            self.contents.locked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
