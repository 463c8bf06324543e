"""The bytes of wdiff files, and the plans by which batches of extents are read, decoded, and packed again.

A batch works in memory areas: 0 the stored images as read, 1 decoded data, 2 newly compressed data. Nothing here
reads a file or compresses: plans say what to do, in arrays of structs (src/wdiff.h has their layouts).
Rules: docs/formats.md, "wdiff". Twin: tests/reference/wdiff.py.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

from extent cimport walb_extent
from walb cimport WALB_LB, bytes_of, structs_of, to_bytes


cdef extern from "wdiff.h" nogil:
    enum:
        WDIFF_PACK_B
        WDIFF_PACK_RECORDS
        WDIFF_INDEX_RECORD_B

    ctypedef struct wdiff_pack_info:
        uint64_t end_lb
        uint32_t n_records
        uint32_t total_size_b
        uint32_t is_end
        uint32_t bad_record

    ctypedef struct wdiff_image:
        uint64_t data_b
        uint64_t stored_at
        uint32_t data_size_b
        uint16_t source

    ctypedef struct wdiff_piece:
        pass

    ctypedef struct wdiff_job:
        pass

    ctypedef struct wdiff_copy:
        uint64_t area
        uint64_t source "from"
        uint64_t to
        uint64_t size_b

    ctypedef struct wdiff_item:
        uint64_t at
        uint32_t size_b
        uint32_t checksum
        uint8_t flags
        uint8_t kind
        uint8_t area
        uint8_t todo

    ctypedef struct wdiff_key:
        pass

    int wdiff_parse_pack(const uint8_t* h, uint64_t data_b, uint16_t source, walb_extent* out, wdiff_pack_info* info)
    int wdiff_parse_index(const uint8_t* p, size_t n, uint64_t index_b, uint16_t source, walb_extent* out,
                          wdiff_pack_info* info)
    size_t wdiff_build_index(const walb_extent* e, size_t n, uint32_t limit_lb, size_t* at, uint32_t* done_lb,
                             uint8_t* out, size_t room)
    size_t wdiff_plan_images(const walb_extent* e, size_t n, wdiff_key* keys, wdiff_image* images, uint32_t* refs)
    size_t wdiff_plan_reads(wdiff_image* im, size_t n, size_t* i, uint64_t gap_b, wdiff_piece* pieces, uint64_t* at)
    size_t wdiff_check_images(const wdiff_image* im, size_t n, const uint8_t* stored)
    size_t wdiff_check_extents(const walb_extent* e, size_t n, const uint8_t* data, uint64_t base_b)
    void wdiff_plan_flat(const walb_extent* e, const uint32_t* refs, size_t n, wdiff_image* im,
                         const uint64_t* targets, wdiff_job* jobs, size_t* n_jobs, wdiff_copy* copies,
                         size_t* n_copies, uint64_t* raw_b)
    void wdiff_plan_pack(const walb_extent* e, const uint32_t* refs, size_t n, wdiff_image* im, uint8_t kind,
                         wdiff_item* items, wdiff_job* jobs, size_t* n_jobs, uint64_t* raw_b)
    void wdiff_settle(wdiff_item* t, size_t n, uint8_t kind, const uint64_t* results, size_t n_results,
                      const uint8_t* const* areas)
    void wdiff_build_pack(const wdiff_item* t, size_t n, uint8_t* h)
    void wdiff_gather(const wdiff_item* t, size_t n, const uint8_t* const* areas, uint8_t* out)
    uint64_t wdiff_plan_runs(const walb_extent* e, size_t n, int ignore_discard, uint32_t zero_min_lb,
                             uint64_t* targets, wdiff_piece* runs, size_t* n_runs, wdiff_piece* zeros,
                             size_t* n_zeros, wdiff_copy* fills, size_t* n_fills)


cdef void* _room(size_t n, size_t size_b) except NULL:
    cdef void* p = malloc(n * size_b + 8)
    if p == NULL:
        raise MemoryError
    return p


# ---- layouts ----

def parse_pack(const uint8_t[::1] header not None, uint64_t data_b, uint16_t source, uint64_t end_lb):
    """Check a pack header [4096 byte] and turn its records into extents.

    `data_b` is where its data area lies in the file number `source`; `end_lb` is where the records before it end.
    Returns (reason, number of the bad record or -1, is end pack, size of the data area [byte], where the records
    end now, extents); reason 0 is good, others are numbers of walbd.format.wdiff.REASONS.
    """
    cdef wdiff_pack_info info
    cdef walb_extent out[127]
    cdef int code
    if header.shape[0] != WDIFF_PACK_B:
        raise ValueError("a pack header has 4096 bytes")
    info.end_lb = end_lb
    code = wdiff_parse_pack(&header[0], data_b, source, out, &info)
    if code:
        return code, _record(info.bad_record), False, 0, end_lb, b""
    return (0, -1, bool(info.is_end), info.total_size_b, info.end_lb,
            to_bytes(out, info.n_records, sizeof(walb_extent)))


cdef object _record(uint32_t number):
    return -1 if number == 0xffffffff else number


def parse_index(const uint8_t[::1] records not None, uint64_t index_b, uint16_t source, uint64_t end_lb):
    """Check index records [48 byte each] and turn them into extents; images lie in [32, index_b) of their file.

    Returns (reason, number of the bad record or -1, where the records end now, extents), as `parse_pack` does.
    """
    cdef size_t n = records.shape[0] // WDIFF_INDEX_RECORD_B
    cdef wdiff_pack_info info
    cdef const uint8_t* p = bytes_of(records)
    cdef bytes result
    cdef walb_extent* out
    cdef int code
    if records.shape[0] % WDIFF_INDEX_RECORD_B:
        raise ValueError("index records have 48 bytes")
    result = PyBytes_FromStringAndSize(NULL, n * sizeof(walb_extent))
    out = <walb_extent*><char*>result
    info.end_lb = end_lb
    with nogil:
        code = wdiff_parse_index(p, n, index_b, source, out, &info)
    if code:
        return code, _record(info.bad_record), end_lb, b""
    return 0, -1, info.end_lb, result


def build_index(const uint8_t[::1] extents not None, uint32_t limit_lb, size_t at, uint32_t done_lb, size_t room):
    """Return at most `room` index records of sorted extents, cut into aligned powers of two up to `limit_lb`.

    Begins at extent `at`, of which `done_lb` blocks are written already; returns (records, at, done_lb) to go on with.
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t count
    cdef uint8_t* out
    if limit_lb == 0 or limit_lb & (limit_lb - 1) or done_lb and (at >= n or done_lb >= e[at].blocks_lb):
        raise ValueError("not a power of two, or not inside an extent")
    out = <uint8_t*>_room(room, WDIFF_INDEX_RECORD_B)
    try:
        with nogil:
            count = wdiff_build_index(e, n, limit_lb, &at, &done_lb, out, room)
        return to_bytes(out, count, WDIFF_INDEX_RECORD_B), at, done_lb
    finally:
        free(out)


# ---- plans ----

def plan_images(const uint8_t[::1] extents not None, uint64_t gap_b):
    """Find the images that extents need, and what to read of their files for them.

    Images of one file that lie at most `gap_b` apart are read together. Returns (images, refs: the image of each
    extent, reads: (source, pieces) for each file, pieces being (offset, size, place in area 0), size of area 0).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t count
    cdef size_t n_pieces
    cdef size_t first
    cdef size_t i = 0
    cdef uint64_t at = 0
    cdef wdiff_key* keys = NULL
    cdef wdiff_image* images = NULL
    cdef uint32_t* refs = NULL
    cdef wdiff_piece* pieces = NULL
    cdef list reads = []
    try:
        keys = <wdiff_key*>_room(n, sizeof(wdiff_key))
        images = <wdiff_image*>_room(n, sizeof(wdiff_image))
        refs = <uint32_t*>_room(n, sizeof(uint32_t))
        pieces = <wdiff_piece*>_room(n, sizeof(wdiff_piece))
        with nogil:
            count = wdiff_plan_images(e, n, keys, images, refs)
        while i < count:
            first = i
            n_pieces = wdiff_plan_reads(images, count, &i, gap_b, pieces, &at)
            reads.append((images[first].source, to_bytes(pieces, n_pieces, sizeof(wdiff_piece))))
        return (bytearray(to_bytes(images, count, sizeof(wdiff_image))), to_bytes(refs, n, sizeof(uint32_t)),
                reads, at)
    finally:
        free(keys)
        free(images)
        free(refs)
        free(pieces)


def plan_images_in_place(const uint8_t[::1] extents not None, uint64_t base_b, uint64_t size_b):
    """Like `plan_images`, for images that are in memory: area 0 is the `size_b` bytes of the file from `base_b` on.

    Returns (images, refs).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t count
    cdef size_t i
    cdef wdiff_key* keys = NULL
    cdef wdiff_image* images = NULL
    cdef uint32_t* refs = NULL
    for i in range(n):
        if not e[i].flags and (e[i].data_b < base_b or e[i].data_b - base_b > size_b or
                               e[i].data_size_b > size_b - (e[i].data_b - base_b)):
            raise ValueError("an image lies outside the area")
    try:
        keys = <wdiff_key*>_room(n, sizeof(wdiff_key))
        images = <wdiff_image*>_room(n, sizeof(wdiff_image))
        refs = <uint32_t*>_room(n, sizeof(uint32_t))
        with nogil:
            count = wdiff_plan_images(e, n, keys, images, refs)
            for i in range(count):
                images[i].stored_at = images[i].data_b - base_b
        return bytearray(to_bytes(images, count, sizeof(wdiff_image))), to_bytes(refs, n, sizeof(uint32_t))
    finally:
        free(keys)
        free(images)
        free(refs)


def check_images(const uint8_t[::1] images not None, const uint8_t[::1] stored not None):
    """Return the number of the first image whose bytes in area 0 do not have its checksum, or -1."""
    cdef const wdiff_image* im = <const wdiff_image*>structs_of(images, sizeof(wdiff_image))
    cdef size_t n = images.shape[0] // sizeof(wdiff_image)
    cdef const uint8_t* data = bytes_of(stored)
    cdef uint64_t size_b = stored.shape[0]
    cdef size_t bad
    for bad in range(n):
        if im[bad].stored_at > size_b or im[bad].data_size_b > size_b - im[bad].stored_at:
            raise ValueError("an image lies outside the area")
    with nogil:
        bad = wdiff_check_images(im, n, data)
    return -1 if bad == n else bad


def check_extents(const uint8_t[::1] extents not None, const uint8_t[::1] data not None, uint64_t base_b):
    """Return the number of the first extent whose stored bytes do not have its checksum, or -1; `data` is what
    lies at `base_b` of the file."""
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef const uint8_t* p = bytes_of(data)
    cdef uint64_t size_b = data.shape[0]
    cdef size_t bad
    for bad in range(n):
        if not e[bad].flags and (e[bad].data_b < base_b or e[bad].data_b - base_b > size_b or
                                 e[bad].data_size_b > size_b - (e[bad].data_b - base_b)):
            raise ValueError("an image lies outside the data")
    with nogil:
        bad = wdiff_check_extents(e, n, p, base_b)
    return -1 if bad == n else bad


def plan_flat(const uint8_t[::1] extents not None, const uint8_t[::1] refs not None, uint8_t[::1] images not None,
              const uint8_t[::1] targets not None, uint64_t raw_b):
    """Plan how each extent's data gets to its target in area 1, whose first `raw_b` bytes hold all targets.

    Returns (jobs: payloads to decompress, copies to make after them, size that area 1 needs).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t n_images = images.shape[0] // sizeof(wdiff_image)
    cdef wdiff_image* im = <wdiff_image*>structs_of(images, sizeof(wdiff_image))
    cdef const uint32_t* ref = <const uint32_t*>structs_of(refs, sizeof(uint32_t))
    cdef const uint64_t* target = <const uint64_t*>structs_of(targets, sizeof(uint64_t))
    cdef size_t n_jobs = 0
    cdef size_t n_copies = 0
    cdef wdiff_job* jobs = NULL
    cdef wdiff_copy* copies = NULL
    _check_refs(ref, refs.shape[0] // sizeof(uint32_t), n, n_images)
    if <size_t>targets.shape[0] // sizeof(uint64_t) != n:
        raise ValueError("one target for each extent")
    try:
        jobs = <wdiff_job*>_room(n_images, sizeof(wdiff_job))
        copies = <wdiff_copy*>_room(n, sizeof(wdiff_copy))
        with nogil:
            wdiff_plan_flat(e, ref, n, im, target, jobs, &n_jobs, copies, &n_copies, &raw_b)
        return to_bytes(jobs, n_jobs, sizeof(wdiff_job)), to_bytes(copies, n_copies, sizeof(wdiff_copy)), raw_b
    finally:
        free(jobs)
        free(copies)


cdef int _check_refs(const uint32_t* ref, size_t n_refs, size_t n, size_t n_images) except -1:
    cdef size_t i
    if n_refs != n:
        raise ValueError("one reference for each extent")
    for i in range(n):
        if ref[i] != 0xffffffff and ref[i] >= n_images:
            raise ValueError("no such image")
    return 0


def copy_all(const uint8_t[::1] copies not None, const uint8_t[::1] stored not None, uint8_t[::1] raw not None):
    """Carry out copies: from area 0 or 1 to area 1; area 3 stands for zeros."""
    cdef const wdiff_copy* c = <const wdiff_copy*>structs_of(copies, sizeof(wdiff_copy))
    cdef size_t n = copies.shape[0] // sizeof(wdiff_copy)
    cdef const uint8_t* a0 = bytes_of(stored)
    cdef uint8_t* a1 = <uint8_t*>bytes_of(raw)
    cdef uint64_t n0 = stored.shape[0]
    cdef uint64_t n1 = raw.shape[0]
    cdef uint64_t n_from
    cdef size_t i
    for i in range(n):
        n_from = n1 if c[i].area == 1 else n0
        if c[i].to > n1 or c[i].size_b > n1 - c[i].to:
            raise ValueError("a copy goes outside the area")
        if c[i].area != 3 and (c[i].source > n_from or c[i].size_b > n_from - c[i].source):
            raise ValueError("a copy comes from outside the area")
    with nogil:
        for i in range(n):
            if c[i].area == 3:
                memset(a1 + c[i].to, 0, c[i].size_b)
            else:
                memmove(a1 + c[i].to, (<const uint8_t*>a1 if c[i].area == 1 else a0) + c[i].source, c[i].size_b)


def plan_pack(const uint8_t[::1] extents not None, const uint8_t[::1] refs not None, uint8_t[::1] images not None,
              uint8_t kind):
    """Plan the records of a pack whose data shall be stored as `kind`: what is so stored, and not cut, goes through.

    Returns (items, jobs: payloads to decompress into area 1, size of area 1, todo: (area, place, size) of each range
    to compress).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef size_t n_images = images.shape[0] // sizeof(wdiff_image)
    cdef wdiff_image* im = <wdiff_image*>structs_of(images, sizeof(wdiff_image))
    cdef const uint32_t* ref = <const uint32_t*>structs_of(refs, sizeof(uint32_t))
    cdef size_t n_jobs = 0
    cdef size_t n_todo = 0
    cdef size_t i
    cdef uint64_t raw_b = 0
    cdef wdiff_job* jobs = NULL
    cdef wdiff_item* items = NULL
    cdef uint64_t* todo = NULL
    _check_refs(ref, refs.shape[0] // sizeof(uint32_t), n, n_images)
    try:
        jobs = <wdiff_job*>_room(n_images, sizeof(wdiff_job))
        items = <wdiff_item*>_room(n, sizeof(wdiff_item))
        todo = <uint64_t*>_room(n, 24)
        wdiff_plan_pack(e, ref, n, im, kind, items, jobs, &n_jobs, &raw_b)
        for i in range(n):
            if items[i].todo:
                todo[3 * n_todo] = items[i].area
                todo[3 * n_todo + 1] = items[i].at
                todo[3 * n_todo + 2] = items[i].size_b
                n_todo += 1
        return (bytearray(to_bytes(items, n, sizeof(wdiff_item))), to_bytes(jobs, n_jobs, sizeof(wdiff_job)), raw_b,
                to_bytes(todo, n_todo, 24))
    finally:
        free(jobs)
        free(items)
        free(todo)


cdef int _check_items(const wdiff_item* t, size_t n, const uint64_t* sizes) except -1:
    cdef size_t i
    for i in range(n):
        if t[i].flags and not t[i].todo:
            continue
        if t[i].area > 2 or t[i].at > sizes[t[i].area] or t[i].size_b > sizes[t[i].area] - t[i].at:
            raise ValueError("an item lies outside its area")
    return 0


def settle(uint8_t[::1] items not None, const uint8_t[::1] results not None, uint8_t kind,
           const uint8_t[::1] stored not None, const uint8_t[::1] raw not None, const uint8_t[::1] packed not None):
    """Take over what compressing the todo ranges gave, two u64 each: place in area 2 and size, or size 0 where it did
    not shrink and stays as it is; no results at all mean that nothing is to be compressed. Sets the checksums."""
    cdef wdiff_item* t = <wdiff_item*>structs_of(items, sizeof(wdiff_item))
    cdef size_t n = items.shape[0] // sizeof(wdiff_item)
    cdef const uint64_t* result = <const uint64_t*>structs_of(results, 16)
    cdef size_t n_results = results.shape[0] // 16
    cdef const uint8_t* areas[3]
    cdef uint64_t sizes[3]
    cdef size_t todo = 0
    cdef size_t i
    areas[0], areas[1], areas[2] = bytes_of(stored), bytes_of(raw), bytes_of(packed)
    sizes[0], sizes[1], sizes[2] = stored.shape[0], raw.shape[0], packed.shape[0]
    _check_items(t, n, sizes)
    for i in range(n):
        todo += t[i].todo != 0
    if n_results and n_results != todo:
        raise ValueError("one result for each todo item")
    for i in range(n_results):
        if result[2 * i] > sizes[2] or result[2 * i + 1] > sizes[2] - result[2 * i]:
            raise ValueError("a result lies outside area 2")
    with nogil:
        wdiff_settle(t, n, kind, result, n_results, areas)


def gather(const uint8_t[::1] items not None, const uint8_t[::1] stored not None, const uint8_t[::1] raw not None,
           const uint8_t[::1] packed not None, bint header):
    """Return the stored data of settled items, one after the other; with `header`, a whole pack."""
    cdef const wdiff_item* t = <const wdiff_item*>structs_of(items, sizeof(wdiff_item))
    cdef size_t n = items.shape[0] // sizeof(wdiff_item)
    cdef const uint8_t* areas[3]
    cdef uint64_t sizes[3]
    cdef size_t size_b = WDIFF_PACK_B if header else 0
    cdef size_t i
    cdef bytes result
    cdef uint8_t* out
    areas[0], areas[1], areas[2] = bytes_of(stored), bytes_of(raw), bytes_of(packed)
    sizes[0], sizes[1], sizes[2] = stored.shape[0], raw.shape[0], packed.shape[0]
    if header and not 0 < n <= WDIFF_PACK_RECORDS:
        raise ValueError("a pack has 1 to 127 records")
    _check_items(t, n, sizes)
    for i in range(n):
        if not t[i].flags:
            size_b += t[i].size_b
    result = PyBytes_FromStringAndSize(NULL, size_b)
    out = <uint8_t*><char*>result
    with nogil:
        if header:
            wdiff_build_pack(t, n, out)
            out += WDIFF_PACK_B
        wdiff_gather(t, n, areas, out)
    return result


def relocate(const uint8_t[::1] extents not None, const uint8_t[::1] items not None, uint64_t at_b, uint16_t source):
    """Return the extents as they are after the gathered data of `items` (one each) was written at `at_b` of the file
    number `source`; each must be a whole image."""
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef const wdiff_item* t = <const wdiff_item*>structs_of(items, sizeof(wdiff_item))
    cdef bytes result
    cdef walb_extent* e
    cdef size_t i
    structs_of(extents, sizeof(walb_extent))
    if <size_t>items.shape[0] // sizeof(wdiff_item) != n:
        raise ValueError("one item for each extent")
    result = to_bytes(bytes_of(extents), n, sizeof(walb_extent))
    e = <walb_extent*><char*>result
    for i in range(n):
        if e[i].flags:
            continue
        if e[i].blocks_lb != e[i].orig_lb:
            raise ValueError("not a whole image")
        e[i].data_b = at_b
        e[i].data_size_b = t[i].size_b
        e[i].checksum = t[i].checksum
        e[i].kind = t[i].kind
        e[i].source = source
        at_b += t[i].size_b
    return result


def plan_runs(const uint8_t[::1] extents not None, bint ignore_discard, uint32_t zero_min_lb):
    """Plan the writing of sorted extents to an image: neighbours together; ranges of nothing of at least
    `zero_min_lb` blocks to be zeroed, shorter ones as zeros in the data (discards not at all if ignored).

    Returns (targets in area 1, runs: pieces (offset in the image, size, place in area 1), zeros: pieces without a
    place, fills: copies of zeros, size of area 1).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef uint64_t* targets = NULL
    cdef wdiff_piece* runs = NULL
    cdef wdiff_piece* zeros = NULL
    cdef wdiff_copy* fills = NULL
    cdef size_t n_runs = 0
    cdef size_t n_zeros = 0
    cdef size_t n_fills = 0
    cdef uint64_t size_b
    try:
        targets = <uint64_t*>_room(n, sizeof(uint64_t))
        runs = <wdiff_piece*>_room(n, sizeof(wdiff_piece))
        zeros = <wdiff_piece*>_room(n, sizeof(wdiff_piece))
        fills = <wdiff_copy*>_room(n, sizeof(wdiff_copy))
        with nogil:
            size_b = wdiff_plan_runs(e, n, ignore_discard, zero_min_lb, targets, runs, &n_runs, zeros, &n_zeros,
                                     fills, &n_fills)
        return (to_bytes(targets, n, sizeof(uint64_t)), to_bytes(runs, n_runs, sizeof(wdiff_piece)),
                to_bytes(zeros, n_zeros, sizeof(wdiff_piece)), to_bytes(fills, n_fills, sizeof(wdiff_copy)), size_b)
    finally:
        free(targets)
        free(runs)
        free(zeros)
        free(fills)


def plan_window(const uint8_t[::1] extents not None, uint64_t begin_lb):
    """Plan extents over an image that lies in area 1 from block `begin_lb` on.

    Returns (targets, fills: copies of zeros over the ranges without data).
    """
    cdef const walb_extent* e = <const walb_extent*>structs_of(extents, sizeof(walb_extent))
    cdef size_t n = extents.shape[0] // sizeof(walb_extent)
    cdef uint64_t* targets = NULL
    cdef wdiff_copy* fills = NULL
    cdef size_t n_fills = 0
    cdef size_t i
    try:
        targets = <uint64_t*>_room(n, sizeof(uint64_t))
        fills = <wdiff_copy*>_room(n, sizeof(wdiff_copy))
        for i in range(n):
            if e[i].address_lb < begin_lb:
                raise ValueError("an extent lies before the window")
            targets[i] = (e[i].address_lb - begin_lb) * WALB_LB
            if e[i].flags:
                fills[n_fills].area = 3
                fills[n_fills].source = 0
                fills[n_fills].to = targets[i]
                fills[n_fills].size_b = <uint64_t>e[i].blocks_lb * WALB_LB
                n_fills += 1
        return to_bytes(targets, n, sizeof(uint64_t)), to_bytes(fills, n_fills, sizeof(wdiff_copy))
    finally:
        free(targets)
        free(fills)
