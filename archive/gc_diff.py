"""gc-diff: removing wdiffs that lead nowhere (docs/archive.md, "Commands")."""

from __future__ import annotations

from collections.abc import Sequence

from walbd.archive.diffs import find_diffs, remove_diffs
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.format.meta import Diff


async def gc_diffs(volume: Volume) -> int:
    """Remove what leads nowhere from the base, and files that an apply could not remove; return how many.

    The caller has checked that the command is allowed.
    """
    return await volume.place.env.pools.run(
        Pool.RECORD, _remove, volume, volume.drop_useless(), volume.base.begin.gid_b
    )


def _remove(volume: Volume, useless: Sequence[Diff], base_gid: int) -> int:
    fs = volume.place.env.fs
    forgotten = [diff for diff in find_diffs(fs, volume.directory).diffs if diff.end.gid_b <= base_gid]
    removed = {*useless, *forgotten}
    remove_diffs(fs, volume.directory, removed)
    return len(removed)
