"""Settings of the proxy daemon."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from walbd.daemon.config import LIVE, Count, DaemonConfig, Delay, Size
from walbd.errors import ConfigError
from walbd.units import MIB


class ProxyConfig(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a proxy can be told."""

    start_stopped: Annotated[bool, Meta(description="leave all volumes Stopped at start")] = False
    wdiff_send_size_max: Annotated[
        Size, Meta(description="wdiffs merged into one transfer, by size; the first one always goes", extra=LIVE)
    ] = 128 * MIB
    wdiff_send_count_max: Annotated[
        Count, Meta(description="wdiffs merged into one transfer, by number", extra=LIVE)
    ] = 1000
    free_reserve_b: Annotated[
        Size, Meta(description="free space that a wlog must leave on the disk, or it is refused", extra=LIVE)
    ] = 64 * MIB
    receives_max: Annotated[
        Count, Meta(description="wlogs received at the same time; more are refused", extra=LIVE)
    ] = 32
    sends_max: Annotated[
        Count, Meta(description="transfers to archives at the same time; more wait", extra=LIVE)
    ] = 8
    probe_interval_s: Annotated[
        Delay, Meta(description="how often an archive that is down is looked for", extra=LIVE)
    ] = 1.0

    def check(self) -> None:
        super().check()
        if self.wdiff_send_size_max == 0:
            raise ConfigError("wdiff_send_size_max must be positive")
