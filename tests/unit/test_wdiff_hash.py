"""Hashes: the siphash of the old tool against its twin, the others by what they must be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.reference.siphash import siphash as reference
from walbd.ext.siphash import SipHash
from walbd.format.hashes import DIGEST_B, BlockHash, hash_bulks, murmur3, siphash, xxh3


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_siphash_in_pieces(pieces: list[bytes]) -> None:
    state = SipHash()
    for piece in pieces:
        state.update(piece)
        state.digest()  # looking does not change it
    assert state.digest() == reference(b"".join(pieces)) == siphash(b"".join(pieces))


def test_siphash_halves_make_the_standard_hash() -> None:
    # The last vector of the authors' test program: 63 bytes 00 01 02 ... with the same key.
    digest = siphash(bytes(range(63)))
    half = int.from_bytes(digest[:8], "little") ^ int.from_bytes(digest[8:], "little")
    assert half == 0x958A324CEB064572


def test_murmur3_is_the_x64_variant() -> None:
    assert murmur3(b"", 0) == bytes(16)
    assert murmur3(b"hello", 0).hex() == "029bbd41b3a7d8cb191dae486a901e5b"


def test_xxh3() -> None:
    assert xxh3(b"", 0).hex() == "99aa06d3014798d86001c324468d497f"
    assert xxh3(b"x", 1) != xxh3(b"x", 2)


@given(st.binary(min_size=1, max_size=3000), st.sampled_from([512, 1024]), st.integers(0, 2**32 - 1))
def test_bulks(data: bytes, bulk_b: int, seed: int) -> None:
    bulks = [data[i : i + bulk_b] for i in range(0, len(data), bulk_b)]
    hashes = hash_bulks(xxh3, memoryview(data), bulk_b, seed)
    assert [hashes[i : i + DIGEST_B] for i in range(0, len(hashes), DIGEST_B)] == [xxh3(b, seed) for b in bulks]
    combined, state = 0, BlockHash(murmur3, seed)
    for i, bulk in enumerate(bulks):
        state.update(bulk)
        combined ^= int.from_bytes(murmur3(bulk, (seed + i) % 2**32), "big")
    assert state.digest() == combined.to_bytes(16, "big")
