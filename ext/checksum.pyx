"""The 32-bit additive checksum that every walb structure carries, and the test for all-zero data.

Source: docs/formats.md, "Checksum". Twin: tests/reference/checksum.py.
"""

from libc.stdint cimport uint8_t, uint32_t

from walb cimport walb_checksum, walb_is_zero


def checksum(const uint8_t[::1] data not None, uint32_t salt=0):
    """Return the salted checksum of `data`, shape (n,) [byte]; a short last word is extended with zeros."""
    cdef size_t n = data.shape[0]
    cdef uint32_t result
    if n == 0:
        return (-salt) & 0xffffffff
    with nogil:
        result = walb_checksum(&data[0], n, salt)
    return result


def is_zero(const uint8_t[::1] data not None):
    """Say whether every byte of `data`, shape (n,), is zero; true for no bytes."""
    cdef size_t n = data.shape[0]
    cdef int result
    if n == 0:
        return True
    with nogil:
        result = walb_is_zero(&data[0], n)
    return bool(result)
