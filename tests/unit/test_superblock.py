"""The superblock: its bytes, what is refused, where things lie."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.checksum import checksum
from walbd.errors import CorruptData
from walbd.format.superblock import (
    PBS_VALUES,
    Superblock,
    damaged_uuid,
    read_superblock,
    read_superblock1,
    ring_offset_pb,
    ring_size_pb,
)
from walbd.fs import OsFileSystem
from walbd.ids import INVALID_LSID, Lsid

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LSID = st.integers(0, 2**64 - 2)


@st.composite
def superblocks(draw: st.DrawFn) -> Superblock:
    oldest, written = sorted((draw(LSID), draw(LSID)))
    return Superblock(
        pbs=draw(st.sampled_from(PBS_VALUES)),
        salt=draw(U32),
        uuid=draw(st.binary(min_size=16, max_size=16)),
        name=draw(st.text("abcé-0", max_size=15)),
        ring_size_pb=draw(st.integers(1, 2**64 - 1)),
        oldest_lsid=Lsid(oldest),
        written_lsid=Lsid(written),
        device_size_lb=draw(U64),
        metadata_size_pb=draw(U32),
    )


SAMPLE = Superblock(
    pbs=512,
    salt=0x19BCB5BC,
    uuid=bytes(range(16)),
    name="gold",
    ring_size_pb=310,
    oldest_lsid=Lsid(250),
    written_lsid=Lsid(250),
    device_size_lb=2048,
)


@given(superblocks())
def test_round_trip(sb: Superblock) -> None:
    block = sb.pack()
    assert len(block) == sb.pbs
    assert checksum(block) == 0
    assert Superblock.parse(block, source="x") == sb


def test_worked_example() -> None:
    assert SAMPLE.ring_offset_pb == 10
    assert SAMPLE.position(250) == 260
    assert SAMPLE.position(315) == 15
    assert SAMPLE.superblock1_offset_b == 4096 + 512
    assert [ring_offset_pb(pbs) for pbs in (512, 4096)] == [10, 3]
    assert ring_size_pb(163840, 512) == 310


def test_names_that_are_no_utf8_survive() -> None:
    raw = bytearray(SAMPLE.pack())
    raw[40:44] = b"\xff\xfeab"
    raw[4:8] = bytes(4)
    raw[4:8] = struct.pack("<I", checksum(bytes(raw)))
    assert Superblock.parse(raw, source="x").pack() == raw


@given(superblocks(), st.data())
def test_every_flipped_bit_is_seen(sb: Superblock, data: st.DataObject) -> None:
    block = bytearray(sb.pack())
    bit = data.draw(st.integers(0, len(block) * 8 - 1))
    block[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptData) as caught:
        Superblock.parse(block, source="dev", offset=4096)
    assert caught.value.facts["path"] == "dev"
    assert caught.value.facts["offset"] == 4096


@given(st.binary(max_size=600))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(CorruptData):
        Superblock.parse(raw, source="x")


@given(superblocks(), st.integers(0, 600))
def test_cut_superblocks_are_refused(sb: Superblock, size: int) -> None:
    block = sb.pack()
    if size < len(block):
        with pytest.raises(CorruptData):
            Superblock.parse(block[:size], source="x")


# offset, struct code, value, what the error says
IMPOSSIBLE = [
    (0, "H", 3, "not a superblock"),
    (2, "H", 1, "version is not supported"),
    (2, "H", 3, "version is not supported"),
    (8, "I", 4096, "impossible block size"),
    (12, "I", 0, "impossible block size"),
    (12, "I", 513, "impossible block size"),
    (12, "I", 8192, "impossible block size"),
    (12, "I", 4096, "cut off"),
    (72, "Q", 0, "ring size is zero"),
    (80, "Q", 2**64 - 1, "oldest lsid"),
    (80, "Q", 251, "oldest lsid is above written lsid"),
    (88, "Q", 2**64 - 1, "written lsid"),
]


@pytest.mark.parametrize(("offset", "code", "value", "text"), IMPOSSIBLE)
def test_impossible_values_with_a_good_checksum(offset: int, code: str, value: int, text: str) -> None:
    block = bytearray(SAMPLE.pack())
    struct.pack_into("<" + code, block, offset, value)
    block[4:8] = bytes(4)
    block[4:8] = struct.pack("<I", checksum(bytes(block)))
    with pytest.raises(CorruptData, match=text):
        Superblock.parse(block, source="x")


def test_name_without_end() -> None:
    block = bytearray(SAMPLE.pack())
    block[40:72] = b"n" * 32
    block[4:8] = bytes(4)
    block[4:8] = struct.pack("<I", checksum(bytes(block)))
    with pytest.raises(CorruptData, match="does not end"):
        Superblock.parse(block, source="x")


def test_overflow_is_valid() -> None:
    sb = replace(SAMPLE, oldest_lsid=Lsid(1), written_lsid=Lsid(100_000))
    assert Superblock.parse(sb.pack(), source="x") == sb


@pytest.mark.parametrize(
    "values",
    [
        {"pbs": 100},
        {"salt": -1},
        {"uuid": b"short"},
        {"name": "n" * 32},
        {"name": "a\0b"},
        {"ring_size_pb": 0},
        {"oldest_lsid": 2**64 - 1},
        {"written_lsid": 249},
        {"device_size_lb": -1},
        {"metadata_size_pb": 2**32},
    ],
)
def test_making_an_invalid_one_is_our_mistake(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any of the checks
        replace(SAMPLE, **values)  # type: ignore[arg-type]


def _write(path: Path, sb: Superblock, *, copy: Superblock | None = None, size_b: int | None = None) -> None:
    content = bytearray(sb.end_b if size_b is None else size_b)
    content[4096 : 4096 + sb.pbs] = sb.pack()
    if copy is not None:
        at = copy.superblock1_offset_b
        content[at : at + copy.pbs] = copy.pack()
    path.write_bytes(content)


@pytest.mark.parametrize("pbs", PBS_VALUES)
@pytest.mark.parametrize("direct", [False, True])
def test_reading_finds_the_block_size(tmp_path: Path, pbs: int, direct: bool) -> None:
    sb = replace(SAMPLE, pbs=pbs)
    _write(tmp_path / "ldev", sb)
    with OsFileSystem().open(tmp_path / "ldev", direct=direct) as file:
        assert read_superblock(file) == sb
        assert read_superblock(file, device_pbs=pbs) == sb
        with pytest.raises(CorruptData, match="another physical block size"):
            read_superblock(file, device_pbs=4096 if pbs == 512 else 512)


@pytest.mark.parametrize("size_b", [0, 100, 4096, 4100, 4096 + 512, SAMPLE.end_b - 1])
def test_devices_that_are_too_small(tmp_path: Path, size_b: int) -> None:
    _write(tmp_path / "ldev", SAMPLE)
    (tmp_path / "ldev").write_bytes((tmp_path / "ldev").read_bytes()[:size_b])
    with OsFileSystem().open(tmp_path / "ldev") as file, pytest.raises(CorruptData) as caught:
        read_superblock(file)
    assert caught.value.hint


def test_a_log_at_the_end_of_all_lsids_is_refused(tmp_path: Path) -> None:
    """Reading on from there would count past the last lsid; no device gets there in its life."""
    for left in (1, 310, 619):
        _write(tmp_path / "ldev", replace(SAMPLE, written_lsid=Lsid(INVALID_LSID - left)))
        with OsFileSystem().open(tmp_path / "ldev") as file, pytest.raises(CorruptData, match="end of its range"):
            read_superblock(file)


@pytest.mark.parametrize("pbs", PBS_VALUES)
def test_the_second_copy(tmp_path: Path, pbs: int) -> None:
    sb = replace(SAMPLE, pbs=pbs)
    copy = replace(sb, written_lsid=Lsid(300))
    _write(tmp_path / "ldev", sb, copy=copy)
    with OsFileSystem().open(tmp_path / "ldev") as file:
        assert damaged_uuid(file) == sb.uuid
        assert read_superblock1(file, uuid=sb.uuid) == copy
        assert read_superblock1(file, uuid=sb.uuid, device_pbs=pbs) == copy
        with pytest.raises(CorruptData, match="another log"):
            read_superblock1(file, uuid=bytes(16))


def test_no_second_copy(tmp_path: Path) -> None:
    _write(tmp_path / "ldev", SAMPLE)
    rng = random.Random(1)
    with OsFileSystem().open(tmp_path / "ldev", write=True) as file:
        with pytest.raises(CorruptData):
            read_superblock1(file, uuid=SAMPLE.uuid)
        file.pwrite(rng.randbytes(20000), 4096 + 512)
        with pytest.raises(CorruptData):
            read_superblock1(file, uuid=SAMPLE.uuid)
