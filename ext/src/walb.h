/* Shared by the extension modules: the checksum, and the layouts of docs/formats.md that the hot loops read.
 * All integers on disk are little-endian; this code runs on little-endian machines only (checked below). */
#ifndef WALBD_WALB_H
#define WALBD_WALB_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "walbd's core supports little-endian machines only"
#endif

/* One record found by a log scan (walbd.ext.logpack), as scans hand them on in byte buffers; 40 bytes, no gaps.
 * `data_b` is the offset of the record's data in the scanned buffer [byte]; discards and paddings have none (0).
 * Python: struct.Struct("<QQQIIII"). */
typedef struct {
    uint64_t lsid;
    uint64_t offset_lb;
    uint64_t data_b;
    uint32_t io_size_lb;
    uint32_t flags; /* 1 exist, 2 padding, 4 discard */
    uint32_t checksum;
    uint32_t lsid_local;
} walb_log_record;

static inline uint32_t walb_load32(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

/* Two's complement of salt plus the sum of little-endian words; 1..3 trailing bytes are zero-extended.
 * The loop vectorises at -O3. */
static inline uint32_t walb_checksum(const uint8_t *data, size_t size, uint32_t salt)
{
    uint32_t sum = salt;
    size_t i, words = size / 4;
    for (i = 0; i < words; i++)
        sum += walb_load32(data + i * 4);
    if (size & 3) {
        uint32_t w = 0;
        memcpy(&w, data + words * 4, size & 3);
        sum += w;
    }
    return (uint32_t)0 - sum;
}

/* Looks at 512 bytes at a time, so that data with a non-zero beginning is told at once. */
static inline int walb_is_zero(const uint8_t *data, size_t size)
{
    size_t i = 0;
    while (i + 512 <= size) {
        uint64_t acc = 0, w;
        size_t k;
        for (k = 0; k < 512; k += 8) {
            memcpy(&w, data + i + k, 8);
            acc |= w;
        }
        if (acc)
            return 0;
        i += 512;
    }
    for (; i < size; i++)
        if (data[i])
            return 0;
    return 1;
}

#endif
