"""Writing the records of a log scan to a file or device, in log order.

Source: docs/formats.md, "Finding the end of the log"; docs/device.md, "Redo". Twin: tests/reference/logapply.py.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.unistd cimport pwrite

from walb cimport WALB_DISCARD, WALB_LB, WALB_PADDING, bytes_of, structs_of, walb_log_record


def first_outside(const uint8_t[::1] records not None, uint64_t limit_lb):
    cdef const walb_log_record* r = <const walb_log_record*>structs_of(records, sizeof(walb_log_record))
    cdef Py_ssize_t n = records.shape[0] // sizeof(walb_log_record), i = 0
    with nogil:
        while i < n:
            if not r[i].flags & WALB_PADDING:
                if r[i].offset_lb > limit_lb or r[i].io_size_lb > limit_lb - r[i].offset_lb:
                    break
            i += 1
    return i if i < n else -1


def first_odd_padding(const uint8_t[::1] records not None, uint32_t pbs, uint64_t ring_size_pb):
    cdef const walb_log_record* r = <const walb_log_record*>structs_of(records, sizeof(walb_log_record))
    cdef Py_ssize_t n = records.shape[0] // sizeof(walb_log_record), i = 0
    if pbs == 0 or ring_size_pb == 0:
        raise ValueError("pbs and ring_size_pb must not be zero")
    with nogil:
        while i < n:
            if r[i].flags & WALB_PADDING and r[i].io_size_lb:
                if (r[i].lsid + <uint64_t>r[i].io_size_lb * WALB_LB // pbs) % ring_size_pb:
                    break
            i += 1
    return i if i < n else -1


def write_records(int fd, const uint8_t[::1] data not None, const uint8_t[::1] records not None,
                  Py_ssize_t first):
    cdef const walb_log_record* r = <const walb_log_record*>structs_of(records, sizeof(walb_log_record))
    cdef Py_ssize_t n = records.shape[0] // sizeof(walb_log_record), i
    cdef size_t size = data.shape[0], todo
    cdef const uint8_t* base = bytes_of(data)
    cdef const uint8_t* p
    cdef uint64_t at
    cdef ssize_t done
    cdef int error = 0
    if first < 0 or first > n:
        raise ValueError("no such record")
    for i in range(first, n):
        if r[i].flags & (WALB_PADDING | WALB_DISCARD):
            continue
        todo = <size_t>r[i].io_size_lb * WALB_LB
        if r[i].data_b > size or todo > size - r[i].data_b:
            raise ValueError("a record points outside the data")
    i = first
    with nogil:
        while i < n:
            if r[i].flags & WALB_DISCARD:
                break
            if not r[i].flags & WALB_PADDING:
                p = base + r[i].data_b
                todo = <size_t>r[i].io_size_lb * WALB_LB
                at = r[i].offset_lb * WALB_LB
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
