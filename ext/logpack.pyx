"""Logpacks: checking headers, scanning and verifying whole buffers of packs, shrinking torn ones.

Source: docs/formats.md, "Logpack". Twin: tests/reference/logpack.py. Golden tests: tests/golden/test_log.py.

    header, little-endian          record i, at 24 + 32 * i
    off size field                 off size field
      0   4  checksum, whole PB      0   4  checksum of the data
      4   2  sector type: 3          4   4  flags
      6   2  total_io_size [PB]      8   8  offset [LB]
      8   8  logpack lsid           16   4  io_size [LB]
     16   2  n_records              20   2  lsid_local
     18   2  n_padding              22   2  reserved
     20   4  reserved               24   8  lsid
"""

from enum import IntEnum

from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE, PyByteArray_Resize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from walb cimport (
    WALB_DISCARD, WALB_EXIST, WALB_IO_MAX_LB, WALB_LB, WALB_PACK_HEADER_B, WALB_PACK_RECORD_B, WALB_PADDING,
    WALB_TYPE_LOGPACK, bytes_of, structs_of, walb_checksum, walb_load16, walb_load32, walb_load64, walb_log_record,
    walb_store16, walb_store32,
)


class Stop(IntEnum):
    """Why a scan ended."""

    MORE = 0  # the next pack (or record) is not wholly in the buffer
    END = 1  # an end header, or in `scan_data` the end of the pack
    NOT_HEADER = 2  # no header here: wrong type or checksum, or a header without records
    WRONG_LSID = 3  # a header with a good checksum, but of another place in the log
    BAD_HEADER = 4  # a header with a good checksum and the right lsid, whose fields contradict each other
    BAD_DATA = 5  # the data of a record does not match its checksum


class Fault(IntEnum):
    """What is wrong with a header or its data."""

    NONE = 0
    TYPE = 1
    CHECKSUM = 2
    EMPTY = 3
    LSID = 4
    N_RECORDS = 5
    N_PADDING = 6
    LSID_OVERFLOW = 7
    RECORD_FLAGS = 8
    RECORD_SIZE = 9
    RECORD_OFFSET = 10
    RECORD_LSID = 11
    TOTAL_SIZE = 12
    DATA_CHECKSUM = 13


cdef enum:
    S_MORE = 0
    S_END = 1
    S_NOT_HEADER = 2
    S_WRONG_LSID = 3
    S_BAD_HEADER = 4
    S_BAD_DATA = 5

cdef enum:
    F_NONE = 0
    F_TYPE = 1
    F_CHECKSUM = 2
    F_EMPTY = 3
    F_LSID = 4
    F_N_RECORDS = 5
    F_N_PADDING = 6
    F_LSID_OVERFLOW = 7
    F_RECORD_FLAGS = 8
    F_RECORD_SIZE = 9
    F_RECORD_OFFSET = 10
    F_RECORD_LSID = 11
    F_TOTAL_SIZE = 12
    F_DATA_CHECKSUM = 13

cdef uint64_t INVALID_LSID = 0xffffffffffffffff


cdef inline void load_record(const uint8_t* header, uint32_t i, walb_log_record* r) noexcept nogil:
    cdef const uint8_t* p = header + WALB_PACK_HEADER_B + WALB_PACK_RECORD_B * i
    r.checksum = walb_load32(p)
    r.flags = walb_load32(p + 4)
    r.offset_lb = walb_load64(p + 8)
    r.io_size_lb = walb_load32(p + 16)
    r.lsid_local = walb_load16(p + 20)
    r.lsid = walb_load64(p + 24)
    r.data_b = 0


cdef inline uint64_t owned_pb(const walb_log_record* r, uint32_t pbs) noexcept nogil:
    """How many PBs of the pack belong to a record."""
    if r.flags & WALB_DISCARD:
        return 0
    return (<uint64_t>r.io_size_lb * WALB_LB + pbs - 1) // pbs


cdef int check_seal(const uint8_t* p, uint32_t pbs, uint32_t salt) noexcept nogil:
    """Fault of what tells a header from any other block: its type and its checksum."""
    if walb_load16(p + 4) != WALB_TYPE_LOGPACK:
        return F_TYPE
    if walb_checksum(p, pbs, salt) != 0:
        return F_CHECKSUM
    return F_NONE


cdef int check_fields(const uint8_t* p, uint32_t pbs, int* record) noexcept nogil:
    """Fault of the fields of a sealed block; `record` says in which record, -1 for the header itself."""
    cdef uint32_t total = walb_load16(p + 6), n = walb_load16(p + 16), n_padding = walb_load16(p + 18)
    cdef uint64_t lsid = walb_load64(p + 8), local = 1
    cdef uint32_t i, paddings = 0, pb_lb = pbs // WALB_LB
    cdef walb_log_record r
    record[0] = -1
    if n == 0:
        return F_NONE if lsid == INVALID_LSID and total == 0 and n_padding == 0 else F_EMPTY
    if n > (pbs - WALB_PACK_HEADER_B) // WALB_PACK_RECORD_B:
        return F_N_RECORDS
    if n_padding > 1:
        return F_N_PADDING
    if lsid > INVALID_LSID - 2 - total:  # the next lsid has to be a valid one
        return F_LSID_OVERFLOW
    for i in range(n):
        load_record(p, i, &r)
        record[0] = i
        if not r.flags & WALB_EXIST or r.flags & ~<uint32_t>7 or r.flags == 7:
            return F_RECORD_FLAGS
        if r.flags & WALB_PADDING:
            paddings += 1
            if r.io_size_lb > WALB_IO_MAX_LB or r.io_size_lb % pb_lb:
                return F_RECORD_SIZE
        else:
            if r.io_size_lb == 0:
                return F_RECORD_SIZE
            if not r.flags & WALB_DISCARD and r.io_size_lb > WALB_IO_MAX_LB:
                return F_RECORD_SIZE
            if r.offset_lb > (INVALID_LSID >> 9) - r.io_size_lb:
                return F_RECORD_OFFSET
        if r.lsid_local != local or r.lsid != lsid + local:
            return F_RECORD_LSID
        local += owned_pb(&r, pbs)
        if local - 1 > total:
            return F_TOTAL_SIZE
    record[0] = -1
    if local - 1 != total:
        return F_TOTAL_SIZE
    if paddings != n_padding:
        return F_N_PADDING
    return F_NONE


cdef struct record_list:
    walb_log_record* items
    size_t count
    size_t room


cdef int push(record_list* rs, const walb_log_record* r) noexcept nogil:
    cdef walb_log_record* items
    cdef size_t room
    if rs.count == rs.room:
        room = rs.room * 2 if rs.room else 256
        items = <walb_log_record*>realloc(rs.items, room * sizeof(walb_log_record))
        if items == NULL:
            return -1
        rs.items = items
        rs.room = room
    rs.items[rs.count] = r[0]
    rs.count += 1
    return 0


cdef append_records(bytearray out, record_list* rs):
    cdef Py_ssize_t old = PyByteArray_GET_SIZE(out), size = rs.count * sizeof(walb_log_record)
    if size:
        PyByteArray_Resize(out, old + size)
        memcpy(PyByteArray_AS_STRING(out) + old, rs.items, size)


cdef class Scan:
    """The outcome of a scan; see logpack.pyi for the meaning of each field."""

    cdef readonly uint64_t lsid
    cdef readonly Py_ssize_t consumed_b
    cdef readonly Py_ssize_t n_packs
    cdef readonly Py_ssize_t n_records
    cdef readonly Py_ssize_t need_b
    cdef readonly Py_ssize_t trouble_b
    cdef readonly int record
    cdef int _stop
    cdef int _fault

    @property
    def stop(self):
        return Stop(self._stop)

    @property
    def fault(self):
        return Fault(self._fault)

    def __repr__(self):
        return (f"Scan(stop={self.stop.name}, lsid={self.lsid}, consumed_b={self.consumed_b}, "
                f"n_packs={self.n_packs}, n_records={self.n_records}, need_b={self.need_b}, "
                f"trouble_b={self.trouble_b}, fault={self.fault.name}, record={self.record})")


cdef check_pbs(uint32_t pbs):
    if pbs == 0 or pbs % WALB_LB or pbs > 65536:
        raise ValueError("pbs must be a multiple of 512 up to 65536")


# Verify records [first, n) whose data begins at `data`, as far as they are whole. Returns the fault, moves
# `first` and `pos` to the record reached and its data. `base` is added to data_b. -1: no memory.
cdef int verify_records(const uint8_t* header, uint32_t pbs, uint32_t salt, bint verify, const uint8_t* data,
                        size_t size, size_t base, uint32_t* first, size_t* pos,
                        record_list* rs) noexcept nogil:
    cdef uint32_t n = walb_load16(header + 16)
    cdef walb_log_record r
    cdef size_t own
    while first[0] < n:
        load_record(header, first[0], &r)
        own = owned_pb(&r, pbs) * pbs
        if size - pos[0] < own:
            return F_NONE
        if not r.flags & (WALB_DISCARD | WALB_PADDING):
            r.data_b = base + pos[0]
            if verify and walb_checksum(data + pos[0], <size_t>r.io_size_lb * WALB_LB, salt) != r.checksum:
                return F_DATA_CHECKSUM
        if rs != NULL and push(rs, &r):
            return -1
        pos[0] += own
        first[0] += 1
    return F_NONE


def scan(const uint8_t[::1] buf not None, uint32_t pbs, uint32_t salt, uint64_t lsid, *,
         bint verify_data=True, bytearray records=None):
    check_pbs(pbs)
    cdef size_t size = buf.shape[0], at = 0, pos, kept
    cdef const uint8_t* base = bytes_of(buf)
    cdef const uint8_t* p
    cdef record_list rs = record_list(NULL, 0, 0)
    cdef record_list* want = &rs if records is not None else NULL
    cdef Scan s = Scan.__new__(Scan)
    cdef int stop = S_MORE, fault = F_NONE, record = -1
    cdef uint32_t first, n
    cdef size_t need = 0, trouble = 0, n_packs = 0, n_records = 0
    with nogil:
        while True:
            trouble = at
            need = pbs
            record = -1
            fault = F_NONE
            if size - at < pbs:
                stop = S_MORE
                break
            p = base + at
            fault = check_seal(p, pbs, salt)
            if fault:
                stop = S_NOT_HEADER
                break
            n = walb_load16(p + 16)
            if n == 0:
                fault = check_fields(p, pbs, &record)
                stop = S_NOT_HEADER if fault else S_END
                break
            if walb_load64(p + 8) != lsid:
                fault = F_LSID
                stop = S_WRONG_LSID
                break
            fault = check_fields(p, pbs, &record)
            if fault:
                stop = S_BAD_HEADER
                break
            need = (1 + <size_t>walb_load16(p + 6)) * pbs
            if size - at < need:
                stop = S_MORE
                break
            first = 0
            pos = 0
            kept = rs.count
            fault = verify_records(p, pbs, salt, verify_data, p + pbs, need - pbs, at + pbs, &first, &pos, want)
            if fault:
                stop = S_BAD_DATA
                record = first
                trouble = at + pbs + pos
                rs.count = kept
                break
            n_packs += 1
            n_records += n
            at += need
            lsid += need // pbs
    try:
        if fault < 0:
            raise MemoryError
        if records is not None:
            append_records(records, &rs)
    finally:
        free(rs.items)
    s.lsid = lsid
    s.consumed_b = at
    s.n_packs = n_packs
    s.n_records = n_records
    s.need_b = need if stop == S_MORE else 0
    s.trouble_b = trouble
    s.record = record
    s._stop = stop
    s._fault = fault
    return s


def scan_data(const uint8_t[::1] header not None, uint32_t pbs, uint32_t salt, const uint8_t[::1] data not None,
              uint32_t first, *, bint verify_data=True, bytearray records=None):
    check_valid(header, pbs, salt)
    cdef const uint8_t* p = &header[0]
    cdef uint32_t n = walb_load16(p + 16), reached = first
    if first > n:
        raise ValueError("the pack has fewer records")
    cdef size_t size = data.shape[0], pos = 0
    cdef const uint8_t* base = bytes_of(data)
    cdef record_list rs = record_list(NULL, 0, 0)
    cdef record_list* want = &rs if records is not None else NULL
    cdef Scan s = Scan.__new__(Scan)
    cdef walb_log_record r
    cdef int fault
    with nogil:
        fault = verify_records(p, pbs, salt, verify_data, base, size, 0, &reached, &pos, want)
    try:
        if fault < 0:
            raise MemoryError
        if records is not None:
            append_records(records, &rs)
    finally:
        free(rs.items)
    s.consumed_b = pos
    s.n_records = reached - first
    s.record = reached
    s.trouble_b = pos
    s._fault = fault
    if reached == n:
        s.lsid = walb_load64(p + 8) + 1 + walb_load16(p + 6)
        s._stop = S_END
    else:
        load_record(p, reached, &r)
        s.lsid = r.lsid
        s._stop = S_BAD_DATA if fault else S_MORE
        s.need_b = 0 if fault else owned_pb(&r, pbs) * pbs
    return s


cdef check_valid(const uint8_t[::1] header, uint32_t pbs, uint32_t salt):
    cdef int record
    check_pbs(pbs)
    if header.shape[0] != pbs or check_seal(&header[0], pbs, salt) or check_fields(&header[0], pbs, &record):
        raise ValueError("not a valid logpack header")


def check_header(const uint8_t[::1] block not None, uint32_t pbs, uint32_t salt):
    check_pbs(pbs)
    if block.shape[0] != pbs:
        raise ValueError("a header is one PB")
    cdef int record = -1
    cdef int fault = check_seal(&block[0], pbs, salt)
    if not fault:
        fault = check_fields(&block[0], pbs, &record)
    return Fault(fault), record


def shrink(const uint8_t[::1] header not None, uint32_t pbs, uint32_t salt, uint32_t n_records):
    check_valid(header, pbs, salt)
    cdef uint32_t n = walb_load16(&header[0] + 16), i
    if not 0 < n_records <= n:
        raise ValueError("a pack shrinks to at least one record and at most those it has")
    cdef bytearray out = bytearray(header)
    cdef uint8_t* p = <uint8_t*>PyByteArray_AS_STRING(out)
    cdef walb_log_record r
    cdef uint32_t total = 0, n_padding = 0
    for i in range(n_records):
        load_record(p, i, &r)
        total += owned_pb(&r, pbs)
        n_padding += 1 if r.flags & WALB_PADDING else 0
    memset(p + WALB_PACK_HEADER_B + WALB_PACK_RECORD_B * n_records, 0, WALB_PACK_RECORD_B * (n - n_records))
    walb_store32(p, 0)
    walb_store16(p + 6, total)
    walb_store16(p + 16, n_records)
    walb_store16(p + 18, n_padding)
    walb_store32(p, walb_checksum(p, pbs, salt))
    return bytes(out)


def find_headers(const uint8_t[::1] buf not None, uint32_t pbs, uint32_t salt):
    check_pbs(pbs)
    cdef size_t i = 0, n = buf.shape[0] // pbs
    cdef const uint8_t* base = bytes_of(buf)
    cdef bint found
    result = []
    while True:
        found = False
        with nogil:
            while i < n:
                if walb_load16(base + i * pbs + 16) != 0 and check_seal(base + i * pbs, pbs, salt) == F_NONE:
                    found = True
                    break
                i += 1
        if not found:
            return result
        result.append((i, walb_load64(base + i * pbs + 8)))
        i += 1


def find_claims(const uint8_t[::1] buf not None, uint32_t pbs, uint64_t lsid):
    check_pbs(pbs)
    cdef size_t i = 0, n = buf.shape[0] // pbs
    cdef const uint8_t* base = bytes_of(buf)
    cdef bint found
    result = []
    while True:
        found = False
        with nogil:
            while i < n:
                if walb_load16(base + i * pbs + 4) == WALB_TYPE_LOGPACK and walb_load64(base + i * pbs + 8) == lsid + i:
                    found = True
                    break
                i += 1
        if not found:
            return result
        result.append(i)
        i += 1


def bad_records(const uint8_t[::1] data not None, uint32_t salt, const uint8_t[::1] records not None):
    cdef const walb_log_record* r = <const walb_log_record*>structs_of(records, sizeof(walb_log_record))
    cdef Py_ssize_t i = 0, n = records.shape[0] // sizeof(walb_log_record)
    cdef size_t size = data.shape[0]
    cdef const uint8_t* base = bytes_of(data)
    cdef int outside = 0
    found = []
    while i < n:
        with nogil:
            while i < n:
                if not r[i].flags & (WALB_DISCARD | WALB_PADDING):
                    if r[i].data_b > size or <size_t>r[i].io_size_lb * WALB_LB > size - r[i].data_b:
                        outside = 1
                        break
                    if walb_checksum(base + r[i].data_b, <size_t>r[i].io_size_lb * WALB_LB, salt) != r[i].checksum:
                        break
                i += 1
        if outside:
            raise ValueError("a record points outside the data")
        if i < n:
            found.append(i)
        i += 1
    return found
