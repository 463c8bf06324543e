"""Hashes of image data: for comparing volumes, and those of the old tools.

    xxh3      XXH3 128 bit with a 64-bit seed: hash backup and verification
    murmur3   MurmurHash3 x64 128 bit with a 32-bit seed: what the old hash backup and block hash used
    siphash   SipHash-2-4 with a fixed key: the old `bhash` command (walbd.ext.siphash)

All results are 16 bytes. Source: docs/formats.md, "Hashes".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from walbd.ext.buffers import Buf
from walbd.ext.siphash import SipHash

DIGEST_B: Final = 16
BULK_B: Final = 64 << 10  # of hash backup
BLOCK_HASH_BULK_B: Final = 256 << 10  # default of the old block hash

SeededHash = Callable[[Buf, int], bytes]


def xxh3(data: Buf, seed: int) -> bytes:
    """Return the XXH3 hash (canonical byte order)."""
    import xxhash

    digest: bytes = xxhash.xxh3_128_digest(data, seed)
    return digest


def murmur3(data: Buf, seed: int) -> bytes:
    """Return the MurmurHash3 x64 hash: h1 then h2, each little-endian."""
    import mmh3

    return mmh3.mmh3_x64_128_digest(data, seed)


def siphash(data: Buf) -> bytes:
    """Return the hash of the old `bhash` command."""
    state = SipHash()
    state.update(data)
    return state.digest()


def hash_bulks(function: SeededHash, data: Buf, bulk_b: int, seed: int) -> bytes:
    """Return the hashes of the bulks of `data`, one after the other; the last bulk may be shorter."""
    view = memoryview(data)
    return b"".join(function(view[at : at + bulk_b], seed) for at in range(0, len(view), bulk_b))


class BlockHash:
    """The hash of a whole volume as archives report it: bulk number i is hashed with seed + i, all are xored.

    Its value depends on the size of the bulks, of which only the last may be shorter.
    """

    def __init__(self, function: SeededHash = murmur3, seed: int = 0) -> None:
        self._function = function
        self._seed = seed
        self._sum = 0

    def update(self, bulk: Buf) -> None:
        """Take the next bulk."""
        self._sum ^= int.from_bytes(self._function(bulk, self._seed & 0xFFFFFFFF), "little")
        self._seed += 1

    def digest(self) -> bytes:
        """Return the hash of the bulks so far."""
        return self._sum.to_bytes(DIGEST_B, "little")
