"""What the storage daemon needs of a WalB device, whoever implements it.

`UserspaceDevice` talks to `walbd device serve`. Errors: ConnectError while the device cannot be reached (the same
call may succeed later), ReadOnlyDevice or RemoteError for what the device refuses.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from walbd.format.ring import Ring
from walbd.protocol.device import DeviceInfo, LsidSample

__all__ = ["DataReader", "Device", "DeviceInfo", "LogReader", "LsidSample"]


class LogReader(Protocol):
    """The log device, open for reading below `permanent`."""

    ring: Ring  # for scans in a thread; its superblock has the geometry, uuid and salt

    async def read(self, lsid: int, n_pb: int) -> memoryview:
        """Return physical blocks [lsid, lsid + n_pb) of the log.

        Blocks that the ring has overwritten come back as they are now: check headers, and `oldest`, afterwards.
        """

    def close(self) -> None:
        """Close; twice is harmless."""


class DataReader(Protocol):
    """The volume as its user sees it now."""

    @property
    def size_b(self) -> int:
        """Size when it was opened."""

    async def read(self, offset_b: int, size_b: int) -> memoryview:
        """Return bytes of the volume. Several reads may be on their way at once."""

    async def close(self) -> None:
        """Close; twice is harmless."""


class Device(Protocol):
    """One WalB device."""

    async def info(self) -> DeviceInfo:
        """Return what the device is, with an lsid sample."""

    async def lsids(self) -> LsidSample:
        """Return a consistent sample."""

    async def set_oldest(self, lsid: int) -> None:
        """Let the device overwrite log below a pack boundary <= permanent.

        Durable on return as far as `prev_written`; the device does the rest by itself, unless it is restarted.
        """

    async def take_checkpoint(self) -> None:
        """Raise `prev_written` to what `written` is now."""

    async def reset_wal(self) -> DeviceInfo:
        """Empty the log: lsid 0, new uuid and salt, overflow cleared."""

    async def freeze(self, timeout_s: float) -> None:
        """Hold back writes; returns when nothing is in flight. Melts after `timeout_s` (0: never)."""

    async def melt(self) -> None:
        """Let writes go on."""

    async def resize(self, size_lb: int) -> DeviceInfo:
        """Grow the volume; 0: to the size of the data device."""

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[LsidSample]]:
        """Yield samples: one at once, then one for each advance of `permanent` (rate-limited), for ever."""

    async def open_log(self) -> LogReader:
        """Open the log device for reading. Open anew after every reset."""

    async def open_data(self) -> DataReader:
        """Open the volume for reading."""
