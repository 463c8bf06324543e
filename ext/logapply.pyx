"""Writing the records of a log scan to a file or device, in log order.

Source: docs/formats.md, "Finding the end of the log"; docs/device.md, "Redo". Twin: tests/reference/logapply.py.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.types cimport off_t


cdef extern from "walb.h" nogil:
    ctypedef struct walb_log_record:
        uint64_t lsid
        uint64_t offset_lb
        uint64_t data_b
        uint32_t io_size_lb
        uint32_t flags
        uint32_t checksum
        uint32_t lsid_local


cdef extern from "unistd.h" nogil:
    ssize_t pwrite(int fd, const void* data, size_t size, off_t offset)


cdef enum:
    FLAG_PADDING = 2
    FLAG_DISCARD = 4


cdef Py_ssize_t count_records(const uint8_t[::1] records) except -1:
    if records.shape[0] % sizeof(walb_log_record):
        raise ValueError("records must hold whole log records")
    return records.shape[0] // sizeof(walb_log_record)


cdef inline void load(const uint8_t* records, Py_ssize_t i, walb_log_record* r) noexcept nogil:
    memcpy(r, records + i * <Py_ssize_t>sizeof(walb_log_record), sizeof(walb_log_record))  # at any alignment


def first_outside(const uint8_t[::1] records not None, uint64_t limit_lb):
    cdef Py_ssize_t n = count_records(records), i = 0
    cdef const uint8_t* rs = &records[0] if n else NULL
    cdef walb_log_record r
    with nogil:
        while i < n:
            load(rs, i, &r)
            if not r.flags & FLAG_PADDING:
                if r.offset_lb > limit_lb or r.io_size_lb > limit_lb - r.offset_lb:
                    break
            i += 1
    return i if i < n else -1


def first_odd_padding(const uint8_t[::1] records not None, uint32_t pbs, uint64_t ring_size_pb):
    cdef Py_ssize_t n = count_records(records), i = 0
    cdef const uint8_t* rs = &records[0] if n else NULL
    cdef walb_log_record r
    if pbs == 0 or ring_size_pb == 0:
        raise ValueError("pbs and ring_size_pb must not be zero")
    with nogil:
        while i < n:
            load(rs, i, &r)
            if r.flags & FLAG_PADDING and r.io_size_lb:
                if (r.lsid + <uint64_t>r.io_size_lb * 512 // pbs) % ring_size_pb:
                    break
            i += 1
    return i if i < n else -1


def write_records(int fd, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
                  Py_ssize_t first):
    cdef Py_ssize_t n = count_records(records), i
    cdef const uint8_t* rs = &records[0] if n else NULL
    cdef walb_log_record r
    cdef size_t size = data.shape[0], todo
    cdef const uint8_t* base = &data[0] if size else NULL
    cdef const uint8_t* p
    cdef uint64_t at
    cdef ssize_t done
    cdef int error = 0
    if first < 0 or first > n:
        raise ValueError("no such record")
    for i in range(first, n):
        load(rs, i, &r)
        if r.flags & (FLAG_PADDING | FLAG_DISCARD):
            continue
        todo = <size_t>r.io_size_lb * 512
        if r.data_b > size or todo > size - r.data_b:
            raise ValueError("a record points outside the data")
    i = first
    with nogil:
        while i < n:
            load(rs, i, &r)
            if r.flags & FLAG_DISCARD:
                break
            if not r.flags & FLAG_PADDING:
                p = base + r.data_b
                todo = <size_t>r.io_size_lb * 512
                at = r.offset_lb * 512
                while todo:
                    done = pwrite(fd, p, todo, at)
                    if done < 0:
                        if errno == EINTR:
                            continue
                        error = errno
                        break
                    p += done
                    at += done
                    todo -= done
                if error:
                    break
            i += 1
    return i, error
