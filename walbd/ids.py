"""The words that must not be mixed up, as types, and the names that people give to things."""

from __future__ import annotations

import random
import re
from typing import Final, NewType

from walbd.errors import UsageError
from walbd.units import UINT64_MAX

Lsid = NewType("Lsid", int)  # address in the endless log of a device [physical block]
Gid = NewType("Gid", int)  # generation of a volume; a clean snapshot is one gid
VolumeName = NewType("VolumeName", str)  # 1 to 64 of 0-9 A-Z a-z and -

INVALID_LSID: Final = Lsid(UINT64_MAX)
NO_GID: Final = Gid(UINT64_MAX)  # none, or not known
NIL_UUID: Final = bytes(16)

_VOLUME = re.compile(r"[0-9A-Za-z-]{1,64}")
_NODE = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")


def volume_name(text: str) -> VolumeName:
    """Check a volume name; raises UsageError."""
    if _VOLUME.fullmatch(text) is None:
        raise UsageError("bad volume name", hint="use 1 to 64 letters, digits and -", volume=text)
    return VolumeName(text)


def node_name(text: str) -> str:
    """Check the name of a server (it also names an archive at the proxies); raises UsageError."""
    if _NODE.fullmatch(text) is None:
        raise UsageError("bad node name", hint="use 1 to 64 letters, digits, dots, - and _", node=text)
    return text


def new_uuid(rng: random.Random) -> bytes:
    """Draw 16 random bytes (no RFC 4122 bits), never all zero."""
    while (uuid := rng.randbytes(16)) == NIL_UUID:
        pass
    return uuid


def uuid_text(uuid: bytes) -> str:
    """Write a uuid as 32 lower-case hexadecimal digits."""
    return uuid.hex()


def parse_uuid(text: str) -> bytes:
    """Read what `uuid_text` writes; raises UsageError."""
    try:
        uuid = bytes.fromhex(text)
    except ValueError:
        uuid = b""
    if len(uuid) != 16 or len(text) != 32:
        raise UsageError("bad uuid", hint="write 32 hexadecimal digits", uuid=text)
    return uuid
