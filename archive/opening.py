"""Opening the wdiffs of a volume while others may merge or rename them (docs/archive.md, "Wdiffs that change").

Whoever reads wdiffs chooses them from the collection in memory, and opens their files in a thread. In between
they may get other names (a snapshot was protected), or be replaced by a merged one. Then the choice is made again;
an open file stays good whatever happens to its name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Final, NamedTuple

from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.errors import InternalError, NotFound
from walbd.format.meta import Diff, diff_name
from walbd.format.wdiff_read import WdiffReader, open_wdiff

_RETRIES: Final = 10


class OpenDiffs(NamedTuple):
    """Wdiffs, oldest first, and their readers."""

    diffs: list[Diff]
    readers: list[WdiffReader]


@asynccontextmanager
async def open_diffs(volume: Volume, pool: Pool, choose: Callable[[], list[Diff]]) -> AsyncIterator[OpenDiffs]:
    """Open what `choose` takes from the collection; it is asked again when a file has gone meanwhile.

    Raises what `choose` raises, NotFound when a file is missing that the collection still has, and CorruptData for
    a damaged header.
    """
    pools = volume.place.env.pools
    files = ExitStack()
    try:
        diffs = choose()
        for _ in range(_RETRIES):
            try:
                readers = await pools.run(pool, _open, volume, diffs, files)
                break
            except NotFound:
                async with volume.naming:  # who gives files other names has told the collection by then
                    again = choose()
                if _names(again) == _names(diffs):
                    raise
                diffs = again
        else:
            raise InternalError("the diffs change again and again", volume=volume.name)
        yield OpenDiffs(diffs, readers)
    finally:
        await pools.run(pool, files.close)


def _names(diffs: Sequence[Diff]) -> list[str]:
    """Return the names of files: diffs are equal whatever their flags are, their files are not."""
    return [diff_name(diff) for diff in diffs]


def _open(volume: Volume, diffs: Sequence[Diff], files: ExitStack) -> list[WdiffReader]:
    """Open all of them or none; runs in a thread."""
    fs = volume.place.env.fs
    with ExitStack() as stack:
        readers = [open_wdiff(stack.enter_context(fs.open(volume.directory / diff_name(diff)))) for diff in diffs]
        files.push(stack.pop_all())
        return readers
