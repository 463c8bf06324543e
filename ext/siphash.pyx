"""The hash of the old `bhash` tool: SipHash-2-4 with a fixed key and an unofficial 128-bit result.

Source: docs/formats.md, "Hashes". C part: src/siphash.h. Twin: tests/reference/siphash.py.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t


cdef extern from "siphash.h" nogil:
    ctypedef struct walb_siphash:
        pass

    void walb_siphash_init(walb_siphash* h)
    void walb_siphash_update(walb_siphash* h, const uint8_t* data, size_t size)
    void walb_siphash_digest(const walb_siphash* h, uint8_t* out)


cdef class SipHash:
    """The hash of the bytes given to `update`, in pieces of any size. Not for several threads at once."""

    cdef walb_siphash _state

    def __cinit__(self):
        walb_siphash_init(&self._state)

    def update(self, const uint8_t[::1] data not None):
        """Hash more bytes."""
        cdef size_t n = data.shape[0]
        if n:
            with nogil:
                walb_siphash_update(&self._state, &data[0], n)

    def digest(self):
        """Return the hash so far, 16 bytes."""
        cdef uint8_t out[16]
        walb_siphash_digest(&self._state, out)
        return PyBytes_FromStringAndSize(<char*>out, 16)
