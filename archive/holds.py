"""Holds of single restore points (docs/policy.md)."""

from __future__ import annotations

from walbd.archive.volume import Volume
from walbd.format.retention import is_holding, reference_time
from walbd.protocol.maintenance import Hold


def held_now(volume: Volume) -> list[Hold]:
    """Return the holds that have not ended, by the time that the policy goes by."""
    reference = reference_time(volume.latest.timestamp, volume.place.env.clock.now())
    return [hold for hold in volume.record.holds if is_holding(hold, reference)]
