"""Replication, the destination's side (docs/archive.md, "Replication").

The source dials, offers, and hears what we need first; then it conducts:

    full      SyncReady: the image comes in order. How far it is durable is in the record, so a copy that was cut
              goes on. One record replacement makes it Archived
    resync    the record says SyncReady, then what the old history had is removed, then what differs is written
              into the image that is there. One replacement makes it Archived; until then only another copy helps
    rounds    a diff, or a comparison, each of which adds one wdiff. Archived in between: proxies send, too

A round names the state that it continues. When that is no longer ours, it is not accepted, and the source looks
again. Nothing waits for the source under a lock, only within a step.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any, Final

import msgspec
import structlog

from walbd.archive.diffs import remove_all_diffs
from walbd.archive.gaps import HASH_BACKUP, HASH_REPLICATION, gaps_after
from walbd.archive.image_receiver import ImageReceiver
from walbd.archive.image_sink import ImageSink
from walbd.archive.lifecycle import promise_nothing
from walbd.archive.pending import commit_pending
from walbd.archive.record import FullProgress
from walbd.archive.recover import remove_copies
from walbd.archive.resize import grow
from walbd.archive.slots import Slots
from walbd.archive.states import ADDING, APPLY, SCAN, Command, State
from walbd.archive.virtual import open_virtual
from walbd.archive.volume import Place, Volume, check_room
from walbd.archive.wdiff_sink import WdiffSink, look_for_room, take_differences, take_stream
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.hash_sync import DiffSink
from walbd.daemon.server import Handler
from walbd.daemon.states import Step
from walbd.daemon.tasks import uninterrupted
from walbd.errors import BadState, Busy, NotFound, Refused, RemoteProtocolError, UsageError
from walbd.format.meta import BaseState, Diff, NotApplicable, trim
from walbd.fs import Buf, failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID
from walbd.protocol.base import Kind, Ok
from walbd.protocol.codec import Message, Request
from walbd.protocol.sync import (
    FullFrom,
    ReplicateDiff,
    ReplicateDone,
    ReplicateFull,
    ReplicateHash,
    ReplicateLatest,
    ReplicateOffer,
    ReplicatePlan,
    ReplicateResync,
    ReplicateState,
    ReplicationKind,
    RoundAnswer,
)
from walbd.units import LB

log = structlog.get_logger()

FP_FULL_BEFORE_COMMIT: Final = failpoints.register(
    "archive.repl_full.before_commit", "SyncReady; the whole image is durable, and goes on from its last record"
)
FP_RESYNC_AFTER_RESET: Final = failpoints.register(
    "archive.repl_resync.after_reset", "SyncReady; nothing of the old history is left but the image"
)
FP_RESYNC_BEFORE_COMMIT: Final = failpoints.register(
    "archive.repl_resync.before_commit", "SyncReady; the image is equal to the source's, and nobody knows"
)
FP_ROUND_BEFORE_COMMIT: Final = failpoints.register(
    "archive.repl_round.before_commit", "an unfinished wdiff; the source sends it again"
)
FP_ROUND_BEFORE_ACK: Final = failpoints.register(
    "archive.repl_round.before_ack", "the wdiff is there; the source was not told, and sees it next time"
)


class Destination:
    """The handler of replications that come."""

    def __init__(self, volumes: dict[str, Volume], place: Place, *, copies: Slots, wdiffs: Slots) -> None:
        """`copies` and `wdiffs` bound how many images, and wdiffs, come at the same time."""
        self._volumes = volumes
        self._place = place
        self._copies = copies
        self._wdiffs = wdiffs

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {ReplicateOffer: self._offer}

    async def _offer(self, conn: Connection, offer: ReplicateOffer) -> Message:
        if conn.peer.kind is not Kind.ARCHIVE:
            raise Refused("replications are taken from archives only", sender=str(conn.peer.kind))
        volume = self._volumes.get(offer.volume)
        if volume is None:
            raise BadState(
                "the volume is not known at the destination",
                hint="initialise it there first (init-vol)",
                volume=offer.volume,
                state=str(State.CLEAR),
            )
        size_b = await self._place.env.pools.run(Pool.RECORD, self._place.images.base_size, volume.name)
        kind = plan(volume, offer, has_image=size_b is not None)
        reception = _Reception(volume, conn, offer, kind, self._wdiffs)
        if kind is not ReplicationKind.ROUNDS and self._copies.is_full:
            raise Busy(
                "too many images are being received", hint="try again when one is done", n_max=self._copies.n_max
            )
        volume.replications += 1
        try:
            await conn.send(ReplicatePlan(kind=kind))
            if kind is not ReplicationKind.ROUNDS:
                await reception.copy(self._copies)
            return await reception.run()
        finally:
            volume.replications -= 1
            volume.machine.changed.set()


def plan(volume: Volume, offer: ReplicateOffer, *, has_image: bool) -> ReplicationKind:
    """Return what we need first. Raises Refused, with a hint, when the replication cannot be taken."""
    if offer.size_lb == 0:
        raise UsageError("a volume of size 0 cannot be replicated", volume=volume.name)
    machine = volume.machine
    if machine.state is State.SYNC_READY:
        kind = ReplicationKind.RESYNC if offer.resync and has_image else ReplicationKind.FULL
        volume.check(Command.REPL_RESYNC if kind is ReplicationKind.RESYNC else Command.REPL_FULL)
        return kind
    if (
        machine.state is not State.ARCHIVED
        or machine.during not in {None, *ADDING}
        or machine.stopping is not None
    ):
        volume.check(Command.REPL_ROUND)
    check_size(volume, offer.size_lb)
    if offer.archive_uuid.hex() == volume.record.archive_uuid and not offer.resync:
        return ReplicationKind.ROUNDS  # while data of others comes, a round waits
    if not offer.resync:
        raise Refused(
            "the destination has an image of another lineage",
            hint="replicate with resync: its own snapshots are given up then",
            volume=volume.name,
            archive_uuid=volume.record.archive_uuid,
            source_archive_uuid=offer.archive_uuid.hex(),
        )
    volume.check(Command.REPL_RESYNC)
    return ReplicationKind.RESYNC


def check_size(volume: Volume, size_lb: int) -> None:
    """Raise Refused unless a volume of this size fits into the image, or the image may be grown for it."""
    if size_lb > volume.size_lb and not volume.place.config.auto_resize:
        raise Refused(
            "the image at the destination is smaller than the volume at the source",
            hint="grow it there (resize), or set auto_resize there",
            volume=volume.name,
            size_lb=volume.size_lb,
            source_size_lb=size_lb,
        )


class _Reception:
    """One replication that comes."""

    def __init__(
        self, volume: Volume, conn: Connection, offer: ReplicateOffer, kind: ReplicationKind, wdiffs: Slots
    ) -> None:
        self._volume = volume
        self._conn = conn
        self._offer = offer
        self._kind = kind
        self._wdiffs = wdiffs
        self._pools = volume.place.env.pools
        self._source = f"replication from {conn.peer.node}"

    async def copy(self, slots: Slots) -> None:
        """Receive the image that we asked for, in one of the slots, which backups use, too."""
        is_full, conn = self._kind is ReplicationKind.FULL, self._conn
        request = await (conn.expect(ReplicateFull) if is_full else conn.expect(ReplicateResync))
        with slots.turn() as turn:  # not before: the source may have to wait for long
            async with self._volume.giving_up():
                await with_filler(conn, turn.comes())
            await (self._full(request) if isinstance(request, ReplicateFull) else self._resync(request))
        await conn.send(Ok())

    async def run(self) -> Message:
        """Take rounds until the source is done; return the last answer."""
        while True:
            message, payload = await self._conn.receive()
            if isinstance(message, ReplicateLatest) and not payload:
                await self._conn.send(self._state())
            elif isinstance(message, ReplicateDiff) and not payload:
                await self._conn.send(await self._round(message, self._take_diff))
            elif isinstance(message, ReplicateHash) and not payload:
                await self._conn.send(await self._round(message, self._take_differences))
            elif isinstance(message, ReplicateDone) and not payload:
                return Ok()
            else:
                raise self._conn.unexpected(message, ReplicateLatest, ReplicateDiff, ReplicateHash, ReplicateDone)

    def _state(self) -> ReplicateState:
        volume = self._volume
        if volume.machine.state is not State.ARCHIVED:
            volume.check(Command.REPL_ROUND)
        latest = volume.latest
        return ReplicateState(
            latest=latest.begin,
            timestamp=latest.timestamp,
            uuid=bytes.fromhex(volume.record.uuid),
            size_lb=volume.size_lb,
        )

    async def _enter(self, command: Command, *excludes: str) -> Step:
        """Enter a step as soon as nothing excludes it; also none of these actions runs then. Raises Refused."""
        volume, machine = self._volume, self._volume.machine

        def is_free() -> bool:
            try:
                volume.check(command)
            except Busy:
                return False
            return not any(machine.running(action) for action in excludes)

        while not is_free():
            await with_filler(self._conn, machine.changed.wait_for(is_free))
        return volume.enter(command)

    async def _compare(
        self, request: ReplicateResync | ReplicateHash, read: Callable[[int, int], Buf], sink: DiffSink
    ) -> None:
        """Let the source compare with what `read` gives, and take what differs."""
        size_b = request.size_lb * LB
        await take_differences(
            self._volume, self._conn, read, sink, size_b=size_b, bulk_b=request.bulk_b, seed=request.seed
        )

    def _hit(self, failpoint: str) -> None:
        with disk_errors(self._volume.directory, "replicate"):
            failpoints.hit(failpoint)

    # --- full

    async def _full(self, request: ReplicateFull) -> None:
        """Receive a whole image, from where an earlier attempt was cut."""
        volume, conn = self._volume, self._conn
        check_base(request.base, request.size_lb, self._offer)
        key = FullProgress(
            archive_uuid=self._offer.archive_uuid.hex(),
            uuid=request.uuid.hex(),
            base=request.base,
            size_lb=request.size_lb,
        )
        step = await self._enter(Command.REPL_FULL)
        try:
            begin_b = await self._resume_at(key)

            async def saved(offset_b: int) -> None:
                await volume.save(full_progress=msgspec.structs.replace(key, offset_b=offset_b))

            receiver = ImageReceiver(
                volume, conn, request.size_lb, source=self._source, begin_b=begin_b, saved=saved
            )
            async with receiver, volume.giving_up():
                await volume.settle()
                await with_filler(conn, receiver.prepare())
                volume.progress_lb = begin_b // LB
                await conn.send(FullFrom(offset_b=begin_b))
                await receiver.receive()
                await saved(request.size_lb * LB)
            self._hit(FP_FULL_BEFORE_COMMIT)
            await with_filler(conn, self._commit_base(step, request.base, request.size_lb, request.uuid))
        finally:
            self._leave()
        log.info("replication.full", volume=volume.name, base=str(request.base), begin_b=begin_b)

    async def _resume_at(self, key: FullProgress) -> int:
        """Return how much of exactly this image is durable here already [byte]."""
        progress, place = self._volume.record.full_progress, self._volume.place
        if progress is None or _fields(progress) | {"offset_b": 0} != _fields(key):
            return 0
        size_b = await self._pools.run(Pool.RECORD, place.images.base_size, self._volume.name)
        return progress.offset_b if size_b == key.size_lb * LB else 0

    async def _commit_base(self, step: Step, base: BaseState, size_lb: int, uuid: bytes) -> None:
        """Make what was received the volume's base: Archived, in one replacement of the record."""
        volume = self._volume

        async def commit() -> None:
            await volume.commit(
                step,
                base=base,
                base_uuid="" if uuid == NIL_UUID else uuid.hex(),
                size_lb=size_lb,
                uuid=uuid.hex(),
                archive_uuid=self._offer.archive_uuid.hex(),
                full_progress=None,
            )
            volume.reset_memory()
            volume.received = volume.place.env.clock.now()

        await uninterrupted(commit())

    # --- resync

    async def _resync(self, request: ReplicateResync) -> None:
        """Give up the old history, and make the image equal to the source's."""
        volume, conn = self._volume, self._conn
        check_base(request.base, request.size_lb, self._offer)
        step = await self._enter(Command.REPL_RESYNC)
        sink: ImageSink | None = None
        try:
            if volume.machine.state is State.ARCHIVED:
                check_size(volume, request.size_lb)
            async with volume.giving_up():
                await volume.settle()
                await with_filler(conn, self._pools.run(Pool.RECEIVE, check_room, volume.place))
            await uninterrupted(promise_nothing(volume, step))
            async with volume.giving_up():
                await with_filler(conn, self._pools.run(Pool.RECEIVE, self._give_up_history))
                sink = await self._pools.run(Pool.RECEIVE, self._open_base, request.size_lb)
                await conn.send(Ok())
                await self._compare(request, sink.read, sink)
            self._hit(FP_RESYNC_BEFORE_COMMIT)
            await with_filler(conn, self._commit_base(step, request.base, sink.size_b // LB, request.uuid))
        finally:
            if sink is not None:
                await self._pools.run(Pool.RECEIVE, sink.close)
            self._leave()
        log.info("replication.resync", volume=volume.name, base=str(request.base), written_b=sink.written_b)

    def _give_up_history(self) -> None:
        place = self._volume.place
        remove_copies(place.images, self._volume.name)
        place.images.remove_unfinished(self._volume.name)
        remove_all_diffs(place.env.fs, self._volume.directory)
        self._hit(FP_RESYNC_AFTER_RESET)

    def _open_base(self, size_lb: int) -> ImageSink:
        """Open the image for comparing, at least as large as the source's; what is beyond that becomes zeros."""
        volume = self._volume
        images = volume.place.images
        old_b = images.base_size(volume.name)
        size_b = max(old_b or 0, size_lb * LB) // LB * LB
        file = images.prepare_base(volume.name, size_b).file
        try:
            if size_b > size_lb * LB:
                file.zero(size_lb * LB, size_b - size_lb * LB)
        except BaseException:
            file.close()
            raise
        return ImageSink(file, size_lb=size_lb, source=self._source, check=volume.check_force)

    # --- rounds

    async def _round(
        self, request: ReplicateDiff | ReplicateHash, take: Callable[[Any, WdiffSink], Awaitable[None]]
    ) -> Message:
        """Take one wdiff, if we still are where the source believes us to be."""
        volume, compares = self._volume, isinstance(request, ReplicateHash)
        with ExitStack() as held:
            await self._enter(Command.REPL_ROUND, *([APPLY] if compares else []))
            held.callback(self._leave)
            turn = held.enter_context(self._wdiffs.turn())  # not before: who waits for the step needs none
            async with volume.giving_up():
                await with_filler(self._conn, turn.comes())
                await volume.settle()
            if compares:  # an apply would change the image that is compared
                held.enter_context(volume.machine.action(SCAN, volume.place.env.clock.now()))
            if (volume.latest.begin, volume.record.uuid) != (request.latest, request.latest_uuid.hex()):
                return RoundAnswer(accepted=False)
            diff = self._label(request.diff, compares=compares)
            check_size(volume, request.size_lb)
            sink = WdiffSink(volume, diff, request.uuid, self._conn.peer.node)
            try:
                async with volume.giving_up():
                    if await self._pools.run(Pool.RECORD, look_for_room, volume.place, volume.name) is None:
                        raise NotFound("the base image has vanished", volume=volume.name)
                    if request.size_lb > volume.size_lb:
                        await grow(volume, request.size_lb)
                    await self._pools.run(Pool.RECEIVE, sink.open)
                    await take(request, sink)
                self._hit(FP_ROUND_BEFORE_COMMIT)
                await uninterrupted(self._commit_round(sink, diff, request))
            finally:
                await self._pools.run(Pool.RECEIVE, sink.close)
        self._hit(FP_ROUND_BEFORE_ACK)
        log.info("replication.round", volume=volume.name, diff=str(diff), hash=compares, size_b=sink.size_b)
        return Ok()

    def _leave(self) -> None:
        self._volume.progress_lb = 0
        self._volume.machine.leave()

    def _label(self, diff: Diff, *, compares: bool) -> Diff:
        """Return the label to store a diff under; raises RemoteProtocolError or NotApplicable."""
        latest = self._volume.latest.begin
        if compares and not (diff.comp and diff.begin == latest and diff.end.is_clean):
            raise RemoteProtocolError(
                "a comparison must lead from our latest snapshot to a clean one",
                diff=str(diff),
                latest=str(latest),
            )
        label = trim(diff, latest)
        if label.begin.gid_b != latest.gid_b:  # it would replace what is here
            raise NotApplicable("the diff leads backward", diff=str(diff), latest=str(latest))
        return label

    async def _take_diff(self, _request: ReplicateDiff, sink: WdiffSink) -> None:
        await self._conn.send(RoundAnswer(accepted=True))
        await take_stream(self._volume, self._conn, sink)

    async def _take_differences(self, request: ReplicateHash, sink: WdiffSink) -> None:
        """Let the source compare with our latest image."""
        volume, conn = self._volume, self._conn
        opening = open_virtual(volume, volume.latest.begin.gid_b, Pool.RECEIVE)
        async with AsyncExitStack() as stack:
            image = await with_filler(conn, stack.enter_async_context(opening))
            await conn.send(RoundAnswer(accepted=True))
            await self._compare(request, image.read, sink)

    async def _commit_round(self, sink: WdiffSink, diff: Diff, request: ReplicateDiff | ReplicateHash) -> None:
        """Name the file and register the diff, with the history that it brings."""
        volume = self._volume
        cause = ""  # of a gap: what the source could not restore, we cannot, either
        if diff.comp:
            cause = HASH_REPLICATION
        elif request.uuid.hex() != volume.record.uuid:
            cause = HASH_BACKUP
        await commit_pending(volume, sink, diff, request.uuid, gaps_after(volume, diff, cause=cause))
        volume.received = volume.place.env.clock.now()


def check_base(base: BaseState, size_lb: int, offer: ReplicateOffer) -> None:
    """Raise RemoteProtocolError unless this can be the base of a volume, and is what was offered."""
    if base.begin.is_none or base.is_applying:
        raise RemoteProtocolError("an image in this state cannot be taken", base=str(base))
    if size_lb < offer.size_lb:
        raise RemoteProtocolError("the volume is smaller than offered", size_lb=size_lb, offered_lb=offer.size_lb)


def _fields(progress: FullProgress) -> dict[str, Any]:
    """Return the fields by name, the time of the base among them."""
    return msgspec.structs.asdict(progress) | {"base": progress.base.describe()}
