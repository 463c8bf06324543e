/* The byte layouts of wdiff files, and the plans by which batches of extents are read, decoded and packed.
 * Layouts and rules: docs/formats.md, "wdiff". */
#ifndef WALBD_WDIFF_H
#define WALBD_WDIFF_H

#include "extent.h"

enum {
    WDIFF_PACK_B = 4096,
    WDIFF_PACK_RECORDS = 127,
    WDIFF_INDEX_RECORD_B = 48,
    WDIFF_KIND_MAX = 5,
    WDIFF_IO_MAX_B = 65535 * 512
};

/* Why a header or record was refused; walbd.format.wdiff has the sentences. */
enum {
    WDIFF_OK = 0,
    WDIFF_BAD_CHECKSUM,
    WDIFF_BAD_COUNT,
    WDIFF_EMPTY_PACK,
    WDIFF_BAD_END_PACK,
    WDIFF_BAD_FLAGS,
    WDIFF_NO_BLOCKS,
    WDIFF_TOO_LARGE,
    WDIFF_BAD_ADDRESS,
    WDIFF_NOT_ASCENDING,
    WDIFF_BAD_KIND,
    WDIFF_BAD_DATA_SIZE,
    WDIFF_BAD_DATA_OFFSET,
    WDIFF_BAD_TOTAL,
    WDIFF_NOT_ALIGNED,
    WDIFF_BAD_IMAGE
};

/* What the address, size and flags of every record must satisfy; *end_lb is where the previous one ended. */
static inline int wdiff_check_range(uint64_t address_lb, uint32_t blocks_lb, uint8_t flags, uint64_t *end_lb)
{
    if ((flags & ~7) || (flags & EXT_NODATA) == EXT_NODATA)
        return WDIFF_BAD_FLAGS;
    if (blocks_lb == 0)
        return WDIFF_NO_BLOCKS;
    if (address_lb >= WALB_ADDRESS_MAX_LB || address_lb + blocks_lb > WALB_ADDRESS_MAX_LB)
        return WDIFF_BAD_ADDRESS;
    if (address_lb < *end_lb)
        return WDIFF_NOT_ASCENDING;
    *end_lb = address_lb + blocks_lb;
    return WDIFF_OK;
}

/* What the stored form of an image must satisfy. */
static inline int wdiff_check_image(uint32_t orig_lb, uint8_t kind, uint32_t data_size_b)
{
    if (orig_lb > WALB_IO_MAX_LB)
        return WDIFF_TOO_LARGE;
    if (kind > WDIFF_KIND_MAX)
        return WDIFF_BAD_KIND;
    if (data_size_b == 0 || data_size_b > orig_lb * 512 || (kind == 0 && data_size_b != orig_lb * 512))
        return WDIFF_BAD_DATA_SIZE;
    return WDIFF_OK;
}

typedef struct {
    uint64_t end_lb;     /* in: where the records before this pack ended; out: where this pack's end */
    uint32_t n_records;
    uint32_t total_size_b;
    uint32_t is_end;
    uint32_t bad_record; /* number of the record that was refused */
} wdiff_pack_info;

/* Check a pack header, 4096 bytes, and turn its records into extents (room for 127). `data_b` is the file offset of
 * the pack's data area. Returns a WDIFF_ code. */
static inline int wdiff_parse_pack(const uint8_t *h, uint64_t data_b, uint16_t source, walb_extent *out, wdiff_pack_info *info)
{
    uint32_t i, n = walb_load16(h + 4);
    uint64_t sum = 0;
    int code;
    info->bad_record = UINT32_MAX;
    info->n_records = n;
    info->is_end = h[6] & 1;
    info->total_size_b = walb_load32(h + 8);
    if (walb_checksum(h, WDIFF_PACK_B, 0) != 0)
        return WDIFF_BAD_CHECKSUM;
    if (n > WDIFF_PACK_RECORDS)
        return WDIFF_BAD_COUNT;
    if (info->is_end)
        return n || info->total_size_b ? WDIFF_BAD_END_PACK : WDIFF_OK;
    if (n == 0)
        return WDIFF_EMPTY_PACK; /* a block of zeros has a good checksum, too */
    for (i = 0; i < n; i++) {
        const uint8_t *r = h + 16 + 32 * i;
        walb_extent e = {0};
        uint32_t data_size_b = walb_load32(r + 20);
        e.address_lb = walb_load64(r);
        e.blocks_lb = walb_load32(r + 8);
        e.flags = r[12] & EXT_NODATA;
        info->bad_record = i;
        if ((code = wdiff_check_range(e.address_lb, e.blocks_lb, r[12], &info->end_lb)))
            return code;
        if (walb_load32(r + 16) != sum)
            return WDIFF_BAD_DATA_OFFSET;
        if (e.flags) {
            if (data_size_b)
                return WDIFF_BAD_DATA_SIZE;
        } else {
            if ((code = wdiff_check_image(e.blocks_lb, r[13], data_size_b)))
                return code;
            e.data_b = data_b + sum;
            e.orig_lb = e.blocks_lb;
            e.data_size_b = data_size_b;
            e.checksum = walb_load32(r + 24);
            e.source = source;
            e.kind = r[13];
        }
        out[i] = e;
        sum += data_size_b;
        if (sum > UINT32_MAX)
            return WDIFF_BAD_TOTAL;
    }
    info->bad_record = UINT32_MAX;
    return sum == info->total_size_b ? WDIFF_OK : WDIFF_BAD_TOTAL;
}

/* Check `n` index records and turn them into extents. Images lie in [32, index_b). */
static inline int wdiff_parse_index(const uint8_t *p, size_t n, uint64_t index_b, uint16_t source, walb_extent *out,
                             wdiff_pack_info *info)
{
    size_t i;
    int code;
    for (i = 0; i < n; i++, p += WDIFF_INDEX_RECORD_B) {
        walb_extent e = {0};
        uint32_t data_size_b = walb_load32(p + 24);
        info->bad_record = (uint32_t)i;
        if (walb_checksum(p, WDIFF_INDEX_RECORD_B, 0) != 0)
            return WDIFF_BAD_CHECKSUM;
        e.address_lb = walb_load64(p);
        e.blocks_lb = walb_load32(p + 8);
        e.flags = p[12] & EXT_NODATA;
        if ((code = wdiff_check_range(e.address_lb, e.blocks_lb, p[12], &info->end_lb)))
            return code;
        if ((e.blocks_lb & (e.blocks_lb - 1)) || (e.address_lb & (e.blocks_lb - 1)))
            return WDIFF_NOT_ALIGNED;
        if (e.flags) {
            if (data_size_b || walb_load32(p + 32))
                return WDIFF_BAD_DATA_SIZE;
        } else {
            e.data_b = walb_load64(p + 16);
            e.offset_lb = walb_load32(p + 28);
            e.orig_lb = walb_load32(p + 32);
            e.data_size_b = data_size_b;
            e.checksum = walb_load32(p + 40);
            e.source = source;
            e.kind = p[13];
            if ((code = wdiff_check_image(e.orig_lb, e.kind, data_size_b)))
                return code;
            if (e.blocks_lb > e.orig_lb || e.offset_lb > e.orig_lb - e.blocks_lb)
                return WDIFF_BAD_IMAGE;
            if (e.data_b < 32 || e.data_b > index_b || data_size_b > index_b - e.data_b)
                return WDIFF_BAD_DATA_OFFSET;
        }
        out[i] = e;
    }
    info->bad_record = UINT32_MAX;
    return WDIFF_OK;
}

/* Write the index records of sorted extents to `out` (room for `room` records), cut into aligned powers of two of at
 * most `limit_lb`. Starts inside extent *at (its first *done_lb blocks are written already) and moves both on.
 * Returns how many records were written. */
static inline size_t wdiff_build_index(const walb_extent *e, size_t n, uint32_t limit_lb, size_t *at, uint32_t *done_lb,
                                uint8_t *out, size_t room)
{
    size_t k = 0;
    while (*at < n && k < room) {
        walb_extent piece = e[*at];
        uint8_t *r = out + WDIFF_INDEX_RECORD_B * k;
        uint32_t left = piece.blocks_lb - *done_lb, step;
        uint64_t address_lb = piece.address_lb + *done_lb;
        if (left == 0) { /* an empty extent gives no record */
            ++*at;
            continue;
        }
        step = extent_aligned_step(address_lb, left, limit_lb);
        k++;
        memset(r, 0, WDIFF_INDEX_RECORD_B);
        walb_store64(r, address_lb);
        walb_store32(r + 8, step);
        r[12] = piece.flags;
        if (!piece.flags) {
            r[13] = piece.kind;
            walb_store64(r + 16, piece.data_b);
            walb_store32(r + 24, piece.data_size_b);
            walb_store32(r + 28, piece.offset_lb + *done_lb);
            walb_store32(r + 32, piece.orig_lb);
            walb_store32(r + 40, piece.checksum);
        }
        walb_store32(r + 44, walb_checksum(r, WDIFF_INDEX_RECORD_B, 0));
        if (step == left) {
            ++*at;
            *done_lb = 0;
        } else {
            *done_lb += step;
        }
    }
    return k;
}

/* ---- batches ----
 * A batch is handled in memory areas: 0 the stored images as read, 1 the decoded data, 2 newly compressed data. */

#define WDIFF_NOWHERE UINT64_MAX

/* One stored image that a batch needs; 48 bytes. Python: struct.Struct("<QQQIIIIHBxI"). */
typedef struct {
    uint64_t data_b;    /* in its file */
    uint64_t stored_at; /* in area 0 */
    uint64_t raw_at;    /* in area 1, or WDIFF_NOWHERE */
    uint32_t data_size_b;
    uint32_t orig_lb;
    uint32_t checksum;
    uint32_t first; /* number of the first extent that uses it */
    uint16_t source;
    uint8_t kind;
    uint8_t reserved;
    uint32_t uses;
} wdiff_image;

/* A piece of a file and its place in an area; 24 bytes, three u64 (walbd.ext.iobatch). */
typedef struct {
    uint64_t offset_b, size_b, at;
} wdiff_piece;

/* A payload to decompress from area 0 to area 1; 32 bytes. Python: struct.Struct("<QQIIII"). */
typedef struct {
    uint64_t stored_at, raw_at;
    uint32_t stored_b, raw_b;
    uint32_t kind, image;
} wdiff_job;

/* A piece to copy into area 1; 32 bytes, four u64. */
typedef struct {
    uint64_t area, from, to, size_b;
} wdiff_copy;

/* A record of a pack that is being made; 40 bytes. Python: struct.Struct("<QQIIIBBBBII"). */
typedef struct {
    uint64_t address_lb;
    uint64_t at; /* of the stored form, in `area` */
    uint32_t blocks_lb;
    uint32_t size_b;
    uint32_t checksum;
    uint8_t flags, kind, area, todo; /* todo: still to be compressed */
    uint32_t image;                  /* or UINT32_MAX */
    uint32_t reserved;
} wdiff_item;

typedef struct {
    uint64_t data_b;
    uint32_t extent;
    uint16_t source;
} wdiff_key;

static int wdiff_key_cmp(const void *x, const void *y)
{
    const wdiff_key *a = (const wdiff_key *)x, *b = (const wdiff_key *)y;
    if (a->source != b->source)
        return a->source < b->source ? -1 : 1;
    if (a->data_b != b->data_b)
        return a->data_b < b->data_b ? -1 : 1;
    return a->extent < b->extent ? -1 : a->extent > b->extent;
}

/* Find the distinct images of a batch, ordered by file and place, and tell each normal extent its image
 * (refs[i]; UINT32_MAX for those without data). `keys`, `images` and `refs` have room for n. Returns the number of
 * images; their places in memory are set by wdiff_plan_reads, or by the caller. */
static inline size_t wdiff_plan_images(const walb_extent *e, size_t n, wdiff_key *keys, wdiff_image *images, uint32_t *refs)
{
    size_t i, k = 0, made = 0;
    int sorted = 1;
    for (i = 0; i < n; i++) {
        refs[i] = UINT32_MAX;
        if (e[i].flags & EXT_NODATA)
            continue;
        keys[k].data_b = e[i].data_b;
        keys[k].source = e[i].source;
        keys[k].extent = (uint32_t)i;
        if (k && wdiff_key_cmp(&keys[k - 1], &keys[k]) > 0)
            sorted = 0;
        k++;
    }
    if (!sorted)
        qsort(keys, k, sizeof *keys, wdiff_key_cmp);
    for (i = 0; i < k; i++) {
        const walb_extent *x = &e[keys[i].extent];
        if (made && extent_same_image(&e[images[made - 1].first], x)) {
            images[made - 1].uses++;
        } else {
            wdiff_image *im = &images[made++];
            memset(im, 0, sizeof *im);
            im->data_b = x->data_b;
            im->raw_at = WDIFF_NOWHERE;
            im->data_size_b = x->data_size_b;
            im->orig_lb = x->orig_lb;
            im->checksum = x->checksum;
            im->first = keys[i].extent;
            im->source = x->source;
            im->kind = x->kind;
            im->uses = 1;
        }
        refs[keys[i].extent] = (uint32_t)(made - 1);
    }
    return made;
}

/* Join the images that lie at most gap_b apart, from image *i on as long as they are in one file, into pieces to read
 * to area 0 from *at on. Moves *i and *at behind them. Returns the number of pieces (at most as many as images). */
static inline size_t wdiff_plan_reads(wdiff_image *im, size_t n, size_t *i, uint64_t gap_b, wdiff_piece *pieces,
                                      uint64_t *at)
{
    size_t k = 0, first = *i;
    for (; *i < n && im[*i].source == im[first].source; ++*i) {
        wdiff_image *m = &im[*i];
        wdiff_piece *s = k ? &pieces[k - 1] : NULL;
        uint64_t end = m->data_b + m->data_size_b;
        if (s && m->data_b <= s->offset_b + s->size_b + gap_b) {
            if (end > s->offset_b + s->size_b) {
                *at += end - (s->offset_b + s->size_b);
                s->size_b = end - s->offset_b;
            }
        } else {
            s = &pieces[k++];
            s->offset_b = m->data_b;
            s->size_b = m->data_size_b;
            s->at = *at;
            *at += s->size_b;
        }
        m->stored_at = s->at + (m->data_b - s->offset_b);
    }
    return k;
}

/* Number of the first image whose stored bytes do not have its checksum, or n. */
static inline size_t wdiff_check_images(const wdiff_image *im, size_t n, const uint8_t *stored)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (walb_checksum(stored + im[i].stored_at, im[i].data_size_b, 0) != im[i].checksum)
            break;
    return i;
}

/* Number of the first extent whose stored bytes (at data_b - base_b in `data`) do not have its checksum, or n. */
static inline size_t wdiff_check_extents(const walb_extent *e, size_t n, const uint8_t *data, uint64_t base_b)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (!e[i].flags && walb_checksum(data + (e[i].data_b - base_b), e[i].data_size_b, 0) != e[i].checksum)
            break;
    return i;
}

static inline void wdiff_add_job(wdiff_job *job, wdiff_image *im, uint32_t number, uint64_t raw_at)
{
    im->raw_at = raw_at;
    job->stored_at = im->stored_at;
    job->raw_at = raw_at;
    job->stored_b = im->data_size_b;
    job->raw_b = im->orig_lb * 512;
    job->kind = im->kind;
    job->image = number;
}

/* Plan how the data of each extent gets to its place in area 1 (targets[i]): an image that is wanted whole is
 * decompressed there, others behind *raw_b and then copied piece by piece. Room: jobs n_images, copies n.
 * *raw_b: in, the size that the targets need; out, the size that the area needs. */
static inline void wdiff_plan_flat(const walb_extent *e, const uint32_t *refs, size_t n, wdiff_image *im,
                            const uint64_t *targets, wdiff_job *jobs, size_t *n_jobs, wdiff_copy *copies,
                            size_t *n_copies, uint64_t *raw_b)
{
    size_t i;
    *n_jobs = *n_copies = 0;
    for (i = 0; i < n; i++) {
        wdiff_image *m;
        wdiff_copy *c;
        if (refs[i] == UINT32_MAX || targets[i] == WDIFF_NOWHERE)
            continue;
        m = &im[refs[i]];
        if (m->kind && m->raw_at == WDIFF_NOWHERE) {
            if (m->uses == 1 && e[i].blocks_lb == m->orig_lb) {
                wdiff_add_job(&jobs[(*n_jobs)++], m, refs[i], targets[i]);
                continue;
            }
            wdiff_add_job(&jobs[(*n_jobs)++], m, refs[i], *raw_b);
            *raw_b += (uint64_t)m->orig_lb * 512;
        }
        c = &copies[(*n_copies)++];
        c->area = m->kind ? 1 : 0;
        c->from = (m->kind ? m->raw_at : m->stored_at) + (uint64_t)e[i].offset_lb * 512;
        c->to = targets[i];
        c->size_b = (uint64_t)e[i].blocks_lb * 512;
    }
}

/* Plan the records of a pack or the images of an index: what is stored as wanted goes through as it is, the rest is
 * decompressed into area 1 (jobs, room n_images) and is `todo`: to be compressed, when `kind` is not none.
 * Data that is stored raw is tried again: the file does not say whether it once failed to shrink. */
static inline void wdiff_plan_pack(const walb_extent *e, const uint32_t *refs, size_t n, wdiff_image *im, uint8_t kind,
                            wdiff_item *items, wdiff_job *jobs, size_t *n_jobs, uint64_t *raw_b)
{
    size_t i;
    *n_jobs = 0;
    *raw_b = 0;
    for (i = 0; i < n; i++) {
        wdiff_item *t = &items[i];
        wdiff_image *m;
        int whole;
        memset(t, 0, sizeof *t);
        t->address_lb = e[i].address_lb;
        t->blocks_lb = e[i].blocks_lb;
        t->flags = e[i].flags;
        t->image = refs[i];
        if (refs[i] == UINT32_MAX)
            continue;
        m = &im[refs[i]];
        whole = e[i].blocks_lb == m->orig_lb;
        if (whole && m->kind == kind) {
            t->at = m->stored_at;
            t->size_b = m->data_size_b;
            t->checksum = m->checksum;
            t->kind = kind;
            continue;
        }
        t->size_b = e[i].blocks_lb * 512;
        t->todo = 1;
        if (m->kind == 0) {
            t->at = m->stored_at + (uint64_t)e[i].offset_lb * 512;
            continue;
        }
        if (m->raw_at == WDIFF_NOWHERE) {
            wdiff_add_job(&jobs[(*n_jobs)++], m, refs[i], *raw_b);
            *raw_b += (uint64_t)m->orig_lb * 512;
        }
        t->area = 1;
        t->at = m->raw_at + (uint64_t)e[i].offset_lb * 512;
    }
}

/* Take over what compressing the todo items gave, in their order, two u64 each: place in area 2 and size, or size 0
 * for what did not shrink; then checksum them. Without results (n_results 0) they stay raw. */
static inline void wdiff_settle(wdiff_item *t, size_t n, uint8_t kind, const uint64_t *results, size_t n_results,
                         const uint8_t *const *areas)
{
    size_t i, k = 0;
    for (i = 0; i < n; i++) {
        if (!t[i].todo)
            continue;
        t[i].todo = 0;
        if (k < n_results) {
            if (results[2 * k + 1]) {
                t[i].area = 2;
                t[i].kind = kind;
                t[i].at = results[2 * k];
                t[i].size_b = (uint32_t)results[2 * k + 1];
            }
            k++;
        }
        t[i].checksum = walb_checksum(areas[t[i].area] + t[i].at, t[i].size_b, 0);
    }
}

/* Write the pack header of these items, 4096 bytes. */
static inline void wdiff_build_pack(const wdiff_item *t, size_t n, uint8_t *h)
{
    size_t i;
    uint32_t sum = 0;
    memset(h, 0, WDIFF_PACK_B);
    walb_store16(h + 4, (uint16_t)n);
    for (i = 0; i < n; i++) {
        uint8_t *r = h + 16 + 32 * i;
        walb_store64(r, t[i].address_lb);
        walb_store32(r + 8, t[i].blocks_lb);
        r[12] = t[i].flags;
        walb_store32(r + 16, sum);
        if (!t[i].flags) {
            r[13] = t[i].kind;
            walb_store32(r + 20, t[i].size_b);
            walb_store32(r + 24, t[i].checksum);
            sum += t[i].size_b;
        }
    }
    walb_store32(h + 8, sum);
    walb_store32(h, walb_checksum(h, WDIFF_PACK_B, 0));
}

static inline void wdiff_gather(const wdiff_item *t, size_t n, const uint8_t *const *areas, uint8_t *out)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (!t[i].flags) {
            memcpy(out, areas[t[i].area] + t[i].at, t[i].size_b);
            out += t[i].size_b;
        }
}

/* Plan the writing of sorted extents to an image. Neighbours become one piece to write from area 1; ranges of nothing of
 * at least zero_min_lb become pieces of `zeros` (place unused), shorter ones are zeros in the data (`fills`). With
 * ignore_discard discarded ranges are left alone. Room: n of each. Returns the size of the data in area 1. */
static inline uint64_t wdiff_plan_runs(const walb_extent *e, size_t n, int ignore_discard, uint32_t zero_min_lb,
                                       uint64_t *targets, wdiff_piece *runs, size_t *n_runs, wdiff_piece *zeros,
                                       size_t *n_zeros, wdiff_copy *fills, size_t *n_fills)
{
    size_t i = 0;
    uint64_t at = 0;
    *n_runs = *n_zeros = *n_fills = 0;
    while (i < n) {
        wdiff_piece *run = *n_runs ? &runs[*n_runs - 1] : NULL;
        uint64_t offset_b = e[i].address_lb * 512, size_b = (uint64_t)e[i].blocks_lb * 512;
        targets[i] = WDIFF_NOWHERE;
        if (!e[i].flags) {
            targets[i++] = at;
        } else if ((e[i].flags & EXT_DISCARD) && ignore_discard) {
            i++;
            continue;
        } else {
            uint64_t end = extent_end(&e[i++]);
            while (i < n && e[i].flags && e[i].address_lb == end && !((e[i].flags & EXT_DISCARD) && ignore_discard)) {
                targets[i] = WDIFF_NOWHERE;
                end = extent_end(&e[i++]);
            }
            size_b = end * 512 - offset_b;
            if (size_b >= (uint64_t)zero_min_lb * 512) {
                zeros[*n_zeros].offset_b = offset_b;
                zeros[*n_zeros].size_b = size_b;
                zeros[(*n_zeros)++].at = 0;
                continue;
            }
            fills[*n_fills].area = 3;
            fills[*n_fills].from = 0;
            fills[*n_fills].to = at;
            fills[(*n_fills)++].size_b = size_b;
        }
        if (run && run->offset_b + run->size_b == offset_b) {
            run->size_b += size_b;
        } else {
            run = &runs[(*n_runs)++];
            run->offset_b = offset_b;
            run->size_b = size_b;
            run->at = at;
        }
        at += size_b;
    }
    return at;
}

#endif
