"""Building logpacks: what NBD requests become in the ring of a log device.

A `Packer` knows the ring; `begin` gives a `LogBatch`, which takes requests in order and lays them out as packs
that follow each other from an lsid on. `seal` computes the checksums, `write` puts the batch into the ring.
Payloads are not copied: the batch points into the receive buffers and keeps them alive.
Source: docs/formats.md, "Logpack"; docs/device.md, "Packing". Twin: tests/reference/packer.py.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyObject_GetBuffer, PyBuffer_Release
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from posix.uio cimport iovec

from device cimport (
    NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_FLAG_NO_HOLE, WALB_ZEROS_B, walb_pwritev_all, walb_request,
    walb_zeros,
)
from walb cimport (
    WALB_DISCARD, WALB_EXIST, WALB_LB, WALB_PACK_HEADER_B, WALB_PACK_RECORD_B, WALB_PADDING, WALB_TYPE_LOGPACK,
    WALB_ZEROS, walb_checksum, walb_log_record, walb_store16, walb_store32, walb_store64,
)


cdef enum:
    PB_MAX = 65535  # of a pack's data
    PAGE_B = 4096
    GIL_KEEP_B = 256 << 10  # work on less than this keeps the GIL


cdef struct _Record:  # a record with data, whose checksum is still to be computed
    const uint8_t* data
    uint32_t size_b
    uint8_t* field  # its record in the header


cdef struct _Segment:  # one contiguous write
    uint64_t offset_b
    size_t iov_begin


cdef class Packer:
    """The geometry of a ring, and the limits of packs."""

    cdef readonly int pbs
    cdef readonly uint64_t ring_pb
    cdef readonly uint64_t ring_begin_b
    cdef readonly uint32_t salt
    cdef readonly uint32_t record_max_pb
    cdef readonly uint32_t pack_max_pb
    cdef uint32_t n_records_max

    def __init__(self, *, int pbs, uint64_t ring_pb, uint64_t ring_begin_b, uint32_t salt,
                 uint32_t record_max_pb, uint32_t pack_max_pb):
        """`ring_begin_b`: where the ring starts on the log device. A larger write is split into records of
        `record_max_pb`; a pack takes more records while its data stay within `pack_max_pb`. Raises ValueError.
        """
        if pbs not in (512, 1024, 2048, 4096):
            raise ValueError("bad physical block size")
        if not 1 <= record_max_pb <= ring_pb // 4 or record_max_pb * <uint64_t>pbs > <uint64_t>WALB_ZEROS_B:
            raise ValueError("records must fit in a quarter of the ring and in 1 MiB")
        if not record_max_pb <= pack_max_pb <= PB_MAX // 2:
            raise ValueError("packs must take the largest record and stay below 32768 blocks")
        self.pbs = pbs
        self.ring_pb = ring_pb
        self.ring_begin_b = ring_begin_b
        self.salt = salt
        self.record_max_pb = record_max_pb
        self.pack_max_pb = pack_max_pb
        self.n_records_max = (pbs - WALB_PACK_HEADER_B) // WALB_PACK_RECORD_B

    def begin(self, uint64_t lsid, uint64_t lsid_limit):
        """Start a batch whose first pack is at `lsid`, and whose last must end at or before `lsid_limit`."""
        cdef LogBatch batch = LogBatch.__new__(LogBatch)
        batch._packer = self
        batch.lsid_begin = lsid
        batch.lsid_end = lsid
        batch._limit = lsid_limit
        batch._held = []
        return batch


cdef class LogBatch:
    """Packs under construction. Use: `add` any number of times, then `seal`, then `write` or `segments`."""

    cdef Packer _packer
    cdef readonly uint64_t lsid_begin
    cdef readonly uint64_t lsid_end  # of the packs so far
    cdef readonly uint64_t size_b  # what `write` will write
    cdef readonly uint64_t data_b  # of it, payload
    cdef readonly uint32_t n_packs
    cdef uint64_t _limit
    cdef list _held  # keeps the payloads alive
    cdef bint _sealed

    cdef uint8_t** _headers
    cdef size_t _headers_cap
    cdef iovec* _iov
    cdef size_t _n_iov
    cdef size_t _iov_cap
    cdef _Record* _records
    cdef size_t _n_records
    cdef size_t _records_cap
    cdef _Segment* _segments
    cdef size_t _n_segments
    cdef size_t _segments_cap
    cdef uint64_t _next_b  # where the last segment ends on the device

    cdef uint8_t* _header  # of the open pack; NULL: none
    cdef uint64_t _pack_lsid
    cdef uint32_t _total_pb
    cdef uint32_t _n_pack_records
    cdef uint32_t _n_padding

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.n_packs):
            free(self._headers[i])
        free(self._headers)
        free(self._iov)
        free(self._records)
        free(self._segments)

    def add(self, requests not None, Py_ssize_t index, uint64_t done_b, data not None, uint64_t size_max_b):
        """Take writes, trims and zero-writes from `requests` on from item `index`, of which `done_b` [byte] are done.

        `requests`: walb_request table, shape (n,), all valid (error 0) and aligned to 512 bytes; payloads in
        `data`. Stops at the ring limit, or when the batch has reached `size_max_b`. Returns (index, done_b,
        records): where it stopped, and the walb_log_record table, shape (m,), of what it took (no paddings),
        `data_b` into `data`. Raises ValueError on a bad table, MemoryError; the batch is useless after either.
        """
        cdef _Held table = _Held(requests)
        cdef _Held held = _Held(data)
        cdef const walb_request* q = <const walb_request*>table.view.buf
        cdef Py_ssize_t n = table.view.len // sizeof(walb_request)
        cdef Py_ssize_t i
        cdef Py_ssize_t n_out = 0
        cdef Py_ssize_t n_out_max = 0
        cdef uint64_t record_max_b = <uint64_t>self._packer.record_max_pb * self._packer.pbs
        cdef walb_log_record* out
        if self._sealed:
            raise ValueError("the batch is sealed")
        if table.view.len % sizeof(walb_request) or not 0 <= index <= n:
            raise ValueError("bad table of requests")
        for i in range(index, n):
            if q[i].length_b == 0 or q[i].length_b % WALB_LB or q[i].offset_b % WALB_LB or q[i].error:
                raise ValueError("bad request")
            if q[i].type == NBD_CMD_WRITE:
                if q[i].data_b > <uint64_t>held.view.len or q[i].length_b > <uint64_t>held.view.len - q[i].data_b:
                    raise ValueError("payload reaches outside its buffer")
            elif q[i].type != NBD_CMD_TRIM and q[i].type != NBD_CMD_WRITE_ZEROES:
                raise ValueError("request of a wrong type")
        if index < n and done_b >= q[index].length_b:
            raise ValueError("bad position in a request")
        # A request gives one record for each begun record_max_b, and at most size_max_b is taken (and one more).
        for i in range(index, n):
            n_out_max += 1 + <Py_ssize_t>(min(<uint64_t>q[i].length_b, size_max_b) // record_max_b)
        records = PyBytes_FromStringAndSize(NULL, n_out_max * sizeof(walb_log_record))
        out = <walb_log_record*>PyBytes_AS_STRING(records)
        i = index
        while i < n and self.size_b < size_max_b:
            if self._take(&q[i], &done_b, <const uint8_t*>held.view.buf, record_max_b, &out[n_out]) == 0:
                break
            n_out += 1
            if done_b >= q[i].length_b:
                done_b = 0
                i += 1
        if n_out:
            self._held.append(held)
        return i, done_b, records[: n_out * sizeof(walb_log_record)]

    cdef int _take(self, const walb_request* q, uint64_t* done_b, const uint8_t* base, uint64_t record_max_b,
                   walb_log_record* out) except -1:
        """Make one record from the rest of a request; return 0 when the ring limit is reached, else 1."""
        cdef uint64_t size_b = q.length_b - done_b[0]
        cdef uint32_t flags = WALB_EXIST
        cdef const uint8_t* data = NULL
        if q.type == NBD_CMD_TRIM or (q.type == NBD_CMD_WRITE_ZEROES and not q.flags & NBD_FLAG_NO_HOLE):
            flags |= WALB_DISCARD
        else:
            if size_b > record_max_b:
                size_b = record_max_b
            if q.type == NBD_CMD_WRITE:
                data = base + q.data_b + done_b[0]
            else:
                flags |= WALB_ZEROS
                data = walb_zeros
        out.offset_lb = (q.offset_b + done_b[0]) // WALB_LB
        out.io_size_lb = <uint32_t>(size_b // WALB_LB)
        out.data_b = q.data_b + done_b[0] if q.type == NBD_CMD_WRITE else 0
        out.flags = flags
        out.checksum = 0
        if not self._place(out, data):
            return 0
        done_b[0] += size_b
        return 1

    cdef int _place(self, walb_log_record* r, const uint8_t* data) except -1:
        """Give a record its place in the open pack or in a new one; return 0 when the limit forbids."""
        cdef Packer p = self._packer
        cdef uint64_t lsid
        cdef uint64_t lap_rest
        cdef uint32_t n_pb = 0
        cdef uint32_t pad_pb = 0
        cdef int attempt
        if not r.flags & WALB_DISCARD:
            n_pb = (r.io_size_lb * WALB_LB + p.pbs - 1) // p.pbs
        for attempt in range(2):
            if self._header == NULL and not self._open_pack():
                return 0
            lsid = self._pack_lsid + 1 + self._total_pb
            pad_pb = 0
            if n_pb:
                lap_rest = p.ring_pb - lsid % p.ring_pb
                if lap_rest < n_pb:
                    pad_pb = <uint32_t>lap_rest
            if self._n_pack_records == 0:
                break  # a fresh pack takes any single record with its padding
            if (self._n_pack_records + 1 + (pad_pb > 0) <= p.n_records_max
                    and self._total_pb + pad_pb + n_pb <= p.pack_max_pb
                    and not (pad_pb and self._n_padding)):
                break
            self._close_pack()
        if lsid + pad_pb + n_pb > self._limit:
            if self._n_pack_records == 0:
                self._drop_pack()
            return 0
        if pad_pb:
            self._add_padding(pad_pb)
            lsid += pad_pb
        self._add_record(r, lsid, n_pb, data)
        return 1

    cdef int _open_pack(self) except -1:
        """Start a pack at lsid_end; return 0 when not even its header fits below the limit."""
        cdef size_t cap
        cdef uint8_t** grown
        if self.lsid_end + 1 > self._limit:
            return 0
        if self.n_packs == self._headers_cap:
            cap = self._headers_cap * 2 if self._headers_cap else 8
            grown = <uint8_t**>realloc(self._headers, cap * sizeof(uint8_t*))
            if grown == NULL:
                raise MemoryError("no memory for logpacks")
            self._headers = grown
            self._headers_cap = cap
        self._header = <uint8_t*>calloc(1, self._packer.pbs)
        if self._header == NULL:
            raise MemoryError("no memory for logpacks")
        self._headers[self.n_packs] = self._header
        self.n_packs += 1
        self._pack_lsid = self.lsid_end
        self._total_pb = 0
        self._n_pack_records = 0
        self._n_padding = 0
        self._write_out(self._pack_lsid, self._header, self._packer.pbs)
        return 1

    cdef void _drop_pack(self) noexcept:
        """Take back an open pack that has no records."""
        self.n_packs -= 1
        free(self._headers[self.n_packs])
        self._header = NULL
        self._n_iov -= 1
        self.size_b -= self._packer.pbs
        self._next_b -= self._packer.pbs
        if self._segments[self._n_segments - 1].iov_begin == self._n_iov:
            self._n_segments -= 1
            self._next_b = <uint64_t>-1  # contiguous with nothing

    cdef void _close_pack(self) noexcept:
        self._header = NULL

    cdef int _add_padding(self, uint32_t pad_pb) except -1:
        cdef uint8_t* field = self._header + WALB_PACK_HEADER_B + self._n_pack_records * WALB_PACK_RECORD_B
        _set_record(field, WALB_EXIST | WALB_PADDING, 0, pad_pb * (self._packer.pbs // WALB_LB), self._total_pb + 1,
                    self._pack_lsid)
        self._total_pb += pad_pb
        self._n_padding = 1
        self._n_pack_records += 1
        return 0

    cdef int _add_record(self, walb_log_record* r, uint64_t lsid, uint32_t n_pb, const uint8_t* data) except -1:
        cdef uint8_t* field = self._header + WALB_PACK_HEADER_B + self._n_pack_records * WALB_PACK_RECORD_B
        cdef uint32_t size_b = r.io_size_lb * WALB_LB
        cdef _Record* grown
        cdef size_t cap
        r.lsid = lsid
        r.lsid_local = <uint32_t>(lsid - self._pack_lsid)
        _set_record(field, r.flags & ~WALB_ZEROS, r.offset_lb, r.io_size_lb, r.lsid_local, self._pack_lsid)
        self._n_pack_records += 1
        self._total_pb += n_pb
        self.lsid_end = self._pack_lsid + 1 + self._total_pb
        _set_header(self._header, self._total_pb, self._pack_lsid, self._n_pack_records, self._n_padding)
        if data == NULL:
            return 0
        if self._n_records == self._records_cap:
            cap = self._records_cap * 2 if self._records_cap else 64
            grown = <_Record*>realloc(self._records, cap * sizeof(_Record))
            if grown == NULL:
                raise MemoryError("no memory for logpacks")
            self._records = grown
            self._records_cap = cap
        self._records[self._n_records].data = data
        self._records[self._n_records].size_b = size_b
        self._records[self._n_records].field = field
        self._n_records += 1
        self._write_out(lsid, data, size_b)
        if n_pb * <uint64_t>self._packer.pbs > size_b:
            self._append_iov(walb_zeros, n_pb * self._packer.pbs - size_b)
        self.data_b += size_b
        return 0

    cdef int _write_out(self, uint64_t lsid, const uint8_t* data, size_t size_b) except -1:
        """Add a piece at an lsid, to the last contiguous write if it ends there."""
        cdef uint64_t offset_b = self._packer.ring_begin_b + lsid % self._packer.ring_pb * self._packer.pbs
        cdef _Segment* grown
        cdef size_t cap
        if self._n_segments == 0 or offset_b != self._next_b:
            if self._n_segments == self._segments_cap:
                cap = self._segments_cap * 2 if self._segments_cap else 4
                grown = <_Segment*>realloc(self._segments, cap * sizeof(_Segment))
                if grown == NULL:
                    raise MemoryError("no memory for logpacks")
                self._segments = grown
                self._segments_cap = cap
            self._segments[self._n_segments].offset_b = offset_b
            self._segments[self._n_segments].iov_begin = self._n_iov
            self._n_segments += 1
            self._next_b = offset_b
        return self._append_iov(data, size_b)

    cdef int _append_iov(self, const uint8_t* data, size_t size_b) except -1:
        cdef iovec* grown
        cdef size_t cap
        if self._n_iov == self._iov_cap:
            cap = self._iov_cap * 2 if self._iov_cap else 64
            grown = <iovec*>realloc(self._iov, cap * sizeof(iovec))
            if grown == NULL:
                raise MemoryError("no memory for logpacks")
            self._iov = grown
            self._iov_cap = cap
        self._iov[self._n_iov].iov_base = <void*>data
        self._iov[self._n_iov].iov_len = size_b
        self._n_iov += 1
        self._next_b += size_b
        self.size_b += size_b
        return 0

    def seal(self, uint64_t fill_limit=0):
        """Compute all checksums, without the GIL when it takes long; nothing can be added afterwards.

        The batch is filled with zeros up to the next multiple of 4096 bytes on the device if that stays below
        the lsid `fill_limit`: writing whole pages spares the kernel reading what is on the rest of the page.
        """
        if self._sealed:
            raise ValueError("the batch is sealed")
        self._fill(fill_limit)
        self._header = NULL
        self._sealed = True
        if self.data_b < GIL_KEEP_B:
            self._seal()  # shorter than handing the GIL over and back
        else:
            with nogil:
                self._seal()

    cdef int _fill(self, uint64_t fill_limit) except -1:
        cdef Packer p = self._packer
        cdef uint64_t fill_b
        cdef uint64_t lap_rest = p.ring_pb - self.lsid_end % p.ring_pb
        if self.n_packs == 0 or self._next_b % PAGE_B == 0:
            return 0
        if p.ring_begin_b + self.lsid_end % p.ring_pb * p.pbs != self._next_b:
            return 0  # the last pack ends in a padding, or with the lap
        fill_b = PAGE_B - self._next_b % PAGE_B
        if fill_b // p.pbs <= lap_rest and self.lsid_end + fill_b // p.pbs <= fill_limit:
            self._append_iov(walb_zeros, fill_b)
        return 0

    cdef void _seal(self) noexcept nogil:
        cdef uint32_t i
        cdef size_t k
        cdef uint32_t salt = self._packer.salt
        for k in range(self._n_records):
            walb_store32(self._records[k].field, walb_checksum(self._records[k].data, self._records[k].size_b, salt))
        for i in range(self.n_packs):
            walb_store32(self._headers[i], walb_checksum(self._headers[i], self._packer.pbs, salt))

    def write(self, int fd):
        """Write the sealed batch to the log device, without the GIL. Once only. Raises OSError."""
        cdef size_t s
        cdef size_t end
        cdef int code = 0
        if not self._sealed:
            raise ValueError("the batch is not sealed")
        with nogil:
            for s in range(self._n_segments):
                end = self._segments[s + 1].iov_begin if s + 1 < self._n_segments else self._n_iov
                code = walb_pwritev_all(fd, &self._iov[self._segments[s].iov_begin],
                                        end - self._segments[s].iov_begin, self._segments[s].offset_b)
                if code:
                    break
        if code:
            raise OSError(code, os.strerror(code))

    def segments(self):
        """Return what `write` would write: (offset [byte], buffers) for each contiguous piece."""
        cdef size_t s
        cdef size_t end
        cdef size_t k
        if not self._sealed:
            raise ValueError("the batch is not sealed")
        found = []
        for s in range(self._n_segments):
            end = self._segments[s + 1].iov_begin if s + 1 < self._n_segments else self._n_iov
            buffers = []
            for k in range(self._segments[s].iov_begin, end):
                buffers.append((<const char*>self._iov[k].iov_base)[: self._iov[k].iov_len])
            found.append((self._segments[s].offset_b, buffers))
        return found


cdef class _Held:
    """A buffer that cannot move or change its size while this lives."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, object buffer):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef void _set_header(uint8_t* h, uint32_t total_pb, uint64_t lsid, uint32_t n_records,
                      uint32_t n_padding) noexcept nogil:
    walb_store16(h + 4, WALB_TYPE_LOGPACK)
    walb_store16(h + 6, total_pb)
    walb_store64(h + 8, lsid)
    walb_store16(h + 16, n_records)
    walb_store16(h + 18, n_padding)


cdef void _set_record(uint8_t* r, uint32_t flags, uint64_t offset_lb, uint32_t io_size_lb, uint32_t lsid_local,
                      uint64_t pack_lsid) noexcept nogil:
    walb_store32(r + 4, flags)
    walb_store64(r + 8, offset_lb)
    walb_store32(r + 16, io_size_lb)
    walb_store16(r + 20, lsid_local)
    walb_store64(r + 24, pack_lsid + lsid_local)
