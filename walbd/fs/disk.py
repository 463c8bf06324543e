"""The only door to the disk: what daemons and tools may do with files, and the real implementation.

Every component gets a `FileSystem`; nothing in the product opens, renames or syncs a file in any other way,
so a simulated disk that forgets what was not synced can take its place. All calls may block: code on the
event loop makes them in a pool. OSErrors leave here as DiskFailed or DiskFull, with the path.

Durable means: file, then name, then directory (`replace_durably`, `TempFile.commit`). A failed sync is final
for that file: the kernel may have dropped the dirty pages, so a later success would prove nothing. The file
object remembers and every later sync of it fails too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from walbd.errors import AlreadyExists, Busy, DiskFailed, DiskFull, NotFound
from walbd.ext.iobatch import pread_many, pwrite_many
from walbd.fs import failpoints

Buf = bytes | bytearray | memoryview

FP_BEFORE_RENAME = failpoints.register("fs.commit.before_rename", "a temporary file; the old file is untouched")
FP_AFTER_RENAME = failpoints.register("fs.commit.after_rename", "the new file, its name perhaps not durable yet")

TMP_PREFIX: Final = "tmp"  # of unfinished files; whatever begins so is garbage at start-up
_IOV_MAX: Final = 1024
_ZEROS: Final = bytes(1 << 20)
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_BLKGETSIZE64: Final = 0x80081272
_BLKPBSZGET: Final = 0x127B
_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_FICLONE: Final = 0x40049409


class File(Protocol):
    """An open file or block device. Offsets and sizes are bytes. Not shared between threads for writing
    overlapping ranges; everything else is safe from any thread."""

    path: Path

    def pread(self, size_b: int, offset_b: int) -> bytes:
        """Read `size_b` bytes; shorter only at the end of the file."""

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        """Fill `buffer`; return how much was read, short only at the end of the file."""

    def pwrite(self, data: Buf, offset_b: int) -> None:
        """Write all of `data`."""

    def pwritev(self, buffers: Sequence[Buf], offset_b: int) -> None:
        """Write all buffers one after the other, starting at `offset_b`."""

    def zero(self, offset_b: int, size_b: int) -> None:
        """Make a range read as zeros, giving its space back where the disk can. Never changes the size."""

    def size(self) -> int:
        """Return the size in bytes, of block devices too."""

    def truncate(self, size_b: int) -> None:
        """Set the size of a regular file; a grown part reads as zeros."""

    def allocate(self, size_b: int) -> None:
        """Reserve space for a regular file of `size_b`, growing it if it is smaller, where the disk can."""

    def sync(self) -> None:
        """Make everything written so far survive power loss; after one failure, fail for ever."""

    def fileno(self) -> int:
        """Return the descriptor, for batch calls of `walbd.ext`; -1 for files that have none (simulated ones)."""

    def close(self) -> None:
        """Close; twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class TempFile(File, Protocol):
    """A new file without its name yet; leaving its `with` block uncommitted removes it."""

    def commit(self, path: Path) -> None:
        """Sync the file, give it its final name (replacing an old file), and sync the directory."""


class FileSystem(Protocol):
    """What the product may do with a disk."""

    def open(
        self, path: Path, *, write: bool = False, create: bool = False, direct: bool = False, lock: bool = False
    ) -> File:
        """Open an existing file or device; with `create`, a new file that must not exist yet.

        `direct` bypasses the page cache (aligned buffers, offsets and sizes are the caller's business;
        a file system without O_DIRECT falls back to cached IO). `lock` takes an exclusive lock or raises Busy; a
        block device is also claimed from the kernel, which refuses it while it is mounted, swapped on or part
        of another device.
        """

    def temp_file(self, directory: Path) -> TempFile:
        """Create an unfinished file in `directory`; its name begins with TMP_PREFIX."""

    def read_bytes(self, path: Path, *, size_max_b: int = 64 << 20) -> bytes:
        """Read a small file; raises NotFound, or DiskFailed when it is larger than `size_max_b`."""

    def replace_durably(self, path: Path, data: bytes) -> None:
        """Make `path` hold `data`, safe from power loss once this returns; on error it holds all old or new."""

    def link(self, path: Path, new: Path) -> None:
        """Give a file a second name (durable after `sync_dir`); an existing `new` raises AlreadyExists."""

    def rename(self, path: Path, new: Path) -> None:
        """Rename within one directory and sync it; replaces `new`."""

    def unlink(self, path: Path) -> None:
        """Remove a name; a missing one is fine. Not synced: what comes back after a crash must be harmless."""

    def list_names(self, directory: Path) -> list[str]:
        """Return the sorted names in a directory."""

    def exists(self, path: Path) -> bool: ...

    def is_dir(self, path: Path) -> bool: ...

    def size_of(self, path: Path) -> int:
        """Return the size of a file by name [byte]."""

    def allocated_of(self, path: Path) -> int:
        """Return the space a file occupies on disk [byte]."""

    def make_dir(self, path: Path, *, parents: bool = False) -> None:
        """Create a directory durably, with `parents` those above it that are missing, too.

        An existing one raises AlreadyExists unless `parents`.
        """

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it, and sync its parent; a missing one is fine."""

    def sync_dir(self, directory: Path) -> None:
        """Make the names in a directory survive power loss."""

    def clone(self, source: Path, target: File) -> bool:
        """Make `target` (new and empty) share the contents of `source`; False when the disk cannot."""

    def data_ranges(self, file: File, begin_b: int = 0, end_b: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (offset, size) [byte] of the parts of [begin, end) of a file that are not holes, ascending."""

    def free_b(self, path: Path) -> int:
        """Return how many bytes a user may still write on the disk that holds `path`."""


@contextmanager
def disk_errors(path: Path, what: str) -> Iterator[None]:
    """Turn OSErrors into the family: `what` is the step in the infinitive ("write", "sync")."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"cannot {what}: no space left", hint="free space on this disk", path=str(path)
            ) from exc
        if exc.errno == errno.ENOENT:
            raise NotFound(f"cannot {what}: no such file", path=str(path)) from exc
        if exc.errno == errno.EEXIST:
            raise AlreadyExists(f"cannot {what}: the file exists", path=str(path)) from exc
        if exc.errno in (errno.EACCES, errno.EPERM):
            hint = f"see the owner and mode of it and of the directories above; we are user {os.geteuid()}"
            raise DiskFailed(f"cannot {what}: {reason}", hint=hint, path=str(path)) from exc
        raise DiskFailed(f"cannot {what}: {reason}", path=str(path), errno=exc.errno) from exc


class OsFile:
    """A file of the operating system."""

    def __init__(self, fd: int, path: Path) -> None:
        self.path = path
        self._fd = fd
        self._sync_failed = False
        # The kernel reports an error to one of several syncs at the same time; the others would believe.
        self._sync_lock = threading.Lock()
        self._is_block = stat.S_ISBLK(os.fstat(fd).st_mode)

    def pread(self, size_b: int, offset_b: int) -> bytes:
        with disk_errors(self.path, "read"):
            data = os.pread(self._fd, size_b, offset_b)
            if len(data) == size_b or not data:
                return data
            parts = [data]
            got = len(data)
            while got < size_b:
                part = os.pread(self._fd, size_b - got, offset_b + got)
                if not part:
                    break
                parts.append(part)
                got += len(part)
            return b"".join(parts)

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        view = memoryview(buffer)
        got = 0
        with disk_errors(self.path, "read"):
            while got < len(view):
                n = os.preadv(self._fd, [view[got:]], offset_b + got)
                if n == 0:
                    break
                got += n
        return got

    def pwrite(self, data: Buf, offset_b: int) -> None:
        view = memoryview(data).cast("B")
        with disk_errors(self.path, "write"):
            done = 0
            while done < len(view):
                done += os.pwrite(self._fd, view[done:], offset_b + done)

    def pwritev(self, buffers: Sequence[Buf], offset_b: int) -> None:
        queue = [memoryview(b).cast("B") for b in buffers]
        with disk_errors(self.path, "write"):
            for start in range(0, len(queue), _IOV_MAX):
                part = queue[start : start + _IOV_MAX]
                size = sum(map(len, part))
                done = os.pwritev(self._fd, part, offset_b)
                if done < size:
                    rest = memoryview(b"".join(part))[done:]
                    while rest:
                        n = os.pwrite(self._fd, rest, offset_b + done)
                        done += n
                        rest = rest[n:]
                offset_b += size

    def pread_many(self, pieces: bytes, buffer: memoryview) -> int:
        """Read pieces (offset, size, place: u64 each) to their places in the buffer.

        Returns the number of the first one that ends beyond the end of the file, or -1.
        """
        done, code = pread_many(self._fd, pieces, buffer)
        if code:
            with disk_errors(self.path, "read"):
                raise OSError(code, os.strerror(code))
        return -1 if done * 24 == len(pieces) else done

    def pwrite_many(self, pieces: bytes, buffer: memoryview) -> None:
        """Write pieces (offset, size, place: u64 each) from their places in the buffer, in order."""
        _, code = pwrite_many(self._fd, pieces, buffer)
        if code:
            with disk_errors(self.path, "write"):
                raise OSError(code, os.strerror(code))

    def zero(self, offset_b: int, size_b: int) -> None:
        if size_b == 0:
            return
        with disk_errors(self.path, "zero a range"):
            if self._is_block:
                try:
                    fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset_b, size_b))
                    return
                except OSError as exc:
                    if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                        raise
            else:
                try:
                    _fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset_b, size_b)
                    return
                except OSError as exc:
                    if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
        for start in range(offset_b, offset_b + size_b, len(_ZEROS)):
            self.pwrite(memoryview(_ZEROS)[: min(len(_ZEROS), offset_b + size_b - start)], start)

    def size(self) -> int:
        with disk_errors(self.path, "stat"):
            if self._is_block:
                size: int = struct.unpack("Q", fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)))[0]
                return size
            return os.fstat(self._fd).st_size

    def truncate(self, size_b: int) -> None:
        with disk_errors(self.path, "resize"):
            os.ftruncate(self._fd, size_b)

    def allocate(self, size_b: int) -> None:
        with disk_errors(self.path, "reserve space"):
            try:
                _fallocate(self._fd, 0, 0, size_b)
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if os.fstat(self._fd).st_size < size_b:
                    os.ftruncate(self._fd, size_b)

    def sync(self) -> None:
        with self._sync_lock:
            if self._sync_failed:
                raise DiskFailed("an earlier sync of this file failed; it cannot be trusted", path=str(self.path))
            try:
                with disk_errors(self.path, "sync"):
                    os.fdatasync(self._fd)  # noqa: TID251
            except DiskFailed:
                self._sync_failed = True
                raise

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class OsTempFile(OsFile):
    """An unfinished file of the operating system."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(fd, path)
        self._committed = False

    def commit(self, path: Path) -> None:
        self.sync()
        with disk_errors(path, "rename"):
            failpoints.hit(FP_BEFORE_RENAME)
            os.chmod(self._fd, 0o644)
            os.replace(self.path, path)  # noqa: TID251
            self._committed = True
            failpoints.hit(FP_AFTER_RENAME)
        _sync_dir(path.parent)

    def close(self) -> None:
        super().close()
        if not self._committed:
            self._committed = True
            self.path.unlink(missing_ok=True)


class OsFileSystem:
    """The disk of this machine."""

    def open(
        self, path: Path, *, write: bool = False, create: bool = False, direct: bool = False, lock: bool = False
    ) -> OsFile:
        flags = os.O_RDWR if write or create else os.O_RDONLY
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        with disk_errors(path, "open"):
            if lock and not create and stat.S_ISBLK(os.stat(path).st_mode):
                flags |= os.O_EXCL
            try:
                fd = os.open(path, flags | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o644)
            except OSError as exc:
                if exc.errno == errno.EBUSY:
                    raise Busy("the device is in use", hint="is it mounted, or served?", path=str(path)) from exc
                if not direct or exc.errno != errno.EINVAL:
                    raise
                fd = os.open(path, flags | os.O_CLOEXEC, 0o644)  # tmpfs and the like
            if lock:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as exc:
                    os.close(fd)
                    hint = "another walbd process has it open: stop that one, if it is not the one you want"
                    raise Busy("the file is in use by another process", hint=hint, path=str(path)) from exc
            return OsFile(fd, path)

    def temp_file(self, directory: Path) -> OsTempFile:
        with disk_errors(directory, "create a file"):
            fd, name = tempfile.mkstemp(prefix=TMP_PREFIX, dir=directory)
            return OsTempFile(fd, Path(name))

    def read_bytes(self, path: Path, *, size_max_b: int = 64 << 20) -> bytes:
        with self.open(path) as file:
            size = file.size()
            if size > size_max_b:
                raise DiskFailed("file is too large to be what it should be", path=str(path), size_b=size)
            return file.pread(size, 0)

    def replace_durably(self, path: Path, data: bytes) -> None:
        with self.temp_file(path.parent) as file:
            file.pwrite(data, 0)
            file.commit(path)

    def link(self, path: Path, new: Path) -> None:
        with disk_errors(new, "link"):
            os.link(path, new)

    def rename(self, path: Path, new: Path) -> None:
        assert path.parent == new.parent
        with disk_errors(path, "rename"):
            os.replace(path, new)  # noqa: TID251
        _sync_dir(new.parent)

    def unlink(self, path: Path) -> None:
        with disk_errors(path, "remove"):
            path.unlink(missing_ok=True)

    def list_names(self, directory: Path) -> list[str]:
        with disk_errors(directory, "list"):
            return sorted(os.listdir(directory))

    def exists(self, path: Path) -> bool:
        with disk_errors(path, "look for"):
            return path.exists()

    def is_dir(self, path: Path) -> bool:
        with disk_errors(path, "look for"):
            return path.is_dir()

    def size_of(self, path: Path) -> int:
        with disk_errors(path, "stat"):
            return path.stat().st_size

    def allocated_of(self, path: Path) -> int:
        with disk_errors(path, "stat"):
            return path.stat().st_blocks * 512

    def make_dir(self, path: Path, *, parents: bool = False) -> None:
        made = [path]
        with disk_errors(path, "create a directory"):
            if parents:
                made += itertools.takewhile(lambda each: not each.exists(), path.parents)
            path.mkdir(parents=parents, exist_ok=parents)
        for each in made:
            _sync_dir(each.parent)

    def remove_tree(self, path: Path) -> None:
        with disk_errors(path, "remove"):
            if not path.exists():
                return
            shutil.rmtree(path)
        _sync_dir(path.parent)

    def sync_dir(self, directory: Path) -> None:
        _sync_dir(directory)

    def clone(self, source: Path, target: File) -> bool:
        with self.open(source) as file, disk_errors(target.path, "clone"):
            try:
                fcntl.ioctl(target.fileno(), _FICLONE, file.fileno())
            except OSError as exc:
                if exc.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS):
                    return False
                raise
            return True

    def data_ranges(self, file: File, begin_b: int = 0, end_b: int | None = None) -> Iterator[tuple[int, int]]:
        fd, end, offset = file.fileno(), file.size(), begin_b
        end = end if end_b is None else min(end, end_b)
        if stat.S_ISBLK(os.fstat(fd).st_mode):  # they do not tell of holes
            if offset < end:
                yield offset, end - offset
            return
        while offset < end:
            with disk_errors(file.path, "seek"):
                try:
                    begin = min(os.lseek(fd, offset, os.SEEK_DATA), end)
                except OSError as exc:
                    if exc.errno == errno.ENXIO:
                        return
                    raise
                offset = min(os.lseek(fd, begin, os.SEEK_HOLE), end) if begin < end else end
            if begin < end:
                yield begin, offset - begin

    def free_b(self, path: Path) -> int:
        with disk_errors(path, "ask for free space"):
            st = os.statvfs(path)
            return st.f_bavail * st.f_frsize


def physical_block_size(file: File) -> int | None:
    """Return the physical block size of a block device [byte], or None for a regular file."""
    fd = file.fileno()
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return None
    size: int = struct.unpack("I", fcntl.ioctl(fd, _BLKPBSZGET, bytes(4)))[0]
    return size


def _sync_dir(directory: Path) -> None:
    with disk_errors(directory, "sync a directory"):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # noqa: TID251
        finally:
            os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(fd: int, mode: int, offset_b: int, size_b: int) -> None:
    if _libc.fallocate(fd, mode, offset_b, size_b) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
