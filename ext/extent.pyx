"""Extents: which input holds the newest data of each range of a volume. Arrays of 40-byte structs in buffers.

The layout is `EXTENT` of walbd.format.extents. Arrays are sorted by address and free of overlaps unless said
otherwise. Rules: docs/formats.md, "wdiff". C part: src/extent.h. Twin: tests/reference/extent.py.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

from extent cimport walb_extent
from walb cimport bytes_of, structs_of, to_bytes, walb_log_record


cdef extern from "extent.h" nogil:
    ctypedef struct extent_input:
        walb_extent* buf
        size_t n
        size_t pos
        size_t room
        uint64_t end_lb
        int finished

    ctypedef struct extent_merge:
        extent_input* inputs "in"
        uint64_t* begin
        size_t k
        walb_extent* out
        size_t n_out
        uint64_t image_lb
        uint64_t done_lb
        int join

    const uint64_t UINT64_MAX
    uint64_t extent_end(const walb_extent* e)
    void extent_trim(walb_extent* e, uint64_t to_lb)
    int extent_same_image(const walb_extent* a, const walb_extent* b)
    size_t extent_overlay(const walb_extent* under, size_t n_under, const walb_extent* over, size_t n_over,
                          walb_extent* out)
    size_t extent_resolve(walb_extent* a, walb_extent* b, size_t* ends, size_t n, walb_extent** result)
    int64_t extent_log_count(const walb_log_record* rec, size_t n, size_t buf_b, uint32_t max_lb, size_t* bad)
    void extent_from_log(const walb_log_record* rec, size_t n, const uint8_t* buf, uint64_t at_b,
                         uint16_t source, uint32_t max_lb, walb_extent* out)
    size_t extent_find(const walb_extent* e, size_t n, uint64_t address_lb)
    void extent_advance(extent_merge* m, size_t i, uint64_t to_lb)
    int64_t extent_merge_run(extent_merge* m, size_t n_max, uint64_t lb_max)


def from_log(const uint8_t[::1] records not None, const uint8_t[::1] buf not None, uint64_t at_b,
             uint16_t source, uint32_t max_lb=0):
    """Turn the records of a log scan (walb_log_record) into extents in order of arrival, later ones on top.

    `buf` is what was scanned and lies at `at_b` in the file number `source`. Paddings vanish, records whose data is all zero are recognised, records above `max_lb` (0: no limit)
    are cut. Returns (extents, -1), or (b"", number of the record) when a record has an address that no device has
    or data outside `buf`.
    """
    cdef const walb_log_record* rec = <const walb_log_record*>structs_of(records, sizeof(walb_log_record))
    cdef size_t n = records.shape[0] // sizeof(walb_log_record)
    cdef size_t size_b = buf.shape[0]
    cdef const uint8_t* data = bytes_of(buf)
    cdef size_t bad = 0
    cdef int64_t count
    cdef bytes result
    cdef walb_extent* out
    with nogil:
        count = extent_log_count(rec, n, size_b, max_lb, &bad)
    if count < 0:
        return b"", bad
    result = PyBytes_FromStringAndSize(NULL, count * sizeof(walb_extent))
    out = <walb_extent*><char*>result
    with nogil:
        extent_from_log(rec, n, data, at_b, source, max_lb, out)
    return result, -1


def resolve(const uint8_t[::1] arrived not None):
    """Return what is visible of extents given in order of arrival: sorted, cut where later ones lie on top."""
    cdef const uint8_t* data = structs_of(arrived, sizeof(walb_extent))
    cdef size_t n = arrived.shape[0] // sizeof(walb_extent)
    cdef size_t count
    cdef walb_extent* result
    cdef walb_extent* a = <walb_extent*>malloc((2 * n + 1) * sizeof(walb_extent))
    cdef walb_extent* b = <walb_extent*>malloc((2 * n + 1) * sizeof(walb_extent))
    cdef size_t* ends = <size_t*>malloc((n + 1) * sizeof(size_t))
    try:
        if a == NULL or b == NULL or ends == NULL:
            raise MemoryError
        with nogil:
            memcpy(a, data, n * sizeof(walb_extent))
            count = extent_resolve(a, b, ends, n, &result)
        return to_bytes(result, count, sizeof(walb_extent))
    finally:
        free(a)
        free(b)
        free(ends)


def overlay(const uint8_t[::1] under not None, const uint8_t[::1] over not None):
    """Return what is visible when the extents `over` are laid upon `under`."""
    cdef const walb_extent* lower = <const walb_extent*>structs_of(under, sizeof(walb_extent))
    cdef const walb_extent* upper = <const walb_extent*>structs_of(over, sizeof(walb_extent))
    cdef size_t n_lower = under.shape[0] // sizeof(walb_extent)
    cdef size_t n_upper = over.shape[0] // sizeof(walb_extent)
    cdef size_t count
    cdef walb_extent* out = <walb_extent*>malloc((n_lower + 2 * n_upper + 1) * sizeof(walb_extent))
    try:
        if out == NULL:
            raise MemoryError
        with nogil:
            count = extent_overlay(lower, n_lower, upper, n_upper, out)
        return to_bytes(out, count, sizeof(walb_extent))
    finally:
        free(out)


def clip(const uint8_t[::1] extents not None, uint64_t begin_lb, uint64_t end_lb):
    """Return the parts of the extents that lie in [begin_lb, end_lb)."""
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t first = extent_find(e, n, begin_lb)
    cdef size_t last = first
    cdef bytes result
    cdef walb_extent* out
    while last < n and e[last].address_lb < end_lb:
        last += 1
    if first == last or begin_lb >= end_lb:
        return b""
    result = to_bytes(e + first, last - first, sizeof(walb_extent))
    out = <walb_extent*><char*>result
    if out[0].address_lb < begin_lb:
        extent_trim(&out[0], begin_lb)
    last -= first + 1
    if extent_end(&out[last]) > end_lb:
        out[last].blocks_lb = <uint32_t>(end_lb - out[last].address_lb)
    return result


def cut_batch(const uint8_t[::1] extents not None, size_t first, size_t n_max, uint64_t lb_max):
    """Return the end of the batch that begins at extent `first`: at most `n_max` extents whose images come to at
    most `lb_max` blocks decompressed, but at least one (if there is one)."""
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t i = first
    cdef uint64_t sum_lb = 0
    while i < n and i - first < n_max:
        if not e[i].flags and not (i > first and extent_same_image(&e[i - 1], &e[i])):
            sum_lb += e[i].orig_lb
        if i > first and sum_lb > lb_max:
            break
        i += 1
    return i


cdef class Merger:
    """Merge `n` streams of sorted extents, oldest first: what a higher number has lies on top.

    Feed batches as `run` asks for them. With `join`, pieces of one image that lie one behind the other, and
    neighbouring ranges of the same kind of nothing, come out as one extent. Not for several threads at once.
    """

    cdef extent_merge _m

    def __cinit__(self, size_t n, bint join=True):
        cdef size_t i
        memset(&self._m, 0, sizeof(extent_merge))
        self._m.join = join
        self._m.inputs = <extent_input*>calloc(n + 1, sizeof(extent_input))
        self._m.begin = <uint64_t*>malloc((n + 1) * sizeof(uint64_t))
        if self._m.inputs == NULL or self._m.begin == NULL:
            raise MemoryError
        self._m.k = n
        for i in range(n):
            self._m.begin[i] = UINT64_MAX

    def __dealloc__(self):
        cdef size_t i
        if self._m.inputs != NULL:
            for i in range(self._m.k):
                free(self._m.inputs[i].buf)
        free(self._m.inputs)
        free(self._m.begin)
        free(self._m.out)

    cdef extent_input* _input(self, size_t i) except NULL:
        if i >= self._m.k:
            raise ValueError("no such input")
        if self._m.begin[i] != UINT64_MAX or self._m.inputs[i].finished:
            raise ValueError("this input was not asked for")
        return &self._m.inputs[i]

    def feed(self, size_t i, const uint8_t[::1] extents not None):
        """Give input `i` its next extents (copied), which must follow the earlier ones in order."""
        cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
        cdef size_t n = extents.shape[0] // sizeof(walb_extent)
        cdef extent_input* input = self._input(i)
        cdef uint64_t end_lb = input.end_lb
        cdef walb_extent* grown
        cdef size_t j
        for j in range(n):
            if e[j].address_lb < end_lb or e[j].blocks_lb == 0:
                raise ValueError("extents out of order")
            end_lb = extent_end(&e[j])
        if n > input.room:
            grown = <walb_extent*>realloc(input.buf, n * sizeof(walb_extent))
            if grown == NULL:
                raise MemoryError
            input.buf = grown
            input.room = n
        if n:
            memcpy(input.buf, e, n * sizeof(walb_extent))
        input.n = n
        input.pos = 0
        input.end_lb = end_lb
        extent_advance(&self._m, i, self._m.done_lb)

    def finish(self, size_t i):
        """Say that input `i` has no more."""
        self._input(i).finished = 1

    def run(self, size_t n_max, uint64_t lb_max):
        """Merge on. Returns the number of the input to feed or finish next; -1 when `take` would give `n_max`
        extents, or extents whose images come to `lb_max` blocks decompressed; -2 when everything is merged."""
        cdef int64_t result
        if n_max == 0:
            raise ValueError("n_max is 0")
        with nogil:
            result = extent_merge_run(&self._m, n_max, lb_max)
        if result == -3:
            raise MemoryError
        return result

    def take(self):
        """Return what was merged since the last call."""
        cdef bytes result = to_bytes(self._m.out, self._m.n_out, sizeof(walb_extent))
        self._m.n_out = 0
        self._m.image_lb = 0
        return result
