"""The scanner: the same packs whatever the buffer size, bounded memory, torn ends; and applying its records."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import Io, build_log, build_pack, image_of, packs
from tests.reference import logapply as reference
from tests.reference.logpack import Found
from tests.reference.logpack import scan as reference_scan
from walbd.errors import CorruptData, DiskFailed
from walbd.ext.logapply import first_odd_padding, first_outside, write_records
from walbd.ext.logpack import Fault, Stop
from walbd.format.logpack import LOG_RECORD, end_header
from walbd.format.logscan import Batch, LogScanner
from walbd.fs import OsFileSystem
from walbd.fs.apply import apply_records, check_inside

DEVICE_LB = 512
PBS = st.sampled_from([512, 4096])


class Source:
    """A log in memory that gives what it has, in pieces no larger than `piece_b`."""

    def __init__(self, log: bytes, pbs: int, lsid: int, piece_b: int = 1 << 30) -> None:
        self.log, self.pbs, self.lsid, self.piece_b = log, pbs, lsid, piece_b
        self.asked_b = 0

    def __call__(self, view: memoryview, lsid: int) -> int:
        assert len(view) % self.pbs == 0
        assert len(view) > 0
        self.asked_b = max(self.asked_b, len(view))
        at = (lsid - self.lsid) * self.pbs
        part = self.log[at : at + min(len(view), self.piece_b)]
        view[: len(part)] = part
        return len(part)


def collect(scanner: LogScanner, pbs: int, begin: int) -> tuple[bytes, list[Found], int]:
    """Return (the log handed out, its records with data_b counted from the beginning, packs)."""
    log, found, n_packs, lsid = bytearray(), [], 0, begin
    for batch in scanner:
        assert batch.lsid == lsid
        assert len(batch.data) == (batch.lsid_end - batch.lsid) * pbs
        lsid = batch.lsid_end
        for fields in LOG_RECORD.iter_unpack(batch.records):
            r = Found(*fields)
            found.append(r._replace(data_b=r.data_b + len(log)) if not r.flags & 6 else r)
        log += batch.data
        n_packs += batch.n_packs
    return bytes(log), found, n_packs


@given(
    packs(DEVICE_LB),
    PBS,
    st.sampled_from([1, 4096, 20000, 1 << 20]),
    st.sampled_from([0, 9000, 16 << 20]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_buffer_gives_the_same(laid: list[list[Io]], pbs: int, chunk_b: int, whole_b: int, end: bool) -> None:
    log = build_log(1000, pbs, 5, laid)
    source = Source(log + (end_header(pbs, 5) if end else b""), pbs, 1000, 8192)
    scanner = LogScanner(source, pbs=pbs, salt=5, lsid=1000, chunk_b=chunk_b, whole_pack_max_b=whole_b)
    got, found, n_packs = collect(scanner, pbs, 1000)
    expected = reference_scan(log, pbs, 5, 1000)
    assert got == log
    assert found == expected[1]
    assert n_packs == len(laid)
    assert scanner.stop is (Stop.END if end else Stop.MORE)
    assert scanner.lsid == 1000 + len(log) // pbs
    assert scanner.trouble_b == len(log)
    assert scanner.torn is None


@given(packs(DEVICE_LB), PBS, st.integers(0, 30), st.sampled_from([1, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_never_beyond_the_limit(laid: list[list[Io]], pbs: int, n_pb: int, chunk_b: int) -> None:
    log = build_log(1000, pbs, 5, laid)
    limit = 1000 + min(n_pb, len(log) // pbs)
    scanner = LogScanner(
        Source(log[: (limit - 1000) * pbs], pbs, 1000), pbs=pbs, salt=5, lsid=1000, lsid_end=limit, chunk_b=chunk_b
    )
    got, _, _ = collect(scanner, pbs, 1000)
    assert log.startswith(got)
    assert scanner.stop is Stop.MORE
    assert scanner.lsid <= limit


@given(
    packs(DEVICE_LB), PBS, st.data(), st.sampled_from([1, 1 << 20]), st.sampled_from([0, 16 << 20]), st.booleans()
)
@settings(max_examples=100, deadline=None)
def test_damaged_data(
    laid: list[list[Io]], pbs: int, data: st.DataObject, chunk_b: int, whole_b: int, keep_torn: bool
) -> None:
    log = build_log(1000, pbs, 5, laid)
    writes = [r for r in reference_scan(log, pbs, 5, 1000)[1] if not r.flags & 6]
    if not writes:
        return
    bad = data.draw(st.sampled_from(writes))
    changed = bytearray(log)
    changed[bad.data_b + data.draw(st.integers(0, bad.io_size_lb * 512 - 1))] ^= 0x40
    outcome, before = reference_scan(bytes(changed), pbs, 5, 1000)
    assert outcome.stop == "BAD_DATA"
    scanner = LogScanner(
        Source(bytes(changed), pbs, 1000),
        pbs=pbs,
        salt=5,
        lsid=1000,
        chunk_b=chunk_b,
        whole_pack_max_b=whole_b,
        keep_torn=keep_torn,
    )
    _, found, n_packs = collect(scanner, pbs, 1000)
    assert (scanner.stop, scanner.fault) == (Stop.BAD_DATA, Fault.DATA_CHECKSUM)
    assert (scanner.record, scanner.trouble_b) == (outcome.record, outcome.trouble_b)
    pack = bad.lsid - bad.lsid_local
    good_of_pack = [r for r in reference_scan(log, pbs, 5, 1000)[1] if r.lsid - r.lsid_local == pack][
        : outcome.record
    ]
    if whole_b:
        assert found == before + (good_of_pack if keep_torn else [])
        assert n_packs == outcome.n_packs + (keep_torn and outcome.record > 0)
    elif keep_torn:
        assert found == before + good_of_pack
    else:  # a pack larger than the buffer comes in parts, and what is good is good
        assert found in (before, before + good_of_pack)
    if keep_torn:
        assert scanner.torn is not None
        assert (scanner.torn.lsid, scanner.torn.record) == (pack, outcome.record)
        assert scanner.lsid == scanner.torn.lsid_end
        assert bool(scanner.torn.header) == (outcome.record > 0)
        kept = bytearray(changed[: outcome.consumed_b]) + scanner.torn.header
        body_b = outcome.consumed_b + pbs
        kept += changed[body_b : body_b + (scanner.lsid - pack - 1) * pbs] if outcome.record else b""
        after, records = reference_scan(bytes(kept), pbs, 5, 1000)
        assert (after.stop, after.lsid) == ("MORE", scanner.lsid)
        assert records == before + good_of_pack
    else:
        assert scanner.torn is None


def test_memory_stays_bounded_in_a_giant_pack() -> None:
    ios = [Io("write", 0, 8000, 1 + i) for i in range(8)]
    log = build_pack(0, 4096, 9, ios)
    source = Source(log, 4096, 0)
    scanner = LogScanner(source, pbs=4096, salt=9, lsid=0)
    got, found, n_packs = collect(scanner, 4096, 0)
    assert len(log) > 30 << 20
    assert got == log
    assert (len(found), n_packs, scanner.lsid) == (8, 1, len(log) // 4096)
    assert source.asked_b < 16 << 20


def test_a_header_that_claims_more_than_there_is() -> None:
    log = build_pack(0, 512, 9, [Io("write", 0, 65535)])[:2048]
    source = Source(log, 512, 0)
    scanner = LogScanner(source, pbs=512, salt=9, lsid=0, lsid_end=4)
    assert list(scanner) == []
    assert (scanner.stop, scanner.lsid) == (Stop.MORE, 0)
    assert source.asked_b == 2048


@given(packs(DEVICE_LB), PBS, st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_applying(
    tmp_path_factory: pytest.TempPathFactory, laid: list[list[Io]], pbs: int, zero: bool, real: bool
) -> None:
    log = build_log(0, pbs, 5, laid)
    base = os.urandom(64) * (DEVICE_LB * 8)
    path = tmp_path_factory.getbasetemp() / f"image-{real}"
    path.write_bytes(base)
    with OsFileSystem().open(path, write=True) as file:
        target = file if real else _WithoutDescriptor(file)
        for batch in LogScanner(Source(log, pbs, 0), pbs=pbs, salt=5, lsid=0, chunk_b=8192):
            apply_records(target, batch.data, batch.records, zero_discards=zero)  # type: ignore[arg-type]
    expected = bytearray(base)
    reference.apply(expected, log, reference_scan(log, pbs, 5, 0)[1], zero)
    assert path.read_bytes() == expected == image_of(base, laid, zero_discards=zero)


class _WithoutDescriptor:
    """A file as simulated disks have them: everything but a descriptor."""

    def __init__(self, file: object) -> None:
        self._file = file

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def fileno(self) -> int:
        return -1


FOUND = st.lists(
    st.builds(
        Found,
        st.integers(0, 2000),
        st.integers(0, 2000),
        st.integers(0, 20).map(lambda n: n * 512),
        st.integers(0, 64),
        st.sampled_from([1, 3, 5]),
        st.integers(0, 9),
        st.integers(1, 9),
    ),
    max_size=12,
)


def pack_found(found: list[Found]) -> bytes:
    return b"".join(LOG_RECORD.pack(*r) for r in found)


@given(FOUND, st.integers(0, 2100), st.sampled_from([512, 4096]), st.integers(1, 300))
def test_record_checks_equal_reference(found: list[Found], limit_lb: int, pbs: int, ring_pb: int) -> None:
    assert first_outside(pack_found(found), limit_lb) == reference.first_outside(found, limit_lb)
    assert first_odd_padding(pack_found(found), pbs, ring_pb) == reference.first_odd_padding(found, pbs, ring_pb)


def test_misaligned_records_are_refused() -> None:
    records = memoryview(b"x" + pack_found([Found(1, 0, 0, 1, 1, 0, 1)]))[1:]
    with pytest.raises(ValueError, match="aligned"):
        first_outside(records, 1)


@given(FOUND, st.data())
@settings(max_examples=50)
def test_write_records_equals_reference(
    tmp_path_factory: pytest.TempPathFactory, found: list[Found], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(found)))
    content = bytes(i & 255 for i in range(84 * 512))
    image = bytearray(2100 * 512)
    path = tmp_path_factory.getbasetemp() / "image"
    path.write_bytes(image)
    with OsFileSystem().open(path, write=True) as file:
        got = write_records(file.fileno(), content, pack_found(found), first)
    assert got == (reference.write_records(image, content, found, first), 0)
    assert path.read_bytes() == image


def test_record_writes_are_checked(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    outside = pack_found([Found(1, 0, 0, 1, 1, 0, 1), Found(2, 1, 513, 1, 1, 0, 2)])
    with OsFileSystem().open(tmp_path / "image", write=True) as file:
        for records, first, text in ((outside, 0, "outside"), (outside, 3, "no such"), (outside[:-1], 0, "whole")):
            with pytest.raises(ValueError, match=text):
                write_records(file.fileno(), b"\xff" * 1024, records, first)
    assert (tmp_path / "image").read_bytes() == bytes(4096)
    with pytest.raises(ValueError, match="zero"):
        first_odd_padding(b"", 512, 0)


def test_a_failing_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    records = pack_found([Found(1, 0, 0, 1, 1, 0, 1)])
    assert write_records(-1, bytes(512), records, 0) == (0, 9)
    with OsFileSystem().open(tmp_path / "image") as file, pytest.raises(DiskFailed) as caught:
        apply_records(file, bytes(512), records, zero_discards=True)
    assert caught.value.facts["path"] == str(tmp_path / "image")


def test_records_outside_are_named() -> None:
    records = pack_found([Found(41, 0, 0, 8, 1, 0, 1), Found(42, 5, 0, 4, 5, 0, 2)])
    check_inside(records, 9, source="log", offset_b=lambda lsid: lsid * 512, what="image")
    with pytest.raises(CorruptData, match="beyond the end of image") as caught:
        check_inside(records, 8, source="log", offset_b=lambda lsid: lsid * 512, what="image")
    assert caught.value.facts["offset"] == 40 * 512
    assert caught.value.facts["lsid"] == 42


def test_batches_say_what_they_hold() -> None:
    log = build_log(0, 512, 1, [[Io("write", 0, 1, 1)], [Io("discard", 0, 1)]])
    (batch,) = LogScanner(Source(log, 512, 0), pbs=512, salt=1, lsid=0)
    assert isinstance(batch, Batch)
    assert (batch.lsid, batch.lsid_end, batch.n_packs, len(batch.records)) == (0, 3, 2, 80)
