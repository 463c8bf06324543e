"""Whether the log of a device still continues what was delivered from it. Source: docs/storage.md, "Lost log"."""

from __future__ import annotations

from typing import Final

from walbd.errors import HistoryBroken, WlogOverflow
from walbd.format.meta import LogPoint
from walbd.storage.device.interface import DeviceInfo, LsidSample
from walbd.storage.record import VolumeRecord

HINT: Final = "reset the volume (reset-vol), then run a hash or full backup"


def check_history(record: VolumeRecord, sample: LsidSample) -> None:
    """Raise WlogOverflow or HistoryBroken unless the log goes on from `record.done` without a gap.

    The uuid tells a log that was reset behind our back, or a reset of ours that a crash cut off; the lsids tell
    a device that lost log it had called permanent, and log that was given up before it was sent.
    """
    done, newest = record.done, record.newest
    if sample.overflow:
        raise WlogOverflow(
            "the log has overflowed: what was not sent yet is overwritten",
            hint=HINT,
            oldest=sample.oldest,
            latest=sample.latest,
        )
    if sample.uuid != record.uuid:
        raise HistoryBroken(
            "the log of the device was reset", hint=HINT, uuid=sample.uuid.hex(), expected=record.uuid_hex
        )
    if newest.lsid > sample.latest:
        raise HistoryBroken(
            "the device has lost log that it had called permanent",
            hint=HINT,
            latest=sample.latest,
            lsid=newest.lsid,
        )
    if sample.oldest > done.lsid:
        raise WlogOverflow("log was given up before it was sent", hint=HINT, oldest=sample.oldest, done=done.lsid)


def problem_of(record: VolumeRecord, sample: LsidSample) -> str:
    """Return in words what `check_history` raises, or nothing."""
    try:
        check_history(record, sample)
    except (WlogOverflow, HistoryBroken) as exc:
        return str(exc)
    return ""


def lost_code(record: VolumeRecord, sample: LsidSample) -> str:
    """Return the code of what `check_history` raises, or nothing."""
    try:
        check_history(record, sample)
    except (WlogOverflow, HistoryBroken) as exc:
        return exc.code
    return ""


def lag_lb(done: LogPoint, info: DeviceInfo) -> int:
    """Return how much log was written and not delivered yet [logical block]."""
    return max(0, info.lsids.latest - done.lsid) * info.pbs // 512
