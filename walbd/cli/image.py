"""`walbd image`: disk images: virtual full images, and hashes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import click

from walbd.cli.files import OUT, output_file
from walbd.errors import DiskFailed, UsageError
from walbd.ext.buffers import Buf
from walbd.ext.siphash import SipHash
from walbd.format.hashes import BLOCK_HASH_BULK_B, DIGEST_B
from walbd.fs import File, OsFileSystem
from walbd.units import LB, MIB, UINT32_MAX, parse_size

_PIECE_B = 1 * MIB
_READ_B = 256 << 10  # stays in the cache


@click.group()
def image() -> None:
    """Disk images: put together from diffs, hash."""


@image.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("files", metavar="WDIFF...", nargs=-1, type=click.Path(path_type=Path))
@OUT
def cat(base: Path, files: tuple[Path, ...], out: Path) -> None:
    """Write BASE as it would be with diffs applied, oldest first; BASE itself is not changed.

    Discarded ranges read as zeros; OUT has holes where a whole MiB is zero. A record that ends beyond BASE is an
    error.

    Example: walbd image cat base.img old.wdiff new.wdiff -o disk.img
    """
    from walbd.ext.checksum import is_zero
    from walbd.format.virtual import virtual_chunks
    from walbd.format.wdiff_read import open_wdiff

    fs = OsFileSystem()
    with ExitStack() as stack:
        source = stack.enter_context(fs.open(base))
        readers = [open_wdiff(stack.enter_context(fs.open(file))) for file in files]
        with output_file(fs, out) as target:
            at = 0
            for piece in virtual_chunks(source, readers, source.size(), _PIECE_B):
                if not is_zero(piece):
                    target.pwrite(piece, at)
                at += len(piece)
            target.truncate(at)


@image.command("hash")
@click.argument("path", metavar="IMAGE", type=click.Path(path_type=Path))
@click.option("--chunk", metavar="BYTES", help="Print one hash for each piece of this size, with its first block.")
@click.option(
    "--algorithm",
    type=click.Choice(["siphash", "murmur3", "xxh3"]),
    default="siphash",
    show_default=True,
    help="siphash is what the old bhash command printed.",
)
@click.option("--seed", type=click.IntRange(0, UINT32_MAX), help="Seed of murmur3 and xxh3; 0 by default.")
@click.option(
    "--combine",
    is_flag=True,
    help="Print one hash for the whole volume, combined from its pieces as archives do (256 KiB by default).",
)
def hash_image(path: Path, chunk: str | None, algorithm: str, seed: int | None, combine: bool) -> None:
    """Hash a disk image or block device, as a whole or in pieces."""
    chunk_b = None if chunk is None else parse_size(chunk)
    if chunk_b is not None and (chunk_b <= 0 or chunk_b % LB):
        raise UsageError("a chunk is a multiple of 512 bytes", chunk=chunk)
    if algorithm == "siphash" and (seed is not None or combine):
        raise UsageError("siphash takes neither a seed nor --combine", hint="choose murmur3 or xxh3")
    with OsFileSystem().open(path) as file:
        if combine:
            total = 0
            for digest in _digests(file, algorithm, seed or 0, chunk_b or BLOCK_HASH_BULK_B, 1):
                total ^= int.from_bytes(digest, "little")
            print(total.to_bytes(DIGEST_B, "little").hex())
            return
        for number, digest in enumerate(_digests(file, algorithm, seed or 0, chunk_b, 0)):
            print(digest.hex() if chunk_b is None else f"{number * chunk_b // LB:016x}\t{digest.hex()}")


class Hasher(Protocol):
    """A hash in the making."""

    def update(self, data: Buf, /) -> None: ...

    def digest(self) -> bytes: ...


def _hasher(algorithm: str, seed: int) -> Hasher:
    hasher: Hasher
    if algorithm == "siphash":
        hasher = SipHash()
    elif algorithm == "murmur3":
        import mmh3

        hasher = mmh3.mmh3_x64_128(seed=seed)
    else:
        import xxhash

        hasher = xxhash.xxh3_128(seed=seed)
    return hasher


def _digests(file: File, algorithm: str, seed: int, chunk_b: int | None, seed_step: int) -> Iterator[bytes]:
    """Yield the hash of each chunk, or of the whole file; the memory does not depend on the size of a chunk.

    The seed grows by `seed_step` from chunk to chunk, modulo 2^32.
    """
    buffer = memoryview(bytearray(_READ_B))
    size_b = file.size()
    chunk_b = max(size_b, 1) if chunk_b is None else chunk_b
    for begin_b in range(0, size_b, chunk_b) if size_b else [0]:
        hasher = _hasher(algorithm, seed)
        at, end_b = begin_b, min(begin_b + chunk_b, size_b)
        while at < end_b:
            got = file.pread_into(buffer[: min(_READ_B, end_b - at)], at)
            if got == 0:
                raise DiskFailed("the image became shorter while it was read", path=str(file.path), offset=at)
            hasher.update(buffer[:got])
            at += got
        yield hasher.digest()
        seed = (seed + seed_step) & UINT32_MAX
