"""Merge: diffs that follow one another become one, and the implicit snapshots between them vanish.

    1. plan      what can be merged; nothing that is held, or where a replica stands, may vanish
    2. merged    as a stream, into an unfinished file, which is then read back and decoded
    3. named     from here on the merged diff counts; its parts lead nowhere
    4. parts     forgotten, then their files removed

A crash before 3 leaves an unfinished file, one after it files that the next start removes. The newest snapshot,
the protected ones and every state of the base stay reachable all the time (docs/metadata.md, Merging;
docs/archive.md, "Merge").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import structlog

from walbd.archive.diffs import remove_diffs, take_name
from walbd.archive.holds import held_now
from walbd.archive.opening import open_diffs
from walbd.archive.states import MERGE
from walbd.archive.volume import Volume, check_room
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.daemon.logs import error_fields
from walbd.daemon.tasks import uninterrupted
from walbd.errors import AlreadyExists, Refused, UsageError, WalbError
from walbd.format.compress import CompressOpt
from walbd.format.meta import Diff, NotMergeable, can_merge_all, diff_name, merge_all
from walbd.format.planning import states_inside
from walbd.format.wdiff_merge import merge, verify
from walbd.format.wdiff_read import WdiffReader, open_wdiff
from walbd.fs import TempFile, failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import Fact

log = structlog.get_logger()

FP_MID_WRITE: Final = failpoints.register("archive.merge.mid_write", "a part of a file without a name")
FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.merge.before_commit", "an unfinished file; the parts are all there"
)
FP_AFTER_COMMIT: Final = failpoints.register(
    "archive.merge.after_commit", "the merged diff and all of its parts, which the next start removes"
)
FP_BEFORE_ERASE: Final = failpoints.register(
    "archive.merge.before_erase", "the merged diff counts; its parts are still there"
)


def plan_merge(volume: Volume, gid_b: int, gid_e: int | None = None, size_max_b: int | None = None) -> list[Diff]:
    """Return what a merge from `gid_b` on would join, oldest first, at least two diffs.

    The first begins at the lowest generation from `gid_b` on; those that begin below `gid_e` follow, as far as
    their sizes do not pass `size_max_b` [byte] together; with a size, at most as many as may be open at once.
    Raises UsageError for an empty range, Refused while an apply is unfinished, when something protected lies
    inside, or for too many diffs, and NotMergeable when there is nothing to merge.
    """
    if gid_e is not None and gid_e <= gid_b:
        raise UsageError("an empty range of generations", gid_b=gid_b, gid_e=gid_e)
    if volume.base.is_applying:
        raise Refused(
            "an apply is unfinished: a merge could make the rest of it impossible",
            hint="apply again: that finishes it",
            base=str(volume.base),
        )
    n_max = volume.place.config.scan_files_max or None
    diffs = volume.diffs.merge_candidates(gid_b, gid_end=gid_e, size_max_b=size_max_b)
    if n_max is not None and len(diffs) > n_max:
        if size_max_b is None:
            raise Refused(
                "too many diffs for one merge",
                hint="merge in parts, or raise scan_files_max",
                diffs=len(diffs),
                n_max=n_max,
            )
        diffs = diffs[:n_max]
    if len(diffs) < 2:
        raise NotMergeable(
            "there are no two diffs here that can become one",
            hint="look at get diff: a diff without M protects the snapshot at its beginning; "
            "disable-snapshot gives it up",
            gid_b=gid_b,
            candidates=len(diffs),
        )
    check_merge(volume, diffs)
    return diffs


def check_merge(volume: Volume, diffs: Sequence[Diff]) -> Diff:
    """Return the label of what these diffs become. Raises Refused if something must not vanish inside of it."""
    label = merge_all(diffs)
    if label in volume.diffs:
        raise AlreadyExists("this diff is there already", hint="run gc-diff", diff=str(label))
    vanishing = states_inside(diffs)
    for gid, why in protected(volume):
        if gid in vanishing:  # not where there is no snapshot: the replica may have one of another history there
            raise Refused(
                "a snapshot that must be kept lies inside",
                hint="merge up to it, or from it on; delete-hold and forget-replica give it up",
                diff=str(label),
                gid=gid,
                kept_for=why,
            )
    return label


def protected(volume: Volume) -> Iterator[tuple[int, str]]:
    """Yield the generations that no merge may swallow, each with the reason: holds, and where replicas stand."""
    for hold in held_now(volume):
        yield hold.gid, f"hold: {hold.reason}"
    for replica in volume.record.replicas:
        yield replica.gid, f"replica at {replica.node}"


async def run_merge(volume: Volume, plan: Sequence[Diff], job: Job) -> dict[str, Fact]:
    """The job: make one diff of those planned; the caller holds the action. A failure changes nothing."""
    pools = volume.place.env.pools
    volume.check_force()
    check_merge(volume, _as_planned(volume, plan))
    await volume.begin_action(MERGE)
    async with open_diffs(volume, Pool.MAINTAIN, lambda: _as_planned(volume, plan)) as parts:
        file = await pools.run(Pool.MAINTAIN, _make_file, volume, plan)
        try:
            job.begin("merging", sum(diff.size_b for diff in plan))
            size_b = await pools.run(Pool.MAINTAIN, _write, volume, parts.readers, file, job)
            job.begin("verifying")
            records = await pools.run(Pool.MAINTAIN, _verify, volume, file)
            merged = await uninterrupted(_commit(volume, plan, file, size_b))
        finally:
            await pools.run(Pool.MAINTAIN, file.close)
    removed_b = sum(diff.size_b for diff in plan)
    return {"diff": str(merged), "diffs": len(plan), "size_b": size_b, "removed_b": removed_b, "records": records}


def _as_planned(volume: Volume, plan: Sequence[Diff]) -> list[Diff]:
    """Return the planned diffs with the flags that they have now; raises Refused when the plan is out of date."""
    found = [volume.diffs.find(diff.begin, diff.end) for diff in plan]
    diffs = [diff for diff in found if diff is not None]
    if len(diffs) != len(plan) or not can_merge_all(diffs):
        raise Refused(
            "the diffs to merge have changed meanwhile", hint="merge again", begin=plan[0].begin, end=plan[-1].end
        )
    return diffs


async def _commit(volume: Volume, plan: Sequence[Diff], file: TempFile, size_b: int) -> Diff:
    """Name the merged file, register it, and remove the parts."""
    pools = volume.place.env.pools
    async with volume.naming:
        parts = _as_planned(volume, plan)
        merged = replace(check_merge(volume, parts), size_b=size_b)
        await pools.run(Pool.MAINTAIN, _name, volume, file, merged)
        volume.replace_diffs(parts, merged)
        try:
            await pools.run(Pool.MAINTAIN, _erase, volume, parts)
        except WalbError as exc:  # it is merged all the same; gc-diff, or the next start, removes them
            log.warning("diffs.not_removed", volume=volume.name, diffs=len(parts), **error_fields(exc))
    return merged


# in threads


def _make_file(volume: Volume, plan: Sequence[Diff]) -> TempFile:
    check_room(volume.place, need_b=sum(diff.size_b for diff in plan))
    return volume.place.env.fs.temp_file(volume.directory)


def _write(volume: Volume, readers: Sequence[WdiffReader], file: TempFile, job: Job) -> int:
    """Write the merged diff; return its size [byte]."""
    place = volume.place
    at = synced = 0
    compress = CompressOpt.parse(place.config.merge_compress)
    for piece in merge(readers, compress, check=volume.check_force):
        file.pwrite(piece, at)
        with disk_errors(file.path, "write"):
            failpoints.hit(FP_MID_WRITE)
        at += len(piece)
        job.progress(at)
        if at - synced >= place.config.fsync_interval_b:
            check_room(place)
            file.sync()
            synced = at
    return at


def _verify(volume: Volume, file: TempFile) -> int:
    """Read the merged diff back as a later apply will; return the number of its records."""
    return verify(open_wdiff(file), size_lb=volume.size_lb, check=volume.check_force)


def _name(volume: Volume, file: TempFile, merged: Diff) -> None:
    path = volume.directory / diff_name(merged)
    try:
        with disk_errors(volume.directory, "name a merged wdiff"):
            failpoints.hit(FP_BEFORE_COMMIT)
            file.commit(path)
            failpoints.hit(FP_AFTER_COMMIT)
    except WalbError:
        try:  # else a start would take it for the parts, and snapshots protected until then would be gone
            take_name(volume.place.env.fs, path)
        except WalbError as exc:
            log.warning("wdiff.name_left", volume=volume.name, diff=str(merged), **error_fields(exc))
        raise


def _erase(volume: Volume, parts: Sequence[Diff]) -> None:
    with disk_errors(volume.directory, "remove merged diffs"):
        failpoints.hit(FP_BEFORE_ERASE)
    remove_diffs(volume.place.env.fs, volume.directory, parts)
