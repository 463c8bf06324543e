"""Receiving the packs of a sorted wdiff that a peer sends.

Source: docs/formats.md, "wdiff: sorted"; docs/protocol.md, "wdiff transfer".
"""

from __future__ import annotations

from walbd.errors import CorruptData
from walbd.ext.buffers import Buf
from walbd.ext.extent import clip
from walbd.ext.wdiff import check_extents, parse_pack
from walbd.format.extents import EXTENT, EXTENT_B
from walbd.format.wdiff import HEADER_B, PACK_B, WdiffType, parse_header
from walbd.format.wdiff_read import bad_pack
from walbd.units import UINT64_MAX

_HINT = "the sender or the connection damaged the stream; it has to be sent again"


def check_stream_header(stream: Buf, source: str, *uuids: bytes) -> None:
    """Check the file header at the beginning of a stream: a sorted wdiff, of one of `uuids` if any are given.

    Raises CorruptData.
    """
    header = parse_header(memoryview(stream)[:HEADER_B], source)
    problem = ""
    if header.type is not WdiffType.SORTED:
        problem = "only sorted wdiffs can be sent"
    elif uuids and header.uuid not in uuids:
        problem = "the wdiff has another uuid than the offer"
    if problem:
        raise CorruptData(problem, hint="the sender made the stream wrongly", source=source, offset=0)


class PackVerifier:
    """Verifies packs one by one before they are stored: header, order over the whole stream, data checksums.

    `ended` tells whether the end pack came; `n_records`, `data_size_b` and `end_lb` count what came so far. With
    `size_lb`, records that end beyond the volume are refused. After an error it must not be used again.
    """

    def __init__(self, *, size_lb: int | None = None, source: str = "stream") -> None:
        self.ended = False
        self.n_records = 0
        self.data_size_b = 0  # stored data, without headers
        self.end_lb = 0  # where the last record ends
        self._size_lb = size_lb
        self._source = source
        self._offset_b = 0  # of the next pack in the stream

    def feed(self, pack: Buf) -> None:
        """Verify one whole pack: its 4096 bytes of header and exactly its data area; raises CorruptData."""
        view = memoryview(pack)
        at = self._offset_b
        if self.ended:
            raise self._corrupt("a pack follows the end pack", at)
        if len(view) < PACK_B:
            raise self._corrupt("a pack is shorter than its header", at, size_b=len(view))
        code, record, is_end, data_size_b, end_lb, extents = parse_pack(view[:PACK_B], at + PACK_B, 0, self.end_lb)
        if code:
            raise self._at_source(bad_pack(code, record, self._source, at))
        if len(view) - PACK_B != data_size_b:
            raise self._corrupt(
                "a pack has another size than its header says",
                at,
                size_b=len(view),
                expected_b=PACK_B + data_size_b,
            )
        if self._size_lb is not None and end_lb > self._size_lb:
            outside = clip(extents, self._size_lb, UINT64_MAX)
            number = len(extents) // EXTENT_B - len(outside) // EXTENT_B
            address_lb, data_b, blocks_lb = EXTENT.unpack_from(extents, number * EXTENT_B)[:3]
            raise self._corrupt(
                "a record ends beyond the end of the volume",
                at,
                address_lb=address_lb,
                blocks_lb=blocks_lb,
                size_lb=self._size_lb,
            )
        bad = check_extents(extents, view[PACK_B:], at + PACK_B)
        if bad >= 0:
            address_lb, data_b, blocks_lb = EXTENT.unpack_from(extents, bad * EXTENT_B)[:3]
            raise self._corrupt(
                "the checksum of stored data does not match", data_b, address_lb=address_lb, blocks_lb=blocks_lb
            )
        self.ended = is_end
        self.n_records += len(extents) // EXTENT_B
        self.data_size_b += data_size_b
        self.end_lb = end_lb
        self._offset_b = at + len(view)

    def feed_all(self, packs: Buf) -> None:
        """Verify whole packs, one behind the other, each as `feed` does."""
        view, at = memoryview(packs), 0
        while at < len(view):
            data_b = int.from_bytes(view[at + 8 : at + 12], "little")  # `feed` checks it
            self.feed(view[at : at + PACK_B + data_b])
            at += PACK_B + data_b

    def finish(self) -> None:
        """Raise CorruptData if the end pack has not come."""
        if not self.ended:
            raise self._corrupt("the stream ends without an end pack", self._offset_b)

    def _corrupt(self, message: str, offset: int, **facts: object) -> CorruptData:
        return CorruptData(message, hint=_HINT, source=self._source, offset=offset, **facts)

    def _at_source(self, error: CorruptData) -> CorruptData:
        facts = {key: value for key, value in error.facts.items() if key not in ("path", "offset")}
        return self._corrupt(error.message, int(str(error.facts["offset"])), **facts)
