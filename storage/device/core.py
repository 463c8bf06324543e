"""What the stages of a device share: the lsids, the open files, and the fail-stop switch.

Each lsid L means "every log position below L ..." (docs/device.md, "The lsids"):

    oldest <= prev_written <= written <= permanent <= flush <= completed <= latest
"""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog

from walbd.daemon.env import Env
from walbd.daemon.logs import error_fields
from walbd.daemon.tasks import Signal
from walbd.errors import DiskFailed, ReadOnlyDevice, WalbError
from walbd.format.superblock import Superblock
from walbd.fs import File

log = structlog.get_logger()


@dataclass(slots=True)
class Lsids:
    """The positions of one device; changed on the event loop only."""

    latest: int = 0  # ... was given to a pack; the next pack begins here
    completed: int = 0  # ... was written to the log device
    flush: int = 0  # ... is covered by a sync of the log that has at least begun
    permanent: int = 0  # ... survives power loss
    written: int = 0  # ... was also written to the data device
    prev_written: int = 0  # ... is on the data device for good, and the superblock says so
    oldest: int = 0  # ... may be overwritten: no consumer needs it

    def set_all(self, lsid: int) -> None:
        """Set everything but `oldest`: nothing is in flight."""
        self.latest = self.completed = self.flush = self.permanent = self.written = self.prev_written = lsid

    def in_order(self) -> bool:
        """Say whether the invariant at the head of this module holds."""
        return (
            self.oldest <= self.prev_written <= self.written <= self.permanent
            and self.permanent <= self.flush <= self.completed <= self.latest
        )


@dataclass
class Core:
    """State that all stages see. A failed disk operation is final: see `fail`."""

    env: Env
    ldev: File
    ddev: File
    superblock: Superblock  # as last written, but for its lsids
    lsids: Lsids
    given_up: int = 0  # no consumer needs the log below: `oldest` follows as `prev_written` rises
    overflow: bool = False  # sticky: the ring has overwritten log that a consumer had not taken
    failed: WalbError | None = None  # the device is read-only since
    # Signals, each set by what it names, and all of them by a failure:
    sync_wanted: Signal = field(default_factory=Signal)
    log_advanced: Signal = field(default_factory=Signal)  # permanent rose, or the log was reset
    checkpoint_wanted: Signal = field(default_factory=Signal)
    settled: Signal = field(default_factory=Signal)  # a log write, a sync, or a data write has ended

    @property
    def ring_pb(self) -> int:
        """Capacity of the ring."""
        return self.superblock.ring_size_pb

    @property
    def size_b(self) -> int:
        """Size of the volume."""
        return self.superblock.device_size_lb * 512

    def oldest_at(self, prev_written: int) -> int:
        """Return what `oldest` may be with this `prev_written`."""
        return max(self.lsids.oldest, min(self.given_up, prev_written))

    def fail(self, error: BaseException, during: str) -> None:
        """Make the device read-only, for good: what a failed write or sync left on disk cannot be known.

        Restarting redoes the log, which repairs the data device.
        """
        if self.failed is None:
            if not isinstance(error, WalbError):
                error = DiskFailed(str(error) or type(error).__name__)
            self.failed = error
            log.error("device.failed", during=during, **error_fields(error))
        for signal in (
            self.sync_wanted,
            self.log_advanced,
            self.checkpoint_wanted,
            self.settled,
        ):
            signal.set()

    def has_failed(self) -> bool:
        """Say whether the device is read-only."""
        return self.failed is not None

    def check_alive(self) -> None:
        """Raise ReadOnlyDevice after a failure."""
        if self.failed is not None:
            raise ReadOnlyDevice(
                "the device is read-only since a disk operation failed",
                hint="see its log for the cause; restart it when the disk is well again",
                cause=str(self.failed),
            )
