"""Packing requests into logpacks, as docs/formats.md ("Logpack", "Logpacks in the ring") tells it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.reference.checksum import checksum
from walbd.units import LB

WRITE, TRIM, WRITE_ZEROES = 1, 4, 6
NO_HOLE = 2
EXIST, PADDING, DISCARD = 1, 2, 4


@dataclass
class Request:
    """One request; `data` for writes."""

    kind: int
    offset_lb: int
    size_lb: int
    data: bytes = b""
    no_hole: bool = False


@dataclass
class Record:
    """One record of a pack, with its data blocks."""

    flags: int
    offset_lb: int
    size_lb: int
    local: int
    data: bytes = b""


@dataclass
class Pack:
    """One pack under construction."""

    lsid: int
    records: list[Record] = field(default_factory=list)
    total_pb: int = 0


def split(request: Request, record_max_lb: int) -> list[Record]:
    """Cut a request into records (without places)."""
    if request.kind == TRIM or (request.kind == WRITE_ZEROES and not request.no_hole):
        return [Record(EXIST | DISCARD, request.offset_lb, request.size_lb, 0)]
    data = request.data if request.kind == WRITE else bytes(request.size_lb * LB)
    return [
        Record(
            EXIST,
            request.offset_lb + at,
            min(record_max_lb, request.size_lb - at),
            0,
            data[at * LB : (at + record_max_lb) * LB],
        )
        for at in range(0, request.size_lb, record_max_lb)
    ]


def pack(
    requests: list[Request],
    *,
    lsid: int,
    limit: int,
    pbs: int,
    ring_pb: int,
    record_max_pb: int,
    pack_max_pb: int,
) -> list[Pack]:
    """Return the packs, as many as end at or before `limit`."""
    n_max = (pbs - 24) // 32
    packs: list[Pack] = []
    for request in requests:
        for record in split(request, record_max_pb * pbs // LB):
            n_pb = 0 if record.flags & DISCARD else -(-record.size_lb * LB // pbs)
            current = packs[-1] if packs else None
            if current is not None:
                at = current.lsid + 1 + current.total_pb
                rest = ring_pb - at % ring_pb
                pad = rest if n_pb and rest < n_pb else 0
                padded = any(r.flags & PADDING for r in current.records)
                if (
                    len(current.records) + 1 + bool(pad) > n_max
                    or current.total_pb + pad + n_pb > pack_max_pb
                    or (pad and padded)
                ):
                    current = None
            if current is None:
                begin = packs[-1].lsid + 1 + packs[-1].total_pb if packs else lsid
                current = Pack(begin)
                at = begin + 1
                rest = ring_pb - at % ring_pb
                pad = rest if n_pb and rest < n_pb else 0
                fresh = True
            else:
                fresh = False
            if at + pad + n_pb > limit:
                return packs
            if fresh:
                packs.append(current)
            if pad:
                current.records.append(Record(EXIST | PADDING, 0, pad * pbs // LB, current.total_pb + 1))
                current.total_pb += pad
            record.local = current.total_pb + 1
            current.records.append(record)
            current.total_pb += n_pb
    return packs


def header(pack: Pack, pbs: int, salt: int) -> bytes:
    """Return the header block of a pack."""
    out = bytearray(pbs)
    out[4:6] = (3).to_bytes(2, "little")
    out[6:8] = pack.total_pb.to_bytes(2, "little")
    out[8:16] = pack.lsid.to_bytes(8, "little")
    out[16:18] = len(pack.records).to_bytes(2, "little")
    out[18:20] = sum(bool(r.flags & PADDING) for r in pack.records).to_bytes(2, "little")
    for i, r in enumerate(pack.records):
        raw = checksum(r.data, salt).to_bytes(4, "little") if r.data else bytes(4)
        raw += r.flags.to_bytes(4, "little") + r.offset_lb.to_bytes(8, "little")
        raw += r.size_lb.to_bytes(4, "little") + r.local.to_bytes(2, "little") + bytes(2)
        raw += (pack.lsid + r.local).to_bytes(8, "little")
        out[24 + 32 * i : 56 + 32 * i] = raw
    out[0:4] = checksum(bytes(out), salt).to_bytes(4, "little")
    return bytes(out)


def apply(packs: list[Pack], ring: bytearray, *, pbs: int, ring_pb: int, salt: int) -> None:
    """Write packs into the bytes of a ring; paddings are left as they are, short last blocks end in zeros."""
    for p in packs:
        at = p.lsid % ring_pb * pbs
        ring[at : at + pbs] = header(p, pbs, salt)
        for r in p.records:
            if r.data:
                data = r.data + bytes(-len(r.data) % pbs)
                at = (p.lsid + r.local) % ring_pb * pbs
                assert at + len(data) <= ring_pb * pbs
                ring[at : at + len(data)] = data
