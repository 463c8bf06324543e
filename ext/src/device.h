/* What the extension modules of the userspace device hand to each other in byte buffers (arrays of these, no
 * gaps), and the reading and writing they share. Little-endian hosts only, as walb.h. */
#ifndef WALBD_DEVICE_H
#define WALBD_DEVICE_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "walb.h"

/* One NBD request (walbd.ext.nbd). Python: struct.Struct("<QQQIIHHI"), 40 bytes.
 * `data_b` is the place of a WRITE's payload in the receive buffer; `error` is an NBD error number, 0 if fine. */
typedef struct {
    uint64_t cookie;
    uint64_t offset_b;
    uint64_t data_b;
    uint32_t length_b;
    uint32_t error;
    uint16_t type;
    uint16_t flags;
    uint32_t reserved;
} walb_request;

/* A part of the volume and its place in a buffer. Python: struct.Struct("<QQQQ"), 32 bytes.
 * `index` tells which request of a batch it belongs to. */
typedef struct {
    uint64_t offset_b;
    uint64_t size_b;
    uint64_t out_b;
    uint64_t index;
} walb_range;

/* Commands of the NBD protocol, and flags of requests. */
enum {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7
};
enum { NBD_FLAG_FUA = 1, NBD_FLAG_NO_HOLE = 2, NBD_FLAG_DF = 4, NBD_FLAG_REQ_ONE = 8, NBD_FLAG_FAST_ZERO = 16 };

/* Data of records with WALB_ZEROS; a record is never larger than this. */
#define WALB_ZEROS_B (1 << 20)
static uint8_t walb_zeros[WALB_ZEROS_B] __attribute__((unused));

#define WALB_IOV_MAX 1024

/* pwritev all of iov[0..n); changes iov. Returns 0 or an errno. */
static inline int walb_pwritev_all(int fd, struct iovec *iov, size_t n, uint64_t offset)
{
    while (n > 0) {
        ssize_t done = pwritev(fd, iov, n > WALB_IOV_MAX ? WALB_IOV_MAX : (int)n, (off_t)offset);
        if (done < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        if (done == 0)
            return EIO;
        offset += (uint64_t)done;
        while (n > 0 && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n > 0) {
            iov->iov_base = (uint8_t *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return 0;
}

#endif
