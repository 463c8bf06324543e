"""Many reads or writes of one file in one call, without the GIL.

Pieces are arrays of three u64: offset in the file, size, place in the buffer [byte].
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from posix.types cimport off_t
from posix.unistd cimport pread, pwrite

from walb cimport structs_of


cdef enum:
    OFFSET = 0
    SIZE = 1
    PLACE = 2


cdef const uint64_t* _pieces(const uint8_t[::1] pieces, const uint8_t[::1] buffer) except NULL:
    cdef const uint64_t* p = <const uint64_t*>structs_of(pieces, 24)
    cdef size_t n = pieces.shape[0] // 24
    cdef uint64_t size_b = buffer.shape[0]
    cdef size_t i
    for i in range(n):
        if p[3 * i + PLACE] > size_b or p[3 * i + SIZE] > size_b - p[3 * i + PLACE]:
            raise ValueError("a piece lies outside the buffer")
        if p[3 * i + OFFSET] >> 62:
            raise ValueError("a piece lies outside of every file")
    return p


def pread_many(int fd, const uint8_t[::1] pieces not None, uint8_t[::1] buffer not None):
    """Read each piece to its place. Returns (number of pieces that are whole, errno of the failed read or 0); with
    errno 0 the next piece, if there is one, ends beyond the end of the file."""
    cdef const uint64_t* p = _pieces(pieces, buffer)
    cdef size_t n = pieces.shape[0] // 24
    cdef size_t i = 0
    cdef uint64_t done
    cdef ssize_t got
    cdef int error = 0
    cdef uint8_t* data
    if n == 0 or buffer.shape[0] == 0:
        return n, 0
    data = &buffer[0]
    with nogil:
        while i < n:
            done = 0
            while done < p[3 * i + SIZE]:
                got = pread(fd, data + p[3 * i + PLACE] + done, p[3 * i + SIZE] - done, <off_t>(p[3 * i + OFFSET] + done))
                if got > 0:
                    done += got
                elif got == 0 or errno != EINTR:
                    error = errno if got < 0 else 0
                    break
            if done < p[3 * i + SIZE]:
                break
            i += 1
    return i, error


def pwrite_many(int fd, const uint8_t[::1] pieces not None, const uint8_t[::1] buffer not None):
    """Write each piece from its place. Returns (number of pieces written, errno of the failed write or 0)."""
    cdef const uint64_t* p = _pieces(pieces, buffer)
    cdef size_t n = pieces.shape[0] // 24
    cdef size_t i = 0
    cdef uint64_t done
    cdef ssize_t got
    cdef int error = 0
    cdef const uint8_t* data
    if n == 0 or buffer.shape[0] == 0:
        return n, 0
    data = &buffer[0]
    with nogil:
        while i < n:
            done = 0
            while done < p[3 * i + SIZE]:
                got = pwrite(fd, data + p[3 * i + PLACE] + done, p[3 * i + SIZE] - done,
                             <off_t>(p[3 * i + OFFSET] + done))
                if got >= 0:
                    done += got
                elif errno != EINTR:
                    error = errno
                    break
            if error:
                break
            i += 1
    return i, error
