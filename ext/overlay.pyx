"""The pending overlay: which blocks of a volume are newer in memory than on the data device.

`Overlay` maps ranges of logical blocks to the data of log records; the last record wins. The same class sorts
and merges what a data-device batch has to write. Data is not copied: the records point into the receive
buffers, which the overlay keeps alive. Tables are arrays of `walb_log_record` (walb.h) and `walb_range`
(device.h). Source: docs/device.md, "The overlay". Twin: tests/reference/overlay.py.
"""

import os
from collections import deque

from cpython.buffer cimport PyBUF_SIMPLE, PyObject_GetBuffer, PyBuffer_Release
from libc.errno cimport EAGAIN, EINTR, ENOSYS, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.uio cimport RWF_NOWAIT, iovec, preadv2

from device cimport WALB_IOV_MAX, WALB_ZEROS_B, walb_pwritev_all, walb_range, walb_zeros
from walb cimport WALB_DISCARD, WALB_LB, WALB_PADDING, WALB_ZEROS, walb_log_record


cdef extern from "imap.h" nogil:
    ctypedef struct imap_entry:
        uint64_t begin
        uint64_t end
        uint64_t seq
        const uint8_t* data
    ctypedef struct imap:
        size_t n_entries
    ctypedef struct imap_cursor:
        size_t leaf
        uint32_t i
    void imap_clear(imap* m)
    imap_entry* imap_at(imap* m, imap_cursor c)
    imap_cursor imap_next(imap* m, imap_cursor c)
    imap_cursor imap_find(imap* m, uint64_t x)
    int imap_insert(imap* m, uint64_t begin, uint64_t end, uint64_t seq, const uint8_t* data)
    void imap_retire(imap* m, uint64_t begin, uint64_t end, uint64_t seq)

cdef enum:
    GIL_KEEP_N = 256  # fewer records than this are inserted without giving up the GIL


cdef class _Table:
    """A buffer, held, as an array of fixed-size structs."""

    cdef Py_buffer view
    cdef Py_ssize_t n
    cdef bint held

    def __cinit__(self, object buffer, Py_ssize_t item_b):
        PyObject_GetBuffer(buffer, &self.view, PyBUF_SIMPLE)
        self.held = True
        if self.view.len % item_b:
            raise ValueError("table is not a whole number of items")
        self.n = self.view.len // item_b

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class Overlay:
    """Ranges of blocks and their newest data. Not for use from two threads at once."""

    cdef imap map
    cdef object _owners  # deque of (pack lsid of the last record, held buffer), in insertion order

    def __cinit__(self):
        memset(&self.map, 0, sizeof(imap))
        self._owners = deque()

    def __dealloc__(self):
        imap_clear(&self.map)

    def __len__(self):
        return self.map.n_entries

    def insert(self, records not None, data not None):
        """Put records over what is there, in their order.

        `records`: walb_log_record table, shape (n,), `data_b` into `data`; discards and zeros read as zeros,
        paddings are skipped. `data` is kept until `retire` has passed the last record. Raises ValueError,
        with nothing changed, when a record reaches outside `data`; MemoryError.
        """
        cdef _Table table = _Table(records, sizeof(walb_log_record))
        cdef _Table held = _Table(data, 1)
        cdef const walb_log_record* r = <const walb_log_record*>table.view.buf
        cdef const uint8_t* base = <const uint8_t*>held.view.buf
        cdef uint64_t size_b = <uint64_t>held.view.len
        cdef uint64_t seq = 0
        cdef Py_ssize_t i
        cdef int failed = 0
        cdef bint uses_data = False
        if table.n == 0:
            return
        for i in range(table.n):
            if r[i].io_size_lb == 0 or r[i].offset_lb > (<uint64_t>1 << 54):
                raise ValueError("record has a bad range")
            if r[i].flags & WALB_ZEROS:
                if <uint64_t>r[i].io_size_lb * WALB_LB > <uint64_t>WALB_ZEROS_B:
                    raise ValueError("record of zeros is too large")
            elif not r[i].flags & (WALB_DISCARD | WALB_PADDING):
                uses_data = True
                if r[i].data_b > size_b or <uint64_t>r[i].io_size_lb * WALB_LB > size_b - r[i].data_b:
                    raise ValueError("record reaches outside its data")
        if table.n < GIL_KEEP_N:
            failed = _insert_all(&self.map, r, table.n, base, &seq)  # shorter than handing the GIL over and back
        else:
            with nogil:
                failed = _insert_all(&self.map, r, table.n, base, &seq)
        if uses_data:
            self._owners.append((seq, held))
        if failed:
            raise MemoryError("no memory for the overlay")

    def retire(self, records not None, uint64_t lsid_end):
        """Forget records of packs below `lsid_end` that overlap the ranges of `records`, and their data.

        `records` must be the tables of all inserted packs below `lsid_end` that were not retired yet.
        """
        cdef _Table table = _Table(records, sizeof(walb_log_record))
        cdef const walb_log_record* r = <const walb_log_record*>table.view.buf
        cdef Py_ssize_t i
        for i in range(table.n):
            if not r[i].flags & WALB_PADDING:
                imap_retire(&self.map, r[i].offset_lb, r[i].offset_lb + r[i].io_size_lb, lsid_end)

    def release(self, uint64_t lsid_end):
        """Let go of the buffers of packs below `lsid_end`; all their records must have been retired."""
        while self._owners and self._owners[0][0] < lsid_end:
            self._owners.popleft()

    def fill(self, ranges not None, out not None):
        """Copy what the overlay has of `ranges` to `out`; return the ranges it does not have, same table form.

        `ranges`: walb_range table, shape (n,) [byte, any alignment]. Raises ValueError, with `out` untouched,
        when a range reaches outside `out`.
        """
        cdef _Table table = _Table(ranges, sizeof(walb_range))
        cdef const walb_range* q = <const walb_range*>table.view.buf
        cdef uint8_t[::1] view = out
        cdef uint64_t out_size_b = view.shape[0]
        cdef Py_ssize_t i
        for i in range(table.n):
            if q[i].out_b > out_size_b or q[i].size_b > out_size_b - q[i].out_b:
                raise ValueError("range reaches outside the buffer")
        if self.map.n_entries == 0:
            return bytes(ranges)
        gaps = bytearray()
        for i in range(table.n):
            self._fill_one(q[i], &view[0] if out_size_b else NULL, gaps)
        return bytes(gaps)

    cdef int _fill_one(self, walb_range q, uint8_t* out, bytearray gaps) except -1:
        cdef uint64_t pos = q.offset_b
        cdef uint64_t end = q.offset_b + q.size_b
        cdef uint64_t begin, stop
        cdef imap_cursor c = imap_find(&self.map, pos // WALB_LB)
        cdef imap_entry* e
        while pos < end:
            e = imap_at(&self.map, c)
            if e == NULL or e.begin * WALB_LB >= end:
                _add_gap(gaps, q, pos, end)
                return 0
            begin = e.begin * WALB_LB
            if begin > pos:
                _add_gap(gaps, q, pos, begin)
                pos = begin
            stop = e.end * WALB_LB
            if stop > end:
                stop = end
            if e.data == NULL:
                memset(out + q.out_b + (pos - q.offset_b), 0, stop - pos)
            else:
                memcpy(out + q.out_b + (pos - q.offset_b), e.data + (pos - begin), stop - pos)
            pos = stop
            c = imap_next(&self.map, c)
        return 0

    def extents(self, uint64_t offset_b, uint64_t size_b):
        """Return (begin, end, is_zero) [byte] of the overlay's entries inside a range, ascending, clipped."""
        cdef imap_cursor c = imap_find(&self.map, offset_b // WALB_LB)
        cdef imap_entry* e = imap_at(&self.map, c)
        cdef uint64_t end = offset_b + size_b
        found = []
        while e != NULL and e.begin * WALB_LB < end:
            found.append((max(e.begin * WALB_LB, offset_b), min(e.end * WALB_LB, end), e.data == NULL))
            c = imap_next(&self.map, c)
            e = imap_at(&self.map, c)
        return found

    def zeros(self):
        """Return (offset, size) [byte] of the discarded ranges, ascending, neighbours joined."""
        cdef imap_cursor c = imap_find(&self.map, 0)
        cdef imap_entry* e = imap_at(&self.map, c)
        cdef uint64_t begin = 0
        cdef uint64_t end = 0  # of the range being joined; begin == end: none
        found = []
        while e != NULL:
            if e.data == NULL:
                if e.begin != end:
                    if end > begin:
                        found.append((begin * WALB_LB, (end - begin) * WALB_LB))
                    begin = e.begin
                end = e.end
            c = imap_next(&self.map, c)
            e = imap_at(&self.map, c)
        if end > begin:
            found.append((begin * WALB_LB, (end - begin) * WALB_LB))
        return found

    def writes(self):
        """Return (offset [byte], data) of the ranges that have data, ascending; for files without descriptor."""
        cdef imap_cursor c = imap_find(&self.map, 0)
        cdef imap_entry* e = imap_at(&self.map, c)
        found = []
        while e != NULL:
            if e.data != NULL:
                found.append((e.begin * WALB_LB, (<const char*>e.data)[: (e.end - e.begin) * WALB_LB]))
            c = imap_next(&self.map, c)
            e = imap_at(&self.map, c)
        return found

    def write(self, int fd):
        """Write the ranges that have data to a file, ascending, neighbours in one call; without the GIL.

        Raises OSError, MemoryError.
        """
        cdef int code
        cdef iovec* iov = <iovec*>malloc(WALB_IOV_MAX * sizeof(iovec))
        if iov == NULL:
            raise MemoryError("no memory for writing")
        with nogil:
            code = self._write(fd, iov)
        free(iov)
        if code:
            raise OSError(code, os.strerror(code))

    cdef int _write(self, int fd, iovec* iov) noexcept nogil:
        cdef imap_cursor c = imap_find(&self.map, 0)
        cdef imap_entry* e = imap_at(&self.map, c)
        cdef size_t n = 0
        cdef uint64_t begin = 0
        cdef uint64_t end = 0
        cdef int code
        while e != NULL:
            if e.data != NULL:
                if n > 0 and (e.begin != end or n == <size_t>WALB_IOV_MAX):
                    code = walb_pwritev_all(fd, iov, n, begin * WALB_LB)
                    if code:
                        return code
                    n = 0
                if n == 0:
                    begin = e.begin
                iov[n].iov_base = <void*>e.data
                iov[n].iov_len = (e.end - e.begin) * WALB_LB
                n += 1
                end = e.end
            c = imap_next(&self.map, c)
            e = imap_at(&self.map, c)
        if n > 0:
            return walb_pwritev_all(fd, iov, n, begin * WALB_LB)
        return 0


cdef int _insert_all(imap* map, const walb_log_record* r, Py_ssize_t n, const uint8_t* base,
                     uint64_t* seq) noexcept nogil:
    """Insert records; return nonzero without memory. `seq`: pack lsid of the last one that is no padding."""
    cdef Py_ssize_t i
    cdef const uint8_t* p
    for i in range(n):
        if r[i].flags & WALB_PADDING:
            continue
        if r[i].flags & WALB_DISCARD:
            p = NULL
        elif r[i].flags & WALB_ZEROS:
            p = walb_zeros
        else:
            p = base + r[i].data_b
        # The lsid of the pack, not of the record: a discard at a pack's end has the next pack's lsid.
        seq[0] = r[i].lsid - r[i].lsid_local
        if imap_insert(map, r[i].offset_lb, r[i].offset_lb + r[i].io_size_lb, seq[0], p):
            return -1
    return 0


cdef int _add_gap(bytearray gaps, walb_range q, uint64_t begin, uint64_t end) except -1:
    cdef walb_range gap
    gap.offset_b = begin
    gap.size_b = end - begin
    gap.out_b = q.out_b + (begin - q.offset_b)
    gap.index = q.index
    gaps += (<const char*>&gap)[: sizeof(walb_range)]
    return 0


def read_ranges(int fd, ranges not None, out not None, bint nowait=False):
    """Read `ranges` of a file into `out`, without the GIL; what lies behind the end of the file reads as zeros.

    `ranges`: walb_range table. With `nowait`, return the table of the ranges that would have had to wait for
    the disk (their part of `out` is undefined); else the empty table. Raises OSError; ValueError when a range
    reaches outside `out`.
    """
    cdef _Table table = _Table(ranges, sizeof(walb_range))
    cdef const walb_range* q = <const walb_range*>table.view.buf
    cdef uint8_t[::1] view = out
    cdef uint64_t out_size_b = view.shape[0]
    cdef Py_ssize_t i
    cdef Py_ssize_t n_missed = 0
    cdef int code = 0
    cdef uint8_t* base
    cdef uint8_t* missed
    if table.n == 0:
        return b""
    for i in range(table.n):
        if q[i].out_b > out_size_b or q[i].size_b > out_size_b - q[i].out_b:
            raise ValueError("range reaches outside the buffer")
    missed = <uint8_t*>malloc(table.n)
    if missed == NULL:
        raise MemoryError("no memory for reading")
    base = &view[0] if out_size_b else NULL
    with nogil:
        for i in range(table.n):
            code = _read_one(fd, base + q[i].out_b, q[i].size_b, q[i].offset_b, nowait)
            missed[i] = code == EAGAIN
            if code == EAGAIN:
                n_missed += 1
                code = 0
            if code:
                break
    try:
        if code:
            raise OSError(code, os.strerror(code))
        if n_missed == 0:
            return b""
        rest = bytearray()
        for i in range(table.n):
            if missed[i]:
                rest += (<const char*>&q[i])[: sizeof(walb_range)]
        return bytes(rest)
    finally:
        free(missed)


cdef int _read_one(int fd, uint8_t* out, uint64_t size_b, uint64_t offset_b, bint nowait) noexcept nogil:
    """Return 0, an errno, or EAGAIN when `nowait` and not everything is at hand."""
    cdef iovec iov
    cdef ssize_t n
    cdef uint64_t done = 0
    while done < size_b:
        iov.iov_base = out + done
        iov.iov_len = size_b - done
        n = preadv2(fd, &iov, 1, <off_t>(offset_b + done), RWF_NOWAIT if nowait else 0)
        if n < 0:
            if errno == EINTR:
                continue
            if nowait and (errno == EOPNOTSUPP or errno == ENOSYS):
                return EAGAIN
            return errno
        if n == 0:
            memset(out + done, 0, size_b - done)
            return 0
        done += <uint64_t>n
    return 0
