"""What all volumes of one storage daemon have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from walbd.daemon.conn import Me
from walbd.daemon.env import Env
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.scheduler import Scheduler
from walbd.daemon.tasks import spawn
from walbd.errors import Stopping
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import Fact
from walbd.storage.config import StorageConfig
from walbd.storage.device.interface import Device
from walbd.storage.pace import Slots, SpeedLimit
from walbd.storage.retarget import StorageSettings

T = TypeVar("T")

OpenDevice = Callable[[str], Device]


def hit(name: str, directory: Path) -> None:
    """Act if a failpoint is armed; its error leaves as DiskFailed, as that of a failing disk would."""
    with disk_errors(directory, "reach a step"):
        failpoints.hit(name)


@dataclass(kw_only=True)
class Shared:
    """The world of a volume. `tasks` is there once the daemon has started, and gone when it stops."""

    env: Env
    settings: StorageSettings
    me: Me
    open_device: OpenDevice
    scheduler: Scheduler[str]  # keys are volume names
    jobs: Jobs
    scan_limit: SpeedLimit
    scan_slots: Slots
    tasks: asyncio.TaskGroup | None = field(default=None)

    @property
    def config(self) -> StorageConfig:
        """The settings that count now: ask each time, and keep no copy."""
        return self.settings.current

    def directory(self, volume: str) -> Path:
        """Return the directory of a volume."""
        return Path(self.config.base_dir) / volume

    def now(self) -> int:
        """Return the time [unix s]."""
        return self.env.clock.now()

    def group(self) -> asyncio.TaskGroup:
        """Return where background tasks are born; raises Stopping when the daemon takes no more."""
        if self.tasks is None:
            raise Stopping("the daemon is stopping")
        return self.tasks

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Begin background work; raises Stopping when the daemon takes no more."""
        if self.tasks is None:
            work.close()
            raise Stopping("the daemon is stopping")
        return spawn(self.tasks, work, name)

    def start_job(self, name: str, volume: str, work: Callable[[Job], Awaitable[dict[str, Fact] | None]]) -> Job:
        """Start a job as a background task."""
        return self.jobs.start(self.group(), name, volume, work)
