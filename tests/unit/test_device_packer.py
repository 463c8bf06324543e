"""ext.packer against its twin, and what it builds against the log scanner."""

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import packer as reference
from tests.reference.overlay import RECORD
from walbd.ext.logpack import Stop, scan
from walbd.ext.packer import LogBatch, Packer
from walbd.units import LB, MIB

REQUEST = struct.Struct("<QQQIIHHI")
SALT = 0x1234ABCD
RING_BEGIN_B = 8192


def make(pbs: int, ring_pb: int, record_max_pb: int, pack_max_pb: int) -> Packer:
    return Packer(
        pbs=pbs,
        ring_pb=ring_pb,
        ring_begin_b=RING_BEGIN_B,
        salt=SALT,
        record_max_pb=record_max_pb,
        pack_max_pb=pack_max_pb,
    )


def tables(requests: list[reference.Request]) -> tuple[bytes, bytes]:
    """Return the request table and the receive buffer."""
    rows, data = b"", b"head"
    for i, r in enumerate(requests):
        flags = 2 if r.no_hole else 0
        rows += REQUEST.pack(i, r.offset_lb * LB, len(data), r.size_lb * LB, 0, r.kind, flags, 0)
        data += r.data
    return rows, data


def write(batch: LogBatch, ring: bytearray) -> None:
    batch.seal()
    size_b = 0
    for offset_b, buffers in batch.segments():
        data = b"".join(buffers)
        at = offset_b - RING_BEGIN_B
        assert at >= 0
        assert at + len(data) <= len(ring)
        ring[at : at + len(data)] = data
        size_b += len(data)
    assert size_b == batch.size_b


@st.composite
def request_lists(draw: st.DrawFn) -> list[reference.Request]:
    found = []
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from([1, 1, 1, 4, 6]))
        size_lb = draw(st.one_of(st.integers(1, 20), st.integers(1, 90)))
        data = draw(st.binary(min_size=1, max_size=4)) * (size_lb * LB) if kind == 1 else b""
        no_hole = kind == 6 and draw(st.booleans())
        found.append(reference.Request(kind, draw(st.integers(0, 1000)), size_lb, data[: size_lb * LB], no_hole))
    return found


@settings(max_examples=60, deadline=None)
@given(
    request_lists(),
    st.sampled_from([512, 4096]),
    st.integers(16, 200),
    st.integers(0, 10**6),
    st.data(),
)
def test_packer_equals_reference(
    requests: list[reference.Request], pbs: int, ring_pb: int, lsid: int, data: st.DataObject
) -> None:
    record_max = data.draw(st.integers(1, min(ring_pb // 4, 30)))
    pack_max = data.draw(st.integers(record_max, 60))
    limit = lsid + data.draw(st.integers(0, ring_pb))
    table, buffer = tables(requests)
    batch = make(pbs, ring_pb, record_max, pack_max).begin(lsid, limit)
    index, done_b, records = batch.add(table, 0, 0, buffer, 64 * MIB)
    packs = reference.pack(
        requests,
        lsid=lsid,
        limit=limit,
        pbs=pbs,
        ring_pb=ring_pb,
        record_max_pb=record_max,
        pack_max_pb=pack_max,
    )
    assert batch.n_packs == len(packs)
    assert batch.lsid_end == (packs[-1].lsid + 1 + packs[-1].total_pb if packs else lsid) <= max(limit, lsid)
    got, expected = bytearray(ring_pb * pbs), bytearray(ring_pb * pbs)
    write(batch, got)
    reference.apply(packs, expected, pbs=pbs, ring_pb=ring_pb, salt=SALT)
    assert got == expected
    # The records that are handed on: all but paddings, with the place of their data.
    wanted = [(p, r) for p in packs for r in p.records if not r.flags & reference.PADDING]
    rows = list(RECORD.iter_unpack(records))
    assert len(rows) == len(wanted)
    for (row_lsid, offset_lb, data_b, size_lb, flags, _, local), (p, r) in zip(rows, wanted, strict=True):
        assert (row_lsid, local, offset_lb, size_lb) == (p.lsid + r.local, r.local, r.offset_lb, r.size_lb)
        assert flags & 0xFF == r.flags
        if r.data and not flags & 256:
            assert buffer[data_b : data_b + size_lb * LB] == r.data
    # Where it stopped: everything before is packed, nothing behind.
    taken_lb = sum(r.size_lb for _, r in wanted)
    assert taken_lb == sum(r.size_lb for r in requests[:index]) + done_b // LB


@settings(max_examples=25, deadline=None)
@given(request_lists(), st.sampled_from([512, 4096]), st.integers(0, 99), st.integers(1, 7))
def test_what_is_packed_in_pieces_is_a_valid_log(
    requests: list[reference.Request], pbs: int, start: int, step: int
) -> None:
    ring_pb = 5000
    packer = make(pbs, ring_pb, 8, 16)
    ring = bytearray(ring_pb * pbs)
    table, buffer = tables(requests)
    lsid, index, done_b = start, 0, 0
    while index < len(requests):
        batch = packer.begin(lsid, start + ring_pb)
        index, done_b, records = batch.add(table, index, done_b, buffer, step * pbs)
        assert records, "no progress"
        write(batch, ring)
        lsid = batch.lsid_end
    assert lsid < ring_pb
    found = scan(memoryview(ring)[start * pbs :], pbs, SALT, start)
    assert (found.lsid, found.stop) == (lsid, Stop.NOT_HEADER)


def test_around_the_record_limit_of_a_header() -> None:
    for pbs, limit in ((512, 15), (4096, 127)):
        requests = [reference.Request(1, i, 1, bytes(LB)) for i in range(limit + 1)]
        table, buffer = tables(requests)
        batch = make(pbs, 4000, 8, 1000).begin(0, 4000)
        batch.add(table[: limit * REQUEST.size], 0, 0, buffer, MIB)
        assert (batch.n_packs, batch.lsid_end) == (1, 1 + limit)
        batch.add(table, limit, 0, buffer, 2 * MIB)
        assert (batch.n_packs, batch.lsid_end) == (2, 3 + limit)


def test_a_batch_can_go_on_after_the_limit_was_hit_at_a_lap_boundary() -> None:
    # The header of the pack that does not fit is taken back; nothing may stick to the piece before it.
    packer = make(512, 16, 4, 4)
    batch = packer.begin(12, 17)
    one = tables([reference.Request(1, 0, 3, b"a" * 3 * LB)])
    assert batch.add(*one[:1], 0, 0, one[1], MIB)[0] == 1
    assert batch.lsid_end == 16
    assert batch.add(*one[:1], 0, 0, one[1], MIB) == (0, 0, b"")
    trim = tables([reference.Request(4, 0, 3)])
    assert batch.add(*trim[:1], 0, 0, trim[1], MIB)[0] == 1
    batch.seal()
    assert [(offset - RING_BEGIN_B) // 512 for offset, _ in batch.segments()] == [12, 0]


@pytest.mark.parametrize(
    "row",
    [
        REQUEST.pack(0, 0, 0, 0, 0, 1, 0, 0),  # empty
        REQUEST.pack(0, 1, 0, 512, 0, 1, 0, 0),  # not aligned
        REQUEST.pack(0, 0, 0, 511, 0, 1, 0, 0),
        REQUEST.pack(0, 0, 1, 512, 0, 1, 0, 0),  # outside
        REQUEST.pack(0, 0, 2**63, 512, 0, 1, 0, 0),
        REQUEST.pack(0, 0, 0, 512, 5, 1, 0, 0),  # refused already
        REQUEST.pack(0, 0, 0, 512, 0, 0, 0, 0),  # a read
        b"x" * 41,
    ],
)
def test_bad_requests_are_refused(row: bytes) -> None:
    batch = make(512, 64, 4, 4).begin(0, 64)
    with pytest.raises(ValueError, match=r"request|payload|table"):
        batch.add(row, 0, 0, bytes(512), MIB)


def test_misuse_is_refused() -> None:
    for bad in ((1000, 64, 4, 4), (512, 64, 17, 17), (512, 64, 4, 3), (512, 64, 0, 4), (4096, 4096, 257, 257)):
        with pytest.raises(ValueError, match=r"block size|records|packs"):
            make(*bad)
    batch = make(512, 64, 4, 4).begin(0, 64)
    row = tables([reference.Request(1, 0, 2, bytes(2 * LB))])
    for index, done_b in ((-1, 0), (2, 0), (0, 1024)):
        with pytest.raises(ValueError, match=r"table|position"):
            batch.add(row[0], index, done_b, row[1], MIB)
    with pytest.raises(ValueError, match="not sealed"):
        batch.write(0)
    batch.seal()
    with pytest.raises(ValueError, match="sealed"):
        batch.add(*row[:1], 0, 0, row[1], MIB)
    with pytest.raises(ValueError, match="sealed"):
        batch.seal()


def test_a_batch_is_filled_up_to_a_page() -> None:
    packer = make(512, 64, 8, 8)  # the ring begins at a page boundary
    for n_lb, limit, filled_lb in ((1, 64, 6), (1, 8, 6), (1, 7, 0), (1, 0, 0), (7, 64, 0), (8, 64, 7)):
        request = tables([reference.Request(1, 0, n_lb, b"x" * n_lb * LB)])
        batch = packer.begin(0, 64)
        batch.add(*request[:1], 0, 0, request[1], MIB)
        batch.seal(limit)
        ((offset_b, buffers),) = batch.segments()
        data = b"".join(buffers)
        assert (offset_b, len(data)) == (RING_BEGIN_B, (1 + n_lb + filled_lb) * LB)
        assert data[(1 + n_lb) * LB :] == bytes(filled_lb * LB)
        assert batch.size_b == len(data)
        assert batch.lsid_end == 1 + n_lb


def test_nothing_is_filled_behind_the_end_of_the_ring() -> None:
    packer = make(512, 62, 8, 8)  # the last page is not whole
    request = tables([reference.Request(1, 0, 3, b"x" * 3 * LB)])
    for lsid, pieces in ((56, [4]), (58, [4]), (54, [4]), (45, [11])):
        batch = packer.begin(lsid, 200)
        batch.add(*request[:1], 0, 0, request[1], MIB)
        batch.seal(200)
        sizes = [len(b"".join(buffers)) // LB for _, buffers in batch.segments()]
        assert sizes == pieces, lsid
    trim = tables([reference.Request(1, 0, 3, b"x" * 3 * LB), reference.Request(1, 0, 8, b"y" * 8 * LB)])
    batch = packer.begin(54, 200)
    batch.add(*trim[:1], 0, 0, trim[1], MIB)  # the second record is behind a padding, in the next lap
    batch.seal(200)
    ends = [offset_b // LB + len(b"".join(buffers)) // LB for offset_b, buffers in batch.segments()]
    assert ends[-1] * LB % 4096 == 0
    assert all(end * LB <= RING_BEGIN_B + 62 * LB for end in ends)


def test_write_equals_segments(tmp_path: object) -> None:
    rng = random.Random(1)
    path = f"{tmp_path}/log"
    packer = make(512, 500, 100, 100)
    requests = [reference.Request(1, i * 8, n, rng.randbytes(n * LB)) for i, n in enumerate([1, 99, 100, 150, 30])]
    table, buffer = tables(requests)
    batch = packer.begin(400, 900)
    assert batch.add(table, 0, 0, buffer, MIB)[0] == 5
    ring = bytearray(500 * 512)
    write(batch, ring)
    with open(path, "w+b") as file:
        file.truncate(RING_BEGIN_B + len(ring))
        batch.write(file.fileno())
        file.seek(RING_BEGIN_B)
        assert file.read() == ring
