"""walb.h for the extension modules, and the one way in which they look into buffers and fill them."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "walb.h" nogil:
    enum:
        WALB_LB
        WALB_IO_MAX_LB
        WALB_TYPE_LOGPACK
        WALB_PACK_HEADER_B
        WALB_PACK_RECORD_B

    enum:
        WALB_EXIST
        WALB_PADDING
        WALB_DISCARD
        WALB_ZEROS

    ctypedef struct walb_log_record:
        uint64_t lsid
        uint64_t offset_lb
        uint64_t data_b
        uint32_t io_size_lb
        uint32_t flags
        uint32_t checksum
        uint32_t lsid_local

    uint64_t walb_nothing[1]
    uint16_t walb_load16(const uint8_t* p)
    uint32_t walb_load32(const uint8_t* p)
    uint64_t walb_load64(const uint8_t* p)
    void walb_store16(uint8_t* p, uint16_t w)
    void walb_store32(uint8_t* p, uint32_t w)
    void walb_store64(uint8_t* p, uint64_t w)
    uint32_t walb_checksum(const uint8_t* data, size_t size, uint32_t salt)
    int walb_is_zero(const uint8_t* data, size_t size)


cdef inline const uint8_t* bytes_of(const uint8_t[::1] buffer) noexcept:
    """Where the contents of a buffer are; some valid place for an empty one."""
    return &buffer[0] if buffer.shape[0] else <const uint8_t*>&walb_nothing[0]


cdef inline const uint8_t* structs_of(const uint8_t[::1] buffer, size_t item_b) except NULL:
    """Where the array of structs that a buffer holds is. Raises ValueError unless it is whole and aligned to 8."""
    cdef const uint8_t* p = bytes_of(buffer)
    if buffer.shape[0] % item_b or <size_t>p % 8:
        raise ValueError("not an aligned array of whole structs")
    return p


cdef inline bytes to_bytes(const void* items, size_t n, size_t item_b):
    """A copy of an array of `n` structs as bytes."""
    return PyBytes_FromStringAndSize(<const char*>items, <Py_ssize_t>(n * item_b))
