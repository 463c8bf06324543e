"""Copies of volumes at other archives. Source: docs/controller.md, "Replication"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from walbd.controller import constants as k
from walbd.controller.archives import Archives
from walbd.controller.constants import K_ARCHIVE, SHORT_TIMEOUT_SEC, TIMEOUT_SEC, Lbs, Mebi
from walbd.controller.data import SyncOpt
from walbd.controller.queries import require_state
from walbd.controller.servers import Server, verify_server_kind
from walbd.controller.verify import verify_timeout, verify_type, verify_u64
from walbd.errors import BadState, NotFound, Refused, TimedOut, UsageError, WalbError
from walbd.ids import node_name
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.units import parse_size

_MERGE_MIN_B: Final = 1 << 20
_HANGS_S: Final = 300.0  # a proxy that was told to deliver everything, and has not delivered anything for so long


class Replication(Archives):
    """Replication; see `Controller`."""

    def replicate_once_nbk(
        self,
        aSrc: Server,
        vol: str,
        aDst: Server,
        doResync: bool = False,
        dontMerge: bool = False,
        syncOpt: SyncOpt | None = None,
        gid: int | None = None,
    ) -> int:
        """Begin to bring a volume at another archive up to a generation, which is returned.

        `gid` None: the last that can be restored at `aSrc` now. The servers choose how: everything where aDst
        holds nothing; by comparing the images where the lineages differ (only with `doResync`) or where aSrc has
        no diffs any more from aDst's state on; otherwise by diffs, merged on the way unless `dontMerge`.

        Before anything is changed: both answer, aSrc is active, aDst is Clear, SyncReady or active; images of
        another lineage are refused without `doResync`, and so is one at aDst that is larger. Then a Clear volume
        is made known at aDst, a smaller image grown.
        """
        args = self._replication_args(aSrc, vol, aDst, doResync, dontMerge, syncOpt, gid)
        state, growth_lb = self._verify_replication(aSrc, vol, aDst, doResync)
        goal = gid if gid is not None else self.get_latest_clean_snapshot(aSrc, vol)
        if state == k.aClear:
            self.ask(aDst, c.ArchiveInitVol(volume=vol))
        if growth_lb:
            self._grow(aDst, vol, growth_lb)
        request = m.Replicate(
            volume=vol,
            dest=aDst.get_host_port(),
            gid=goal,
            resync=doResync,
            dont_merge=dontMerge,
            compress=args.cmprOpt.wire,
            merge_size_max_b=max(_MERGE_MIN_B, parse_size(args.maxWdiffMergeSizeU)),
            bulk_b=parse_size(args.bulkSizeU),
        )
        self._replications[aSrc.name, vol, aDst.name] = self.ask(aSrc, request).job
        return goal

    def wait_for_replicated(
        self, aSrc: Server, vol: str, aDst: Server, gid: int, timeoutS: float = TIMEOUT_SEC
    ) -> None:
        """Wait until a replication has ended and the other archive holds a generation, in its base or by diffs.

        Raises the error of the replication when it failed.
        """
        self._check(aSrc, vol, K_ARCHIVE)
        self._check(aDst, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        job = self._replications.pop((aSrc.name, vol, aDst.name), None)
        if job is not None:
            self._wait_for_action(aSrc, vol, job, k.aaReplSync, "replicate", timeoutS)
        else:
            self._wait_for_no_action(aSrc, vol, k.aaReplSync, timeoutS)
        self.wait_until(
            f"the end of the replication at {aDst.name}",
            lambda: True if self.get_state(aDst, vol) not in k.aDuringReplicate else None,
            timeoutS,
            s=aDst,
            vol=vol,
        )
        head = self.wait_until(
            f"the state of {aDst.name}", lambda: self._head(aDst, vol), SHORT_TIMEOUT_SEC, s=aDst, vol=vol
        )
        if head < gid:
            raise Refused(
                "the replication has ended before its goal",
                hint="replicate again: it goes on from there; the logs of the archives say why",
                server=aDst.name,
                volume=vol,
                gid=gid,
                reached=head,
            )

    def replicate_once(
        self,
        aSrc: Server,
        vol: str,
        aDst: Server,
        timeoutS: float = TIMEOUT_SEC,
        doResync: bool = False,
        dontMerge: bool = False,
        syncOpt: SyncOpt | None = None,
        gid: int | None = None,
    ) -> int:
        """Bring a volume at another archive up to a generation, and return that; see `replicate_once_nbk`."""
        verify_timeout(timeoutS)
        goal = self.replicate_once_nbk(aSrc, vol, aDst, doResync, dontMerge, syncOpt, gid)
        self.wait_for_replicated(aSrc, vol, aDst, goal, timeoutS)
        return goal

    def replicate(
        self,
        aSrc: Server,
        vol: str,
        aDst: Server,
        synchronizing: bool,
        timeoutS: float = TIMEOUT_SEC,
        doResync: bool = False,
        dontMerge: bool = False,
        syncOpt: SyncOpt | None = None,
    ) -> int:
        """Copy a volume to another archive; with `synchronizing` the proxies feed that one from then on, too.

        Returns the generation that the copy has (synchronizing: had before the proxies were told).
        """
        verify_type(synchronizing, bool)
        if synchronizing:
            self._verify_feeding(aSrc, vol, but=aDst)
        gid = self.replicate_once(aSrc, vol, aDst, timeoutS, doResync, dontMerge, syncOpt)
        if synchronizing:
            self.synchronize(aSrc, vol, aDst, timeoutS, syncOpt)
        return gid

    def synchronize(
        self,
        aSrc: Server,
        vol: str,
        aDst: Server,
        timeoutS: float = TIMEOUT_SEC,
        syncOpt: SyncOpt | None = None,
    ) -> None:
        """Make all proxies feed another archive, too, without a gap in what it holds.

        The proxies first deliver everything and stop, the rest is replicated from aSrc, then they go on, feeding
        both; meanwhile the log waits at the storages. aDst is best replicated shortly before, as `replicate`
        does. aSrc must be fed by every proxy that feeds any archive, and all archives that are fed must be
        active: the proxies could not deliver everything else. A proxy that delivers nothing for five minutes is
        not waited for any longer.

        When something fails, proxies that were started are started again, and aDst is removed where it was added.
        """
        self._replication_args(aSrc, vol, aDst, False, False, syncOpt, None)
        verify_timeout(timeoutS)
        self._verify_replication(aSrc, vol, aDst, False)
        change = _Change(self._verify_feeding(aSrc, vol))
        try:
            for px in change.active:
                change.told.append(px)
                self.stop_nbk(px, vol, "empty")
            for px in self.sLayout.proxyL:
                if px in change.active:
                    self._wait_for_emptied(px, vol, timeoutS)
                known = aDst.name in self.get_archive_info_list(px, vol)
                if not known:
                    change.added.append(px)
                self._put_archive_info(px, vol, aDst, syncOpt)
            self.replicate_once(aSrc, vol, aDst, timeoutS, syncOpt=syncOpt)
        except BaseException:
            self._undo_synchronize(change, vol, aDst)
            raise
        self._start_proxies(vol)
        self._try_kick_storages()
        self._try_forget_replica(aSrc, vol, aDst)

    # What a source knows of its copies

    def get_replica_positions(self, ax: Server, vol: str) -> list[m.ReplicaPosition]:
        """Return to where an archive has replicated a volume: it keeps the diffs that these still need."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, m.GetReplicaPositions(volume=vol)).rows

    def forget_replica(self, ax: Server, vol: str, name: str) -> None:
        """Do not keep anything for a copy at the archive of that name any more."""
        self._check(ax, vol, K_ARCHIVE)
        verify_type(name, str)
        self.ask(ax, m.ForgetReplica(volume=vol, node=node_name(name)))

    # Inner parts

    def _try_forget_replica(self, ax: Server, vol: str, copy: Server) -> None:
        """A copy that proxies feed needs nothing of another archive any more: its last position would only keep
        diffs from being merged, and look like lag."""
        try:
            self.forget_replica(ax, vol, copy.name)
        except NotFound:
            pass
        except WalbError as exc:
            self.say(f"warning: {ax.name} still keeps diffs for {copy.name}: {exc}")

    def _replication_args(
        self,
        aSrc: Server,
        vol: str,
        aDst: Server,
        doResync: bool,
        dontMerge: bool,
        syncOpt: SyncOpt | None,
        gid: int | None,
    ) -> SyncOpt:
        self._check(aSrc, vol, K_ARCHIVE)
        verify_server_kind(aDst, (K_ARCHIVE,))
        verify_type(doResync, bool)
        verify_type(dontMerge, bool)
        if gid is not None:
            verify_u64(gid)
        if syncOpt is not None:
            verify_type(syncOpt, SyncOpt)
        if aSrc.name == aDst.name or aSrc.get_host_port() == aDst.get_host_port():
            raise UsageError("an archive cannot be replicated to itself", server=aSrc.name)
        return syncOpt if syncOpt is not None else SyncOpt()

    def _verify_replication(self, aSrc: Server, vol: str, aDst: Server, doResync: bool) -> tuple[str, int]:
        """Check both archives; return the state at aDst, and to which size it must grow (0: it need not)."""
        states = self._states([aSrc, aDst], vol)
        hint = f"walbc start {aSrc.name} {vol}" if states[aSrc] == k.aStopped else ""
        require_state(aSrc, vol, states[aSrc], k.aActive, hint)
        hint = f"walbc start {aDst.name} {vol}" if states[aDst] == k.aStopped else ""
        require_state(aDst, vol, states[aDst], [k.aClear, k.aSyncReady, *k.aActive], hint)
        if states[aDst] not in k.aActive:
            return states[aDst], 0
        if not doResync and self.get_archive_uuid(aSrc, vol) != self.get_archive_uuid(aDst, vol):
            raise BadState(
                "the archives hold images of different lineages",
                hint=f"to give up what {aDst.name} holds: walbc replicate {vol} {aDst.name} --resync",
                server=aDst.name,
                volume=vol,
                state=states[aDst],
            )
        if not self.exists_base_image(aDst, vol):
            return states[aDst], 0
        source_lb, dest_lb = self.get_vol_size_lb(aSrc, vol), self.get_vol_size_lb(aDst, vol)
        if dest_lb > source_lb:
            raise BadState(
                "the image at the destination is larger",
                hint=f"grow the source first: walbc resize {vol} SIZE, or clear the volume at {aDst.name}",
                server=aDst.name,
                volume=vol,
                size_lb=dest_lb,
                source_lb=source_lb,
            )
        return states[aDst], source_lb if dest_lb < source_lb else 0

    def _grow(self, ax: Server, vol: str, size_lb: int) -> None:
        """Grow an image to the size of another one, which need not be a whole number of MiB."""
        if size_lb * Lbs % Mebi == 0:
            self.resize_archive(ax, vol, size_lb * Lbs // Mebi, False)
            return
        self.ask(ax, c.Resize(volume=vol, size_b=size_lb * Lbs))
        self._wait_for_no_action(ax, vol, k.aaResize, SHORT_TIMEOUT_SEC)

    def _verify_feeding(self, aSrc: Server, vol: str, *, but: Server | None = None) -> list[Server]:
        """Return the proxies that are active; raises unless all answer, and feed aSrc if they feed any archive,
        and all archives that are fed (`but` one that will be replicated to first) can take what they get.
        """
        self.sLayout.verify(0, 1, 0)
        states = self._states(self.sLayout.proxyL, vol)
        for px, state in states.items():
            require_state(px, vol, state, [k.pClear, k.pStopped, *k.pActive])
        fed: set[str] = set()
        for px, names in self.ask_all(self.sLayout.proxyL, c.ListArchiveInfo(volume=vol)).items():
            if names.names and aSrc.name not in names.names:
                raise BadState(
                    "the source is not fed by all proxies, so it may not have everything",
                    hint=f"take an archive that is fed, or: walbc start-synchronizing {aSrc.name} {vol}",
                    server=px.name,
                    volume=vol,
                    source=aSrc.name,
                    feeds=", ".join(names.names),
                )
            fed |= set(names.names)
        archives = [ax for ax in self.sLayout.archiveL if ax.name in fed and ax != but]
        for ax, state in self._states(archives, vol).items():
            hint = f"it takes no diffs, so proxies cannot end; or: walbc stop-synchronizing {ax.name} {vol}"
            require_state(ax, vol, state, k.aActive, hint)
        return [px for px, state in states.items() if state in k.pActive]

    def _wait_for_emptied(self, px: Server, vol: str, timeoutS: float) -> None:
        """Wait until a proxy that was told to stop empty has stopped. While it waits, the logs of the storages
        fill: so it may not hang, as it does when an archive dies.
        """
        began, before = self.calls.now(), None
        job = self._stops.get((px.name, vol))
        while True:
            left_s = timeoutS - (self.calls.now() - began)
            try:
                self.wait_for_stopped(px, vol, timeoutS=min(_HANGS_S, left_s))
                return
            except TimedOut as exc:
                (row,) = self.ask(px, c.GetStatus(volume=vol)).volumes
                if left_s <= _HANGS_S or (row.diffs, row.diffs_b) == before:
                    raise TimedOut(
                        "a proxy does not deliver what it holds",
                        hint=f"see which archive does not take it: walbc status {vol}",
                        server=px.name,
                        volume=vol,
                        waiting_diffs=row.diffs,
                    ) from exc
                before = (row.diffs, row.diffs_b)
                if job is not None:
                    self._stops[px.name, vol] = job

    def _head(self, ax: Server, vol: str) -> int:
        """Return the last generation that the base and the diffs from there reach."""
        ends = [diff.E.gidB for diff in self.get_applicable_diff_list(ax, vol)]
        return max([self.get_base(ax, vol).B.gidB, *ends])

    def _start_proxies(self, vol: str) -> None:
        """Start the volume at all proxies where it is stopped; all are tried before an error is raised."""
        failed: WalbError | None = None
        for px in self.sLayout.proxyL:
            try:
                if self.get_state(px, vol) == k.pStopped:
                    self.start(px, vol)
            except WalbError as exc:
                self.say(f"warning: {px.name} {vol} is not started: {exc}")
                failed = exc
        if failed is not None:
            raise failed

    def _undo_synchronize(self, change: _Change, vol: str, aDst: Server) -> None:
        """Remove a destination that was half added, and start what was stopped; tell what cannot be done."""
        for px in self.sLayout.proxyL:
            try:
                if px in change.told and self.get_state(px, vol) != k.pStopped:
                    self.stop(px, vol, "force")  # ends a stop that waits until everything is sent
                if px in change.added and aDst.name in self.get_archive_info_list(px, vol):
                    self.ask(px, c.DeleteArchiveInfo(volume=vol, archive=aDst.name))
                if px in change.active and self.get_state(px, vol) == k.pStopped:
                    self.start(px, vol)
            except WalbError as exc:
                self.say(f"warning: {px.name} {vol} is not as before: {exc}")


@dataclass
class _Change:
    """What a `synchronize` has begun."""

    active: Sequence[Server]  # proxies that were started
    told: list[Server] = field(default_factory=list)  # proxies that were told to stop
    added: list[Server] = field(default_factory=list)  # proxies to which the destination was added
