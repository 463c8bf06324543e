"""The three kinds of fake servers of `tests.kit.fake_group`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from tests.kit.fake_server import NOW, FakeServer, FakeVolume
from walbd.daemon.conn import Connection
from walbd.daemon.full_copy import cut_piece
from walbd.daemon.jobs import Job
from walbd.daemon.server import Handler
from walbd.errors import AlreadyExists, BadState, NotFound, WlogOverflow
from walbd.format.meta import BaseState, Diff, RestorePoint, Snapshot
from walbd.format.policy import Grid, Policy
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import End, Fact, JobAccepted, Ok
from walbd.protocol.codec import Message, Request
from walbd.protocol.policy import GetPolicy, PolicyView, Trouble
from walbd.protocol.transfer import Packing


class FakeStorage(FakeServer):
    """Full backups and snapshots."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.StorageInitVol: self.init_vol,
            c.ResetVol: self.reset_vol,
            c.FullBackup: self.full_backup,
            c.HashBackup: self.hash_backup,
            c.Resize: self.resize,
            m.Retarget: self.retarget,
            m.DumpLogHeader: self.dump_log_header,
            c.TakeSnapshot: self.snapshot,
            c.SetFullScanBps: self.set_bps,
            c.GetIsOverflow: self.is_overflow,
            c.GetLogUsage: self.log_usage,
            c.GetUuid: self.get_uuid,
            c.GetTsDelta: self.ts_delta,
            c.Kick: self.kick,
        }

    def stoppable(self) -> tuple[str, ...]:
        return "Target", "Standby", "FullSync", "HashSync"

    async def init_vol(self, request: c.StorageInitVol) -> Ok:
        if request.volume in self.volumes:
            raise BadState("not allowed in this state", state=self.state(request.volume))
        self.volumes[request.volume] = FakeVolume("SyncReady", device=request.device)
        return Ok()

    async def start(self, request: c.Start) -> Ok:
        if request.role is c.Role.STANDBY:
            self.require(request.volume, "SyncReady").state = "Standby"
            return Ok()
        if self.known(request.volume).overflow:
            raise WlogOverflow("the log has overflowed")
        return await super().start(request)

    async def reset_vol(self, request: c.ResetVol) -> Ok:
        volume = self.require(request.volume, "Stopped")
        volume.gid_past = max(volume.gid_past, volume.gid)
        volume.state, volume.overflow, volume.gid = "SyncReady", False, request.gid
        return Ok()

    async def full_backup(self, request: c.FullBackup) -> JobAccepted:
        return self.backup(request.volume, "full-backup", "SyncReady", "FullSync")

    async def hash_backup(self, request: c.HashBackup) -> JobAccepted:
        return self.backup(request.volume, "hash-backup", "Archived", "HashSync", gid_past=request.gid_past)

    def backup(self, vol: str, name: str, needed: str, passing: str, *, gid_past: int = 0) -> JobAccepted:
        volume = self.require(vol, "SyncReady")
        archive = self.group.servers[self.group.layout.get_primary_archive().name]
        if archive.state(vol) != needed:
            raise BadState(f"the archive cannot take a {name}", state=archive.state(vol))
        at_archive = archive.volumes[vol]
        volume.state = at_archive.state = passing

        async def work(job: Job) -> dict[str, Fact]:
            try:
                job.begin("copy", total=1 << 24)
                job.progress(1 << 22)
                await self.group.gate(name)
                volume.uuid = at_archive.uuid = bytes(15) + b"\x07"
                volume.gid = max([gid_past, *at_archive.points]) + 1
                volume.state, at_archive.state = "Target", "Archived"
                volume.snapshots.append(volume.gid)
                self.group.settle()
                return {"gid": volume.gid}
            finally:
                if volume.state == passing:
                    volume.state, at_archive.state = "SyncReady", needed

        return self.job(name, vol, work)

    async def resize(self, request: c.Resize) -> Ok:
        volume = self.known(request.volume)
        volume.size_lb = request.size_b // 512 or volume.size_lb
        return Ok()

    async def retarget(self, _request: m.Retarget) -> m.Reloaded:
        return m.Reloaded(applied=["archive", "proxies"], needs_restart=[])

    async def dump_log_header(self, request: m.DumpLogHeader) -> Ok:
        self.known(request.volume)
        return Ok()

    async def snapshot(self, request: c.TakeSnapshot) -> c.GidValue:
        volume = self.require(request.volume, "Target", "Stopped")
        volume.gid += 1
        volume.snapshots.append(volume.gid)
        self.group.settle()
        return c.GidValue(gid=volume.gid)

    async def set_bps(self, _request: c.SetFullScanBps) -> Ok:
        return Ok()

    async def is_overflow(self, request: c.GetIsOverflow) -> c.BoolValue:
        return c.BoolValue(value=self.known(request.volume).overflow)

    async def log_usage(self, request: c.GetLogUsage) -> c.LogUsages:
        names = [request.volume] if request.volume else sorted(self.volumes)
        return c.LogUsages(rows=[c.LogUsage(volume=n, usage_pb=10, capacity_pb=1000, pbs=4096) for n in names])

    async def get_uuid(self, request: c.GetUuid) -> c.UuidValue:
        return c.UuidValue(value=self.known(request.volume).uuid)

    async def ts_delta(self, _request: c.GetTsDelta) -> c.TsDeltas:
        row = c.TsDelta(
            volume="vol0", dest="a0", gid=9, timestamp=NOW, dest_gid=7, dest_timestamp=NOW - 3, delta_s=3
        )
        return c.TsDeltas(rows=[row])

    async def kick(self, _request: c.Kick) -> c.Kicked:
        self.group.settle()
        return c.Kicked(tasks=1)


class FakeProxy(FakeServer):
    """Archive infos, and what waits for archives."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.ListArchiveInfo: self.list_infos,
            c.GetArchiveInfo: self.get_info,
            c.AddArchiveInfo: self.add_info,
            c.UpdateArchiveInfo: self.update_info,
            c.DeleteArchiveInfo: self.delete_info,
            c.GetIsWdiffSendError: self.is_error,
            c.GetProxyDiff: self.diffs,
            c.Kick: self.kick,
        }

    async def list_infos(self, request: c.ListArchiveInfo) -> c.Names:
        volume = self.volumes.get(request.volume)
        return c.Names(names=sorted(volume.infos) if volume is not None else [])

    async def get_info(self, request: c.GetArchiveInfo) -> c.ArchiveInfo:
        return self.info(request.volume, request.archive)

    async def add_info(self, request: c.AddArchiveInfo) -> Ok:
        volume = self.volumes.setdefault(request.volume, FakeVolume("Stopped"))
        self.require(request.volume, "Stopped")
        if request.info.archive in volume.infos:
            raise AlreadyExists("the archive is there", archive=request.info.archive)
        volume.infos[request.info.archive] = request.info
        return Ok()

    async def update_info(self, request: c.UpdateArchiveInfo) -> Ok:
        self.require(request.volume, "Stopped")
        self.info(request.volume, request.info.archive)
        self.volumes[request.volume].infos[request.info.archive] = request.info
        return Ok()

    async def delete_info(self, request: c.DeleteArchiveInfo) -> Ok:
        volume = self.require(request.volume, "Stopped")
        volume.infos.pop(request.archive, None)
        volume.waiting.pop(request.archive, None)
        if not volume.infos:
            del self.volumes[request.volume]
        return Ok()

    async def is_error(self, request: c.GetIsWdiffSendError) -> c.BoolValue:
        self.info(request.volume, request.archive)
        return c.BoolValue(value=self.volumes[request.volume].send_error)

    async def diffs(self, request: c.GetProxyDiff) -> c.Diffs:
        gids = self.known(request.volume).waiting.get(request.archive, [])
        return c.Diffs(diffs=[clean_diff(gid - 1, gid) for gid in gids])

    async def kick(self, request: c.Kick) -> c.Kicked:
        if request.volume:
            self.require(request.volume, "Started")
            self.info(request.volume, request.archive)
            self.volumes[request.volume].send_error = False
        self.group.settle()
        return c.Kicked(tasks=1)

    def info(self, vol: str, archive: str) -> c.ArchiveInfo:
        infos = self.known(vol).infos
        if archive not in infos:
            raise NotFound("no such archive here", archive=archive)
        return infos[archive]


class FakeArchive(FakeServer):
    """Restore points, images, diffs and replicas."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.ArchiveInitVol: self.init_vol,
            c.ResetVol: self.reset_vol,
            c.GetRestorable: self.restorable,
            c.GetRestored: self.get_restored,
            c.GetRestoredPath: self.path,
            c.Restore: self.restore,
            c.DelRestored: self.del_restored,
            c.Apply: self.apply,
            c.GcDiff: self.gc,
            c.GetDiff: self.get_diff,
            c.GetApplicableDiff: self.get_diff,
            c.GetBase: self.get_base,
            c.GetMetaState: self.get_base,
            c.GetMetaSnap: self.meta_snap,
            c.GetVolSize: self.size,
            c.GetProgress: self.progress,
            c.GetUuid: self.get_uuid,
            c.GetArchiveUuid: self.get_archive_uuid,
            c.GetExistsBaseImage: self.exists_base,
            c.Resize: self.resize,
            m.GetNumDiff: self.num_diff,
            m.GetTotalDiffSize: self.diff_size,
            m.GetExistsDiff: self.exists_diff,
            m.Merge: self.merge,
            m.EnableSnapshot: self.enable,
            m.DisableSnapshot: self.disable,
            m.GetCold: self.cold,
            m.DelCold: self.del_cold,
            m.BlockHash: self.block_hash,
            m.Replicate: self.replicate,
            m.Scrub: self.scrub,
            GetPolicy: self.get_policy,
            m.GetBaseAll: self.bases,
            m.GetVolumeGroup: self.nothing,
            m.GetThinpool: self.nothing,
            c.GetTsDelta: self.ts_delta,
            m.GetGaps: self.gaps,
            m.GetReplicaPositions: self.replicas,
            m.ForgetReplica: self.forget,
        }

    async def init_vol(self, request: c.ArchiveInitVol) -> Ok:
        if request.volume in self.volumes:
            raise BadState("not allowed in this state", state=self.state(request.volume))
        self.volumes[request.volume] = FakeVolume("SyncReady")
        return Ok()

    async def reset_vol(self, request: c.ResetVol) -> Ok:
        self.require(request.volume, "Stopped", "SyncReady")
        self.volumes[request.volume] = FakeVolume("SyncReady")
        return Ok()

    async def restorable(self, request: c.GetRestorable) -> c.RestorePoints:
        volume = self.volumes.get(request.volume)
        if volume is None or volume.state != "Archived":
            return c.RestorePoints(points=[])
        return c.RestorePoints(points=[RestorePoint(Gid(gid), NOW + gid, gid > 1) for gid in volume.points])

    async def get_restored(self, request: c.GetRestored) -> c.Gids:
        return c.Gids(gids=sorted(self.known(request.volume).restored))

    async def path(self, request: c.GetRestoredPath) -> c.TextValue:
        if request.gid not in self.known(request.volume).restored:
            raise NotFound("no such image", gid=request.gid)
        return c.TextValue(value=f"/images/{request.volume}/{request.gid}")

    async def restore(self, request: c.Restore) -> JobAccepted:
        volume = self.require(request.volume, "Archived")
        if request.gid not in volume.points:
            raise NotFound("the generation cannot be restored", hint="see get_restorable", gid=request.gid)

        async def work(job: Job) -> None:
            job.begin("write", total=1000, unit="diffs")
            await self.group.gate("restore")
            volume.restored.append(request.gid)

        return self.job("restore", request.volume, work)

    async def del_restored(self, request: c.DelRestored) -> Ok:
        volume = self.known(request.volume)
        if request.gid not in volume.restored:
            raise NotFound("no such image", gid=request.gid)
        volume.restored.remove(request.gid)
        return Ok()

    async def apply(self, request: c.Apply) -> JobAccepted:
        volume = self.require(request.volume, "Archived")

        async def work(job: Job) -> None:
            await self.group.gate("apply")
            volume.base = request.gid
            volume.points = [gid for gid in volume.points if gid >= request.gid]

        return self.job("apply", request.volume, work)

    async def gc(self, request: c.GcDiff) -> c.Kicked:
        self.known(request.volume)
        return c.Kicked(tasks=2)

    async def get_diff(self, request: c.GetDiff | c.GetApplicableDiff) -> c.Diffs:
        diffs = self.diffs(request.volume)
        if isinstance(request, c.GetDiff):
            diffs = [diff for diff in diffs if request.gid_b <= diff.begin.gid_b < request.gid_e]
        return c.Diffs(diffs=diffs)

    def diffs(self, vol: str) -> list[Diff]:
        volume = self.known(vol)
        gids = [volume.base, *(gid for gid in volume.points if gid > volume.base)]
        return [
            clean_diff(a, b, mergeable=a not in volume.protected, comp=b in volume.compared)
            for a, b in itertools.pairwise(gids)
        ]

    async def num_diff(self, request: m.GetNumDiff) -> c.IntValue:
        return c.IntValue(value=len(self.between(request)))

    async def diff_size(self, request: m.GetTotalDiffSize) -> c.IntValue:
        return c.IntValue(value=sum(diff.size_b for diff in self.between(request)))

    def between(self, request: m.GetNumDiff | m.GetTotalDiffSize) -> list[Diff]:
        return [d for d in self.diffs(request.volume) if request.gid_b <= d.begin.gid_b < request.gid_e]

    async def exists_diff(self, request: m.GetExistsDiff) -> c.BoolValue:
        wanted = (request.diff.begin, request.diff.end)
        return c.BoolValue(value=any(wanted == (d.begin, d.end) for d in self.diffs(request.volume)))

    async def merge(self, request: m.Merge) -> JobAccepted:
        volume = self.require(request.volume, "Archived")

        async def work(job: Job) -> dict[str, Fact]:
            await self.group.gate("merge")
            end = request.gid_e if request.gid_e is not None else max(volume.points)
            volume.points = [gid for gid in volume.points if not request.gid_b < gid < end]
            return {"gid_e": end}

        return self.job("merge", request.volume, work)

    async def enable(self, request: m.EnableSnapshot) -> Ok:
        self.known(request.volume).protected += request.gids
        return Ok()

    async def disable(self, request: m.DisableSnapshot) -> Ok:
        volume = self.known(request.volume)
        volume.protected = [gid for gid in volume.protected if gid not in request.gids]
        return Ok()

    async def cold(self, request: m.GetCold) -> c.Gids:
        return c.Gids(gids=sorted(self.known(request.volume).colds))

    async def del_cold(self, request: m.DelCold) -> Ok:
        volume = self.known(request.volume)
        if request.gid not in volume.colds:
            raise NotFound("no such image", gid=request.gid)
        volume.colds.remove(request.gid)
        return Ok()

    async def resize(self, request: c.Resize) -> Ok:
        volume = self.require(request.volume, "Archived", "Stopped")
        if not self.group.frozen:
            volume.size_lb = request.size_b // 512
        return Ok()

    async def block_hash(self, request: m.BlockHash) -> JobAccepted:
        self.require(request.volume, "Archived")

        async def work(job: Job) -> dict[str, Fact]:
            await self.group.gate("block-hash")
            return {"hash": f"{request.gid:032x}"}

        return self.job("block-hash", request.volume, work)

    def streams(self) -> dict[type[Request[Any]], Handler]:
        return {m.VirtFullScan: self.scan}

    async def scan(self, conn: Connection, request: m.VirtFullScan) -> None:
        self.group.requests.append((self.name, request))
        volume = self.require(request.volume, "Archived")
        size_b = request.size_lb * 512 or len(volume.image)
        await conn.send(m.ScanBegin(size_b=size_b))
        image = memoryview(volume.image)[:size_b]
        for chunk, payload in cut_piece(image, 0, request.bulk_b, Packing.LZ4):
            if volume.damage == "place":
                chunk = dataclasses.replace(chunk, offset_b=chunk.offset_b + 512)
            elif volume.damage == "bytes" and len(payload):
                payload = bytes(payload[:-1]) + bytes([payload[-1] ^ 1])
            elif volume.damage == "packing" and len(payload):
                payload = b"\xff" * len(payload)
            elif volume.damage == "size":
                chunk = dataclasses.replace(chunk, size_b=chunk.size_b + size_b)
            elif volume.damage == "cut":
                conn.abort()
                return
            await conn.send(chunk, *([payload] if len(payload) else []))
            if volume.damage == "early":
                break
        await conn.send(Ok() if volume.damage == "message" else End())

    async def replicate(self, request: m.Replicate) -> JobAccepted:
        volume = self.require(request.volume, "Archived")
        dest = next(s for s in self.group.servers.values() if request.dest.endswith(f":{s.port}"))
        copy = dest.require(request.volume, "SyncReady", "Archived")

        async def work(job: Job) -> None:
            await self.group.gate("replicate")
            if not self.group.frozen:
                copy.points = [gid for gid in volume.points if request.gid is None or gid <= request.gid]
                copy.state, copy.base, copy.uuid = "Archived", volume.base, volume.uuid
                copy.archive_uuid, copy.size_lb = volume.archive_uuid, volume.size_lb

        return self.job("replicate", request.volume, work)

    async def scrub(self, request: m.Scrub) -> JobAccepted:
        volume = self.require(request.volume, "Archived")

        async def work(job: Job) -> dict[str, Fact]:
            await self.group.gate("scrub")
            return {"wdiffs": 3, "damaged": int(bool(volume.damage)), "damaged_files": volume.damage}

        return self.job("scrub", request.volume, work)

    async def get_policy(self, request: GetPolicy) -> PolicyView:
        enabled = self.known(request.volume).policy
        troubles = (
            [] if enabled else [Trouble(what="apply", error_code="x", error="y", failures=1, since=1, retry=2)]
        )
        return PolicyView(
            policy=Policy(keep=Grid.parse("all=48h daily=7")),
            is_default=True,
            enabled=enabled,
            next="nothing",
            applied=0,
            merged=0,
            troubles=troubles,
        )

    async def bases(self, _request: m.GetBaseAll) -> m.BaseStates:
        rows = [(name, BaseState(Snapshot.clean(v.base), timestamp=NOW)) for name, v in self.volumes.items()]
        return m.BaseStates(rows=rows)

    async def nothing(self, _request: m.GetVolumeGroup | m.GetThinpool) -> c.TextValue:
        return c.TextValue(value="")

    async def ts_delta(self, _request: c.GetTsDelta) -> c.TsDeltas:
        rows = [
            c.TsDelta(
                volume=name,
                dest=replica.node,
                gid=max(volume.points),
                timestamp=NOW,
                dest_gid=replica.gid,
                dest_timestamp=replica.timestamp,
                delta_s=NOW - replica.timestamp,
            )
            for name, volume in self.volumes.items()
            for replica in volume.replicas
        ]
        return c.TsDeltas(rows=rows)

    async def gaps(self, request: m.GetGaps) -> m.Gaps:
        return m.Gaps(gaps=self.known(request.volume).gaps)

    async def replicas(self, request: m.GetReplicaPositions) -> m.ReplicaPositions:
        return m.ReplicaPositions(rows=self.known(request.volume).replicas)

    async def forget(self, request: m.ForgetReplica) -> Ok:
        volume = self.known(request.volume)
        if request.node not in [row.node for row in volume.replicas]:
            raise NotFound("no such replica", node=request.node)
        volume.replicas = [row for row in volume.replicas if row.node != request.node]
        return Ok()

    async def get_base(self, request: c.GetBase | c.GetMetaState) -> c.BaseValue:
        return c.BaseValue(base=BaseState(Snapshot.clean(self.known(request.volume).base), timestamp=NOW))

    async def meta_snap(self, request: c.GetMetaSnap) -> c.SnapshotValue:
        return c.SnapshotValue(snapshot=Snapshot.clean(max(self.known(request.volume).points)))

    async def size(self, request: c.GetVolSize) -> c.IntValue:
        if self.state(request.volume) in ("Clear", "SyncReady"):
            raise NotFound("there is no base image")
        return c.IntValue(value=self.known(request.volume).size_lb)

    async def progress(self, request: c.GetProgress) -> c.IntValue:
        self.known(request.volume)
        return c.IntValue(value=0)

    async def get_uuid(self, request: c.GetUuid) -> c.UuidValue:
        return c.UuidValue(value=self.known(request.volume).uuid)

    async def get_archive_uuid(self, request: c.GetArchiveUuid) -> c.UuidValue:
        return c.UuidValue(value=self.known(request.volume).archive_uuid)

    async def exists_base(self, request: c.GetExistsBaseImage) -> c.BoolValue:
        return c.BoolValue(value=self.state(request.volume) in ("Archived", "Stopped"))


def clean_diff(begin: int, end: int, *, mergeable: bool = True, comp: bool = False) -> Diff:
    """A clean diff."""
    ends = Snapshot.clean(begin), Snapshot.clean(end)
    return Diff(*ends, mergeable=mergeable, comp=comp, timestamp=NOW, size_b=4096)
