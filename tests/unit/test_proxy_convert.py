"""From log to wdiff: what arrives is right, or refused with a typed error."""

import dataclasses
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.fake_archive import clean, overlay
from tests.kit.logs import Io, build_log, image_of, packs
from walbd.errors import CorruptData, RemoteProtocolError, WalbError
from walbd.format.compress import CompressOpt, Kind, compress
from walbd.format.logpack import end_header
from walbd.fs import OsFileSystem
from walbd.protocol.transfer import Packing, WlogChunk, WlogEnd, WlogOffer
from walbd.proxy.convert import WlogConverter

UUID = b"u" * 16
SALT = 77
SIZE_LB = 256
OFFER = WlogOffer(volume="v", uuid=UUID, pbs=512, salt=SALT, size_lb=SIZE_LB, lsid=100, log_max_pb=1 << 20)
QUIET = [HealthCheck.function_scoped_fixture]


def raw(data: bytes, lsid: int = 100) -> tuple[WlogChunk, bytes]:
    return WlogChunk(lsid=lsid, size_b=len(data), packing=Packing.NONE), data


def convert(directory: Path, offer: WlogOffer, chunks: list[tuple[WlogChunk, bytes]], end: WlogEnd) -> bytes:
    """Convert a stream and return the wdiff; leaves nothing in the directory, also after an error."""
    converter = WlogConverter(OsFileSystem(), directory, offer, "test")
    try:
        converter.begin()
        for chunk, payload in chunks:
            converter.add(chunk, payload)
        converter.finish(end)
        converter.commit(directory / "out")
        data = (directory / "out").read_bytes()
        assert len(data) == converter.wdiff_b
        return data
    finally:
        converter.close()
        (directory / "out").unlink(missing_ok=True)
        assert list(directory.iterdir()) == []


@settings(max_examples=40, suppress_health_check=QUIET, deadline=None)
@given(
    log=packs(SIZE_LB, max_packs=6), pbs=st.sampled_from([512, 4096]), cuts=st.integers(0, 63), lz4=st.booleans()
)
def test_wdiff_is_the_log(tmp_path: Path, log: list, pbs: int, cuts: int, lz4: bool) -> None:  # type: ignore[type-arg]
    offer = dataclasses.replace(OFFER, pbs=pbs)
    chunks, lsid = [], offer.lsid
    group = b""
    for i, pack in enumerate(log):
        group += build_log(lsid + len(group) // pbs, pbs, SALT, [pack])
        if cuts >> i & 1 or i == len(log) - 1:
            chunk, payload = raw(group, lsid)
            if lz4:
                kind, packed = compress(CompressOpt(Kind.LZ4), group)
                if kind is Kind.LZ4:
                    chunk, payload = dataclasses.replace(chunk, packing=Packing.LZ4), bytes(packed)
            chunks.append((chunk, payload))
            lsid += len(group) // pbs
            group = b""
    wdiff = convert(tmp_path, offer, chunks, WlogEnd(lsid=lsid, diff=clean(0, 1)))
    image = random.Random(1).randbytes(SIZE_LB * 512)
    assert overlay(image, [wdiff]) == image_of(image, log)


@settings(max_examples=150, suppress_health_check=QUIET, deadline=None)
@given(
    log=packs(SIZE_LB, max_packs=3),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=3),
    cut=st.floats(0, 1),
)
def test_damage_is_found_or_harmless(tmp_path: Path, log: list, flips: list, cut: float) -> None:  # type: ignore[type-arg]
    """Flipped bits and lost tails give CorruptData or RemoteProtocolError; else the image is what was written.

    Paddings and the tails of last blocks are covered by no checksum, and mean nothing.
    """
    good = build_log(100, 512, SALT, log)
    data = bytearray(good[: int(len(good) * cut)])
    for where, bit in flips:
        if data:
            data[int(where * len(data))] ^= 1 << bit
    end = WlogEnd(lsid=100 + len(good) // 512, diff=clean(0, 1))
    try:
        wdiff = convert(tmp_path, OFFER, [raw(bytes(data))] if data else [], end)
    except (CorruptData, RemoteProtocolError):
        assert bytes(data) != good
    else:
        image = bytes(SIZE_LB * 512)
        assert overlay(image, [wdiff]) == image_of(image, log)


@settings(max_examples=60, suppress_health_check=QUIET, deadline=None)
@given(
    payload=st.binary(max_size=2000),
    size_b=st.integers(0, 64 << 20),
    packing=st.sampled_from(list(Packing)),
    lsid=st.sampled_from([100, 101, 2**64 - 1]),
)
def test_random_chunks(tmp_path: Path, payload: bytes, size_b: int, packing: Packing, lsid: int) -> None:
    chunk = WlogChunk(lsid=lsid, size_b=size_b, packing=packing)
    with pytest.raises(WalbError):
        convert(tmp_path, OFFER, [(chunk, payload)], WlogEnd(lsid=100, diff=clean(0, 1)))


def test_what_is_wrong_with_a_log_is_said(tmp_path: Path) -> None:
    log = [[Io("write", 0, 2, 1)], [Io("write", 4, 2, 2)]]
    good = build_log(100, 512, SALT, log)

    def refused(data: bytes, offer: WlogOffer = OFFER) -> WalbError:
        with pytest.raises(WalbError) as caught:
            convert(tmp_path, offer, [raw(data)], WlogEnd(lsid=100 + len(data) // 512, diff=clean(0, 1)))
        return caught.value

    flipped = bytearray(good)
    flipped[512 * 4] ^= 1  # in the data of the second pack
    for data, offset, says in (
        (bytes(flipped), 512 * 4, "checksum"),
        (good + end_header(512, SALT), len(good), "an end of log inside"),
        (good[:-512], 512 * 3, "within a logpack"),
    ):
        error = refused(data)
        assert isinstance(error, CorruptData)
        assert says in error.message
        assert error.facts["offset"] == offset
    end = WlogEnd(lsid=106, diff=clean(0, 1))
    assert convert(tmp_path, dataclasses.replace(OFFER, log_max_pb=6), [raw(good)], end)
    error = refused(good, dataclasses.replace(OFFER, log_max_pb=5))
    assert isinstance(error, RemoteProtocolError)
    assert "more log comes" in error.message


@pytest.mark.parametrize("lsid", [0, 2**64 - 2, 2**64 - 1])
def test_extreme_positions(tmp_path: Path, lsid: int) -> None:
    offer = dataclasses.replace(OFFER, lsid=lsid)
    assert convert(tmp_path, offer, [], WlogEnd(lsid=lsid, diff=clean(0, 1)))
    with pytest.raises(WalbError):
        convert(tmp_path, offer, [raw(bytes(512), lsid)], WlogEnd(lsid=lsid, diff=clean(0, 1)))
