"""Wdiffs that change more than the newest snapshot: those that bring another log history, or a gap.

A wdiff counts from the moment its file has its name; what else becomes true with it is in the record. So that no
crash comes between:

    1. record: `pending` names the wdiff, and what will be true with it
    2. the file gets its name
    3. record: it is true, and nothing is pending

A start that finds something pending looks for the file (archive/recover.py): with it, 3 is done now; without,
nothing has happened.
The uuid tells whether wdiffs of proxies continue the history: it must never be that of a history which the newest
snapshot does not belong to. Source: docs/archive.md, "Histories".
"""

from __future__ import annotations

from typing import Protocol

import structlog

from walbd.archive.colds import colds_of, remove_colds
from walbd.archive.diffs import take_name
from walbd.archive.record import Pending
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.logs import error_fields
from walbd.errors import WalbError
from walbd.format.meta import Diff, diff_name
from walbd.protocol.maintenance import Gap

log = structlog.get_logger()


class Unnamed(Protocol):
    """A complete and durable wdiff file that has no name yet."""

    def commit(self) -> Diff:
        """Name the file durably; return its label with its size. Blocks."""


async def commit_pending(
    volume: Volume, sink: Unnamed, diff: Diff, uuid: bytes, gaps: tuple[Gap, ...] | None = None
) -> None:
    """Name the file of `diff` and register it; from then on `uuid` is the volume's history, and `gaps` its gaps.

    All of it, or nothing. The caller holds a step, and lets nothing cut this in two (`uninterrupted`). When the
    disk fails so that nobody can tell which, the volume is Broken until the next start, which looks.
    """
    pools = volume.place.env.pools
    pending = Pending(diff=diff, uuid=uuid.hex(), gaps=volume.record.gaps if gaps is None else gaps)
    alone = pending.is_true(volume.record)
    if not diff.is_clean or diff.comp:
        await _leave_no_colds_beyond(volume)
    if not alone:
        await volume.save(pending=pending)
    try:
        named = await pools.run(Pool.RECEIVE, sink.commit)
    except WalbError:
        await _take_back(volume, diff, alone=alone)
        raise
    if alone:
        volume.add_diff(named)
    else:
        await volume.fulfil(pending, named)


async def _leave_no_colds_beyond(volume: Volume) -> None:
    """Remove cold images of snapshots above the newest one, which are there when wdiffs were lost.

    What was compared leads on from the newest snapshot only, and would be laid over them.
    """
    newest = volume.latest.begin.gid_b
    await remove_colds(volume, [gid for gid in colds_of(volume.record) if gid > newest])


async def _take_back(volume: Volume, diff: Diff, *, alone: bool) -> None:
    """Make sure that the file has no name after a failure. With `alone` it would do no harm at the next start."""
    pools, path = volume.place.env.pools, volume.directory / diff_name(diff)
    try:
        await pools.run(Pool.RECORD, take_name, volume.place.env.fs, path)
    except WalbError as exc:
        if alone:
            log.warning("wdiff.name_left", volume=volume.name, diff=str(diff), **error_fields(exc))
        else:
            log.error("volume.broken", volume=volume.name, **error_fields(exc))
            volume.set_broken(exc)
        return
    if alone:
        return
    try:
        await volume.save(pending=None)
    except WalbError as exc:  # without the file it means nothing
        log.warning("record.not_saved", volume=volume.name, **error_fields(exc))
