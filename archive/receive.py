"""Taking wdiffs from proxies (docs/archive.md, "wdiff transfer"; docs/protocol.md, "Transfers").

    offer -> verdict; when accepted: packs, each verified as it comes, into an unfinished file; that file read back
    and decoded; synced, named, registered; then, with the volume ready for the next one, Ok

The file's name is the record: nothing else has to be written, and what has no name yet is garbage. A lost Ok is
harmless: the same diff offered again is too old.
"""

from __future__ import annotations

from typing import Final

import structlog

from walbd.archive.gaps import gaps_after
from walbd.archive.pending import commit_pending
from walbd.archive.resize import grow
from walbd.archive.slots import Slots
from walbd.archive.states import FULL_SYNC, HASH_SYNC, START, WDIFF_RECV, Command, State
from walbd.archive.volume import Place, Volume
from walbd.archive.wdiff_sink import WdiffSink, look_for_room, take_stream
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.tasks import uninterrupted
from walbd.errors import Refused
from walbd.format.meta import Diff, Relation, relation, trim
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID
from walbd.protocol.base import Kind, Ok
from walbd.protocol.transfer import Verdict, WdiffOffer, WdiffVerdict

log = structlog.get_logger()

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


async def _commit(volume: Volume, sink: WdiffSink, diff: Diff, uuid: bytes) -> None:
    """Name the file and register the diff: one step, whatever is cancelled meanwhile."""
    await commit_pending(volume, sink, diff, uuid, gaps_after(volume, diff))
    volume.received = volume.place.env.clock.now()
