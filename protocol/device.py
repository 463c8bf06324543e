"""The control conversation of a device: what its socket answers. Source: docs/device.md, "The control socket".

An lsid sample is consistent: all its values were true at one moment. Every sample carries the uuid of the log
sequence, so that a consumer notices a reset.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

import msgspec

from walbd.protocol.base import U32, U64, Ok, Text, Uuid
from walbd.protocol.codec import Message, Request, message

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


@message("device-lsids")
class LsidSample(Message):
    """How far a device is, at one moment; docs/device.md says what each lsid promises."""

    uuid: Uuid  # of the log sequence
    latest: U64
    completed: U64
    flush: U64
    permanent: U64
    written: U64
    prev_written: U64
    oldest: U64
    overflow: bool
    read_only: bool
    frozen: bool


@message("device-info")
class DeviceInfo(Message):
    """What a device is."""

    name: Name
    uuid: Uuid
    pbs: U32  # physical block size [byte]
    salt: U32  # of the log's checksums
    size_lb: U64
    capacity_pb: U64  # of the ring
    ldev: Text
    ddev: Text
    nbd: list[Text] = field(default_factory=list)  # addresses: unix:PATH or HOST:PORT
    read_only: Text = ""  # why, or empty
    lsids: LsidSample


@message("device-get-info")
class GetDeviceInfo(Request[DeviceInfo]):
    """What is this device, and how far?"""


@message("device-get-lsids")
class GetLsids(Request[LsidSample]):
    """How far is it?"""


@message("device-watch")
class WatchLsids(Request[LsidSample]):
    """One sample at once, then one whenever more log has become permanent, or the log was reset, or a flag
    changed (at most some 20 a second); ends with the connection."""


@message("device-set-oldest")
class SetOldest(Request[Ok]):
    """Give up the log below a pack boundary, up to `permanent`: at once as far as `prev_written`, the rest with
    the checkpoint that raises it."""

    lsid: U64


@message("device-checkpoint")
class TakeCheckpoint(Request[Ok]):
    """Raise `prev_written` to `written`."""


@message("device-reset-log")
class ResetLog(Request[DeviceInfo]):
    """Empty the log: lsid 0, new uuid and salt, no overflow."""


@message("device-freeze")
class Freeze(Request[Ok]):
    """Hold back writes; answered when nothing is in flight any more."""

    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0  # melts by itself then; 0: never


@message("device-melt")
class Melt(Request[Ok]):
    """Let writes go on."""


@message("device-resize")
class Resize(Request[DeviceInfo]):
    """Grow the volume; 0: to the size of the data device."""

    size_lb: U64 = 0


@message("device-stop")
class StopDevice(Request[Ok]):
    """End the process in an orderly way; answered before it ends."""
