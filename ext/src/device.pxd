"""device.h for the extension modules of the userspace device."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec


cdef extern from "device.h" nogil:
    ctypedef struct walb_request:
        uint64_t cookie
        uint64_t offset_b
        uint64_t data_b
        uint32_t length_b
        uint32_t error
        uint16_t type
        uint16_t flags

    ctypedef struct walb_range:
        uint64_t offset_b
        uint64_t size_b
        uint64_t out_b
        uint64_t index

    enum:
        NBD_CMD_READ
        NBD_CMD_WRITE
        NBD_CMD_DISC
        NBD_CMD_FLUSH
        NBD_CMD_TRIM
        NBD_CMD_WRITE_ZEROES
        NBD_CMD_BLOCK_STATUS

    enum:
        NBD_FLAG_FUA
        NBD_FLAG_NO_HOLE
        NBD_FLAG_DF
        NBD_FLAG_REQ_ONE
        NBD_FLAG_FAST_ZERO

    uint8_t walb_zeros[1]
    int WALB_ZEROS_B
    int WALB_IOV_MAX
    int walb_pwritev_all(int fd, iovec* iov, size_t n, uint64_t offset)
