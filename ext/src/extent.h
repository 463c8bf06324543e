/* Extents: where the newest data of a range of the volume lies. The one record that readers, the merge, apply,
 * virtual images and the writers of wdiffs exchange. Rules: docs/formats.md, "wdiff". Plain C over arrays; no
 * function here allocates unless it says so. */
#ifndef WALBD_EXTENT_H
#define WALBD_EXTENT_H

#include <stdlib.h>

#include "walb.h"

enum { EXT_ALLZERO = 2, EXT_DISCARD = 4, EXT_NODATA = EXT_ALLZERO | EXT_DISCARD };

/* No address is at or above this [LB]: byte offsets then fit in a signed 64-bit integer. */
#define WALB_ADDRESS_MAX_LB (UINT64_C(1) << 54)

/* 40 bytes, no gaps. Python: struct.Struct("<QQIIIIIHBB").
 * A normal extent is `blocks_lb` blocks from block `offset_lb` of a stored image, which is `orig_lb` blocks long
 * when decompressed. All-zero and discarded extents have flags only, and zeros in every field about data. */
typedef struct {
    uint64_t address_lb;
    uint64_t data_b;      /* of the stored image, from the start of its file [byte] */
    uint32_t blocks_lb;
    uint32_t offset_lb;
    uint32_t orig_lb;
    uint32_t data_size_b; /* of the stored image */
    uint32_t checksum;    /* of the stored image, salt 0 */
    uint16_t source;      /* number of the input file */
    uint8_t flags;        /* 0 normal, 2 all-zero, 4 discard */
    uint8_t kind;         /* compression */
} walb_extent;

static inline uint64_t extent_end(const walb_extent *e)
{
    return e->address_lb + e->blocks_lb;
}

/* Cut the left part away, up to `to_lb`, which lies inside. */
static inline void extent_trim(walb_extent *e, uint64_t to_lb)
{
    uint32_t cut = (uint32_t)(to_lb - e->address_lb);
    e->address_lb = to_lb;
    e->blocks_lb -= cut;
    if (!(e->flags & EXT_NODATA))
        e->offset_lb += cut;
}

static inline int extent_same_image(const walb_extent *a, const walb_extent *b)
{
    return a->source == b->source && a->data_b == b->data_b && a->data_size_b == b->data_size_b &&
           a->orig_lb == b->orig_lb && a->checksum == b->checksum && a->kind == b->kind;
}

/* Say whether `b` continues `a`: the next blocks of the same image, or more of the same nothing. */
static inline int extent_continues(const walb_extent *a, const walb_extent *b)
{
    if (a->flags != b->flags || extent_end(a) != b->address_lb || (uint64_t)a->blocks_lb + b->blocks_lb > UINT32_MAX)
        return 0;
    if (a->flags & EXT_NODATA)
        return 1;
    return a->offset_lb + a->blocks_lb == b->offset_lb && extent_same_image(a, b);
}

/* Lay `over` upon `under` (each sorted, without overlaps) and write what is visible to `out`, sorted.
 * `out` has room for n_under + 2 * n_over extents. Returns how many were written. */
static inline size_t extent_overlay(const walb_extent *under, size_t n_under, const walb_extent *over, size_t n_over,
                             walb_extent *out)
{
    size_t i = 0, j, k = 0;
    walb_extent cur;
    int have = 0;
    for (j = 0; j < n_over; j++) {
        uint64_t begin = over[j].address_lb, end = extent_end(&over[j]);
        while (have || i < n_under) {
            if (!have) {
                cur = under[i++];
                have = 1;
            }
            if (cur.address_lb >= begin)
                break;
            if (extent_end(&cur) <= begin) {
                out[k++] = cur;
                have = 0;
                continue;
            }
            out[k] = cur;
            out[k++].blocks_lb = (uint32_t)(begin - cur.address_lb);
            extent_trim(&cur, begin);
        }
        out[k++] = over[j];
        while (have || i < n_under) {
            if (!have) {
                cur = under[i++];
                have = 1;
            }
            if (cur.address_lb >= end)
                break;
            if (extent_end(&cur) > end) {
                extent_trim(&cur, end);
                break;
            }
            have = 0;
        }
    }
    if (have)
        out[k++] = cur;
    memcpy(out + k, under + i, (n_under - i) * sizeof *out);
    return k + (n_under - i);
}

/* Sort `n` extents given in order of arrival, later ones winning, by merging neighbours bottom-up with
 * extent_overlay. `a` holds the input; `a` and `b` have room for 2 * n each, `ends` for n + 1.
 * The result is left in *result (one of a, b). Returns how many extents are visible: at most 2 * n - 1. */
static inline size_t extent_resolve(walb_extent *a, walb_extent *b, size_t *ends, size_t n, walb_extent **result)
{
    size_t runs = n, r;
    *result = a;
    if (n == 0)
        return 0;
    for (r = 0; r < n; r++)
        ends[r] = r + 1;
    while (runs > 1) {
        size_t from = 0, k = 0, made = 0;
        for (r = 0; r < runs; r += 2) {
            size_t mid = ends[r];
            if (r + 1 < runs) {
                size_t end = ends[r + 1];
                k += extent_overlay(a + from, mid - from, a + mid, end - mid, b + k);
                from = end;
            } else {
                memcpy(b + k, a + from, (mid - from) * sizeof *a);
                k += mid - from;
                from = mid;
            }
            ends[made++] = k;
        }
        runs = made;
        walb_extent *t = a;
        a = b;
        b = t;
    }
    *result = a;
    return ends[0];
}

/* Count what extent_from_log writes for these records; -1 when a record lies outside the buffer or no device
 * can have it (*bad is its number). */
static inline int64_t extent_log_count(const walb_log_record *rec, size_t n, size_t buf_b, uint32_t max_lb, size_t *bad)
{
    size_t i;
    int64_t count = 0;
    for (i = 0; i < n; i++) {
        uint64_t size_b = (uint64_t)rec[i].io_size_lb * 512;
        if (rec[i].flags & 2)
            continue;
        *bad = i;
        if (rec[i].offset_lb >= WALB_ADDRESS_MAX_LB || rec[i].offset_lb + rec[i].io_size_lb > WALB_ADDRESS_MAX_LB)
            return -1;
        if (!(rec[i].flags & 4) &&
            (rec[i].io_size_lb > WALB_IO_MAX_LB || rec[i].data_b > buf_b || size_b > buf_b - rec[i].data_b))
            return -1;
        count += max_lb ? (rec[i].io_size_lb + (uint64_t)max_lb - 1) / max_lb : (rec[i].io_size_lb > 0);
    }
    return count;
}

/* Turn log records into extents in order of arrival: paddings vanish, all-zero data is recognised per record,
 * records above max_lb (0: no limit) are cut. `at_b` is where `buf` lies in its file. */
static inline void extent_from_log(const walb_log_record *rec, size_t n, const uint8_t *buf, uint64_t at_b,
                                   uint16_t source, uint32_t max_lb, walb_extent *out)
{
    size_t i;
    for (i = 0; i < n; i++) {
        uint32_t left = rec[i].io_size_lb, step;
        walb_extent e = {0};
        if ((rec[i].flags & 2) || left == 0)
            continue;
        e.address_lb = rec[i].offset_lb;
        e.source = source;
        if (rec[i].flags & 4) {
            e.flags = EXT_DISCARD;
        } else if (walb_is_zero(buf + rec[i].data_b, (size_t)left * 512)) {
            e.flags = EXT_ALLZERO;
        } else {
            e.data_b = at_b + rec[i].data_b;
            e.orig_lb = left;
            e.data_size_b = left * 512;
            e.checksum = walb_checksum(buf + rec[i].data_b, e.data_size_b, 0);
        }
        if (e.flags)
            e.source = 0;
        while (left) {
            step = max_lb && left > max_lb ? max_lb : left;
            e.blocks_lb = step;
            *out++ = e;
            e.address_lb += step;
            if (!e.flags)
                e.offset_lb += step;
            left -= step;
        }
    }
}

/* The first piece of a range cut into aligned powers of two, at most `limit` (a power of two). */
static inline uint32_t extent_aligned_step(uint64_t address_lb, uint32_t blocks_lb, uint32_t limit)
{
    uint64_t align = address_lb ? address_lb & (~address_lb + 1) : UINT64_C(1) << 31;
    uint32_t step = align > UINT32_C(1) << 31 ? UINT32_C(1) << 31 : (uint32_t)align;
    if (step > blocks_lb)
        step = UINT32_C(1) << (31 - __builtin_clz(blocks_lb));
    return step < limit ? step : limit;
}

/* Index of the first extent that ends above `address_lb`, in a sorted array. */
static inline size_t extent_find(const walb_extent *e, size_t n, uint64_t address_lb)
{
    size_t lo = 0, hi = n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (extent_end(&e[mid]) > address_lb)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

/* ---- k-way merge ---- */

typedef struct {
    walb_extent *buf;
    size_t n, pos, room;
    uint64_t end_lb; /* where the extents fed so far end */
    int finished;
} extent_input;

typedef struct {
    extent_input *in; /* oldest first: of two that overlap, the one with the higher number wins */
    uint64_t *begin;  /* address of each input's head; UINT64_MAX when it has none */
    size_t k;
    walb_extent *out;
    size_t n_out, room_out;
    uint64_t image_lb; /* size of the images that the output needs, decompressed */
    uint64_t done_lb;  /* everything below has come out */
    int join;          /* put the pieces of one image, or of nothing, together again */
} extent_merge;

static inline void extent_advance(extent_merge *m, size_t i, uint64_t to_lb)
{
    extent_input *in = &m->in[i];
    while (in->pos < in->n) {
        walb_extent *e = &in->buf[in->pos];
        if (e->address_lb >= to_lb)
            break;
        if (extent_end(e) > to_lb) {
            extent_trim(e, to_lb);
            break;
        }
        in->pos++;
    }
    m->begin[i] = in->pos < in->n ? in->buf[in->pos].address_lb : UINT64_MAX;
}

/* Merge until the output holds n_max extents, or their images come to lb_max blocks (one image may be larger), or
 * an input is needed. Returns the number of the input to feed, -1 when the output is full, -2 when everything has
 * come out, -3 without memory (it allocates the output). */
static inline int64_t extent_merge_run(extent_merge *m, size_t n_max, uint64_t lb_max)
{
    for (;;) {
        uint64_t begin = UINT64_MAX, stop, image_lb = 0;
        walb_extent piece, *last = m->n_out ? &m->out[m->n_out - 1] : NULL;
        size_t i, best = 0;
        for (i = 0; i < m->k; i++) {
            if (m->begin[i] == UINT64_MAX) {
                if (!m->in[i].finished)
                    return (int64_t)i;
            } else if (m->begin[i] <= begin) {
                begin = m->begin[i];
                best = i;
            }
        }
        if (begin == UINT64_MAX)
            return -2;
        piece = m->in[best].buf[m->in[best].pos];
        stop = extent_end(&piece);
        for (i = best + 1; i < m->k; i++) /* newer ones begin later: they cut it */
            if (m->begin[i] < stop)
                stop = m->begin[i];
        piece.blocks_lb = (uint32_t)(stop - begin);
        if (m->join && last && extent_continues(last, &piece)) {
            last->blocks_lb += piece.blocks_lb;
        } else {
            if (!(piece.flags & EXT_NODATA) && !(last && !(last->flags & EXT_NODATA) && extent_same_image(last, &piece)))
                image_lb = piece.orig_lb;
            if (m->n_out >= n_max || (last && m->image_lb + image_lb > lb_max))
                return -1;
            if (m->n_out == m->room_out) {
                size_t room = m->room_out ? m->room_out * 2 : 256;
                walb_extent *out = (walb_extent *)realloc(m->out, room * sizeof *out);
                if (!out)
                    return -3;
                m->out = out;
                m->room_out = room;
            }
            m->out[m->n_out++] = piece;
            m->image_lb += image_lb;
        }
        m->done_lb = stop;
        for (i = 0; i <= best; i++) /* older ones are hidden so far */
            if (m->begin[i] < stop)
                extent_advance(m, i, stop);
    }
}

#endif
