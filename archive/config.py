"""Settings of an archive daemon."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from walbd.daemon.config import LIVE, Count, DaemonConfig, Size
from walbd.errors import ConfigError, UsageError
from walbd.format.compress import CompressOpt
from walbd.format.policy import DAY_S, DEFAULT_KEEP, DEFAULT_LEVELS, Grid, parse_levels
from walbd.units import LB, MIB


class ArchiveConfig(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an archive has beside the settings of all daemons."""

    fsync_interval_b: Annotated[
        Size, Meta(description="sync a long copy each time so much was written", extra=LIVE)
    ] = 256 * MIB
    fsync_interval_s: Annotated[
        int, Meta(ge=1, le=3600, description="and at the latest after so long", extra=LIVE)
    ] = 10
    wdiffs_max: Annotated[Count, Meta(description="wdiffs received at the same time; more wait", extra=LIVE)] = 16
    backups_max: Annotated[Count, Meta(description="backups at the same time; more are refused", extra=LIVE)] = 8
    maintain_max: Annotated[
        Count, Meta(description="applies, merges and scrubs at the same time; more wait", extra=LIVE)
    ] = 2
    restores_max: Annotated[Count, Meta(description="restores at the same time; more wait", extra=LIVE)] = 2
    scans_max: Annotated[
        Count, Meta(description="hashes and scans of images at the same time; more wait", extra=LIVE)
    ] = 2
    replications_max: Annotated[
        Count, Meta(description="replications sent at the same time; more wait", extra=LIVE)
    ] = 2
    free_reserve_b: Annotated[
        Size, Meta(description="free space that backups, wdiffs and copies must leave on the disk", extra=LIVE)
    ] = 256 * MIB
    auto_resize: Annotated[
        bool,
        Meta(
            description="grow the image when a wdiff comes from a larger device, instead of refusing it",
            extra=LIVE,
        ),
    ] = False
    open_files_max: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="wdiffs that one apply or restore opens at once; 0: no limit",
            extra=LIVE,
        ),
    ] = 256
    scan_files_max: Annotated[
        int,
        Meta(
            ge=0,
            le=100_000,
            description="wdiffs that one hash, scan or merge opens, all at once; 0: no limit",
            extra=LIVE,
        ),
    ] = 4096
    merge_compress: Annotated[str, Meta(description="compression of merged wdiffs, KIND[:LEVEL]", extra=LIVE)] = (
        "zstd:1"
    )
    keep_one_cold: Annotated[bool, Meta(description="keep only the newest cold image of a volume", extra=LIVE)] = (
        False
    )
    policy: Annotated[
        bool, Meta(description="merge, apply and replicate by policy; off: for no volume", extra=LIVE)
    ] = True
    keep: Annotated[
        str, Meta(description="which restore points stay, for volumes without a policy of their own", extra=LIVE)
    ] = DEFAULT_KEEP
    levels: Annotated[
        str, Meta(description="AGE:INTERVAL ... of older implicit points one stays in each interval", extra=LIVE)
    ] = DEFAULT_LEVELS
    apply_interval_s: Annotated[
        int, Meta(ge=0, le=1 << 31, description="no more applies of a volume by policy than one in", extra=LIVE)
    ] = DAY_S
    policy_max: Annotated[
        Count,
        Meta(description="merges, applies and replications, of each so many at a time, by policy", extra=LIVE),
    ] = 1
    policy_rest_percent: Annotated[
        int, Meta(ge=0, le=95, description="share of the time that merges and applies by policy rest", extra=LIVE)
    ] = 50

    def check(self) -> None:
        """Raise ConfigError for settings that are wrong together."""
        super().check()
        if self.fsync_interval_b < LB:
            raise ConfigError("fsync_interval_b is too small", hint="give at least 1MiB")
        try:
            CompressOpt.parse(self.merge_compress)
        except UsageError as exc:
            raise ConfigError(f"merge_compress: {exc.message}", hint=exc.hint, value=self.merge_compress) from exc
        for name, parse in (("keep", Grid.parse), ("levels", parse_levels)):
            try:
                parse(getattr(self, name))
            except UsageError as exc:
                raise ConfigError(f"{name}: {exc.message}", hint=exc.hint, **exc.facts) from exc
