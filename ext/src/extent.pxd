"""extent.h for the extension modules: the struct; its functions are declared by the one module that calls them."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "extent.h" nogil:
    ctypedef struct walb_extent:
        uint64_t address_lb
        uint64_t data_b
        uint32_t blocks_lb
        uint32_t offset_lb
        uint32_t orig_lb
        uint32_t data_size_b
        uint32_t checksum
        uint16_t source
        uint8_t flags
        uint8_t kind
