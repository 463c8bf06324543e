"""Taking wdiffs from proxies (docs/archive.md, "wdiff transfer"; docs/protocol.md, "Transfers").

    offer -> verdict; when accepted: packs, each verified as it comes, into an unfinished file; that file read back
    and decoded; synced, named, registered; then, with the volume ready for the next one, Ok

The file's name is the record: nothing else has to be written, and what has no name yet is garbage. A lost Ok is
harmless: the same diff offered again is too old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import structlog

from walbd.archive.gaps import gaps_after
from walbd.archive.pending import commit_pending
from walbd.archive.slots import Slots
from walbd.archive.states import FULL_SYNC, HASH_SYNC, START, WDIFF_RECV, Command, State
from walbd.archive.volume import Place, Volume, check_room
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.hash_sync import DiffSink, receive_differences
from walbd.daemon.pipeline import Pipeline
from walbd.daemon.tasks import uninterrupted
from walbd.errors import AlreadyExists, Refused
from walbd.format.meta import Diff, Relation, diff_name, relation, trim
from walbd.format.wdiff import HEADER_B, WdiffHeader, WdiffType
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import open_wdiff
from walbd.format.wdiff_stream import PackVerifier, check_stream_header
from walbd.fs import Buf, TempFile, failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID
from walbd.protocol.base import End, Kind, Ok
from walbd.protocol.transfer import Verdict, WdiffChunk, WdiffOffer, WdiffVerdict
from walbd.units import LB

log = structlog.get_logger()

FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.wdiff.before_commit", "an unfinished file; the proxy sends the diff again"
)
FP_AFTER_COMMIT: Final = failpoints.register(
    "archive.wdiff.after_commit", "the wdiff is there; the proxy was not told, and hears too-old next time"
)
FP_BEFORE_ACK: Final = failpoints.register(
    "archive.wdiff.before_ack", "the wdiff is there and registered; the proxy was not told"
)


def judge(volume: Volume | None, offer: WdiffOffer, sender: Kind, *, auto_resize: bool = False) -> Verdict:
    """Return what to say to an offer; the order of the questions matters. Raises Refused for what is no verdict.

    State comes before uuid: during a backup the new uuid is not recorded yet, and diffs sent meanwhile must be
    held, not destroyed. A damaged volume, one being stopped, and a sender of another kind are errors.
    """
    if sender is not Kind.PROXY or offer.sender is not sender:
        raise Refused(
            "wdiffs are offered by proxies only", hint="archives replicate to one another", sender=str(sender)
        )
    if volume is None:
        return Verdict.NOT_FOUND
    machine = volume.machine
    if machine.state is State.BROKEN or (machine.stopping is not None):
        volume.check(Command.WDIFF_TRANSFER)
    if machine.state is State.STOPPED and machine.during in (None, START):
        return Verdict.STOPPED
    if machine.during in (FULL_SYNC, HASH_SYNC):
        return Verdict.SYNCING
    if machine.during == WDIFF_RECV:
        return Verdict.BUSY
    if machine.during is not None or machine.state is not State.ARCHIVED:
        return Verdict.NOT_READY
    if offer.uuid.hex() != volume.record.uuid:
        # A replication may bring this history, or has still to tell any: nobody may throw anything away.
        unknown = volume.replications or volume.record.uuid == NIL_UUID.hex()
        return Verdict.NOT_READY if unknown else Verdict.DIFFERENT_UUID
    if offer.size_lb > volume.size_lb and not auto_resize:
        return Verdict.SMALLER
    return _RELATIONS[relation(volume.latest.begin, offer.diff)]


_RELATIONS: Final = {
    Relation.APPLICABLE: Verdict.ACCEPT,
    Relation.TOO_OLD: Verdict.TOO_OLD,
    Relation.TOO_NEW: Verdict.TOO_NEW,
    Relation.NOT_APPLICABLE: Verdict.NOT_APPLICABLE,
}

_HINTS: Final = {
    Verdict.STOPPED: "start the volume at the archive",
    Verdict.NOT_READY: "run a full backup",
    Verdict.NOT_FOUND: "initialise the volume at the archive, and run a full backup",
    Verdict.DIFFERENT_UUID: "the log was reset since the last backup: these diffs lead nowhere",
    Verdict.SMALLER: "grow the volume at the archive, or set auto_resize there",
    Verdict.TOO_NEW: "a diff before it is missing: another proxy may have it; if not, run a hash backup",
}


async def receive_wdiff(
    volumes: dict[str, Volume], place: Place, slots: Slots, conn: Connection, offer: WdiffOffer
) -> WdiffVerdict | Ok:
    """Conduct a transfer; the returned message is the last answer."""

    def answer() -> WdiffVerdict:
        volume = volumes.get(offer.volume)
        verdict = judge(volume, offer, conn.peer.kind, auto_resize=place.config.auto_resize)
        latest = volume.latest.begin if volume is not None and not volume.latest.begin.is_none else None
        return WdiffVerdict(verdict=verdict, latest=latest, hint=_HINTS.get(verdict, ""))

    if (reply := answer()).verdict is not Verdict.ACCEPT:
        return reply
    with slots.turn() as turn:
        await with_filler(conn, turn.comes())
        if (reply := answer()).verdict is not Verdict.ACCEPT:
            return reply
        return await _transfer(volumes[offer.volume], conn, offer, reply)


async def _transfer(
    volume: Volume, conn: Connection, offer: WdiffOffer, accept: WdiffVerdict
) -> WdiffVerdict | Ok:
    """Receive what was accepted. No await stands between the verdict and the step."""
    volume.enter(Command.WDIFF_TRANSFER)
    place = volume.place
    pools = place.env.pools
    diff = volume.dated(trim(offer.diff, volume.latest.begin))
    sink = WdiffSink(volume, diff, offer.uuid, conn.peer.node)
    try:
        try:
            async with volume.giving_up():
                await volume.settle()
                if await pools.run(Pool.RECORD, look_for_room, place, volume.name) is None:
                    return WdiffVerdict(verdict=Verdict.NOT_FOUND, hint="the base image has vanished")
                if offer.size_lb > volume.size_lb:
                    await grow(volume, offer.size_lb)
                await pools.run(Pool.RECEIVE, sink.open)
                await conn.send(accept)
                await take_stream(volume, conn, sink)
            await uninterrupted(_commit(volume, sink, diff, offer.uuid))
        finally:
            await pools.run(Pool.RECEIVE, sink.close)
    finally:
        volume.machine.leave()
    with disk_errors(volume.directory, "acknowledge"):
        failpoints.hit(FP_BEFORE_ACK)
    log.info("wdiff.received", volume=volume.name, diff=str(diff), size_b=sink.size_b, records=sink.n_records)
    return Ok()


async def take_stream(volume: Volume, conn: Connection, sink: WdiffSink) -> None:
    """Take packs until the end of the stream; each piece is verified while the next one comes.

    On return the file is complete, decoded once, and durable, without a name.
    """
    pools = volume.place.env.pools
    timer = volume.sync_timer()
    async with Pipeline(0) as pipeline:
        while True:
            message, payload = await conn.receive()
            if isinstance(message, End) and not payload:
                break
            if not isinstance(message, WdiffChunk) or not payload:
                raise conn.unexpected(message, WdiffChunk, End)
            await pipeline.push(pools.run(Pool.RECEIVE, sink.feed, payload), len(payload))
            if timer.is_due(len(payload)):
                await pipeline.push(pools.run(Pool.RECEIVE, sink.sync), 0)
        await pipeline.drain()
    await with_filler(conn, pools.run(Pool.MAINTAIN, sink.finish))  # long: reception has few threads


async def take_differences(
    volume: Volume,
    conn: Connection,
    read: Callable[[int, int], Buf],
    sink: DiffSink,
    *,
    size_b: int,
    bulk_b: int,
    seed: int,
) -> None:
    """Let the sender compare its image with what `read` gives, and take what differs.

    The volume shows how far it is. The caller sends the Ok.
    """

    def tick(done_b: int) -> None:
        volume.progress_lb = done_b // LB

    await receive_differences(
        conn,
        volume.place.env.pools,
        read,
        sink,
        size_b=size_b,
        bulk_b=bulk_b,
        seed=seed,
        timer=volume.sync_timer(),
        tick=tick,
    )


async def _commit(volume: Volume, sink: WdiffSink, diff: Diff, uuid: bytes) -> None:
    """Name the file and register the diff: one step, whatever is cancelled meanwhile."""
    await commit_pending(volume, sink, diff, uuid, gaps_after(volume, diff))
    volume.received = volume.place.env.clock.now()


async def grow(volume: Volume, size_lb: int) -> None:
    """Grow the image to the size of the sender's device: the image first, then the record that promises it."""
    place = volume.place
    old_lb = volume.size_lb
    await place.env.pools.run(Pool.RECEIVE, place.images.grow_base, volume.name, size_lb * LB)
    await volume.grown(size_lb)
    log.info("volume.grown", volume=volume.name, size_lb=size_lb, old_size_lb=old_lb)


def look_for_room(place: Place, name: str) -> int | None:
    """Return the size of the base image; raises DiskFull when there is no room for more data."""
    check_room(place)
    return place.images.base_size(name)


class WdiffSink:
    """An unfinished wdiff file, and the checks on the way into it. One thread at a time calls it.

    `uuid` must be known before the first piece, `diff` before `commit`.
    """

    def __init__(self, volume: Volume, diff: Diff | None, uuid: bytes, sender: str) -> None:
        self.diff = diff
        self.uuid = uuid
        self.size_b = 0
        self._volume = volume
        self._source = f"wdiff stream from {sender}"
        self._verifier = PackVerifier(source=self._source)
        self._file: TempFile | None = None

    @property
    def n_records(self) -> int:
        """How many records came so far."""
        return self._verifier.n_records

    @property
    def file(self) -> TempFile:
        """The open file."""
        assert self._file is not None
        return self._file

    def open(self) -> None:
        """Begin the file, for a volume of the size that it has now."""
        if self.diff is not None and self.diff in self._volume.diffs:
            raise AlreadyExists("this diff is already there", diff=str(self.diff))
        self._verifier = PackVerifier(size_lb=self._volume.size_lb, source=self._source)
        self._file = self._volume.place.env.fs.temp_file(self._volume.directory)

    def feed(self, piece: memoryview) -> None:
        """Verify and write one piece: whole packs, the first one behind the file header. Raises CorruptData."""
        if self.size_b == 0:
            check_stream_header(piece, self._source, self.uuid, NIL_UUID)
            self._write(WdiffHeader(WdiffType.SORTED, self.uuid).pack())
            piece = piece[HEADER_B:]
        self._verifier.feed_all(piece)
        self._write(piece)

    def sync(self) -> None:
        """Make what came so far durable, so that the end need not wait for all of it."""
        self.file.sync()

    def finish(self) -> None:
        """Check that the stream was complete, and read the file back as a later apply will; raises CorruptData."""
        self._verifier.finish()
        verify(open_wdiff(self.file), size_lb=self._volume.size_lb, check=self._volume.check_force)
        self.file.sync()

    def commit(self) -> Diff:
        """Name the file durably; return its label with its size."""
        directory, diff = self._volume.directory, self.diff
        assert diff is not None
        with disk_errors(directory, "name a wdiff"):
            failpoints.hit(FP_BEFORE_COMMIT)
            self.file.commit(directory / diff_name(diff))
            failpoints.hit(FP_AFTER_COMMIT)
        return replace(diff, size_b=self.size_b)

    def close(self) -> None:
        """Close the file; it is removed if it got no name."""
        if self._file is not None:
            self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self.file.pwrite(data, self.size_b)
        self.size_b += len(data)
