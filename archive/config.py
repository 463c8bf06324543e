"""Settings of an archive daemon."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from walbd.daemon.config import Count, DaemonConfig, Size
from walbd.errors import ConfigError
from walbd.units import GIB, LB, MIB


class ArchiveConfig(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an archive has beside the settings of all daemons."""

    fsync_interval_b: Annotated[Size, Meta(description="sync a long copy each time so much was written")] = GIB
    fsync_interval_s: Annotated[int, Meta(ge=1, le=3600, description="and at the latest after so long")] = 10
    wdiffs_max: Annotated[Count, Meta(description="wdiffs received at the same time; more wait")] = 16
    backups_max: Annotated[Count, Meta(description="full backups at the same time; more are refused")] = 8
    maintain_max: Annotated[Count, Meta(description="restores and applies at the same time; more wait")] = 2
    free_reserve_b: Annotated[
        Size, Meta(description="free space that backups, wdiffs and copies must leave on the disk")
    ] = 256 * MIB
    auto_resize: Annotated[
        bool, Meta(description="grow the image when a wdiff comes from a larger device, instead of refusing it")
    ] = False
    open_files_max: Annotated[
        int, Meta(ge=0, le=100_000, description="wdiffs that one apply or restore opens at once; 0: no limit")
    ] = 256

    def check(self) -> None:
        """Raise ConfigError for settings that are wrong together."""
        super().check()
        if self.fsync_interval_b < LB:
            raise ConfigError("fsync_interval_b is too small", hint="give at least 1MiB")
