"""Making logs for tests: random packs, wlog files, log devices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from walbd.ext.checksum import checksum
from walbd.format.logpack import (
    FLAG_DISCARD,
    FLAG_EXIST,
    FLAG_PADDING,
    end_header,
    make_header,
    pack_header,
    records_max,
)
from walbd.format.superblock import Superblock, ring_size_pb
from walbd.format.wlog import WlogHeader
from walbd.ids import Lsid
from walbd.units import ceil_pb

UUID = bytes(range(16))


@dataclass(frozen=True)
class Io:
    """One record to be made: kind is `write`, `discard` or `padding`."""

    kind: str
    offset_lb: int
    size_lb: int
    seed: int = 0

    def data(self) -> bytes:
        """Return what a write holds; seed 0 makes zeros."""
        size_b = self.size_lb * 512
        return random.Random(self.seed).randbytes(size_b) if self.seed else bytes(size_b)


FLAGS = {"write": FLAG_EXIST, "discard": FLAG_EXIST | FLAG_DISCARD, "padding": FLAG_EXIST | FLAG_PADDING}


def build_pack(lsid: int, pbs: int, salt: int, ios: Iterable[Io]) -> bytes:
    """Return one logpack; the tails of last PBs and the paddings are filled with 0xa5."""
    ios = list(ios)
    parts, items = [], []
    for io in ios:
        owned_b = 0 if io.kind == "discard" else ceil_pb(io.size_lb, pbs) * pbs
        data = io.data() if io.kind == "write" else b""
        parts.append(data + b"\xa5" * (owned_b - len(data)))
        csum = checksum(data, salt) if io.kind == "write" else 0
        items.append((0 if io.kind == "padding" else io.offset_lb, io.size_lb, FLAGS[io.kind], csum))
    return pack_header(make_header(lsid, pbs, items), pbs=pbs, salt=salt) + b"".join(parts)


def build_log(lsid: int, pbs: int, salt: int, packs: Iterable[Iterable[Io]]) -> bytes:
    """Return consecutive logpacks."""
    out = bytearray()
    for ios in packs:
        out += build_pack(lsid + len(out) // pbs, pbs, salt, ios)
    return bytes(out)


def build_wlog(
    lsid: int, pbs: int, salt: int, packs: Iterable[Iterable[Io]], *, uuid: bytes = UUID, end_lsid: int = 2**64 - 1
) -> bytes:
    """Return a whole wlog file."""
    header = WlogHeader(pbs=pbs, salt=salt, uuid=uuid, begin_lsid=Lsid(lsid), end_lsid=Lsid(end_lsid))
    return header.pack() + build_log(lsid, pbs, salt, packs) + end_header(pbs, salt)


def image_of(image: bytes, packs: Iterable[Iterable[Io]], *, zero_discards: bool = True) -> bytes:
    """Return what an image becomes when the IOs are applied to it, straight from the IOs."""
    out = bytearray(image)
    for ios in packs:
        for io in ios:
            begin, end = io.offset_lb * 512, (io.offset_lb + io.size_lb) * 512
            if io.kind == "write":
                out[begin:end] = io.data()
            elif io.kind == "discard" and zero_discards:
                out[begin:end] = bytes(end - begin)
    return bytes(out)


def fit_ring(lsid: int, pbs: int, ring_pb: int, packs: Iterable[Iterable[Io]]) -> list[list[Io]]:
    """Lay packs out as a driver does: a padding record where the next write would cross the end of the ring.

    Paddings that are in the packs already are dropped; packs are closed where they have to be.
    """
    out: list[list[Io]] = []
    for ios in packs:
        pack: list[Io] = []
        at, padded = lsid + 1, False

        def close(pack: list[Io], at: int) -> int:
            if pack:
                out.append(pack)
            return at if pack else at - 1

        for io in (io for io in ios if io.kind != "padding"):
            own = 0 if io.kind == "discard" else ceil_pb(io.size_lb, pbs)
            room = ring_pb - at % ring_pb
            needed = 2 if own > room else 1
            if len(pack) + needed > records_max(pbs) or (own > room and padded):
                lsid = close(pack, at)
                pack, at, padded = [], lsid + 1, False
                room = ring_pb - at % ring_pb
            if own > room:
                pack.append(Io("padding", 0, room * pbs // 512))
                at += room
                padded = True
            pack.append(io)
            at += own
        lsid = close(pack, at)
    return out


def make_ldev(
    path: Path,
    *,
    pbs: int,
    size_b: int,
    device_size_lb: int,
    salt: int,
    lsid: int,
    packs: Callable[[Superblock], list[list[Io]]],
    oldest_lsid: int | None = None,
    fill: bytes = b"\x5a",
) -> tuple[Superblock, list[list[Io]], int]:
    """Write a log device whose log begins at `lsid`; return superblock 0, the packs, and the end of the log."""
    sb = Superblock(
        pbs=pbs,
        salt=salt,
        uuid=UUID,
        name="test",
        ring_size_pb=ring_size_pb(size_b, pbs),
        oldest_lsid=Lsid(lsid if oldest_lsid is None else oldest_lsid),
        written_lsid=Lsid(lsid),
        device_size_lb=device_size_lb,
    )
    laid = packs(sb)
    content = bytearray(fill * (size_b // len(fill)))
    content[4096 : 4096 + pbs] = sb.pack()
    log = build_log(lsid, pbs, salt, laid)
    assert len(log) // pbs < sb.ring_size_pb
    for k in range(len(log) // pbs):
        at = sb.offset_b(lsid + k)
        content[at : at + pbs] = log[k * pbs : (k + 1) * pbs]
    path.write_bytes(content)
    return sb, laid, lsid + len(log) // pbs


def ios(device_size_lb: int, max_lb: int = 20, *, paddings: bool = True) -> st.SearchStrategy[Io]:
    """Draw an IO that lies inside a device."""

    def place(kind: str) -> st.SearchStrategy[Io]:
        return st.integers(1, max_lb).flatmap(
            lambda size: st.builds(
                Io, st.just(kind), st.integers(0, device_size_lb - size), st.just(size), st.integers(0, 3)
            )
        )

    kinds = [place("write"), place("write"), place("discard")]
    if paddings:
        kinds.append(st.builds(Io, st.just("padding"), st.just(0), st.integers(0, 3).map(lambda n: n * 8)))
    return st.one_of(kinds)


def packs(
    device_size_lb: int, *, max_packs: int = 4, max_records: int = 6, paddings: bool = True
) -> st.SearchStrategy[list[list[Io]]]:
    """Draw the packs of a log; at most one padding in each."""

    def one_padding(pack: list[Io]) -> list[Io]:
        seen, out = False, []
        for io in pack:
            if io.kind != "padding" or not seen:
                out.append(io)
            seen = seen or io.kind == "padding"
        return out

    pack = st.lists(ios(device_size_lb, paddings=paddings), min_size=1, max_size=max_records).map(one_padding)
    return st.lists(pack, max_size=max_packs)
