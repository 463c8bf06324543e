"""The golden vectors: files made by the original tools, and what those tools said about them.

tests/golden/README.md tells who made them; manifest.json says what each contains.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent.parent / "golden"

Item = dict[str, Any]


@functools.cache
def manifest() -> dict[str, Any]:
    """Return the whole manifest."""
    loaded: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())
    return loaded


def items(*kinds: str) -> list[Item]:
    """Return the items of these kinds, in the order of the manifest."""
    return [item for item in manifest()["items"] if item["kind"] in kinds]


def item(file: str) -> Item:
    """Return the item that describes a file."""
    return next(item for item in manifest()["items"] if item.get("file") == file)


def item_id(item: Item) -> str:
    """Return a name for an item, for test ids."""
    return str(item.get("file", item["kind"]))


def path(item: Item) -> Path:
    """Return the path of an item's file."""
    return GOLDEN / str(item["file"])


def base_image(base: str, size_b: int) -> bytes:
    """Return a base image as the manifest defines it: `zero`, or `pattern` (each word holds its own offset)."""
    if base == "zero":
        return bytes(size_b)
    assert base == "pattern"
    return struct.pack(f"<{size_b // 8}Q", *range(0, size_b, 8))


def sha256(data: bytes) -> str:
    """Return the digest as the manifest writes it."""
    return hashlib.sha256(data).hexdigest()
