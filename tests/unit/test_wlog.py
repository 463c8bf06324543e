"""wlog files: written and read back, and every way to be damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import UUID, Io, build_log, build_wlog, packs
from tests.reference.checksum import checksum
from tests.reference.logpack import scan as reference_scan
from walbd.errors import CorruptData
from walbd.format.logpack import end_header
from walbd.format.wlog import WlogHeader, WlogReader, WlogWriter
from walbd.fs import OsFileSystem
from walbd.ids import INVALID_LSID, Lsid

DEVICE_LB = 512
PBS = st.sampled_from([512, 4096])


class Memory:
    """A file in memory."""

    def __init__(self, content: bytes | bytearray = b"") -> None:
        self.content = bytearray(content)
        self.path = Path("memory")

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return bytes(self.content[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        part = self.pread(len(buffer), offset_b)
        buffer[: len(part)] = part
        return len(part)

    def size(self) -> int:
        return len(self.content)

    def pwrite(self, data: bytes | bytearray | memoryview, offset_b: int) -> None:
        self.content[offset_b : offset_b + len(data)] = data


def read_all(content: bytes | bytearray, chunk_b: int = 1 << 20) -> tuple[bytes, int, int]:
    """Return (all packs handed out, lsid reached, number of packs)."""
    reader = WlogReader(Memory(content))
    out, n_packs = bytearray(), 0
    for batch in reader.batches(chunk_b=chunk_b):
        out += batch.data
        n_packs += batch.n_packs
    return bytes(out), reader.lsid, n_packs


@given(packs(DEVICE_LB), PBS, st.integers(0, 2**40), st.sampled_from([1, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_round_trip(laid: list[list[Io]], pbs: int, lsid: int, chunk_b: int) -> None:
    log = build_log(lsid, pbs, 7, laid)
    header = WlogHeader(pbs=pbs, salt=7, uuid=UUID, begin_lsid=Lsid(lsid))
    file = Memory()
    writer = WlogWriter(file, header)
    writer.append(log[: pbs * 3])
    writer.append(log[pbs * 3 :])
    assert writer.finish() == len(file.content)
    assert file.content == build_wlog(lsid, pbs, 7, laid)
    assert WlogReader(file).header == header
    assert read_all(file.content, chunk_b) == (log, lsid + len(log) // pbs, len(laid))


@given(packs(DEVICE_LB), PBS, st.data())
@settings(max_examples=100, deadline=None)
def test_cut_files_are_refused(laid: list[list[Io]], pbs: int, data: st.DataObject) -> None:
    content = build_wlog(10, pbs, 7, laid)
    size = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(CorruptData) as caught:
        read_all(content[:size])
    assert caught.value.facts["path"] == "memory"
    assert caught.value.facts["offset"] in range(size + 1)
    assert caught.value.hint


@given(packs(DEVICE_LB), PBS, st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_are_seen_or_harmless(laid: list[list[Io]], pbs: int, data: st.DataObject) -> None:
    content = build_wlog(10, pbs, 7, laid)
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    log = content[4096:-pbs]
    outcome, records = reference_scan(log, pbs, 7, 10)
    covered = {4096 + 512 * k for k in range(len(log) // 512)}  # sectors of the log that a checksum covers
    owners = {b for r in records if not r.flags & 6 for b in range(r.data_b, r.data_b + r.io_size_lb * 512, 512)}
    at = 0
    while at < len(log):
        owners |= set(range(at, at + pbs, 512))
        at += (1 + int.from_bytes(log[at + 6 : at + 8], "little")) * pbs
    covered = (
        {4096 + b for b in owners} | set(range(0, 4096, 512)) | set(range(len(content) - pbs, len(content), 512))
    )
    if bit // 8 // 512 * 512 in covered:
        with pytest.raises(CorruptData) as caught:
            read_all(changed)
        assert caught.value.facts["offset"] in range(bit // 8 + 1)
    else:
        assert read_all(changed)[1:] == (outcome.lsid, len(laid))


@given(st.binary(max_size=9000))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CorruptData):
        read_all(content)


@given(packs(DEVICE_LB), PBS, st.binary(min_size=1, max_size=9000))
@settings(max_examples=40, deadline=None)
def test_anything_behind_the_end_is_refused(laid: list[list[Io]], pbs: int, rest: bytes) -> None:
    with pytest.raises(CorruptData, match="follows the end block"):
        read_all(build_wlog(10, pbs, 7, laid) + rest)


ONE = [[Io("write", 0, 3, 1)]]
TWO = [[Io("discard", 5, 3)], [Io("write", 1, 2, 2)]]


def test_wlogs_one_after_the_other() -> None:
    first = build_wlog(10, 512, 7, ONE)
    second = build_wlog(14, 4096, 8, TWO)
    out, lsid, n_packs = read_all(first + second)
    assert out == first[4096:-512] + second[4096:-4096]
    assert (lsid, n_packs) == (17, 3)


@pytest.mark.parametrize(
    "second",
    [build_wlog(15, 512, 7, TWO), build_wlog(13, 512, 7, TWO), build_wlog(14, 512, 7, TWO, uuid=bytes(16))],
)
def test_another_wlog_that_does_not_continue(second: bytes) -> None:
    with pytest.raises(CorruptData, match="does not continue") as caught:
        read_all(build_wlog(10, 512, 7, ONE) + second)
    assert caught.value.facts["offset"] == 4096 + 5 * 512


def test_a_gap_in_the_lsids() -> None:
    header = build_wlog(10, 512, 7, [])[:4096]
    content = header + build_log(10, 512, 7, ONE) + build_log(15, 512, 7, TWO) + end_header(512, 7)
    with pytest.raises(CorruptData, match="another lsid than its place") as caught:
        read_all(content)
    assert caught.value.facts["offset"] == 4096 + 4 * 512
    assert caught.value.facts["lsid"] == 14


def test_the_end_lsid_is_an_upper_bound() -> None:
    assert read_all(build_wlog(10, 512, 7, ONE, end_lsid=14))[1] == 14
    assert read_all(build_wlog(10, 512, 7, ONE, end_lsid=1000))[1] == 14
    with pytest.raises(CorruptData, match="beyond the end lsid"):
        read_all(build_wlog(10, 512, 7, ONE, end_lsid=13))


def test_an_empty_wlog_is_a_wlog() -> None:
    assert read_all(build_wlog(10, 512, 7, [])) == (b"", 10, 0)


def test_what_ended_the_file_is_told_apart() -> None:
    content = build_wlog(10, 512, 7, ONE + TWO)
    for size, text in ((len(content) - 512, "without an end block"), (len(content) - 513, "inside a logpack")):
        with pytest.raises(CorruptData, match=text):
            read_all(content[:size])
    with pytest.raises(CorruptData, match="inside a logpack"):
        read_all(content[: len(content) - 1])
    with pytest.raises(CorruptData, match="checksum of the logpack header"):
        read_all(content[:-1] + b"\1")
    block = bytearray(content[-512:])
    block[8:12] = b"\0\0\0\0"
    block[0:4] = bytes(4)
    block[0:4] = struct.pack("<I", checksum(bytes(block), 7))
    with pytest.raises(CorruptData, match="without records that is no end"):
        read_all(content[:-512] + block)


# offset, struct code, value, what the error says
IMPOSSIBLE = [
    (0, "H", 3, "wrong sector type"),
    (2, "H", 1, "version is not supported"),
    (4, "H", 512, "impossible size"),
    (16, "I", 4096, "impossible size"),
    (20, "I", 0, "impossible size"),
    (20, "I", 8192, "impossible size"),
    (48, "Q", 10, "range of the wlog is empty"),
]


@pytest.mark.parametrize(("offset", "code", "value", "text"), IMPOSSIBLE)
def test_impossible_headers(offset: int, code: str, value: int, text: str) -> None:
    content = bytearray(build_wlog(10, 512, 7, ONE))
    struct.pack_into("<" + code, content, offset, value)
    content[8:12] = bytes(4)
    content[8:12] = struct.pack("<I", checksum(bytes(content[:4096])))
    with pytest.raises(CorruptData, match=text):
        read_all(content)


def test_headers_that_cannot_be_made() -> None:
    for pbs, uuid, begin, end in (
        (500, UUID, 0, 1),
        (512, b"", 0, 1),
        (512, UUID, 1, 1),
        (512, UUID, INVALID_LSID, INVALID_LSID),
    ):
        with pytest.raises(ValueError, match=r"PB size|16 bytes|empty lsid"):
            WlogHeader(pbs=pbs, salt=0, uuid=uuid, begin_lsid=Lsid(begin), end_lsid=Lsid(end))


def test_real_files(tmp_path: Path) -> None:
    path = tmp_path / "a.wlog"
    path.write_bytes(build_wlog(10, 512, 7, ONE))
    with OsFileSystem().open(path) as file:
        reader = WlogReader(file)
        assert [batch.n_packs for batch in reader.batches()] == [1]
        assert reader.offset_of(11) == 4096 + 512
