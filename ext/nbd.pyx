"""The hot loops of an NBD server: cutting the request stream into batches, and writing replies.

Source: the NBD protocol (https://github.com/NetworkBlockDevice/nbd, doc/proto.md), transmission phase; all
integers on the wire are big-endian. Tables are arrays of `walb_request` and `walb_range` (device.h).
Twin: tests/reference/nbd.py.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from device cimport (
    NBD_CMD_BLOCK_STATUS, NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES, NBD_FLAG_DF, NBD_FLAG_FAST_ZERO, NBD_FLAG_FUA, NBD_FLAG_NO_HOLE, NBD_FLAG_REQ_ONE, walb_range,
    walb_request,
)
from walb cimport WALB_LB

from walbd.errors import RemoteProtocolError


cdef extern from *:
    uint16_t bswap16 "__builtin_bswap16"(uint16_t) nogil
    uint32_t bswap32 "__builtin_bswap32"(uint32_t) nogil
    uint64_t bswap64 "__builtin_bswap64"(uint64_t) nogil

cdef enum:
    REQUEST_MAGIC = 0x25609513
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668e33ef
    REQUEST_B = 28
    SIMPLE_REPLY_B = 16
    DATA_CHUNK_B = 28  # structured header and the offset

    REPLY_DONE = 1
    REPLY_OFFSET_DATA = 1

    EPERM = 1
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95

    CHUNK_CLASS_B = (1 << 20) + (1 << 16)  # so that a request of 1 MiB fits whole
    SPARE_MAX = 64  # chunks kept for the next use
    COST_B = 1024


CHUNK_B = CHUNK_CLASS_B  # the usual size of a receive buffer [byte]
REQUEST_COST_B = COST_B  # of memory for a request that is not answered, besides its data: tables, tasks

cdef uint8_t* _spare[SPARE_MAX]
cdef int _n_spare = 0


cdef class Chunk:
    """A buffer whose contents are undefined at first; those of the usual size are used again."""

    cdef uint8_t* _data
    cdef Py_ssize_t _size_b

    def __cinit__(self, Py_ssize_t size_b):
        global _n_spare
        if size_b <= 0:
            raise ValueError("a chunk needs a size")
        self._size_b = size_b
        if size_b == CHUNK_CLASS_B and _n_spare > 0:
            _n_spare -= 1
            self._data = _spare[_n_spare]
        else:
            self._data = <uint8_t*>malloc(size_b)
        if self._data == NULL:
            raise MemoryError("no memory for a buffer")

    def __dealloc__(self):
        global _n_spare
        if self._data != NULL:
            if self._size_b == CHUNK_CLASS_B and _n_spare < SPARE_MAX:
                _spare[_n_spare] = self._data
                _n_spare += 1
            else:
                free(self._data)

    def __len__(self):
        return self._size_b

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self._data, self._size_b, 0, flags)


def parse_requests(const uint8_t[::1] data not None, Py_ssize_t begin, Py_ssize_t end, uint64_t size_b,
                   uint32_t length_max_b, bint read_only=False, uint64_t room_b=0xffffffffffffffff):
    """Cut the complete requests in `data[begin:end]` into three tables, each in order of arrival.

    Ends early when what was taken costs `room_b` or more: data of reads and writes, and REQUEST_COST_B for each.
    At least one request is taken. Returns (consumed, need, writes, n_fua, write_b, reads, read_b, others):
    `consumed`: where the first request that was not taken begins; `need`: how many bytes it will have in all, or
    those of a header if that was not looked at yet;
    `writes`: valid WRITE, TRIM and WRITE_ZEROES, aligned to 512 bytes and inside a volume of `size_b` bytes;
    `n_fua` of them have FUA; `write_b`: their payload [byte];
    `reads`: valid READs, and their size `read_b` [byte]; `others`: everything else, and what is refused, with
    its `error`. Empty tables are empty bytes. Raises RemoteProtocolError on a wrong magic and on a WRITE
    above `length_max_b`: the stream cannot be followed any more.
    """
    cdef Py_ssize_t pos = begin
    cdef Py_ssize_t n = 0
    cdef Py_ssize_t n_writes = 0
    cdef Py_ssize_t n_reads = 0
    cdef Py_ssize_t n_others = 0
    cdef Py_ssize_t need = REQUEST_B
    cdef Py_ssize_t n_fua = 0
    cdef uint64_t write_b = 0
    cdef uint64_t read_b = 0
    cdef uint64_t cost_b = 0
    cdef const uint8_t* p
    cdef walb_request q
    cdef walb_request* writes = NULL
    cdef walb_request* reads = NULL
    cdef walb_request* others = NULL
    if not 0 <= begin <= end <= data.shape[0]:
        raise ValueError("bad range of the buffer")
    # First count, then fill: the tables get their exact sizes.
    while end - pos >= REQUEST_B and (cost_b < room_b or pos == begin):
        p = &data[pos]
        if _load32(p) != REQUEST_MAGIC:
            raise RemoteProtocolError("not an NBD request", magic=f"{_load32(p):#x}")
        _parse(p, &q)
        need = REQUEST_B
        if q.type == NBD_CMD_WRITE:
            if q.length_b > length_max_b:
                raise RemoteProtocolError("NBD write is too large", size_b=q.length_b, size_max_b=length_max_b)
            need += q.length_b
            if end - pos < need:
                break
        _check(&q, size_b, length_max_b, read_only)
        if q.error or (q.type != NBD_CMD_READ and not _is_write(&q)):
            n_others += 1
        elif q.type == NBD_CMD_READ:
            n_reads += 1
        else:
            n_writes += 1
        cost_b += COST_B
        if q.type == NBD_CMD_WRITE or (q.type == NBD_CMD_READ and not q.error):
            cost_b += q.length_b
        pos += need
        need = REQUEST_B
    write_table = PyBytes_FromStringAndSize(NULL, n_writes * sizeof(walb_request)) if n_writes else b""
    read_table = PyBytes_FromStringAndSize(NULL, n_reads * sizeof(walb_request)) if n_reads else b""
    other_table = PyBytes_FromStringAndSize(NULL, n_others * sizeof(walb_request)) if n_others else b""
    writes = <walb_request*>PyBytes_AS_STRING(write_table)
    reads = <walb_request*>PyBytes_AS_STRING(read_table)
    others = <walb_request*>PyBytes_AS_STRING(other_table)
    n = n_writes + n_reads + n_others
    n_writes = n_reads = n_others = 0
    pos = begin
    while n > 0:
        _parse(&data[pos], &q)
        _check(&q, size_b, length_max_b, read_only)
        pos += REQUEST_B
        if q.type == NBD_CMD_WRITE:
            q.data_b = pos
            pos += q.length_b
        if q.error or (q.type != NBD_CMD_READ and not _is_write(&q)):
            others[n_others] = q
            n_others += 1
        elif q.type == NBD_CMD_READ:
            reads[n_reads] = q
            n_reads += 1
            read_b += q.length_b
        else:
            writes[n_writes] = q
            n_writes += 1
            if q.type == NBD_CMD_WRITE:
                write_b += q.length_b
            if q.flags & NBD_FLAG_FUA:
                n_fua += 1
        n -= 1
    return pos, need, write_table, n_fua, write_b, read_table, read_b, other_table


cdef inline uint32_t _load32(const uint8_t* p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return bswap32(v)


cdef inline void _parse(const uint8_t* p, walb_request* q) noexcept nogil:
    cdef uint16_t v16
    cdef uint64_t v64
    memset(q, 0, sizeof(walb_request))
    memcpy(&v16, p + 4, 2)
    q.flags = bswap16(v16)
    memcpy(&v16, p + 6, 2)
    q.type = bswap16(v16)
    memcpy(&q.cookie, p + 8, 8)  # opaque: stays as it is on the wire
    memcpy(&v64, p + 16, 8)
    q.offset_b = bswap64(v64)
    q.length_b = _load32(p + 24)


cdef inline bint _is_write(const walb_request* q) noexcept nogil:
    return q.type == NBD_CMD_WRITE or q.type == NBD_CMD_TRIM or q.type == NBD_CMD_WRITE_ZEROES


cdef inline void _check(walb_request* q, uint64_t size_b, uint32_t length_max_b, bint read_only) noexcept nogil:
    """Set the error of a request that must be refused."""
    cdef uint16_t allowed = NBD_FLAG_FUA  # meaningless but allowed on any command
    cdef bint inside = q.offset_b <= size_b and q.length_b <= size_b - q.offset_b
    if _is_write(q):
        if q.type == NBD_CMD_WRITE_ZEROES:
            allowed |= NBD_FLAG_NO_HOLE | NBD_FLAG_FAST_ZERO
        if read_only:
            q.error = EPERM
        elif q.flags & ~allowed or q.length_b == 0 or q.offset_b % WALB_LB or q.length_b % WALB_LB:
            q.error = EINVAL
        elif not inside:
            q.error = ENOSPC
        elif q.flags & NBD_FLAG_FAST_ZERO and q.flags & NBD_FLAG_NO_HOLE:
            q.error = ENOTSUP  # zeros that must be allocated are written, which is not fast
    elif q.type == NBD_CMD_READ:
        if q.flags & ~(allowed | NBD_FLAG_DF) or q.length_b == 0 or not inside:
            q.error = EINVAL
        elif q.length_b > length_max_b:
            q.error = EOVERFLOW
    elif q.type == NBD_CMD_BLOCK_STATUS:
        if q.flags & ~(allowed | NBD_FLAG_REQ_ONE) or q.length_b == 0 or not inside:
            q.error = EINVAL
    elif q.type == NBD_CMD_FLUSH:
        if q.flags & ~allowed:
            q.error = EINVAL
    elif q.type != NBD_CMD_DISC:
        q.error = EINVAL


def simple_replies(requests not None, Py_ssize_t begin, Py_ssize_t end, uint32_t error=0, int fua=-1):
    """Return simple replies to `requests[begin:end]`, all with `error`.

    `requests`: walb_request table. `fua`: only those with (1) or without (0) the FUA flag, -1: all.
    """
    cdef const uint8_t[::1] view = requests
    cdef Py_ssize_t n = view.shape[0] // <Py_ssize_t>sizeof(walb_request)
    cdef const walb_request* q
    cdef Py_ssize_t i
    cdef Py_ssize_t n_out = 0
    cdef uint8_t* out
    cdef uint32_t magic = bswap32(SIMPLE_REPLY_MAGIC)
    cdef uint32_t code = bswap32(error)
    if not 0 <= begin <= end <= n:
        raise ValueError("bad range of requests")
    if begin == end:
        return b""
    q = <const walb_request*>&view[0]
    if fua >= 0:
        for i in range(begin, end):
            if (q[i].flags & NBD_FLAG_FUA) == fua:
                n_out += 1
    else:
        n_out = end - begin
    replies = PyBytes_FromStringAndSize(NULL, n_out * SIMPLE_REPLY_B)
    out = <uint8_t*>PyBytes_AS_STRING(replies)
    for i in range(begin, end):
        if fua >= 0 and (q[i].flags & NBD_FLAG_FUA) != fua:
            continue
        memcpy(out, &magic, 4)
        memcpy(out + 4, &code, 4)
        memcpy(out + 8, &q[i].cookie, 8)
        out += SIMPLE_REPLY_B
    return replies


def read_replies(requests not None, bint structured):
    """Lay out the replies to READs one after the other, headers written, room left for the data.

    `requests`: walb_request table, shape (n,), n at least 1. Returns (out, ranges): a Chunk that holds exactly
    the replies, and the walb_range table, shape (n,), of the data to be read, in which `index` counts the
    requests. The header of a reply begins 28 (structured) or 16 bytes before its data.
    """
    cdef const uint8_t[::1] view = requests
    cdef Py_ssize_t n = view.shape[0] // <Py_ssize_t>sizeof(walb_request)
    cdef const walb_request* q
    cdef walb_range* r
    cdef Py_ssize_t i
    cdef Py_ssize_t size_b = 0
    cdef Py_ssize_t header_b = DATA_CHUNK_B if structured else SIMPLE_REPLY_B
    cdef Chunk out
    cdef uint8_t* p
    cdef uint32_t v32
    cdef uint16_t v16
    cdef uint64_t v64
    if n == 0:
        raise ValueError("no requests")
    q = <const walb_request*>&view[0]
    for i in range(n):
        size_b += header_b + q[i].length_b
    out = Chunk(size_b)
    ranges = PyBytes_FromStringAndSize(NULL, n * sizeof(walb_range))
    r = <walb_range*>PyBytes_AS_STRING(ranges)
    p = out._data
    for i in range(n):
        if structured:
            v32 = bswap32(STRUCTURED_REPLY_MAGIC)
            memcpy(p, &v32, 4)
            v16 = bswap16(REPLY_DONE)
            memcpy(p + 4, &v16, 2)
            v16 = bswap16(REPLY_OFFSET_DATA)
            memcpy(p + 6, &v16, 2)
            memcpy(p + 8, &q[i].cookie, 8)
            v32 = bswap32(8 + q[i].length_b)
            memcpy(p + 16, &v32, 4)
            v64 = bswap64(q[i].offset_b)
            memcpy(p + 20, &v64, 8)
        else:
            v32 = bswap32(SIMPLE_REPLY_MAGIC)
            memcpy(p, &v32, 4)
            memset(p + 4, 0, 4)
            memcpy(p + 8, &q[i].cookie, 8)
        p += header_b
        r[i].offset_b = q[i].offset_b
        r[i].size_b = q[i].length_b
        r[i].out_b = p - out._data
        r[i].index = i
        p += q[i].length_b
    return out, ranges
