/* An interval map: disjoint half-open ranges of logical blocks, each with the place of its data and a sequence
 * number; the last insertion wins where ranges overlap. A two-level B-tree: leaves of sorted entries and one
 * sorted array of leaves, so that a look-up is two short binary searches over contiguous memory.
 * Not thread-safe. Used by walbd.ext.overlay. */
#ifndef WALBD_IMAP_H
#define WALBD_IMAP_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define IMAP_LEAF 64
#define IMAP_LB 512

typedef struct {
    uint64_t begin; /* lb */
    uint64_t end;   /* lb, exclusive */
    uint64_t seq;
    const uint8_t *data; /* of `begin`; NULL: the range reads as zeros */
} imap_entry;

typedef struct {
    uint32_t n; /* at least 1 in a map */
    imap_entry e[IMAP_LEAF];
} imap_leaf;

typedef struct {
    imap_leaf **leaf;
    uint64_t *first; /* leaf[i]->e[0].begin */
    size_t n_leaves;
    size_t cap;
    size_t n_entries;
    imap_leaf *spare[2]; /* what one insertion may need at most */
    int n_spare;
} imap;

typedef struct {
    size_t leaf;
    uint32_t i;
} imap_cursor;

static inline void imap_clear(imap *m)
{
    size_t i;
    for (i = 0; i < m->n_leaves; i++)
        free(m->leaf[i]);
    while (m->n_spare > 0)
        free(m->spare[--m->n_spare]);
    free(m->leaf);
    free(m->first);
    memset(m, 0, sizeof(*m));
}

/* The entry at a cursor, or NULL behind the last one. */
static inline imap_entry *imap_at(imap *m, imap_cursor c)
{
    return c.leaf < m->n_leaves ? &m->leaf[c.leaf]->e[c.i] : NULL;
}

static inline imap_cursor imap_next(imap *m, imap_cursor c)
{
    if (++c.i >= m->leaf[c.leaf]->n) {
        c.leaf++;
        c.i = 0;
    }
    return c;
}

/* Index of the last leaf that begins at or before x; 0 when there is none. */
static inline size_t imap_leaf_of(const imap *m, uint64_t x)
{
    size_t lo = 0, hi = m->n_leaves; /* first[lo] <= x < first[hi], if lo > 0 */
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (m->first[mid] <= x)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* The first entry that ends behind x. */
static inline imap_cursor imap_find(imap *m, uint64_t x)
{
    imap_cursor c = {0, 0};
    imap_leaf *l;
    uint32_t lo, hi;
    if (m->n_leaves == 0)
        return c;
    c.leaf = imap_leaf_of(m, x);
    l = m->leaf[c.leaf];
    lo = 0;
    hi = l->n;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (l->e[mid].end > x)
            hi = mid;
        else
            lo = mid + 1;
    }
    c.i = lo;
    if (lo == l->n) {
        c.leaf++;
        c.i = 0;
    }
    return c;
}

static inline void imap_remove(imap *m, imap_cursor c)
{
    imap_leaf *l = m->leaf[c.leaf];
    m->n_entries--;
    l->n--;
    if (l->n == 0) {
        size_t rest = m->n_leaves - c.leaf - 1;
        free(l);
        memmove(&m->leaf[c.leaf], &m->leaf[c.leaf + 1], rest * sizeof(*m->leaf));
        memmove(&m->first[c.leaf], &m->first[c.leaf + 1], rest * sizeof(*m->first));
        m->n_leaves--;
        return;
    }
    memmove(&l->e[c.i], &l->e[c.i + 1], (l->n - c.i) * sizeof(imap_entry));
    if (c.i == 0)
        m->first[c.leaf] = l->e[0].begin;
}

/* Have the memory at hand that one imap_insert may need; returns 0, or -1 without memory (nothing changed). */
static inline int imap_reserve(imap *m)
{
    if (m->n_leaves + 2 > m->cap) {
        size_t cap = m->cap ? m->cap * 2 : 16;
        imap_leaf **leaf = realloc(m->leaf, cap * sizeof(*leaf));
        uint64_t *first;
        if (!leaf)
            return -1;
        m->leaf = leaf;
        first = realloc(m->first, cap * sizeof(*first));
        if (!first)
            return -1;
        m->first = first;
        m->cap = cap;
    }
    while (m->n_spare < 2) {
        imap_leaf *l = malloc(sizeof(*l));
        if (!l)
            return -1;
        m->spare[m->n_spare++] = l;
    }
    return 0;
}

/* Put an empty leaf, reserved before, at index `at`. */
static inline void imap_add_leaf(imap *m, size_t at)
{
    imap_leaf *l = m->spare[--m->n_spare];
    size_t rest = m->n_leaves - at;
    l->n = 0;
    memmove(&m->leaf[at + 1], &m->leaf[at], rest * sizeof(*m->leaf));
    memmove(&m->first[at + 1], &m->first[at], rest * sizeof(*m->first));
    m->leaf[at] = l;
    m->n_leaves++;
}

/* Add an entry that overlaps no other. */
static inline void imap_add(imap *m, imap_entry entry)
{
    size_t at;
    imap_leaf *l;
    uint32_t lo, hi;
    if (m->n_leaves == 0)
        imap_add_leaf(m, 0);
    at = imap_leaf_of(m, entry.begin);
    l = m->leaf[at];
    if (l->n == IMAP_LEAF) {
        imap_leaf *r;
        /* ascending insertion at the end leaves full leaves behind, anything else splits in the middle */
        uint32_t keep = at + 1 == m->n_leaves && l->e[l->n - 1].begin < entry.begin ? IMAP_LEAF : IMAP_LEAF / 2;
        imap_add_leaf(m, at + 1);
        r = m->leaf[at + 1];
        r->n = IMAP_LEAF - keep;
        memcpy(r->e, &l->e[keep], r->n * sizeof(imap_entry));
        l->n = keep;
        if (r->n == 0 || r->e[0].begin <= entry.begin) {
            if (r->n)
                m->first[at + 1] = r->e[0].begin;
            l = r;
            at++;
        } else {
            m->first[at + 1] = r->e[0].begin;
        }
    }
    lo = 0;
    hi = l->n;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (l->e[mid].begin > entry.begin)
            hi = mid;
        else
            lo = mid + 1;
    }
    memmove(&l->e[lo + 1], &l->e[lo], (l->n - lo) * sizeof(imap_entry));
    l->e[lo] = entry;
    l->n++;
    m->first[at] = l->e[0].begin;
    m->n_entries++;
}

/* Cut [begin, end) out of the map. */
static inline void imap_cut(imap *m, uint64_t begin, uint64_t end)
{
    imap_cursor c = imap_find(m, begin);
    imap_entry *e;
    while ((e = imap_at(m, c)) != NULL && e->begin < end) {
        if (e->begin < begin && e->end > end) {
            imap_entry right = *e;
            right.begin = end;
            if (right.data)
                right.data += (end - e->begin) * IMAP_LB;
            imap_add(m, right);
            c = imap_find(m, begin); /* the leaf may have been split */
            imap_at(m, c)->end = begin;
            return;
        }
        if (e->begin < begin) {
            e->end = begin;
            c = imap_next(m, c);
        } else if (e->end > end) {
            if (e->data)
                e->data += (end - e->begin) * IMAP_LB;
            e->begin = end;
            if (c.i == 0)
                m->first[c.leaf] = end;
            return;
        } else {
            imap_remove(m, c);
            c = imap_find(m, begin); /* removal may have moved the cursor to the end of a leaf */
        }
    }
}

/* Insert a range over whatever is there; returns 0, or -1 without memory (nothing changed). */
static inline int imap_insert(imap *m, uint64_t begin, uint64_t end, uint64_t seq, const uint8_t *data)
{
    imap_entry entry;
    entry.begin = begin;
    entry.end = end;
    entry.seq = seq;
    entry.data = data;
    if (imap_reserve(m))
        return -1;
    imap_cut(m, begin, end);
    imap_add(m, entry);
    return 0;
}

/* Remove the entries that overlap [begin, end) and have a sequence number below `seq`. */
static inline void imap_retire(imap *m, uint64_t begin, uint64_t end, uint64_t seq)
{
    imap_cursor c = imap_find(m, begin);
    imap_entry *e;
    while ((e = imap_at(m, c)) != NULL && e->begin < end) {
        if (e->seq < seq) {
            uint64_t x = e->begin;
            imap_remove(m, c);
            c = imap_find(m, x > begin ? x : begin);
        } else {
            c = imap_next(m, c);
        }
    }
}

#endif
