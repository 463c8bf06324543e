"""gc-diff: removing wdiffs that lead nowhere (docs/archive.md, "Commands")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from walbd.archive.diffs import find_diffs, remove_diffs
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.format.meta import Diff, contains


async def gc_diffs(volume: Volume) -> int:
    """Remove what leads nowhere from the base, and files that an apply or a merge could not remove.

    Returns how many. The caller has checked that the command is allowed.
    """
    pools, fs = volume.place.env.pools, volume.place.env.fs
    async with volume.naming:
        useless = volume.drop_useless()
        found = await pools.run(Pool.RECORD, find_diffs, fs, volume.directory)
        removed = {*useless, *forgotten(volume, found.diffs)}
        await pools.run(Pool.RECORD, remove_diffs, fs, volume.directory, removed)
        return len(removed)


def forgotten(volume: Volume, files: Iterable[Diff]) -> Sequence[Diff]:
    """Return which files nobody knows of, and hold nothing that is not elsewhere.

    A file that is about to be registered leads beyond all that are there, so it is none of them.
    """
    diffs, base_gid = volume.diffs, volume.base.begin.gid_b
    return [
        file
        for file in files
        if file not in diffs
        and (file.end.gid_b <= base_gid or any(contains(diff, file) for diff in diffs.over(file.begin.gid_b)))
    ]
