"""Using another primary archive, or other proxies, at once and over restarts, without touching the configuration.

BASE_DIR/retarget.json has the value that counts and the configured one that it replaced. It holds as long as the
configuration still says the replaced value; once somebody has changed that, the configuration wins and the value
is dropped. Source: docs/storage.md, "Other archives and proxies".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from walbd.daemon.env import Env, Pool
from walbd.daemon.net import parse_address
from walbd.daemon.record import load_record, save_record
from walbd.daemon.reload import Read, Settings
from walbd.errors import ConfigError, CorruptData, NotFound, UsageError
from walbd.fs import FileSystem, failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import Fact
from walbd.storage.config import StorageConfig

log = structlog.get_logger()

NAME: Final = "retarget.json"

FP_BEFORE_SAVE: Final = failpoints.register(
    "storage.retarget.before_save", "archive and proxies as before: the change was not answered and did not happen"
)
FP_AFTER_SAVE: Final = failpoints.register(
    "storage.retarget.after_save", "the new archive or proxies are on disk, and count from the next start on"
)
FP_BEFORE_DROP: Final = failpoints.register(
    "storage.retarget.before_drop", "an override that says what the configuration says, or that it has overtaken"
)


class Override(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts instead of the configuration, and the configured values that were replaced; empty: nothing."""

    archive: str = ""
    archive_replaced: str = ""
    proxy: tuple[str, ...] = ()
    proxy_replaced: tuple[str, ...] = ()

    def left_by(self, config: StorageConfig) -> Override:
        """Return what of this still holds under a configuration."""
        left = Override()
        if self.archive and config.archive == self.archive_replaced != self.archive:
            left = msgspec.structs.replace(left, archive=self.archive, archive_replaced=self.archive_replaced)
        if self.proxy and tuple(config.proxy) == self.proxy_replaced != self.proxy:
            left = msgspec.structs.replace(left, proxy=self.proxy, proxy_replaced=self.proxy_replaced)
        return left

    def on(self, config: StorageConfig) -> StorageConfig:
        """Return the configuration that counts. Raises ConfigError when it would be a bad one."""
        if self.archive:
            config = msgspec.structs.replace(config, archive=self.archive)
        if self.proxy:
            config = msgspec.structs.replace(config, proxy=list(self.proxy))
        config.check()
        return config

    def __bool__(self) -> bool:
        return bool(self.archive or self.proxy)


class StorageSettings(Settings[StorageConfig]):
    """The settings of a storage daemon; archive and proxies may be overridden durably."""

    def __init__(self, config: StorageConfig, env: Env, read: Read[StorageConfig] | None = None) -> None:
        super().__init__(config, read)
        self._env = env
        self.override = Override()
        self.problem = ""  # why the override on disk cannot be used
        self._fs = env.fs
        self._path = Path(config.base_dir) / NAME

    async def load(self) -> None:
        """Take over the override of an earlier life; the caller holds the base directory.

        One that cannot be read does not keep the daemon from starting, as logs would pile up then; status tells.
        """
        try:
            found = await self._env.pools.run(Pool.RECORD, load_override, self._fs, self._path)
            left = found.left_by(self.configured)
            current = left.on(self.configured)
        except (CorruptData, ConfigError) as exc:
            why = exc.facts.get("reason") or exc.message
            self.problem = (
                f"{NAME} is unusable ({why}); the configured archive and proxies are used: retarget again"
            )
            log.error("retarget.unusable", path=str(self._path), error=str(exc))
            return
        await self._keep(left, was=found)
        self._use(self.configured, current)

    async def retarget(self, archive: str, proxies: Sequence[str]) -> list[str]:
        """Use another archive ("": as it is) or other proxies (none: as they are) from now on, durably.

        Return the settings that changed. Raises UsageError or DiskFailed, and then nothing has changed.
        """
        if not archive and not proxies:
            raise UsageError("neither an archive nor proxies are given", hint="name what is to be used")
        for text in (*([archive] if archive else []), *proxies):
            if (address := parse_address(text)).port == 0 and not address.path:
                raise UsageError("a server has no port 0", address=text)
        async with self._lock:
            wanted = self.override
            if archive:
                wanted = msgspec.structs.replace(wanted, archive=archive, archive_replaced=self.configured.archive)
            if proxies:
                wanted = msgspec.structs.replace(
                    wanted, proxy=tuple(proxies), proxy_replaced=tuple(self.configured.proxy)
                )
            wanted = wanted.left_by(self.configured)
            try:
                current = wanted.on(self.configured)
            except ConfigError as exc:
                raise UsageError(exc.message, hint=exc.hint, **exc.facts) from exc
            await self._keep(wanted, was=self.override, anew=bool(self.problem))
            changed = self._use(self.configured, current)
        log.info("storage.retargeted", archive=self.current.archive, proxy=self.current.proxy, changed=changed)
        return changed

    def facts(self) -> dict[str, Fact]:
        """Return what status shows: what counts, and what it overrides."""
        shown: dict[str, Fact] = {"archive": self.current.archive, "proxy": ",".join(self.current.proxy)}
        if self.override.archive:
            shown["archive_configured"] = self.configured.archive
        if self.override.proxy:
            shown["proxy_configured"] = ",".join(self.configured.proxy)
        return shown

    async def _adopt(self, configured: StorageConfig) -> list[str]:
        left = self.override.left_by(configured)
        current = left.on(configured)
        await self._keep(left, was=self.override)
        return self._use(configured, current)

    async def _keep(self, override: Override, *, was: Override, anew: bool = False) -> None:
        """Make an override durable, and then known; `anew`: also when it is the same."""
        if override != was or anew:
            await self._env.pools.run(Pool.RECORD, save_override, self._fs, self._path, override)
            for name in ("archive", "proxy"):
                if getattr(was, name) and not getattr(override, name):
                    log.warning("retarget.dropped", setting=name, value=getattr(was, name))
            self.problem = ""
        self.override = override


def load_override(fs: FileSystem, path: Path) -> Override:
    """Read the override; an empty one if there is no file. Blocks; raises CorruptData."""
    try:
        return load_record(fs, path, Override)
    except NotFound:
        return Override()


def save_override(fs: FileSystem, path: Path, override: Override) -> None:
    """Replace or remove the file, durably. Blocks; raises DiskFailed."""
    with disk_errors(path, "replace"):
        if override:
            failpoints.hit(FP_BEFORE_SAVE)
            save_record(fs, path, override)
            failpoints.hit(FP_AFTER_SAVE)
        else:
            failpoints.hit(FP_BEFORE_DROP)
            fs.unlink(path)
            fs.sync_dir(path.parent)
