"""The real disk: what is synced, in which order, and what is left when a step fails."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from walbd.errors import AlreadyExists, Busy, DiskFailed, DiskFull, NotFound
from walbd.fs import TMP_PREFIX, OsFileSystem, disk
from walbd.fs.disk import physical_block_size

FS = OsFileSystem()


class Calls:
    """Notes what changes the disk for good, by the names of files; `fail` makes one call fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.failing: dict[str, int] = {}
        for name in ("fdatasync", "fsync", "replace"):
            monkeypatch.setattr(os, name, self._noted(name, getattr(os, name)))

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            paths = [Path(os.readlink(f"/proc/self/fd/{arg}") if isinstance(arg, int) else arg) for arg in args]
            names = ["tmp" if path.name.startswith(TMP_PREFIX) else path.name for path in paths]
            self.seen.append(" ".join([name, *names]))
            if name in self.failing:
                code = self.failing.pop(name)
                raise OSError(code, os.strerror(code))
            return call(*args)

        return noted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


def names(home: Path) -> list[str]:
    return sorted(os.listdir(home))


# Durable means: file, then name, then directory


def test_a_file_is_replaced_file_then_name_then_directory(calls: Calls, home: Path) -> None:
    for data in (b"old", b"new"):
        calls.seen.clear()
        FS.replace_durably(home / "f", data)
        assert calls.seen == ["fdatasync tmp", "replace tmp f", "fsync home"]
        assert (home / "f").read_bytes() == data
    assert names(home) == ["f"]
    assert (home / "f").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("step", "code", "error", "left"),
    [
        ("fdatasync", errno.EIO, DiskFailed, b"old"),
        ("fdatasync", errno.ENOSPC, DiskFull, b"old"),
        ("replace", errno.EIO, DiskFailed, b"old"),
        ("fsync", errno.EIO, DiskFailed, b"new"),  # it may be lost, and the caller was told
    ],
)
def test_a_replacement_that_fails(
    calls: Calls, home: Path, step: str, code: int, error: type[Exception], left: bytes
) -> None:
    (home / "f").write_bytes(b"old")
    calls.failing[step] = code
    with pytest.raises(error):
        FS.replace_durably(home / "f", b"new")
    assert calls.seen[-1].startswith(step)
    assert (home / "f").read_bytes() == left
    assert names(home) == ["f"]


def test_a_failed_sync_is_final(calls: Calls, home: Path) -> None:
    """The kernel has forgotten what it could not write: to ask again and believe it would be wrong."""
    with FS.open(home / "f", create=True) as file:
        file.pwrite(b"x", 0)
        calls.failing["fdatasync"] = errno.EIO
        for _ in range(2):
            with pytest.raises(DiskFailed):
                file.sync()
        assert calls.seen == ["fdatasync f"]
    with FS.temp_file(home) as unfinished:
        calls.failing["fdatasync"] = errno.EIO
        with pytest.raises(DiskFailed):
            unfinished.sync()
        with pytest.raises(DiskFailed):
            unfinished.commit(home / "g")
    assert names(home) == ["f"]


def test_what_changes_a_directory_syncs_it(calls: Calls, home: Path) -> None:
    FS.make_dir(home / "d")
    FS.make_dir(home / "a" / "b", parents=True)  # two new names
    FS.make_dir(home / "a" / "b", parents=True)
    (home / "d" / "f").write_bytes(b"")
    FS.rename(home / "d" / "f", home / "d" / "g")
    FS.remove_tree(home / "d")
    FS.remove_tree(home / "d")  # gone already
    FS.sync_dir(home)
    with FS.open(home / "f", create=True) as file:
        file.sync()
    assert calls.seen == [
        "fsync home", "fsync a", "fsync home", "fsync a",
        "replace f g", "fsync d", "fsync home", "fsync home", "fdatasync f",
    ]  # fmt: skip
    assert names(home) == ["a", "f"]


def test_an_unfinished_file_is_removed_unless_it_got_its_name(home: Path) -> None:
    with FS.temp_file(home) as file:
        file.pwrite(b"x", 0)
        assert file.path.parent == home
        assert file.path.name.startswith(TMP_PREFIX)
    assert names(home) == []
    with FS.temp_file(home) as file:
        file.commit(home / "f")
        (home / file.path.name).write_bytes(b"somebody else's")
        other = file.path
    file.close()
    assert names(home) == sorted(["f", other.name])


# Reading and writing


def test_short_writes_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pwritev = os.pwrite, os.pwritev
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:3]), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: pwritev(fd, [bytes(parts[0])[:2]], at))
    with FS.open(home / "f", create=True) as file:
        file.pwrite(b"0123456789", 5)
        file.pwritev([b"abc", b"", b"defgh", b"i"], 15)
        assert file.size() == 24
    assert (home / "f").read_bytes() == bytes(5) + b"0123456789abcdefghi"


def test_short_reads_go_on_and_end_at_the_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "f").write_bytes(b"0123456789")
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 3), at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:3]], at))
    with FS.open(home / "f") as file:
        assert file.pread(8, 1) == b"12345678"
        assert file.pread(8, 5) == b"56789"
        assert file.pread(8, 10) == b""
        buffer = bytearray(b"." * 8)
        assert (file.pread_into(buffer, 1), bytes(buffer)) == (8, b"12345678")
        assert (file.pread_into(buffer, 7), bytes(buffer)) == (3, b"78945678")


def test_what_is_too_large_to_be_a_record_is_not_read(home: Path) -> None:
    (home / "f").write_bytes(b"12345")
    assert FS.read_bytes(home / "f", size_max_b=5) == b"12345"
    with pytest.raises(DiskFailed, match="too large"):
        FS.read_bytes(home / "f", size_max_b=4)


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", [0, errno.EOPNOTSUPP, errno.ENOSYS])
def test_zeroing_also_where_no_holes_can_be_made(home: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if code:
        monkeypatch.setattr(disk, "_fallocate", refusing(code))
    data = b"x" * (3 << 20)
    (home / "f").write_bytes(data)
    with FS.open(home / "f", write=True) as file:
        file.zero(5, 0)
        file.zero(5, 2 << 20)
    end = 5 + (2 << 20)
    assert (home / "f").read_bytes() == data[:5] + bytes(2 << 20) + data[end:]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_space_is_reserved_where_that_can_be(home: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with FS.open(home / "f", create=True) as file:
        file.allocate(1 << 20)
        assert (file.size(), FS.allocated_of(home / "f")) == (1 << 20, 1 << 20)
        monkeypatch.setattr(disk, "_fallocate", refusing(code))
        file.allocate(100)  # never smaller
        assert file.size() == 1 << 20
        file.allocate(2 << 20)
        assert file.size() == 2 << 20


@pytest.mark.parametrize(("code", "error"), [(errno.EIO, DiskFailed), (errno.ENOSPC, DiskFull)])
def test_errors_of_space_are_told(
    home: Path, code: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FS.open(home / "f", create=True) as file:
        file.pwrite(b"data", 0)
        monkeypatch.setattr(disk, "_fallocate", refusing(code))
        with pytest.raises(error):
            file.allocate(100)
        with pytest.raises(error):
            file.zero(0, 4)
    assert (home / "f").read_bytes() == b"data"


def test_holes_are_left_out(home: Path) -> None:
    with FS.open(home / "f", create=True) as file:
        file.truncate(4 << 20)
        file.pwrite(b"x" * 4096, 1 << 20)
        assert list(FS.data_ranges(file)) == [(1 << 20, 4096)]
        assert list(FS.data_ranges(file, 0, (1 << 20) + 100)) == [(1 << 20, 100)]
        assert list(FS.data_ranges(file, (1 << 20) + 4096)) == []
        assert list(FS.data_ranges(file, 0, 1 << 20)) == []
        assert physical_block_size(file) is None


# Opening


def test_what_is_there_is_not_created(home: Path) -> None:
    (home / "f").write_bytes(b"x")
    with pytest.raises(AlreadyExists):
        FS.open(home / "f", create=True)
    with pytest.raises(NotFound):
        FS.open(home / "g", write=True)
    with pytest.raises(AlreadyExists):
        FS.link(home / "f", home / "f")
    assert (home / "f").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("code", "direct", "error"),
    [
        (errno.EINVAL, True, None),  # no direct IO here, as on tmpfs: without it then
        (errno.EINVAL, False, DiskFailed),
        (errno.EIO, True, DiskFailed),
        (errno.EBUSY, True, Busy),
        (errno.EBUSY, False, Busy),
    ],
)
def test_devices_that_cannot_be_opened(
    home: Path, code: int, direct: bool, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "f").write_bytes(b"x")
    open_ = os.open
    tries: list[int] = []

    def once(path: Path, flags: int, mode: int = 0o777) -> int:
        tries.append(flags)
        if len(tries) == 1:
            raise OSError(code, os.strerror(code))
        return open_(path, flags, mode)

    monkeypatch.setattr(os, "open", once)
    if error is None:
        with FS.open(home / "f", direct=direct) as file:
            assert file.pread(1, 0) == b"x"
        assert [bool(flags & os.O_DIRECT) for flags in tries] == [True, False]
    else:
        with pytest.raises(error):
            FS.open(home / "f", direct=direct)
        assert len(tries) == 1


def test_more_buffers_than_one_call_takes(home: Path) -> None:
    parts = [f"{i:05}".encode() for i in range(2500)]
    with FS.open(home / "f", create=True) as file:
        file.pwritev(parts, 7)
    assert (home / "f").read_bytes() == bytes(7) + b"".join(parts)


def test_many_pieces_at_once(home: Path) -> None:
    pieces = struct.pack("<6Q", 0, 4, 4, 4096, 4, 0)  # offset, size, place
    with FS.open(home / "f", create=True) as file:
        file.pwrite_many(pieces, memoryview(b"abcdefgh"))
        assert (file.pread(4, 0), file.pread(4, 4096)) == (b"efgh", b"abcd")
        buffer = bytearray(8)
        assert file.pread_many(pieces, memoryview(buffer)) == -1
        assert bytes(buffer) == b"abcdefgh"
        file.truncate(4097)
        assert file.pread_many(pieces, memoryview(buffer)) == 1  # that one ends beyond the end
    with FS.open(home / "f") as reader:
        with pytest.raises(DiskFailed, match="cannot write"):
            reader.pwrite_many(pieces, memoryview(b"abcdefgh"))


def test_what_is_closed_may_be_locked_again(home: Path) -> None:
    for _ in range(2):
        with FS.open(home / "f", create=not (home / "f").exists(), write=True, lock=True):
            with pytest.raises(Busy):
                FS.open(home / "f", lock=True)
