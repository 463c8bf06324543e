"""Diffs, sizes and contents of volumes at archives. Source: docs/controller.md, "Archives"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

from walbd.controller import constants as k
from walbd.controller.constants import K_ARCHIVE, K_STORAGE, SHORT_TIMEOUT_SEC, TIMEOUT_SEC, Lbs, Mebi
from walbd.controller.data import Diff
from walbd.controller.images import Images
from walbd.controller.progress import Progress
from walbd.controller.queries import require_state
from walbd.controller.scan import ImageSink, image_sink
from walbd.controller.servers import Server
from walbd.controller.verify import (
    verify_gid_range,
    verify_int,
    verify_size_unit,
    verify_timeout,
    verify_type,
    verify_u64,
)
from walbd.controller.words import check_bulk
from walbd.errors import ConnectError, Refused, TimedOut, UsageError
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import Fact, JobAccepted, JobInfo
from walbd.protocol.codec import Message, Request
from walbd.units import parse_size

T = TypeVar("T")

_HASH_BULK: Final = "64K"
_JOB_TRIES: Final = 3  # of a job that a restart of the archive has forgotten


class Archives(Images):
    """Diffs, sizes and contents; see `Controller`."""

    # Diffs

    def apply(self, ax: Server, vol: str, gid: int, timeoutS: float = TIMEOUT_SEC) -> None:
        """Write the diffs up to a generation into the base image: all snapshots before it vanish.

        The generation must be the end of a diff that continues the base.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        ends = [diff.E.gidB for diff in self.get_applicable_diff_list(ax, vol)]
        if gid not in ends:
            raise UsageError(
                "no diff that continues the base ends at this generation",
                hint=f"ends: {_some(ends)}",
                server=ax.name,
                volume=vol,
                gid=gid,
            )
        job = self.ask(ax, c.Apply(volume=vol, gid=gid)).job
        self._wait_for_action(ax, vol, job, k.aaApply, "apply", timeoutS)
        base = self._when_reached(ax, vol, "base", lambda: self.get_base(ax, vol))
        gids = self._when_reached(ax, vol, "restore points", lambda: self.get_restorable_gid(ax, vol, "all"))
        if base.is_applying() or base.B.gidB < gid or (gids and gids[0] < gid):
            raise Refused(
                "the apply has ended before its goal",
                hint="call apply again; the log of the archive says why",
                server=ax.name,
                volume=vol,
                gid=gid,
                base=str(base),
            )

    def merge(self, ax: Server, vol: str, gidB: int, gidE: int, timeoutS: float = TIMEOUT_SEC) -> None:
        """Make one diff of those from generation gidB to gidE: the snapshots between them vanish.

        Both must be ends of diffs that continue the base. Every diff but the first must be mergeable (see
        `disable_snapshot`), and none may come from a comparison, such as a hash backup.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_gid_range(gidB, gidE, "bad range to merge")
        verify_timeout(timeoutS)
        self._verify_mergeable(ax, vol, gidB, gidE)
        job = self.ask(ax, m.Merge(volume=vol, gid_b=gidB, gid_e=gidE)).job
        self._wait_for_action(ax, vol, job, k.aaMerge, "merge", timeoutS)
        if not self._when_reached(ax, vol, "diffs", lambda: self.exists_diff(ax, vol, gidB, gidE)):
            raise Refused(
                "the merge has ended before its goal",
                hint="call merge again; the log of the archive says why",
                server=ax.name,
                volume=vol,
                gidB=gidB,
                gidE=gidE,
            )

    def enable_snapshot(self, ax: Server, vol: str, gidL: Sequence[int]) -> None:
        """Protect snapshots from merging. All of them, or none when a generation is unknown."""
        self.ask(ax, m.EnableSnapshot(volume=vol, gids=self._gids(ax, vol, gidL)))

    def disable_snapshot(self, ax: Server, vol: str, gidL: Sequence[int]) -> None:
        """Let merging remove snapshots, and take them from the explicit restore points.

        All of them, or none when a generation is unknown. The base's own generation and the latest one stay
        restorable.
        """
        self.ask(ax, m.DisableSnapshot(volume=vol, gids=self._gids(ax, vol, gidL)))

    def gc_diff(self, ax: Server, vol: str) -> int:
        """Remove the diffs that no restore point needs; returns how many there were."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GcDiff(volume=vol)).tasks

    # Sizes

    def resize_archive(
        self, ax: Server, vol: str, sizeMb: int, doZeroClear: bool, timeoutS: float | None = None
    ) -> None:
        """Grow the image of a volume at an archive; nothing where it has this size, or is not known.

        `doZeroClear` writes zeros over what is new, which may take long. Without `timeoutS`: 100 s, with zeros a
        day. Raises UsageError for a smaller size.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_type(doZeroClear, bool)
        limit_s: float = (TIMEOUT_SEC if doZeroClear else SHORT_TIMEOUT_SEC) if timeoutS is None else timeoutS
        verify_timeout(limit_s)
        size_lb = _size_lb(sizeMb)
        state = self.get_state(ax, vol)
        if state == k.aClear:
            return
        require_state(ax, vol, state, k.aAcceptForResize)
        if self._verify_growth(ax, vol, size_lb):
            return
        try:
            self.ask(ax, c.Resize(volume=vol, size_b=size_lb * Lbs, zero=doZeroClear))
        except (ConnectError, TimedOut) as exc:
            self.say(f"warning: {exc}")  # it may go on all the same: the size will tell
        self._wait_for_no_action(ax, vol, k.aaResize, limit_s)
        now_lb = self._when_reached(ax, vol, "size", lambda: self.get_vol_size_lb(ax, vol))
        if now_lb != size_lb:
            raise Refused(
                "the image has not got its new size",
                hint="the log of the archive says why",
                server=ax.name,
                volume=vol,
                size_lb=now_lb,
                wanted_lb=size_lb,
            )

    def resize_storage(self, sx: Server, vol: str, sizeMb: int) -> None:
        """Tell a storage that the data device of a volume has grown; 0: to the size of the data device.

        Nothing where the volume is not known.
        """
        self._check(sx, vol, K_STORAGE)
        verify_int(sizeMb)
        if sizeMb < 0:
            raise UsageError("a size cannot be negative", sizeMb=sizeMb)
        if self.get_state(sx, vol) != k.sClear:
            self.ask(sx, c.Resize(volume=vol, size_b=sizeMb * Mebi))

    def resize(self, vol: str, sizeMb: int, doZeroClear: bool) -> None:
        """Grow a volume at all archives, then at all storages of the layout.

        An archive that is larger than the storage is harmless; the reverse stops transfers. The data devices
        must have grown before. Nothing is changed unless all servers answer and allow it.
        """
        size_lb = _size_lb(sizeMb)
        verify_type(doZeroClear, bool)
        layout = self.sLayout
        states = self._states([*layout.archiveL, *layout.storageL], vol)
        archives = [ax for ax in layout.archiveL if states[ax] not in (k.aClear, k.aSyncReady)]
        for ax in archives:
            require_state(ax, vol, states[ax], k.aAcceptForResize)
            self._verify_growth(ax, vol, size_lb)
        for ax in archives:
            self.resize_archive(ax, vol, sizeMb, doZeroClear)
        for sx in layout.storageL:
            self.resize_storage(sx, vol, sizeMb)

    # Contents

    def get_block_hash(
        self,
        ax: Server,
        vol: str,
        gid: int,
        bulkSizeU: str = _HASH_BULK,
        scanSizeU: str | None = None,
        timeoutS: float = TIMEOUT_SEC,
        sleepPct: int = 0,
    ) -> str:
        """Return a hash of the image of a generation [32 hex digits]: equal at archives that hold the same.

        `bulkSizeU` must be the same for hashes that are compared; `scanSizeU` hashes only the beginning.
        `sleepPct` is the share of the time in which the archive rests.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        _verify_percent(sleepPct)
        bulk_b, size_lb = _bulk_b(bulkSizeU), _scan_lb(scanSizeU)
        request = m.BlockHash(volume=vol, gid=gid, bulk_b=bulk_b, size_lb=size_lb, sleep_percent=sleepPct)
        return str(self._ask_job(ax, request, timeoutS, vol, "block-hash").result["hash"])

    def virt_full_scan(
        self,
        ax: Server,
        vol: str,
        gid: int,
        dest: str | Path | BinaryIO,
        bulkSizeU: str | None = None,
        scanSizeU: str | None = None,
        sleepPct: int = 0,
    ) -> int:
        """Write the image of a generation to a file or device, without restoring it; return its size [byte].

        `dest` is a path, or an open binary file such as ``sys.stdout.buffer``, to which everything is written in
        order. A new regular file has its name only when it is complete; one that exists is replaced then. A
        block device must be large enough. `sleepPct` is the share of the time in which the archive rests.
        Every piece is checked against its checksum. Raises CorruptData, DiskFailed, or the archive's refusal.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        _verify_percent(sleepPct)
        request = m.VirtFullScan(volume=vol, gid=gid, size_lb=_scan_lb(scanSizeU), sleep_percent=sleepPct)
        if bulkSizeU is not None:
            request = dataclasses.replace(request, bulk_b=_bulk_b(bulkSizeU))
        with image_sink(dest, ax.name) as sink:
            self._scan_into(ax, request, sink)
            return sink.size_b

    def scrub(self, ax: Server, vol: str, timeoutS: float = TIMEOUT_SEC) -> dict[str, Fact]:
        """Have an archive read and verify everything that it stores of a volume; return what it has found.

        `damaged` counts what is damaged and `damaged_files` names it; nothing is changed. Raises what kept the
        archive from looking, not that something is damaged.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_timeout(timeoutS)
        return self._ask_job(ax, m.Scrub(volume=vol), timeoutS, vol, "scrub").result

    # Images that stay

    def get_cold(self, ax: Server, vol: str) -> list[int]:
        """Return the generations of which there is a cold image: one that was a base, and is kept."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, m.GetCold(volume=vol)).gids

    def del_cold(self, ax: Server, vol: str, gid: int) -> None:
        """Remove a cold image; up to three tries, one second apart. One that is gone meanwhile is fine."""
        self._del_image(ax, vol, gid, m.DelCold(volume=vol, gid=gid), self.get_cold)

    # Gaps

    def get_gaps(self, ax: Server, vol: str) -> list[m.Gap]:
        """Return the intervals for which no restore point can exist, oldest first; see `Gap`."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, m.GetGaps(volume=vol)).gaps

    # Inner parts

    def _gids(self, ax: Server, vol: str, gidL: Sequence[int]) -> list[int]:
        self._check(ax, vol, K_ARCHIVE)
        verify_type(gidL, (list, tuple), int)
        for gid in gidL:
            verify_u64(gid)
        if not gidL:
            raise UsageError("no generation is named")
        return list(gidL)

    def _when_reached(self, ax: Server, vol: str, what: str, ask: Callable[[], T]) -> T:
        """Ask about what a command has done; a connection that is lost just then does not make it a failure."""
        return self.wait_until(f"the {what} of {vol} at {ax.name}", ask, SHORT_TIMEOUT_SEC, s=ax, vol=vol)

    def _ask_job(self, ax: Server, request: Request[JobAccepted], timeoutS: float, vol: str, what: str) -> JobInfo:
        """Have a job done that changes nothing, and return it; asked again where a restart has forgotten it."""
        for _ in range(_JOB_TRIES):
            job = self.wait_for_job(ax, self.ask(ax, request).job, timeoutS, vol=vol, what=what)
            if job is not None:
                return job
        raise Refused("the archive restarts all the time", server=ax.name, volume=vol)

    def _verify_mergeable(self, ax: Server, vol: str, gidB: int, gidE: int) -> None:
        """Raise UsageError or Refused unless the diffs from gidB to gidE can be merged."""
        diffs = self.get_applicable_diff_list(ax, vol)
        inside = [d for d in diffs if d.B.gidB >= gidB and d.E.gidB <= gidE]
        if not inside or inside[0].B.gidB != gidB or inside[-1].E.gidB != gidE:
            raise UsageError(
                "these are no ends of diffs that continue the base",
                hint=f"ends: {_some([d.B.gidB for d in diffs[:1]] + [d.E.gidB for d in diffs])}",
                server=ax.name,
                volume=vol,
                gidB=gidB,
                gidE=gidE,
            )
        reason, found = _unmergeable(inside)
        if found is not None:
            raise Refused(
                f"a diff between them {reason}",
                hint=f"walbc disable-snapshot {vol} {found.B.gidB} --archive {ax.name}"
                if not found.isMergeable
                else "merge before and after it",
                server=ax.name,
                volume=vol,
                diff=str(found),
            )

    def _verify_growth(self, ax: Server, vol: str, size_lb: int) -> bool:
        """Say whether the image has this size already; raises UsageError when it is larger."""
        now_lb = self.get_vol_size_lb(ax, vol)
        if now_lb > size_lb:
            raise UsageError(
                "an image cannot become smaller",
                server=ax.name,
                volume=vol,
                size_lb=now_lb,
                wanted_lb=size_lb,
            )
        return now_lb == size_lb

    def _scan_into(self, ax: Server, request: m.VirtFullScan, sink: ImageSink) -> None:
        began = self.calls.now()
        shown = scan_progress(ax, request.volume, sink, 0.0)

        def take(message: Message, payload: memoryview) -> None:
            nonlocal shown
            sink.take(message, payload)
            shown = scan_progress(ax, request.volume, sink, self.calls.now() - began)
            self.progress(shown)

        try:
            self.follow(ax, request, take)
            sink.finish()
        finally:
            self._end_progress(shown)


def scan_progress(ax: Server, vol: str, sink: ImageSink, elapsed_s: float) -> Progress:
    """Return how far a scan is."""
    return Progress(
        what="scan", volume=vol, server=ax.name, done=sink.done_b, total=sink.size_b, elapsed_s=elapsed_s
    )


def _unmergeable(diffs: Sequence[Diff]) -> tuple[str, Diff | None]:
    """Return why diffs cannot be merged, and the first that is in the way."""
    for i, diff in enumerate(diffs):
        if diff.isCompDiff:
            return "comes from a comparison", diff
        if i and not diff.isMergeable:
            return "begins at a snapshot that is protected", diff
    return "", None


def _size_lb(sizeMb: int) -> int:
    verify_int(sizeMb)
    if sizeMb <= 0:
        raise UsageError("a size is a number of MiB above 0", sizeMb=sizeMb)
    return sizeMb * Mebi // Lbs


def _bulk_b(sizeU: str) -> int:
    verify_size_unit(sizeU)
    check_bulk(parse_size(sizeU))
    return parse_size(sizeU)


def _verify_percent(sleepPct: int) -> None:
    verify_int(sleepPct)
    if not 0 <= sleepPct <= 99:
        raise UsageError("a share of rest is from 0 to 99 percent", sleepPct=sleepPct)


def _scan_lb(sizeU: str | None) -> int:
    """Return the size of the part to look at [logical block]; 0: everything."""
    if sizeU is None:
        return 0
    verify_size_unit(sizeU)
    size_b = parse_size(sizeU)
    if size_b == 0 or size_b % Lbs:
        raise UsageError("the size to scan is a multiple of 512 bytes, and not 0", size=sizeU)
    return size_b // Lbs


def _some(gids: Sequence[int], n: int = 10) -> str:
    """Write a few of many numbers, the last ones."""
    shown = ", ".join(str(gid) for gid in gids[-n:]) or "none"
    return f"..., {shown}" if len(gids) > n else shown
