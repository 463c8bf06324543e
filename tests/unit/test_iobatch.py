"""Many reads or writes in one call, beside the same one by one."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.wdiffs import MemoryFile
from walbd.errors import DiskFailed
from walbd.ext.iobatch import pread_many, pwrite_many
from walbd.format.wdiff_batch import read_pieces
from walbd.fs import OsFileSystem

PIECES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 60), st.integers(0, 60)), max_size=8)


def packed(pieces: list[tuple[int, int, int]]) -> bytes:
    return b"".join(struct.pack("<QQQ", *piece) for piece in pieces)


@given(PIECES)
@settings(max_examples=60)
def test_reading_is_reading_one_by_one(pieces: list[tuple[int, int, int]]) -> None:
    content = bytes(range(1, 151))
    memory, real = memoryview(bytearray(120)), memoryview(bytearray(120))
    fd = os.memfd_create("test")
    try:
        os.write(fd, content)
        short = read_pieces(MemoryFile(content), packed(pieces), memory)
        done, code = pread_many(fd, packed(pieces), real)
    finally:
        os.close(fd)
    assert code == 0
    assert (-1 if done == len(pieces) else done) == short
    for _, size, at in pieces[:done]:
        assert real[at : at + size] == memory[at : at + size] or short >= 0


@given(PIECES)
@settings(max_examples=60)
def test_writing_is_writing_one_by_one(pieces: list[tuple[int, int, int]]) -> None:
    buffer = bytes(range(1, 121))
    expected = MemoryFile(bytes(200))
    fd = os.memfd_create("test")
    try:
        os.write(fd, bytes(200))
        assert pwrite_many(fd, packed(pieces), buffer) == (len(pieces), 0)
        for offset, size, at in pieces:
            expected.pwrite(buffer[at : at + size], offset)
        assert os.pread(fd, 300, 0) == expected.data
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "pieces", [[(0, 2, 0)], [(0, 1, 1)], [(0, 1, 1 << 63)], [(1 << 62, 1, 0)], [(0, 1 << 63, 0)]]
)
def test_pieces_outside_are_refused(pieces: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="outside"):
        pread_many(0, packed(pieces), bytearray(1))
    with pytest.raises(ValueError, match="outside"):
        pwrite_many(0, packed(pieces), bytearray(1))


def test_broken_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="whole"):
        pread_many(0, bytes(23), bytearray(1))
    with pytest.raises(ValueError, match="aligned"):
        pwrite_many(0, memoryview(bytes(25))[1:], bytearray(1))


def test_errors_of_the_system(tmp_path: Path) -> None:
    assert pread_many(-1, packed([(0, 1, 0)]), bytearray(1)) == (0, errno.EBADF)
    assert pwrite_many(-1, packed([(0, 1, 0)]), bytearray(1)) == (0, errno.EBADF)
    (tmp_path / "file").write_bytes(b"x")
    with OsFileSystem().open(tmp_path / "file") as file:
        with pytest.raises(DiskFailed) as caught:
            file.pwrite_many(packed([(0, 1, 0)]), memoryview(b"y"))  # opened for reading
        assert caught.value.facts["path"] == str(tmp_path / "file")
        assert file.pread_many(packed([(0, 1, 0), (1, 1, 0)]), memoryview(bytearray(1))) == 1
        file.close()
        with pytest.raises(DiskFailed):
            file.pread_many(packed([(0, 1, 0)]), memoryview(bytearray(1)))
