/* SipHash-2-4 with the 128-bit result of the old `bhash` tool, which is not the official 128-bit variant: its two
 * words are v0 ^ v1 and v2 ^ v3 after the finalisation of the 64-bit function, so that their exclusive or is the
 * standard 64-bit hash. Source: docs/formats.md, "Hashes"; J.-P. Aumasson, D. J. Bernstein, "SipHash" (2012). */
#ifndef WALBD_SIPHASH_H
#define WALBD_SIPHASH_H

#include "walb.h"

typedef struct {
    uint64_t v0, v1, v2, v3;
    uint64_t size_b;
    uint8_t rest[8]; /* the size_b % 8 bytes that do not make a word yet */
} walb_siphash;

#define SIP_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define SIP_ROUND(v0, v1, v2, v3)                                                                                      \
    do {                                                                                                               \
        v0 += v1;                                                                                                      \
        v1 = SIP_ROTL(v1, 13) ^ v0;                                                                                    \
        v0 = SIP_ROTL(v0, 32);                                                                                         \
        v2 += v3;                                                                                                      \
        v3 = SIP_ROTL(v3, 16) ^ v2;                                                                                    \
        v0 += v3;                                                                                                      \
        v3 = SIP_ROTL(v3, 21) ^ v0;                                                                                    \
        v2 += v1;                                                                                                      \
        v1 = SIP_ROTL(v1, 17) ^ v2;                                                                                    \
        v2 = SIP_ROTL(v2, 32);                                                                                         \
    } while (0)

static inline void walb_siphash_init(walb_siphash *h)
{
    const uint64_t k0 = UINT64_C(0x0706050403020100), k1 = UINT64_C(0x0f0e0d0c0b0a0908);
    memset(h, 0, sizeof *h);
    h->v0 = k0 ^ UINT64_C(0x736f6d6570736575);
    h->v1 = k1 ^ UINT64_C(0x646f72616e646f6d);
    h->v2 = k0 ^ UINT64_C(0x6c7967656e657261);
    h->v3 = k1 ^ UINT64_C(0x7465646279746573);
}

static inline void walb_siphash_words(walb_siphash *h, const uint8_t *data, size_t n)
{
    uint64_t v0 = h->v0, v1 = h->v1, v2 = h->v2, v3 = h->v3, m;
    size_t i;
    for (i = 0; i < n; i++) {
        memcpy(&m, data + 8 * i, 8);
        v3 ^= m;
        SIP_ROUND(v0, v1, v2, v3);
        SIP_ROUND(v0, v1, v2, v3);
        v0 ^= m;
    }
    h->v0 = v0;
    h->v1 = v1;
    h->v2 = v2;
    h->v3 = v3;
}

static inline void walb_siphash_update(walb_siphash *h, const uint8_t *data, size_t size)
{
    size_t have = h->size_b % 8;
    h->size_b += size;
    if (have) {
        size_t take = size < 8 - have ? size : 8 - have;
        memcpy(h->rest + have, data, take);
        if (have + take < 8)
            return;
        walb_siphash_words(h, h->rest, 1);
        data += take;
        size -= take;
    }
    walb_siphash_words(h, data, size / 8);
    memcpy(h->rest, data + size / 8 * 8, size % 8);
}

static inline void walb_siphash_digest(const walb_siphash *state, uint8_t *out)
{
    walb_siphash h = *state;
    uint8_t last[8] = {0};
    uint64_t words[2];
    int i;
    memcpy(last, h.rest, h.size_b % 8);
    last[7] = (uint8_t)h.size_b;
    walb_siphash_words(&h, last, 1);
    h.v2 ^= 0xff;
    for (i = 0; i < 4; i++)
        SIP_ROUND(h.v0, h.v1, h.v2, h.v3);
    words[0] = h.v0 ^ h.v1;
    words[1] = h.v2 ^ h.v3;
    memcpy(out, words, 16);
}

#endif
