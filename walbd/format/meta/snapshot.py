"""Snapshots: which instants an image of the whole volume may show (docs/metadata.md, Snapshots).

Text form `|b|` when every block shows the same instant (clean), `|b,e|` when each block shows some instant
from b to e (dirty: a copy of a live device). Decimal, no blanks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Self

from walbd.format.meta.errors import BadLabel
from walbd.ids import NO_GID, Gid
from walbd.units import UINT64_MAX

GID_PATTERN: Final = r"(?:0|[1-9][0-9]{0,19})"  # decimal without leading zeros; the range is checked apart
SNAPSHOT_PATTERN: Final = rf"\|{GID_PATTERN}(?:,{GID_PATTERN})?\|"
_SNAPSHOT: Final = re.compile(rf"\|({GID_PATTERN})(?:,({GID_PATTERN}))?\|")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A full image of the volume, by the instants it may show: `gid_b <= gid_e`, both unsigned 64 bit.

    `gid_e` may be `NO_GID`: the upper end is not known. Raises BadLabel.
    """

    gid_b: Gid
    gid_e: Gid

    def __post_init__(self) -> None:
        if not 0 <= self.gid_b <= self.gid_e <= UINT64_MAX:
            raise BadLabel("a snapshot needs 0 <= begin <= end < 2^64", gid_b=self.gid_b, gid_e=self.gid_e)

    @classmethod
    def clean(cls, gid: int) -> Self:
        """Return `|gid|`."""
        return cls(Gid(gid), Gid(gid))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read exactly what `str` writes; raises BadLabel."""
        match = _SNAPSHOT.fullmatch(text)
        if match is None or match[1] == match[2]:
            raise BadLabel("not a snapshot", hint="write |GID| or |BEGIN,END| with BEGIN < END", text=text)
        return cls(Gid(int(match[1])), Gid(int(match[2] or match[1])))

    @property
    def is_clean(self) -> bool:
        """Every block is as it was at one instant; only such a snapshot may be restored."""
        return self.gid_b == self.gid_e

    @property
    def is_none(self) -> bool:
        """No image at all: the base of a volume that was never copied."""
        return self.gid_b == NO_GID

    def __str__(self) -> str:
        return f"|{self.gid_b}|" if self.is_clean else f"|{self.gid_b},{self.gid_e}|"


NO_SNAPSHOT: Final = Snapshot(NO_GID, NO_GID)
