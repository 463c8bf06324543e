"""A file system in memory that forgets: what was not synced survives a power failure piece by piece, or not.

Names and contents are durable apart, as on a real disk: a file's bytes after its sync, a name after the sync of
its directory. `after_crash` returns what would be found if the power failed now: each name that was changed since
its directory was synced is old or new, and so is each 512 bytes of a file. `on_change` is called after every
operation that changes something, so that a test can look at each of these moments in one run.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from walbd.errors import AlreadyExists, Busy, NotFound
from walbd.fs import TMP_PREFIX, Buf, File

PIECE_B = 512


class Inode:
    """A file's contents."""

    def __init__(self) -> None:
        self.now = bytearray()
        self.durable = bytearray()
        self.locked = False

    def sync(self) -> None:
        self.durable = bytearray(self.now)

    def survivor(self, rng: random.Random) -> Inode:
        after = Inode()
        if self.now == self.durable:
            after.now = bytearray(self.now)
        else:
            size_b = len(rng.choice([self.now, self.durable]))
            old, new = self.durable.ljust(size_b, b"\0"), self.now.ljust(size_b, b"\0")
            share = rng.choice([0.0, 0.5, 1.0])
            for at in range(0, size_b, PIECE_B):
                after.now += (new if rng.random() < share else old)[at : min(at + PIECE_B, size_b)]
        after.sync()
        return after


class Directory:
    """Names."""

    def __init__(self) -> None:
        self.now: dict[str, Inode | Directory] = {}
        self.durable: dict[str, Inode | Directory] = {}

    def sync(self) -> None:
        self.durable = dict(self.now)

    def survivor(self, rng: random.Random) -> Directory:
        after = Directory()
        for name in sorted({*self.now, *self.durable}):
            node = rng.choice([self.now, self.durable]).get(name)
            if node is not None:
                after.now[name] = node.survivor(rng)
        after.sync()
        return after


class MemoryFileSystem:
    """A `walbd.fs.FileSystem`."""

    def __init__(self) -> None:
        self.root = Directory()
        self.on_change: Callable[[], None] | None = None
        self.shares = False  # clones share blocks, as on XFS; here they have a copy
        self._mutex = threading.RLock()
        self._count = 0

    def after_crash(self, rng: random.Random) -> MemoryFileSystem:
        """Return the disk as it is when the power is back."""
        with self._mutex:
            after = MemoryFileSystem()
            after.shares = self.shares
            after.root = self.root.survivor(rng)
            return after

    def copy(self) -> MemoryFileSystem:
        """Return the disk as a new process sees it that follows one which was killed now."""

        def read(node: Inode | Directory) -> Inode | Directory:
            if isinstance(node, Inode):
                other = Inode()
                other.now = bytearray(node.now)
                other.sync()
                return other
            directory = Directory()
            directory.now = {name: read(child) for name, child in node.now.items()}
            directory.sync()
            return directory

        with self._mutex:
            after = MemoryFileSystem()
            after.shares = self.shares
            root = read(self.root)
            assert isinstance(root, Directory)
            after.root = root
            return after

    # --- help

    @contextmanager
    def change(self) -> Iterator[None]:
        """Around every operation that changes something."""
        with self._mutex:
            yield
            if self.on_change is not None:
                self.on_change()

    def _find(self, path: Path) -> Inode | Directory | None:
        with self._mutex:
            node: Inode | Directory | None = self.root
            for part in path.parts[1:]:
                if not isinstance(node, Directory):
                    return None
                node = node.now.get(part)
            return node

    def _dir(self, path: Path) -> Directory:
        node = self._find(path)
        if not isinstance(node, Directory):
            raise NotFound("no such directory", path=str(path))
        return node

    def _file(self, path: Path) -> Inode:
        node = self._find(path)
        if not isinstance(node, Inode):
            raise NotFound("no such file", path=str(path))
        return node

    # --- FileSystem

    def open(
        self, path: Path, *, write: bool = False, create: bool = False, direct: bool = False, lock: bool = False
    ) -> MemoryFile:
        if create:
            with self.change():
                if self._find(path) is not None:
                    raise AlreadyExists("the file exists", path=str(path))
                self._dir(path.parent).now[path.name] = Inode()
        inode = self._file(path)
        if lock:
            if inode.locked:
                raise Busy("in use", path=str(path))
            inode.locked = True
        return MemoryFile(self, path, inode, locked=lock)

    def temp_file(self, directory: Path) -> MemoryTempFile:
        with self.change():
            self._count += 1
            path = directory / f"{TMP_PREFIX}{self._count}"
            inode = self._dir(directory).now[path.name] = Inode()
            return MemoryTempFile(self, path, inode)

    def read_bytes(self, path: Path, *, size_max_b: int = 64 << 20) -> bytes:
        return bytes(self._file(path).now)

    def replace_durably(self, path: Path, data: bytes) -> None:
        with self.temp_file(path.parent) as file:
            file.pwrite(data, 0)
            file.commit(path)

    def link(self, path: Path, new: Path) -> None:
        with self.change():
            if self._find(new) is not None:
                raise AlreadyExists("the file exists", path=str(new))
            self._dir(new.parent).now[new.name] = self._file(path)

    def rename(self, path: Path, new: Path) -> None:
        with self.change():
            directory = self._dir(path.parent)
            if path.name not in directory.now:
                raise NotFound("no such file", path=str(path))
            directory.now[new.name] = directory.now.pop(path.name)
        self.sync_dir(new.parent)

    def unlink(self, path: Path) -> None:
        with self.change():
            self._dir(path.parent).now.pop(path.name, None)

    def list_names(self, directory: Path) -> list[str]:
        return sorted(self._dir(directory).now)

    def exists(self, path: Path) -> bool:
        return self._find(path) is not None

    def is_dir(self, path: Path) -> bool:
        return isinstance(self._find(path), Directory)

    def size_of(self, path: Path) -> int:
        return len(self._file(path).now)

    def allocated_of(self, path: Path) -> int:
        return len(self._file(path).now)

    def make_dir(self, path: Path, *, parents: bool = False) -> None:
        with self.change():
            if self._find(path) is not None and not parents:
                raise AlreadyExists("the directory exists", path=str(path))
            directory = self.root
            for part in path.parts[1:]:
                child = directory.now.get(part)
                if child is None:
                    if part != path.name and not parents:
                        raise NotFound("no such directory", path=str(path))
                    child = directory.now[part] = Directory()
                assert isinstance(child, Directory)
                directory = child
        self.sync_dir(path.parent)

    def remove_tree(self, path: Path) -> None:
        node = self._find(path)
        if node is None:
            return
        if isinstance(node, Directory):
            for name in list(node.now):
                self.remove_tree(path / name)
        self.unlink(path)
        self.sync_dir(path.parent)

    def sync_dir(self, directory: Path) -> None:
        with self.change():
            self._dir(directory).sync()

    def clone(self, source: Path, target: File) -> bool:
        if self.shares:
            target.pwrite(self.read_bytes(source), 0)
        return self.shares

    def data_ranges(self, file: File, begin_b: int = 0, end_b: int | None = None) -> Iterator[tuple[int, int]]:
        end = file.size() if end_b is None else min(end_b, file.size())
        for at in range(begin_b, end, 4096):
            data = file.pread(min(4096, end - at), at)
            if any(data):
                yield at, len(data)

    def free_b(self, path: Path) -> int:
        return 1 << 40


class MemoryFile:
    """An open file (walbd.fs.File)."""

    def __init__(self, fs: MemoryFileSystem, path: Path, inode: Inode, *, locked: bool = False) -> None:
        self.path = path
        self._fs = fs
        self._inode = inode
        self._locked = locked

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return bytes(self._inode.now[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        data = self.pread(len(buffer), offset_b)
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, data: Buf, offset_b: int) -> None:
        with self._fs.change():
            data = bytes(data)
            if len(self._inode.now) < offset_b:
                self._inode.now.extend(bytes(offset_b - len(self._inode.now)))
            self._inode.now[offset_b : offset_b + len(data)] = data

    def pwritev(self, buffers: Sequence[Buf], offset_b: int) -> None:
        self.pwrite(b"".join(map(bytes, buffers)), offset_b)

    def zero(self, offset_b: int, size_b: int) -> None:
        size_b = min(size_b, self.size() - offset_b)
        if size_b > 0:
            self.pwrite(bytes(size_b), offset_b)

    def size(self) -> int:
        return len(self._inode.now)

    def truncate(self, size_b: int) -> None:
        with self._fs.change():
            del self._inode.now[size_b:]
            self._inode.now.extend(bytes(size_b - len(self._inode.now)))

    def allocate(self, size_b: int) -> None:
        pass

    def sync(self) -> None:
        with self._fs.change():
            self._inode.sync()

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        if self._locked:
            self._inode.locked = self._locked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class MemoryTempFile(MemoryFile):
    """An unfinished file (walbd.fs.TempFile)."""

    def __init__(self, fs: MemoryFileSystem, path: Path, inode: Inode) -> None:
        super().__init__(fs, path, inode)
        self._committed = False

    def commit(self, path: Path) -> None:
        self.sync()
        with self._fs.change():
            directory = self._fs._dir(path.parent)
            directory.now[path.name] = directory.now.pop(self.path.name)
            self._committed = True
        self._fs.sync_dir(path.parent)

    def close(self) -> None:
        super().close()
        if not self._committed:
            self._committed = True
            self._fs.unlink(self.path)
