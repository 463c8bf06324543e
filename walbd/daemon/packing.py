"""Packing of payloads on the wire. Source: docs/protocol.md, "Transfers"."""

from __future__ import annotations

import lz4.block

from walbd.ext.buffers import Buf
from walbd.protocol.transfer import Packing


def pack_bytes(data: memoryview, packing: Packing) -> tuple[Packing, Buf]:
    """Return `data` as one lz4 block if that was asked for and is smaller, else as it is."""
    if packing is Packing.LZ4:
        packed: bytes = lz4.block.compress(data, store_size=False)
        if len(packed) < len(data):
            return Packing.LZ4, packed
    return Packing.NONE, data
