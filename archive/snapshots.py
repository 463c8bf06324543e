"""enable-snapshot and disable-snapshot: whether merging may destroy a snapshot (docs/archive.md, "Snapshots").

A snapshot is protected by a flag of the diffs that begin there, and the flag is part of the file's name.
Everything is checked first; then the files get their new names beside the old ones, the collection in memory
changes at once, and the old names go. So there is no moment at which a diff has no name. Of two names of one
file a start takes the one that protects more (archive/recover.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from walbd.archive.states import Command
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.tasks import uninterrupted
from walbd.errors import NotFound, UsageError, WalbError
from walbd.format.meta import Diff, diff_name
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors

FP_BEFORE_LINK: Final = failpoints.register(
    "archive.snapshot.before_link", "every diff has its old name, some have the new one too"
)
FP_BEFORE_UNLINK: Final = failpoints.register(
    "archive.snapshot.before_unlink", "diffs have both names; the next start takes the one that protects more"
)

Change = tuple[Diff, Diff]  # as it is, as it becomes


async def change_snapshots(volume: Volume, gids: Sequence[int], command: Command) -> None:
    """Protect the snapshots `gids` (ENABLE_SNAPSHOT) or give them up (DISABLE_SNAPSHOT): all of them, or none.

    Raises UsageError for none at all, NotFound when no diff begins at one of them, what `Volume.check` raises, and
    DiskFailed: when it comes while old names go, everything is changed, but may not outlast a crash.
    """
    if not gids:
        raise UsageError("no snapshot is named", hint="give one or more generations")
    await uninterrupted(_change(volume, gids, command))


async def _change(volume: Volume, gids: Sequence[int], command: Command) -> None:
    pools = volume.place.env.pools
    async with volume.naming:
        volume.check(command)  # what was checked before may have changed while others gave names
        changes = _plan(volume, gids, enable=command is Command.ENABLE_SNAPSHOT)
        await pools.run(Pool.RECORD, _link, volume, changes)
        for _, after in changes:
            volume.relabel_diff(after)
        await pools.run(Pool.RECORD, _unlink, volume, changes)


def _plan(volume: Volume, gids: Sequence[int], *, enable: bool) -> list[Change]:
    changes: list[Change] = []
    unknown = []
    for gid in sorted(set(gids)):
        change = volume.diffs.snapshot_change(gid, enable=enable)
        changes += change.changed
        if not change.found:
            unknown.append(gid)
    if unknown:
        raise NotFound(
            "no diff begins at these generations; nothing was changed",
            hint="choose restorable ones other than the newest, which is kept anyway",
            gids=", ".join(map(str, unknown)),
        )
    return changes


# in threads


def _link(volume: Volume, changes: Sequence[Change]) -> None:
    """Give files their new names beside the old ones, durably: all, or after a failure none."""
    fs, directory = volume.place.env.fs, volume.directory
    made: list[Path] = []
    try:
        for before, after in changes:
            with disk_errors(directory, "rename a wdiff"):
                failpoints.hit(FP_BEFORE_LINK)
            fs.unlink(directory / diff_name(after))  # which an earlier change could not take away
            fs.link(directory / diff_name(before), directory / diff_name(after))
            made.append(directory / diff_name(after))
        fs.sync_dir(directory)
    except WalbError:
        for path in made:
            fs.unlink(path)
        raise


def _unlink(volume: Volume, changes: Sequence[Change]) -> None:
    """Take the old names away, durably."""
    fs, directory = volume.place.env.fs, volume.directory
    with disk_errors(directory, "rename a wdiff"):
        failpoints.hit(FP_BEFORE_UNLINK)
    for before, _ in changes:
        fs.unlink(directory / diff_name(before))
    fs.sync_dir(directory)
