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

enum {
    WALB_LB = 512, /* a logical block [byte] */
    WALB_IO_MAX_LB = 65535, /* the largest record: so that 32 MiB of memory always hold one */
    WALB_TYPE_LOGPACK = 3, /* sector type of the header of a logpack */
    WALB_PACK_HEADER_B = 24,
    WALB_PACK_RECORD_B = 32
};

/* Flags of log records; the last one never goes to disk: the data are zeros and need no buffer. */
enum { WALB_EXIST = 1, WALB_PADDING = 2, WALB_DISCARD = 4, WALB_ZEROS = 256 };

/* One record found by a log scan (walbd.ext.logpack), as scans hand them on in byte buffers; 40 bytes, no gaps.
 * `data_b` is the offset of the record's data in the scanned buffer [byte]; discards and paddings have none (0).
 * Python: struct.Struct("<QQQIIII"). */
typedef struct {
    uint64_t lsid;
    uint64_t offset_lb;
    uint64_t data_b;
    uint32_t io_size_lb;
    uint32_t flags; /* WALB_EXIST and others */
    uint32_t checksum;
    uint32_t lsid_local;
} walb_log_record;

/* What pointers to the contents of empty buffers point to. */
static uint64_t walb_nothing[1] __attribute__((unused));

static inline uint16_t walb_load16(const uint8_t *p)
{
    uint16_t w;
    memcpy(&w, p, 2);
    return w;
}

static inline uint32_t walb_load32(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

static inline uint64_t walb_load64(const uint8_t *p)
{
    uint64_t w;
    memcpy(&w, p, 8);
    return w;
}

static inline void walb_store16(uint8_t *p, uint16_t w) { memcpy(p, &w, 2); }
static inline void walb_store32(uint8_t *p, uint32_t w) { memcpy(p, &w, 4); }
static inline void walb_store64(uint8_t *p, uint64_t w) { memcpy(p, &w, 8); }

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
