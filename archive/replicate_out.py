"""Replication, the source's side (docs/archive.md, "Replication").

We dial the destination and hear what it needs; only then the job is accepted. A full copy or a resync first, if it
needs one; then rounds: it tells what it has, we look what leads on from there.

    diffs      those that continue its newest snapshot, merged on the way as far as they may be
    comparing  when there are none, or they are of another log history than its snapshot: what differs between its
               newest image and our first clean one above it

The image of a full copy or resync is our base with what an interrupted apply was about to write laid over it. An
apply is kept out all the time, so the base does not change; diffs may be merged beside us, and are looked for
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import structlog

from walbd.archive.opening import OpenDiffs, open_diffs
from walbd.archive.queries import known
from walbd.archive.replicas import note_failure, note_position
from walbd.archive.slots import Slots
from walbd.archive.states import REPLICATE, Command
from walbd.archive.virtual import open_virtual
from walbd.archive.volume import Place, Volume
from walbd.archive.work import Starter, accepted
from walbd.daemon.conn import Connection, Me, dial, with_filler
from walbd.daemon.copying import ImageSource, tell
from walbd.daemon.env import Pool
from walbd.daemon.full_copy import send_full
from walbd.daemon.hash_sync import send_differences
from walbd.daemon.jobs import Job
from walbd.daemon.net import parse_address
from walbd.daemon.server import Handler
from walbd.daemon.wdiff_send import send_wdiff, until_ok
from walbd.errors import (
    Busy,
    ConnectError,
    HistoryBroken,
    Refused,
    RemoteError,
    RemoteProtocolError,
    TimedOut,
    UsageError,
    WalbError,
)
from walbd.format.compress import CompressOpt
from walbd.format.meta import BaseState, Diff, NotReachable, Snapshot, hash_replication_diff, merge_all
from walbd.format.virtual import VirtualImage
from walbd.format.wdiff_merge import merge
from walbd.format.wdiff_read import WdiffReader
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID
from walbd.protocol.base import Fact, JobAccepted, Kind
from walbd.protocol.codec import Request
from walbd.protocol.maintenance import Replicate
from walbd.protocol.sync import (
    ReplicateDiff,
    ReplicateDone,
    ReplicateFull,
    ReplicateHash,
    ReplicateLatest,
    ReplicateOffer,
    ReplicateResync,
    ReplicateState,
    ReplicationKind,
)
from walbd.protocol.transfer import Packing
from walbd.units import LB

log = structlog.get_logger()

FILES_MAX: Final = 1000  # merged into one diff on the way
REFUSED_MAX: Final = 100  # rounds in succession that the destination does not accept, as it has moved on

FP_BEFORE_POSITION: Final = failpoints.register(
    "archive.repl_source.before_position", "the destination has more than the record here says"
)


class Replicator:
    """The handler of replications that an operator or a policy asks for."""

    def __init__(self, volumes: dict[str, Volume], place: Place, me: Me, starter: Starter, slots: Slots) -> None:
        """`slots` bounds how many run at the same time; more wait, agreed on with their destinations."""
        self._volumes = volumes
        self._place = place
        self._me = me
        self._starter = starter
        self._slots = slots

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {Replicate: self._replicate}

    async def _replicate(self, conn: Connection, request: Replicate) -> JobAccepted:
        return await with_filler(conn, self.begin(request))

    async def begin(self, request: Replicate) -> JobAccepted:
        """Agree with the destination, and begin the job. Raises what either side refuses."""
        volume = known(self._volumes, request.volume, Command.REPLICATE)
        wishes = _wishes(volume, request)
        address = parse_address(request.dest)
        async with AsyncExitStack() as stack:
            stack.enter_context(volume.machine.action(REPLICATE, self._place.env.clock.now()))
            volume.replicating.add(request.dest)
            stack.callback(volume.replicating.discard, request.dest)
            try:
                async with volume.giving_up():
                    conn = await stack.enter_async_context(dial(self._place.env, self._me, address))
                    kind = await self._agree(conn, volume, request)
            except WalbError as exc:
                await note_failure(volume, request.dest, exc)
                raise
            replication = Replication(volume, conn, request, kind, wishes)
            job = self._starter.holding(
                "replicate", volume, ExitStack(), lambda job: self._run(job, replication, kept)
            )
            kept = stack.pop_all()
            return accepted(job)

    async def _agree(self, conn: Connection, volume: Volume, request: Replicate) -> ReplicationKind:
        if conn.peer.kind is not Kind.ARCHIVE or conn.peer.node == self._me.node:
            raise Refused(
                "the destination of a replication is another archive",
                hint="give the address of another archive",
                address=request.dest,
                got=f"{conn.peer.kind} {conn.peer.node}",
            )
        offer = ReplicateOffer(
            volume=volume.name,
            size_lb=volume.size_lb,
            archive_uuid=bytes.fromhex(volume.record.archive_uuid),
            resync=request.resync,
        )
        return (await conn.call(offer)).kind

    async def _run(self, job: Job, replication: Replication, kept: AsyncExitStack) -> dict[str, Fact]:
        """The job; `kept` holds the action and the connection."""
        volume, conn = replication.volume, replication.conn
        async with kept:
            try:
                async with volume.giving_up():
                    with self._slots.turn() as turn:
                        job.begin("waiting")
                        await with_filler(conn, turn.comes())
                        return await replication.run(job)
            except WalbError as exc:
                await note_failure(volume, replication.dest, exc)
                if not isinstance(exc, ConnectError | TimedOut | RemoteError):
                    await tell(conn, exc)
                raise


@dataclass(frozen=True)
class Wishes:
    """What a replication is to reach, and how."""

    gid: int | None  # reached: done
    size_b: int | None  # not more than this is left: done; 0: nothing
    compress: CompressOpt


def _wishes(volume: Volume, request: Replicate) -> Wishes:
    """Check what was asked for; raises UsageError or NotReachable."""
    compress = CompressOpt.parse(request.compress)
    if request.gid is not None and request.size_b is not None:
        raise UsageError("either a generation or a size ends a replication", hint="give one of them, or none")
    latest = volume.latest.begin.gid_b
    if request.gid is not None and request.gid > latest:
        raise NotReachable(
            "this generation has not arrived yet", hint="wait for it", gid=request.gid, latest=latest
        )
    gid = latest if request.gid is None and request.size_b is None else request.gid
    return Wishes(gid, request.size_b, compress)


class Replication:
    """One replication that runs."""

    def __init__(
        self, volume: Volume, conn: Connection, request: Replicate, kind: ReplicationKind, wishes: Wishes
    ) -> None:
        self.volume = volume
        self.conn = conn
        self.dest = request.dest
        self._request = request
        self._kind = kind
        self._wishes = wishes
        self._env = volume.place.env
        self._wire_b = 0
        self._rounds = 0

    async def run(self, job: Job) -> dict[str, Fact]:
        """Do it all; return the result of the job."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._kind is not ReplicationKind.ROUNDS:
            await self._copy_base(job)
        refused = 0
        while True:
            state = await self.conn.call(ReplicateLatest())
            await self._note(state)
            if self._is_level(state):
                break
            sent = await self._round(state, job)
            if sent is None:
                break
            if sent:
                self._rounds, refused = self._rounds + 1, 0
            elif (refused := refused + 1) > REFUSED_MAX:
                raise Busy("the destination moves on faster than we can follow", hint="try again later")
        await self.conn.call(ReplicateDone())
        return {
            "kind": str(self._kind),
            "gid": state.latest.gid_b,
            "rounds": self._rounds,
            "wire_b": self._wire_b,
            "elapsed_s": round(loop.time() - began, 3),
        }

    async def _note(self, state: ReplicateState) -> None:
        with disk_errors(self.volume.directory, "note a position"):
            failpoints.hit(FP_BEFORE_POSITION)
        await note_position(self.volume, self.conn.peer.node, self.dest, state.latest.gid_b, state.timestamp)

    # --- deciding

    def _is_level(self, at: ReplicateState) -> bool:
        """Tell whether the destination has all that we have; raises HistoryBroken when it never can be told."""
        volume = self.volume
        latest = volume.latest.begin
        if at.latest.gid_b < latest.gid_b:
            return False
        if at.uuid.hex() != volume.record.uuid:
            raise HistoryBroken(
                "the destination is ahead of us, in another log history",
                hint="if that history is the abandoned one, replicate again when our snapshots have passed those "
                "of the destination, or now with resync; else replicate the other way round",
                latest=str(latest),
                uuid=volume.record.uuid,
                dest_latest=str(at.latest),
                dest_uuid=at.uuid.hex(),
            )
        return True

    async def _round(self, at: ReplicateState, job: Job) -> bool | None:
        """Send one diff, or compare. False: the destination is no longer where it was. None: it has enough."""
        gid, base_gid = self._wishes.gid, self.volume.base.begin.gid_b
        if at.latest.gid_b < base_gid and gid is not None and at.latest.gid_b >= gid:
            return None
        if at.latest.gid_b >= base_gid:
            async with AsyncExitStack() as stack:
                opening = open_diffs(self.volume, Pool.SEND, lambda: self._way_from(at.latest))
                found = await with_filler(self.conn, stack.enter_async_context(opening))
                if self._is_on_our_way(at, found):
                    if self._is_enough(at.latest):
                        return None
                    return await self._send_diffs(at, found.diffs[1:], found.readers[1:], job)
        return await self._compare(at, job)

    def _is_enough(self, latest: Snapshot) -> bool:
        """Tell whether what was asked for is reached by a destination that is on our way."""
        gid, size_b = self._wishes.gid, self._wishes.size_b
        if gid is not None:
            return latest.gid_b >= gid
        left_b = sum(diff.size_b for diff in self.volume.diffs.chain(latest))
        return size_b is not None and size_b > 0 and left_b <= size_b

    def _way_from(self, latest: Snapshot) -> list[Diff]:
        """Return the diff that leads to there, and then those that lead on and can be sent as one; or nothing.

        From our very base the first that leads on stands in for the one that led there. Where the record does
        not tell the history of the base, that one has to: it is of the same, or begins one, which has no
        generations up to there. Of a compared one that is not known.
        """
        volume, request = self.volume, self._request
        n_max = volume.place.config.open_files_max or FILES_MAX
        following = volume.diffs.applicable_and_mergeable(
            latest,
            size_max_b=request.merge_size_max_b,
            n_max=1 if request.dont_merge else min(n_max, FILES_MAX),
        )
        if not following:
            return []
        if latest.gid_b == volume.base.begin.gid_b:
            return [] if following[0].comp and not volume.record.base_uuid else [following[0], *following]
        steps = volume.diffs.steps(volume.base.begin)
        leading = next((diff for diff, after in steps if after.gid_b >= latest.gid_b), None)
        return [] if leading is None else [leading, *following]

    def _is_on_our_way(self, at: ReplicateState, found: OpenDiffs) -> bool:
        """Tell whether our diffs lead on from exactly the image that the destination has.

        Generations are used again after a log was reset, so the wdiff that led there here has to be of the
        destination's history; the next one, too, if it begins below.
        """
        if not found.diffs:
            return False
        leading, following = (self._uuid_of(reader.header.uuid) for reader in found.readers[:2])
        record = self.volume.record
        if record.base_uuid and at.latest.gid_b == record.base.begin.gid_b:
            leading = bytes.fromhex(record.base_uuid)
        begins_there = found.diffs[1].begin.gid_b == at.latest.gid_b
        return leading == at.uuid and (begins_there or following == at.uuid)

    def _uuid_of(self, header_uuid: bytes) -> bytes:
        """Return the history of a wdiff; those that old tools have merged do not tell."""
        return bytes.fromhex(self.volume.record.uuid) if header_uuid == NIL_UUID else header_uuid

    def _clean_above(self, snapshot: Snapshot) -> BaseState:
        """Return our first clean state that a comparison can lead to from there; raises HistoryBroken."""
        volume = self.volume
        needed = volume.diffs.minimum(volume.base)
        state = volume.base.end_applying(needed)
        states = [state]
        states += [BaseState(after, timestamp=diff.timestamp) for diff, after in volume.diffs.steps(state.begin)]
        for state in states:
            found = state.begin
            if found.is_clean and found.gid_b > snapshot.gid_b and found.gid_e >= snapshot.gid_e:
                return state
        raise HistoryBroken(
            "no diffs lead on from what the destination has, and no clean snapshot is above it to compare with",
            hint="try again when more logs have arrived, or replicate with resync",
            dest_latest=str(snapshot),
            latest=str(volume.latest.begin),
        )

    # --- sending

    async def _send_diffs(
        self, at: ReplicateState, diffs: Sequence[Diff], readers: Sequence[WdiffReader], job: Job
    ) -> bool:
        volume, conn = self.volume, self.conn
        uuid = self._uuid_of(readers[-1].header.uuid)
        request = ReplicateDiff(
            latest=at.latest, latest_uuid=at.uuid, size_lb=volume.size_lb, diff=merge_all(diffs), uuid=uuid
        )
        if not (await conn.call(request)).accepted:
            return False
        job.begin("sending diffs", sum(diff.size_b for diff in diffs))
        pieces = merge(readers, self._wishes.compress, uuid=uuid, check=volume.check_force)
        self._wire_b += await send_wdiff(conn, self._env.pools, pieces, tick=job.progress)
        return True

    async def _compare(self, at: ReplicateState, job: Job) -> bool:
        volume, conn = self.volume, self.conn
        target = self._clean_above(at.latest)
        diff = hash_replication_diff(at.latest, target)
        gid = diff.end.gid_b
        job.begin("opening")
        async with AsyncExitStack() as stack:
            opening = open_virtual(volume, gid, Pool.SEND)
            try:
                image = await with_filler(conn, stack.enter_async_context(opening))
            except NotReachable:
                if self._clean_above(at.latest) == target:
                    raise
                return False  # it was merged away meanwhile
            uuid = await self._history_after(lambda: volume.diffs.to_materialise(volume.base, gid, clean=True))
            source = self._source(image, job, at.size_lb * LB)
            seed = self._env.rng.getrandbits(64)
            request = ReplicateHash(
                latest=at.latest,
                latest_uuid=at.uuid,
                size_lb=source.size_b // LB,
                diff=diff,
                uuid=uuid,
                bulk_b=self._request.bulk_b,
                seed=seed,
            )
            if not (await conn.call(request)).accepted:
                return False
            await self._send_differences(source, uuid, seed, job)
        return True

    async def _copy_base(self, job: Job) -> None:
        """Full copy or resync of our base, as it is once an interrupted apply is finished."""
        volume, conn, request = self.volume, self.conn, self._request
        base = volume.base.end_applying(volume.diffs.minimum(volume.base))
        job.begin("opening")
        async with AsyncExitStack() as stack:
            source, uuid = await self._open_base(stack, job)
            size_lb = source.size_b // LB
            if self._kind is ReplicationKind.RESYNC:
                seed = self._env.rng.getrandbits(64)
                await conn.call(
                    ReplicateResync(size_lb=size_lb, base=base, uuid=uuid, bulk_b=request.bulk_b, seed=seed)
                )
                await self._send_differences(source, uuid, seed, job)
                return
            full = ReplicateFull(size_lb=size_lb, base=base, uuid=uuid, bulk_b=request.bulk_b)
            begin_b = (await conn.call(full)).offset_b
            if begin_b > source.size_b or begin_b % LB:
                raise RemoteProtocolError("a copy cannot begin there", offset_b=begin_b, size_b=source.size_b)
            job.begin("copying", source.size_b)
            job.progress(begin_b)
            pools = self._env.pools
            copying = send_full(conn, pools, source, bulk_b=request.bulk_b, packing=Packing.LZ4, begin_b=begin_b)
            self._wire_b += await until_ok(conn, copying)

    async def _send_differences(self, source: ImageSource, uuid: bytes, seed: int, job: Job) -> None:
        job.begin("comparing", source.size_b)
        bulk_b = self._request.bulk_b
        found = await send_differences(self.conn, self._env.pools, source, bulk_b=bulk_b, seed=seed, uuid=uuid)
        self._wire_b += found.wire_b

    # --- reading

    async def _open_base(self, stack: AsyncExitStack, job: Job) -> tuple[ImageSource, bytes]:
        """Open our base with what an interrupted apply was about to write laid over it; and tell its history."""
        volume, pools, conn = self.volume, self._env.pools, self.conn
        opening = open_diffs(volume, Pool.SEND, lambda: volume.diffs.minimum(volume.base))
        found = await with_filler(conn, stack.enter_async_context(opening))
        uuid = await self._history_after(lambda: found.diffs)
        base = await pools.run(Pool.SEND, volume.place.images.open_base, volume.name)
        stack.push_async_callback(pools.run, Pool.SEND, base.close)
        size_b, check = volume.size_lb * LB, volume.check_force
        look = pools.run(Pool.SEND, VirtualImage, base, found.readers, size_b, check=check)
        return self._source(await with_filler(conn, look), job), uuid

    def _source(self, image: VirtualImage, job: Job, least_b: int = 0) -> ImageSource:
        """Return an image to be copied, with zeros behind its end where `least_b` is more."""

        async def read(offset_b: int, size_b: int) -> bytes:
            return await self._env.pools.run(Pool.SEND, image.read, offset_b, size_b)

        size_b = max(image.size_b, least_b)
        return ImageSource(read=read, size_b=size_b, data_b=image.size_b, tick=job.progress)

    async def _history_after(self, way: Callable[[], list[Diff]]) -> bytes:
        """Return the log history that the base with the diffs of `way` belongs to: that of the last diff.

        Of the base alone the record tells it. If it does not: that of the diff that leads on from it, which is the
        same, or begins there. Where that one was made by comparing, nobody can tell, and the destination will have
        to compare, too.
        """

        def choose() -> list[Diff]:
            return way()[-1:] or [diff for diff, _ in islice(volume.diffs.steps(volume.base.begin), 1)]

        volume = self.volume
        if volume.record.base_uuid and not way():
            return bytes.fromhex(volume.record.base_uuid)
        async with open_diffs(volume, Pool.SEND, choose) as found:
            if not way() and found.diffs and found.diffs[0].comp:
                return NIL_UUID
            return self._uuid_of(found.readers[0].header.uuid if found.readers else NIL_UUID)
