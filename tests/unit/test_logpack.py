"""Logpacks: ext.logpack and format.logpack against the reference, and everything that is refused."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import Io, build_log, build_pack, packs
from tests.reference import logpack as reference
from tests.reference.checksum import checksum
from walbd.errors import CorruptData
from walbd.ext.logpack import (
    Fault,
    Scan,
    Stop,
    bad_records,
    check_header,
    find_claims,
    find_headers,
    scan,
    scan_data,
    shrink,
)
from walbd.format.logpack import (
    END_HEADER,
    LOG_RECORD,
    LOG_RECORD_B,
    PackHeader,
    end_header,
    make_header,
    pack_header,
    parse_header,
    records_max,
    tail_b,
)

PBS = st.sampled_from([512, 4096])
SALT = st.integers(0, 2**32 - 1)
LSIDS = st.one_of(st.integers(0, 1000), st.integers(2**64 - 3000, 2**64 - 2), st.just(2**40))
DEVICE_LB = 4096


def as_reference(found: Scan) -> reference.Scan:
    return reference.Scan(
        found.stop.name,
        found.fault.name,
        found.lsid,
        found.consumed_b,
        found.n_packs,
        found.n_records,
        found.need_b,
        found.trouble_b,
        found.record,
    )


def unpack(records: bytes | bytearray) -> list[reference.Found]:
    return [reference.Found(*fields) for fields in LOG_RECORD.iter_unpack(records)]


def both_scans(buf: bytes, pbs: int, salt: int, lsid: int, verify: bool = True) -> reference.Scan:
    """Scan with both implementations, require the same outcome, and return it."""
    records = bytearray(b"before")
    got = scan(buf, pbs, salt, lsid, verify_data=verify, records=records)
    expected, found = reference.scan(buf, pbs, salt, lsid, verify)
    assert as_reference(got) == expected
    assert records[:6] == b"before"
    assert unpack(records[6:]) == found
    assert as_reference(scan(buf, pbs, salt, lsid, verify_data=verify)) == expected
    return expected


@st.composite
def logs(draw: st.DrawFn, max_lsid: int = 2**64) -> tuple[bytes, int, int, int]:
    pbs, salt, lsid = draw(PBS), draw(SALT), draw(LSIDS.filter(lambda n: n < max_lsid))
    made = b""
    for ios in draw(packs(DEVICE_LB)):
        at = lsid + len(made) // pbs
        if at > 2**64 - 700:
            break
        made += build_pack(at, pbs, salt, ios)
    return made, pbs, salt, lsid


@given(logs(), st.sampled_from([b"", b"end", b"zero", b"junk"]), st.booleans())
@settings(max_examples=60)
def test_good_logs(log: tuple[bytes, int, int, int], tail: bytes, verify: bool) -> None:
    buf, pbs, salt, lsid = log
    behind = {b"": b"", b"end": end_header(pbs, salt), b"zero": bytes(pbs), b"junk": b"\xa5" * (pbs + 7)}[tail]
    found = both_scans(buf + behind, pbs, salt, lsid, verify)
    assert found.consumed_b == len(buf)
    assert found.stop == {b"": "MORE", b"end": "END"}.get(tail, "NOT_HEADER")


@given(logs(), st.data())
@settings(max_examples=100)
def test_cut_logs(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    buf, pbs, salt, lsid = log
    size = data.draw(st.integers(0, len(buf)))
    found = both_scans(buf[:size], pbs, salt, lsid)
    assert found.stop == "MORE"
    if found.consumed_b + found.need_b <= len(buf):
        more = scan(buf[: found.consumed_b + found.need_b], pbs, salt, lsid)
        assert (more.consumed_b, more.need_b) > (found.consumed_b, found.need_b)


@given(logs(), st.data())
@settings(max_examples=150)
def test_flipped_bits(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    buf, pbs, salt, lsid = log
    if not buf:
        return
    changed = bytearray(buf)
    for bit in data.draw(st.lists(st.integers(0, len(buf) * 8 - 1), min_size=1, max_size=3)):
        changed[bit // 8] ^= 1 << bit % 8
    found = both_scans(bytes(changed), pbs, salt, lsid)
    if found.stop == "MORE":  # the flips were in paddings or tails, or undid each other
        assert found.consumed_b == len(buf)


@given(logs(), st.data())
@settings(max_examples=150)
def test_resealed_headers(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    """Fields changed with a matching checksum: only the rules about fields can tell."""
    buf, pbs, salt, lsid = log
    if not buf:
        return
    changed = bytearray(buf)
    at = data.draw(st.sampled_from([6, 8, 16, 18, 24, 28, 32, 40, 44, 48, 60, 64]))
    size = data.draw(st.sampled_from([1, 2, 4]))
    value = data.draw(st.one_of(st.integers(0, 8), st.integers(0, 2 ** (8 * size) - 1)))
    changed[at : at + size] = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    changed[0:4] = bytes(4)
    changed[0:4] = struct.pack("<I", checksum(bytes(changed[:pbs]), salt))
    both_scans(bytes(changed), pbs, salt, lsid)
    fault, record = check_header(changed[:pbs], pbs, salt)
    assert (fault.name, record) == reference.check_header(bytes(changed[:pbs]), pbs, salt)
    assert find_headers(changed, pbs, salt) == reference.find_headers(bytes(changed), pbs, salt)
    assert find_claims(changed, pbs, lsid) == reference.find_claims(bytes(changed), pbs, lsid)


@given(st.binary(max_size=1600), PBS, SALT, LSIDS)
def test_random_bytes(buf: bytes, pbs: int, salt: int, lsid: int) -> None:
    both_scans(buf, pbs, salt, lsid)
    assert find_headers(buf, pbs, salt) == reference.find_headers(buf, pbs, salt)
    assert find_claims(buf, pbs, lsid) == reference.find_claims(buf, pbs, lsid)


@given(st.binary(min_size=512, max_size=512), SALT)
def test_random_sealed_headers(raw: bytes, salt: int) -> None:
    block = bytearray(raw)
    block[0:6] = b"\0\0\0\0\3\0"
    block[0:4] = struct.pack("<I", checksum(bytes(block), salt))
    fault, record = check_header(block, 512, salt)
    assert (fault.name, record) == reference.check_header(bytes(block), 512, salt)
    if fault is Fault.NONE:
        parse_header(block, pbs=512, salt=salt, source="x", offset=0)
    else:
        with pytest.raises(CorruptData):
            parse_header(block, pbs=512, salt=salt, source="x", offset=0)


@given(logs(), st.data())
@settings(max_examples=80)
def test_parts_of_a_pack(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    buf, pbs, salt, _ = log
    if not buf:
        return
    header = buf[:pbs]
    body = bytearray(buf[pbs : (1 + reference.u16(header, 6)) * pbs])
    first = data.draw(st.integers(0, reference.u16(header, 16)))
    begin = sum(r.owned_pb(pbs) for r in reference.records(header)[:first]) * pbs
    size = data.draw(st.integers(0, len(body) - begin))
    if size and data.draw(st.booleans()):
        body[begin + data.draw(st.integers(0, size - 1))] ^= 0x10
    part = bytes(body[begin : begin + size])
    records = bytearray()
    got = scan_data(header, pbs, salt, part, first, records=records)
    expected, found = reference.scan_data(header, pbs, salt, part, first)
    assert as_reference(got) == expected
    assert unpack(records) == found


@given(logs(), st.data())
@settings(max_examples=80)
def test_shrink(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    buf, pbs, salt, lsid = log
    if not buf:
        return
    header = buf[:pbs]
    n = data.draw(st.integers(1, reference.u16(header, 16)))
    small = shrink(header, pbs, salt, n)
    assert small == reference.shrink(header, pbs, salt, n)
    kept = reference.scan(small + buf[pbs:], pbs, salt, lsid)[1][:n]
    assert kept == reference.scan(buf, pbs, salt, lsid)[1][:n]


def test_shrink_refuses() -> None:
    header = build_pack(0, 512, 1, [Io("write", 0, 1)])[:512]
    for n in (0, 2):
        with pytest.raises(ValueError, match="shrinks"):
            shrink(header, 512, 1, n)
    with pytest.raises(ValueError, match="not a valid"):
        shrink(header, 512, 2, 1)
    with pytest.raises(ValueError, match="not a valid"):
        shrink(header[:100], 512, 1, 1)


@given(logs(), st.data())
@settings(max_examples=50)
def test_bad_records(log: tuple[bytes, int, int, int], data: st.DataObject) -> None:
    buf, pbs, salt, lsid = log
    records = bytearray()
    scan(buf, pbs, salt, lsid, records=records)
    changed = bytearray(buf)
    for at in data.draw(st.lists(st.integers(0, max(len(buf) - 1, 0)), max_size=4)):
        if buf:
            changed[at] ^= 0x80
    assert bad_records(changed, salt, records) == reference.bad_records(bytes(changed), salt, unpack(records))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="pbs"):
        scan(b"", 0, 0, 0)
    with pytest.raises(ValueError, match="pbs"):
        scan(b"", 100, 0, 0)
    with pytest.raises(ValueError, match="one PB"):
        check_header(b"x" * 511, 512, 0)
    with pytest.raises(ValueError, match="whole structs"):
        bad_records(b"", 0, b"x" * 39)
    record = LOG_RECORD.pack(1, 0, 512, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="outside"):
        bad_records(b"x" * 1023, 0, record)
    with pytest.raises(ValueError, match="fewer records"):
        scan_data(build_pack(0, 512, 0, [Io("discard", 0, 1)]), 512, 0, b"", 2)
    assert LOG_RECORD_B == 40


# What is changed in a pack of three records (write, discard, padding), and the fault it has to give.
# offset, struct code, value
CONTRADICTIONS = [
    ("claims more records than fit", [(16, "H", 16)], Fault.N_RECORDS, -1),
    ("claims 65535 records", [(16, "H", 65535)], Fault.N_RECORDS, -1),
    ("two paddings claimed", [(18, "H", 2)], Fault.N_PADDING, -1),
    ("no padding claimed", [(18, "H", 0)], Fault.N_PADDING, -1),
    ("the next lsid would be invalid", [(8, "Q", 2**64 - 12)], Fault.LSID_OVERFLOW, -1),
    ("no EXIST", [(28, "I", 0)], Fault.RECORD_FLAGS, 0),
    ("padding and discard", [(28, "I", 7)], Fault.RECORD_FLAGS, 0),
    ("unknown flag", [(28, "I", 9)], Fault.RECORD_FLAGS, 0),
    ("write of nothing", [(40, "I", 0)], Fault.RECORD_SIZE, 0),
    ("write too large", [(40, "I", 65536)], Fault.RECORD_SIZE, 0),
    ("discard of nothing", [(72, "I", 0)], Fault.RECORD_SIZE, 1),
    ("padding too large", [(104, "I", 65536)], Fault.RECORD_SIZE, 2),
    ("beyond any device", [(32, "Q", 2**55 - 1)], Fault.RECORD_OFFSET, 0),
    ("discard beyond any device", [(64, "Q", 2**64 - 1)], Fault.RECORD_OFFSET, 1),
    ("lsid_local zero", [(44, "H", 0)], Fault.RECORD_LSID, 0),
    ("lsid_local skips", [(76, "H", 5)], Fault.RECORD_LSID, 1),
    ("lsid of another pack", [(48, "Q", 500)], Fault.RECORD_LSID, 0),
    ("records larger than the pack", [(6, "H", 5)], Fault.TOTAL_SIZE, 2),
    ("records smaller than the pack", [(6, "H", 11)], Fault.TOTAL_SIZE, -1),
    ("no records, but a size", [(16, "H", 0)], Fault.EMPTY, -1),
]


@pytest.mark.parametrize(
    ("changes", "fault", "record"), [c[1:] for c in CONTRADICTIONS], ids=[c[0] for c in CONTRADICTIONS]
)
def test_contradictions(changes: list[tuple[int, str, int]], fault: Fault, record: int) -> None:
    pack = bytearray(build_pack(7, 512, 99, [Io("write", 3, 2, 1), Io("discard", 9, 4), Io("padding", 0, 8)]))
    for offset, code, value in changes:
        struct.pack_into("<" + code, pack, offset, value)
    pack[0:4] = bytes(4)
    pack[0:4] = struct.pack("<I", checksum(bytes(pack[:512]), 99))
    assert check_header(pack[:512], 512, 99) == (fault, record)
    lsid = reference.u64(bytes(pack), 8)
    found = both_scans(bytes(pack), 512, 99, lsid)
    assert found.stop == ("NOT_HEADER" if fault is Fault.EMPTY else "BAD_HEADER")
    with pytest.raises(CorruptData) as caught:
        parse_header(pack, pbs=512, salt=99, source="log", offset=1234)
    assert caught.value.facts["offset"] == 1234
    assert caught.value.facts.get("record", -1) == record


def test_padding_must_be_whole_blocks() -> None:
    pack = bytearray(build_pack(0, 4096, 5, [Io("padding", 0, 8)]))
    struct.pack_into("<I", pack, 40, 7)
    pack[0:4] = bytes(4)
    pack[0:4] = struct.pack("<I", checksum(bytes(pack[:4096]), 5))
    assert check_header(pack[:4096], 4096, 5) == (Fault.RECORD_SIZE, 0)


def test_packs_of_another_lap_or_log() -> None:
    pack = build_pack(100, 512, 7, [Io("write", 0, 1, 1)])
    assert scan(pack, 512, 7, 410).stop is Stop.WRONG_LSID
    assert scan(pack, 512, 8, 100).stop is Stop.NOT_HEADER
    assert scan(pack, 512, 7, 100).stop is Stop.MORE


@given(logs(max_lsid=2**63))
@settings(max_examples=40)
def test_headers_survive_parsing(log: tuple[bytes, int, int, int]) -> None:
    buf, pbs, salt, lsid = log
    at = 0
    while at < len(buf):
        header = parse_header(buf[at:], pbs=pbs, salt=salt, source="x", offset=at)
        assert header.lsid == lsid + at // pbs
        assert pack_header(header, pbs=pbs, salt=salt) == buf[at : at + pbs]
        at += (header.next_lsid - header.lsid) * pbs


def test_end_header() -> None:
    block = end_header(512, 0x12345678)
    assert block[:4].hex() == "87a9cbed"
    header = parse_header(block, pbs=512, salt=0x12345678, source="x", offset=0)
    assert header.is_end
    assert header.lsid == 2**64 - 1
    assert header.records == END_HEADER.records
    with pytest.raises(CorruptData, match="cut off"):
        parse_header(block[:511], pbs=512, salt=0x12345678, source="x", offset=0)


def test_making_headers_has_limits() -> None:
    assert [records_max(pbs) for pbs in (512, 4096)] == [15, 127]
    discard = (0, 1, 5, 0)
    assert make_header(0, 512, [discard] * 15).total_io_size_pb == 0
    with pytest.raises(ValueError, match="do not fit"):
        make_header(0, 512, [discard] * 16)
    with pytest.raises(ValueError, match="do not fit"):
        make_header(0, 512, [])
    assert make_header(0, 512, [(0, 65535, 1, 0)]).total_io_size_pb == 65535
    with pytest.raises(ValueError, match="do not fit"):
        make_header(0, 512, [(0, 65535, 1, 0), (0, 1, 1, 0)])
    with pytest.raises(ValueError, match="out of range"):
        pack_header(make_header(2**64 - 2, 512, [discard]), pbs=512, salt=0)
    many = PackHeader(lsid=make_header(0, 512, [discard]).lsid, total_io_size_pb=0, records=())
    with pytest.raises(ValueError, match="without records"):
        pack_header(many, pbs=512, salt=0)
    assert tail_b(9, 4096) == 7 * 512
    assert tail_b(8, 4096) == 0


def test_the_largest_pack_is_scanned_whole() -> None:
    rng = random.Random(3)
    log = build_log(5, 4096, rng.getrandbits(32), [[Io("write", i, 16, 1 + i) for i in range(127)]])
    assert both_scans(log, 4096, random.Random(3).getrandbits(32), 5).n_records == 127
