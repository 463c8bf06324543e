"""The task of one volume: it runs whenever there may be something to do, never twice at the same time.

The scheduler runs `Worker.work` with growing delay after failures. It looks at the volume as it is then: what was
true when the task was pushed does not matter. Source: docs/storage.md, "The task of a volume".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import msgspec
import structlog

from walbd.daemon.scheduler import Again
from walbd.errors import ForceStopped, InternalError, WalbError
from walbd.format.meta import Transfer, drop_delivered, is_implicit_due, plan_transfer
from walbd.fs import failpoints
from walbd.ids import Lsid
from walbd.storage.device.interface import DeviceInfo, LsidSample
from walbd.storage.history import check_history
from walbd.storage.logread import BadLog
from walbd.storage.proxies import Proxies
from walbd.storage.record import VolumeRecord
from walbd.storage.shared import hit
from walbd.storage.states import WLOG_REMOVE, WLOG_SEND, State
from walbd.storage.transfer import send_stretch
from walbd.storage.volume import Candidate, Volume, is_lost
from walbd.units import MIB

log = structlog.get_logger()

_SOON_S: Final = 0.1  # a step or a run is about to end
_GARBAGE_S: Final = 1.0  # a checkpoint of the device will let more log be erased
_SETTLE_MIN_S: Final = 0.1

FP_DONE_BEFORE_SAVE: Final = failpoints.register(
    "storage.done.before_save", "log that a proxy has and that will be sent again"
)
FP_DONE_AFTER_SAVE: Final = failpoints.register("storage.done.after_save", "delivered log that is not erased yet")


def settle_delay_s(pending_b: int, *, size_max_b: int, max_s: float) -> float:
    """Return how long to wait for more log: the less there is compared to one transfer, the longer.

    0.1 s when half a transfer is there, `max_s` when a tenth or less is, and linear in between.
    """
    pending = -(-pending_b // MIB) * MIB / max(size_max_b, 1)
    share = min(max((0.5 - pending) / 0.4, 0.0), 1.0)
    least_s = min(_SETTLE_MIN_S, max_s)
    return least_s + share * (max_s - least_s)


class Worker:
    """Runs the tasks of all volumes of a daemon."""

    def __init__(self, proxies: Proxies) -> None:
        self._proxies = proxies

    async def work(self, volume: Volume) -> Again | None:
        """Do what there is to do for a volume; return when to come again. Raises whatever failed."""
        machine = volume.machine
        if machine.stopping is not None or not volume.monitored:
            return None
        if machine.running(WLOG_SEND) or machine.running(WLOG_REMOVE):
            return Again(_SOON_S)
        if volume.erases:
            return await self._erase(volume)
        if volume.sends:
            return await self._send(volume)
        return Again(_SOON_S) if machine.during is not None else None

    async def _erase(self, volume: Volume) -> Again | None:
        """Standby: give up the log as far as the data device has it for good."""
        with volume.machine.action(WLOG_REMOVE, volume.shared.now()):
            info = await volume.info()
            if info.lsids.overflow:
                await volume.reset_standby()
                return None
            oldest = await volume.erase_log(info, info.lsids.written)
        if oldest < info.lsids.latest:
            volume.look_again(_GARBAGE_S)
        return None

    async def _send(self, volume: Volume) -> Again | None:
        lost: WalbError | None = None
        volume.more = False
        try:
            with volume.machine.action(WLOG_SEND, volume.shared.now()):
                info = await volume.info()
                check_history(volume.record, info.lsids)
                again = await volume.unless_forced(self._step(volume, info), also=lambda: not volume.monitored)
        except ForceStopped:
            return None
        except WalbError as exc:
            volume.send_error = str(exc)
            if not is_lost(exc):
                raise
            lost = exc
        else:
            volume.send_error = ""
        if lost is not None:
            return await self._lost(volume, lost)
        if again is None and volume.more:
            again = Again(volume.shared.config.gather_delay_s)
        return again

    async def _lost(self, volume: Volume, lost: WalbError) -> Again | None:
        """The log does not continue the history: a target stops by itself, a backup sees it and fails."""
        machine = volume.machine
        volume.note_lost(lost)
        if machine.during is None and machine.state is State.TARGET and machine.stopping is None:
            await volume.give_up()
        return None

    async def _step(self, volume: Volume, info: DeviceInfo) -> Again | None:
        """Erase what is delivered, plan, send one stretch, record it, erase again."""
        oldest = await volume.erase_log(info, volume.record.done.lsid)
        transfer = await self._plan(volume, info)
        if transfer is None:
            record = volume.record
            waits = record.queue or record.done.lsid < info.lsids.permanent
            # A snapshot that waits for the log to become permanent: the device will tell.
            if not waits and oldest < record.done.lsid:
                volume.look_again(_GARBAGE_S)
            return None
        if transfer.exceeds_max:
            log.warning("wlog.exceeds_max", volume=volume.name, lsid=transfer.begin.lsid, limit=transfer.limit)
        await self._transfer(volume, info, transfer)
        return await self._after(volume)

    async def _plan(self, volume: Volume, info: DeviceInfo) -> Transfer | None:
        """Take the implicit snapshot that is due, and choose the next stretch."""
        sample = info.lsids

        def tidy(record: VolumeRecord) -> VolumeRecord:
            return msgspec.structs.replace(record, queue=drop_delivered(record.done, record.queue))

        record = await volume.update(tidy)
        if record.done.lsid >= sample.permanent and not record.queue:
            volume.candidate = None
            return None
        now = volume.shared.now()
        candidate = volume.candidate
        if candidate is not None and candidate.lsid <= record.newest.lsid:
            candidate = None  # an explicit snapshot came later, or this one was taken
        if candidate is not None and candidate.is_ready(sample):
            if await volume.is_pack_begin(candidate.lsid, sample):
                await self._push(volume, candidate, sample)
            candidate = None
        interval_s = volume.shared.config.snapshot_interval_s
        if candidate is None and is_implicit_due(volume.record.queue, sample.latest, now, interval_s):
            candidate = Candidate(sample.latest, now)
            if candidate.is_ready(sample):
                await self._push(volume, candidate, sample)
                candidate = None
        volume.candidate = candidate
        record = volume.record
        transfer = plan_transfer(record.done, record.queue, sample.permanent, size_max_pb=volume.size_max_pb)
        if transfer is not None and record.cut_lsid and transfer.limit < transfer.end.lsid:
            return replace(transfer, limit=Lsid(record.cut_lsid))
        return transfer

    @staticmethod
    async def _push(volume: Volume, candidate: Candidate, sample: LsidSample) -> None:
        await volume.push_point(candidate.lsid, uuid=sample.uuid, explicit=False, now=candidate.timestamp)

    async def _transfer(self, volume: Volume, info: DeviceInfo, transfer: Transfer) -> None:
        """Send a stretch and, once a proxy has it, record that durably."""

        async def before_partial(lsid: int) -> None:
            # The end of a partial stretch has the generation after `done`, wherever it is. If a proxy has it and
            # we do not get to know that, the repetition must end at the same place, whatever the settings are
            # then: one generation with two contents would be taken for a repetition, and log would be lost.
            await volume.update(lambda record: record.with_cut(lsid))

        try:
            sent = await send_stretch(
                volume.shared,
                self._proxies,
                volume.device,
                volume=volume.name,
                path=volume.record.device,
                info=info,
                transfer=transfer,
                before_partial=before_partial,
                known=volume.send_error,
            )
        except BadLog as exc:
            await self._keep_block(volume, exc)
            raise

        def delivered(record: VolumeRecord) -> VolumeRecord:
            if record.done != transfer.begin or record.uuid != info.uuid:
                raise InternalError("the history changed during a transfer", volume=volume.name)
            return record.after_delivery(sent.done)

        hit(FP_DONE_BEFORE_SAVE, volume.directory)
        await volume.update(delivered)
        hit(FP_DONE_AFTER_SAVE, volume.directory)

    async def _after(self, volume: Volume) -> Again | None:
        """Erase what was delivered just now, and say when to come again."""
        info = await volume.info()
        record = volume.record
        oldest = await volume.erase_log(info, record.done.lsid)
        latest = info.lsids.latest
        if record.queue:
            return Again()
        if record.done.lsid < latest:
            pending_b = (latest - record.done.lsid) * info.pbs
            config = volume.shared.config
            return Again(
                settle_delay_s(pending_b, size_max_b=config.wlog_send_size_max, max_s=config.settle_delay_max_s)
            )
        if oldest < record.done.lsid:
            volume.look_again(_GARBAGE_S)
        return None

    @staticmethod
    async def _keep_block(volume: Volume, error: BadLog) -> None:
        """Keep the block in trouble for analysis, one file for each place."""
        try:
            await volume.keep_block(error.lsid, error.block)
        except WalbError as exc:
            log.warning("block.not_kept", volume=volume.name, error=str(exc))
