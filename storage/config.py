"""Configuration of the storage daemon. Every field is a key of the file and an option: docs/storage.md."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from walbd.daemon.config import LIVE, Count, DaemonConfig, Delay, Seconds, Size
from walbd.daemon.net import Address, parse_address
from walbd.errors import ConfigError, UsageError
from walbd.units import MIB

PackingName = Literal["lz4", "none"]
WholeSeconds = Annotated[int, Meta(ge=1, le=86400 * 365)]


class StorageConfig(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `walbd storage`."""

    archive: Annotated[str, Meta(min_length=3, description="HOST:PORT of the primary archive", extra=LIVE)]
    proxy: Annotated[list[str], Meta(min_length=1, description="HOST:PORT of the proxies, best first", extra=LIVE)]
    wlog_send_size_max: Annotated[
        Size, Meta(ge=2 * MIB, description="largest stretch of log sent at once", extra=LIVE)
    ] = 128 * MIB
    wlog_packing: Annotated[PackingName, Meta(description="packing of the log on the wire", extra=LIVE)] = "lz4"
    backup_packing: Annotated[PackingName, Meta(description="packing of backups on the wire", extra=LIVE)] = "lz4"
    snapshot_interval_s: Annotated[
        WholeSeconds, Meta(description="least time between implicit snapshots", extra=LIVE)
    ] = 2
    full_scan_bytes_per_s: Annotated[
        Size, Meta(description="speed limit of the scans of backups; 0: none", extra=LIVE)
    ] = 0
    ts_delta_interval_s: Annotated[
        Delay, Meta(description="how often the archive is asked how far it is behind", extra=LIVE)
    ] = 60.0
    backups_max: Annotated[Count, Meta(description="backups at the same time; further ones wait", extra=LIVE)] = 2
    transfers_max: Annotated[
        Count, Meta(description="log transfers at the same time; further ones wait", extra=LIVE)
    ] = 4
    proxy_check_interval_s: Annotated[
        Delay, Meta(description="how often a proxy's availability is checked", extra=LIVE)
    ] = 10.0
    proxy_check_timeout_s: Annotated[
        Delay, Meta(description="how long a proxy may take to answer the check", extra=LIVE)
    ] = 3.0
    probe_interval_s: Annotated[
        Delay, Meta(description="how often something that is away is looked for", extra=LIVE)
    ] = 1.0
    gather_delay_s: Annotated[
        Seconds, Meta(description="time from new log to its transfer, so that writes go together", extra=LIVE)
    ] = 0.1
    settle_delay_max_s: Annotated[
        Seconds, Meta(description="longest wait for more log when little is there", extra=LIVE)
    ] = 1.0

    def check(self) -> None:
        super().check()
        try:
            self.archive_address()
            self.proxy_addresses()
        except UsageError as exc:
            raise ConfigError(exc.message, hint=exc.hint, **exc.facts) from exc
        if len(set(self.proxy_addresses())) != len(self.proxy):
            raise ConfigError("a proxy is named twice", proxy=",".join(self.proxy))

    def archive_address(self) -> Address:
        """Return where the primary archive listens; raises UsageError."""
        return parse_address(self.archive)

    def proxy_addresses(self) -> list[Address]:
        """Return where the proxies listen, best first; raises UsageError."""
        return [parse_address(text) for text in self.proxy]
