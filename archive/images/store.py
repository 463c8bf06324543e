"""Where the images of volumes are kept: what an archive asks of such a place (docs/archive.md, "Images").

One *base* image per volume, *restored* images, each a writable copy at one generation, and *cold* images, which
are like restored ones and never change; a store makes them only if they share the blocks of the others. All calls
may block; code on the event loop makes them in a pool. Sizes and offsets are bytes. Calls for one volume that
change images are kept apart by the state table, so a store needs no locks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from walbd.fs import File

Tick = Callable[[int], None]
"""Called now and then by long copies with the bytes done so far; it may raise to abandon the copy."""


class PreparedImage(NamedTuple):
    """A base image that is ready to be written from beginning to end."""

    file: File
    reads_zero: bool  # all of it reads as zeros now: zeros need not be written


class ImageStore(Protocol):
    """The images of all volumes of one archive."""

    def base_size(self, volume: str) -> int | None:
        """Return the size of the base image, None if there is none."""

    def open_base(self, volume: str, *, write: bool = False) -> File:
        """Open the base image; raises NotFound."""

    def prepare_base(self, volume: str, size_b: int) -> PreparedImage:
        """Make a base image of exactly this size, or take the one that is there, and open it for writing.

        Its name is durable; its contents are the caller's business. Raises DiskFull or DiskFailed.
        """

    def grow_base(self, volume: str, size_b: int) -> None:
        """Make the base image larger, durably; what is new reads as zeros. Never makes it smaller."""

    def remove_base(self, volume: str) -> None:
        """Remove the base image; a missing one is fine."""

    def clone_base(self, volume: str, gid: int, tick: Tick, *, cold: int | None = None) -> File:
        """Make an unfinished writable copy of the base image for a restore of `gid`; raises DiskFull.

        With `cold` it is a copy of that cold image, as large as the base image. A stale one is replaced. It costs
        no copying where the disk can share blocks.
        """

    def finish_clone(self, volume: str, gid: int) -> None:
        """Give an unfinished copy, which the caller has synced and closed, its final name, durably."""

    def abandon_clone(self, volume: str, gid: int) -> None:
        """Remove an unfinished copy; a missing one is fine."""

    def restored(self, volume: str) -> list[int]:
        """Return the generations of the finished restored images, ascending."""

    def restored_path(self, volume: str, gid: int) -> Path:
        """Return the path of a restored image, for whoever mounts it."""

    def remove_restored(self, volume: str, gid: int) -> None:
        """Remove a restored image, durably: it must not come back into a later history. A missing one is fine."""

    def remove_unfinished(self, volume: str) -> None:
        """Remove the unfinished copies that a crash left."""

    def make_cold(self, volume: str, gid: int) -> bool:
        """Keep an unfinished copy, which the caller has synced, as the cold image `gid` too, durably.

        Returns False, and does nothing, where that would cost copying.
        """

    def colds(self, volume: str) -> list[int]:
        """Return the generations of the cold images, ascending."""

    def open_cold(self, volume: str, gid: int) -> File:
        """Open a cold image for reading; raises NotFound."""

    def remove_cold(self, volume: str, gid: int) -> None:
        """Remove a cold image, durably; a missing one is fine."""
