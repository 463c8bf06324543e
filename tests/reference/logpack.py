"""Logpacks as the specification reads: the twin of walbd.ext.logpack.

Everything returns plain tuples and names (of walbd.ext.logpack.Stop and Fault), so that the two can be compared.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.reference.checksum import checksum

INVALID_LSID = 2**64 - 1
EXIST, PADDING, DISCARD = 1, 2, 4


def u16(block: bytes, at: int) -> int:
    return int.from_bytes(block[at : at + 2], "little")


def u32(block: bytes, at: int) -> int:
    return int.from_bytes(block[at : at + 4], "little")


def u64(block: bytes, at: int) -> int:
    return int.from_bytes(block[at : at + 8], "little")


class Record(NamedTuple):
    checksum: int
    flags: int
    offset_lb: int
    io_size_lb: int
    lsid_local: int
    lsid: int

    def owned_pb(self, pbs: int) -> int:
        return 0 if self.flags & DISCARD else (self.io_size_lb * 512 + pbs - 1) // pbs


def record(block: bytes, i: int) -> Record:
    at = 24 + 32 * i
    return Record(
        u32(block, at),
        u32(block, at + 4),
        u64(block, at + 8),
        u32(block, at + 16),
        u16(block, at + 20),
        u64(block, at + 24),
    )


def records(block: bytes) -> list[Record]:
    return [record(block, i) for i in range(u16(block, 16))]


def check_header(block: bytes, pbs: int, salt: int) -> tuple[str, int]:
    if u16(block, 4) != 3:
        return "TYPE", -1
    if checksum(block, salt) != 0:
        return "CHECKSUM", -1
    return check_fields(block, pbs)


def check_fields(block: bytes, pbs: int) -> tuple[str, int]:
    total, lsid, n, n_padding = u16(block, 6), u64(block, 8), u16(block, 16), u16(block, 18)
    if n == 0:
        return ("NONE" if (lsid, total, n_padding) == (INVALID_LSID, 0, 0) else "EMPTY"), -1
    if n > (pbs - 24) // 32:
        return "N_RECORDS", -1
    if n_padding > 1:
        return "N_PADDING", -1
    if lsid + 1 + total >= INVALID_LSID:
        return "LSID_OVERFLOW", -1
    local = 1
    for i, r in enumerate(records(block)):
        if r.flags not in (EXIST, EXIST | PADDING, EXIST | DISCARD):
            return "RECORD_FLAGS", i
        if r.flags & PADDING:
            size_good = r.io_size_lb <= 65535 and r.io_size_lb * 512 % pbs == 0
        elif r.flags & DISCARD:
            size_good = r.io_size_lb > 0
        else:
            size_good = 0 < r.io_size_lb <= 65535
        if not size_good:
            return "RECORD_SIZE", i
        if not r.flags & PADDING and (r.offset_lb + r.io_size_lb) * 512 >= 2**64:
            return "RECORD_OFFSET", i
        if (r.lsid_local, r.lsid) != (local, lsid + local):
            return "RECORD_LSID", i
        local += r.owned_pb(pbs)
        if local - 1 > total:
            return "TOTAL_SIZE", i
    if local - 1 != total:
        return "TOTAL_SIZE", -1
    if sum(bool(r.flags & PADDING) for r in records(block)) != n_padding:
        return "N_PADDING", -1
    return "NONE", -1


class Found(NamedTuple):
    """Struct fields of one walb_log_record."""

    lsid: int
    offset_lb: int
    data_b: int
    io_size_lb: int
    flags: int
    checksum: int
    lsid_local: int


class Scan(NamedTuple):
    stop: str
    fault: str
    lsid: int
    consumed_b: int
    n_packs: int
    n_records: int
    need_b: int
    trouble_b: int
    record: int


def has_data(r: Record) -> bool:
    return not r.flags & (PADDING | DISCARD)


def good_records(
    block: bytes, pbs: int, salt: int, data: bytes, first: int, verify: bool, base: int
) -> tuple[list[Found], int, str]:
    """Records from `first` on that are whole and good, the bytes they own, and the fault of the next one."""
    found: list[Found] = []
    at = 0
    for r in records(block)[first:]:
        own = r.owned_pb(pbs) * pbs
        if at + own > len(data):
            break
        if has_data(r) and verify and checksum(data[at : at + r.io_size_lb * 512], salt) != r.checksum:
            return found, at, "DATA_CHECKSUM"
        data_b = base + at if has_data(r) else 0
        found.append(Found(r.lsid, r.offset_lb, data_b, r.io_size_lb, r.flags, r.checksum, r.lsid_local))
        at += own
    return found, at, "NONE"


def scan(buf: bytes, pbs: int, salt: int, lsid: int, verify: bool = True) -> tuple[Scan, list[Found]]:
    at = n_packs = 0
    out: list[Found] = []

    def done(
        stop: str, fault: str = "NONE", need: int = 0, trouble: int | None = None, at_record: int = -1
    ) -> Scan:
        return Scan(stop, fault, lsid, at, n_packs, len(out), need, at if trouble is None else trouble, at_record)

    while True:
        block = buf[at : at + pbs]
        if len(block) < pbs:
            return done("MORE", need=pbs), out
        fault, at_record = check_header(block, pbs, salt)
        if fault in ("TYPE", "CHECKSUM"):
            return done("NOT_HEADER", fault), out
        if u16(block, 16) == 0:
            return (done("NOT_HEADER", fault) if fault != "NONE" else done("END")), out
        if u64(block, 8) != lsid:
            return done("WRONG_LSID", "LSID"), out
        if fault != "NONE":
            return done("BAD_HEADER", fault, at_record=at_record), out
        size = (1 + u16(block, 6)) * pbs
        if len(buf) - at < size:
            return done("MORE", need=size), out
        found, used, fault = good_records(block, pbs, salt, buf[at + pbs : at + size], 0, verify, at + pbs)
        if fault != "NONE":
            return done("BAD_DATA", fault, trouble=at + pbs + used, at_record=len(found)), out
        out += found
        n_packs += 1
        at += size
        lsid += size // pbs


def scan_data(
    block: bytes, pbs: int, salt: int, data: bytes, first: int, verify: bool = True
) -> tuple[Scan, list[Found]]:
    found, used, fault = good_records(block, pbs, salt, data, first, verify, 0)
    reached = first + len(found)
    if reached == u16(block, 16):
        lsid = u64(block, 8) + 1 + u16(block, 6)
        return Scan("END", fault, lsid, used, 0, len(found), 0, used, reached), found
    next_record = record(block, reached)
    stop = "MORE" if fault == "NONE" else "BAD_DATA"
    need = next_record.owned_pb(pbs) * pbs if stop == "MORE" else 0
    return Scan(stop, fault, next_record.lsid, used, 0, len(found), need, used, reached), found


def shrink(block: bytes, pbs: int, salt: int, n_records: int) -> bytes:
    kept = records(block)[:n_records]
    out = bytearray(block[: 24 + 32 * n_records] + bytes(pbs - 24 - 32 * n_records))
    out[0:4] = bytes(4)
    out[6:8] = sum(r.owned_pb(pbs) for r in kept).to_bytes(2, "little")
    out[16:18] = n_records.to_bytes(2, "little")
    out[18:20] = sum(bool(r.flags & PADDING) for r in kept).to_bytes(2, "little")
    out[0:4] = checksum(bytes(out), salt).to_bytes(4, "little")
    return bytes(out)


def find_headers(buf: bytes, pbs: int, salt: int) -> list[tuple[int, int]]:
    found = []
    for i in range(len(buf) // pbs):
        block = buf[i * pbs : (i + 1) * pbs]
        if u16(block, 4) == 3 and u16(block, 16) != 0 and checksum(block, salt) == 0:
            found.append((i, u64(block, 8)))
    return found


def find_claims(buf: bytes, pbs: int, lsid: int) -> list[int]:
    blocks = [buf[at : at + pbs] for at in range(0, len(buf) // pbs * pbs, pbs)]
    return [i for i, block in enumerate(blocks) if u16(block, 4) == 3 and u64(block, 8) == lsid + i]


def bad_records(data: bytes, salt: int, found: list[Found]) -> list[int]:
    return [
        i
        for i, r in enumerate(found)
        if not r.flags & (PADDING | DISCARD)
        and checksum(data[r.data_b : r.data_b + r.io_size_lb * 512], salt) != r.checksum
    ]
