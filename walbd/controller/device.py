"""WalB devices of a host: userspace ones, and the kernel driver's. Source: docs/controller.md, "Devices"."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final, Protocol

from walbd.controller.constants import TIMEOUT_SEC, Lbs, Mebi
from walbd.controller.local import RunCommand, path_test, run_local_command
from walbd.controller.verify import verify_function, verify_int, verify_size_unit, verify_timeout, verify_type
from walbd.errors import NotSupported, Refused, TimedOut, UsageError

POLL_S: Final = 0.3
DEVICE_BASE_DIR: Final = "/var/lib/walbd/device"
_KERNEL_TOOL: Final = "wdevc"


class Driver(Protocol):
    """What one kind of device is made and looked at with."""

    path: str

    def run(self, cmdArgs: list[str]) -> str: ...
    def exists(self) -> bool: ...
    def format_ldev(self, doDiscard: bool) -> None: ...
    def create(self, kernel: dict[str, int], own: dict[str, str], force: bool) -> None: ...
    def delete(self) -> None: ...
    def resize(self, newSizeMb: int) -> None: ...
    def reset(self) -> None: ...
    def get_size_lb(self) -> int: ...
    def get_log_size_lb(self) -> int: ...
    def lsids(self) -> dict[str, int]: ...


class Device:
    """A WalB device, and the program that makes and looks at it.

    `wdevcPath` says of which kind: `walbd` (the default) for a userspace device, whose `path` is its directory
    below `baseDir`; a path that ends in `wdevc` for one of the kernel driver, whose `path` is /dev/walb/NAME.
    `path` is what a storage takes (`init_storage(sx, vol, dev.path)`). `runCommand` runs programs on the device's
    host. A userspace device is served by a process of its own (`walbd device serve`).
    """

    def __init__(
        self,
        name: str,
        ldev: str = "",
        ddev: str = "",
        wdevcPath: str = "walbd",
        runCommand: RunCommand = run_local_command,
        *,
        baseDir: str = DEVICE_BASE_DIR,
    ) -> None:
        for text in (name, ldev, ddev, wdevcPath, baseDir):
            verify_type(text, str)
        verify_function(runCommand)
        if not name or "/" in name:
            raise UsageError("bad device name", name=name)
        self.name = name
        self.ldev = ldev
        self.ddev = ddev
        self.wdevcPath = wdevcPath
        self.runCommand = runCommand
        self.baseDir = baseDir
        kernel = Path(wdevcPath).name == _KERNEL_TOOL
        self._driver: Driver = _Kernel(self) if kernel else _Userspace(self)

    @classmethod
    def at(cls, path: str) -> Device:
        """Return the userspace device that has this directory, on this host."""
        verify_type(path, str)
        return cls(Path(path).name, baseDir=str(Path(path).parent))

    @property
    def path(self) -> str:
        """The device's directory, or its block device."""
        return self._driver.path

    def run_wdevc(self, cmdArgs: list[str]) -> str:
        """Run `walbd device ...` or `wdevc ...`, and return its output."""
        verify_type(cmdArgs, list, str)
        return self._driver.run(cmdArgs)

    def exists(self) -> bool:
        """Say whether the device has been created."""
        return self._driver.exists()

    def format_ldev(self, doDiscard: bool = True) -> None:
        """Make `ldev` an empty log device for `ddev`. A log that it holds is lost."""
        verify_type(doDiscard, bool)
        self._driver.format_ldev(doDiscard)

    def create(
        self,
        maxl: int | None = None,
        maxp: int | None = None,
        minp: int | None = None,
        qp: int | None = None,
        fs: int | None = None,
        fp: int | None = None,
        bp: int | None = None,
        bi: int | None = None,
        *,
        sizeU: str | None = None,
        ldevSizeU: str | None = None,
        pbs: int | None = None,
        force: bool = False,
    ) -> None:
        """Make the device out of `ldev` and `ddev`.

        The positional options are those of the kernel driver, and refused for a userspace device. By keyword, for
        a userspace device: sizes, where `ddev` and `ldev` are to be created as files, and the physical block
        size. There, a log device that holds a log already is refused unless `force`, or this object has just
        formatted it.
        """
        verify_type(force, bool)
        given = {"maxl": maxl, "maxp": maxp, "minp": minp, "qp": qp, "fs": fs, "fp": fp, "bp": bp, "bi": bi}
        kernel = {name: value for name, value in given.items() if value is not None}
        for value in kernel.values():
            verify_int(value)
        own = {}
        for option, size in (("--size", sizeU), ("--ldev-size", ldevSizeU)):
            if size is not None:
                verify_size_unit(size)
                own[option] = size
        if pbs is not None:
            verify_int(pbs)
            own["--pbs"] = str(pbs)
        self._driver.create(kernel, own, force)

    def delete(self) -> None:
        """Remove the device, which must not be in use. Its log and data devices are kept."""
        self._driver.delete()

    def resize(self, newSizeMb: int) -> None:
        """Grow the volume, after its data device. One that a storage manages is grown with Controller.resize."""
        verify_int(newSizeMb)
        self._driver.resize(newSizeMb)

    def reset(self) -> None:
        """Throw away the log of a device that is in use on this host: new uuid, no overflow.

        A volume that is managed needs a full or hash backup afterwards.
        """
        self._driver.reset()

    def info(self) -> dict[str, Any]:
        """Return what a userspace device tells of itself (`walbd device info --json`)."""
        if not isinstance(self._driver, _Userspace):
            raise NotSupported("a device of the kernel driver tells only its sizes and lsids", path=self.path)
        return self._driver.info()

    def get_size_lb(self) -> int:
        """Return the size of the volume [logical block]."""
        return self._driver.get_size_lb()

    def get_size_mb(self) -> int:
        """Return the size of the volume [MiB]; raises Refused when it is not a whole number of them."""
        size_b = self.get_size_lb() * Lbs
        if size_b % Mebi:
            raise Refused("the size is not a whole number of MiB", hint="use get_size_lb", size_b=size_b)
        return size_b // Mebi

    def get_log_size_lb(self) -> int:
        """Return how much log the device can hold [logical block]; kernel driver: the size of the log device."""
        return self._driver.get_log_size_lb()

    def wait_for_log_empty(self, timeoutS: float = TIMEOUT_SEC) -> None:
        """Wait until a storage has taken all log of a device that is in use. Raises TimedOut."""
        verify_timeout(timeoutS)
        deadline = time.monotonic() + timeoutS
        while True:
            lsids = self._driver.lsids()
            if lsids["completed"] == lsids["oldest"]:
                return
            if time.monotonic() >= deadline:
                raise TimedOut("waited too long for the log to be taken", path=self.path, timeout_s=timeoutS)
            time.sleep(POLL_S)

    def __str__(self) -> str:
        return ", ".join((self.name, self.ldev, self.ddev, self.wdevcPath))


class _Userspace:
    """Devices of `walbd device`."""

    def __init__(self, dev: Device) -> None:
        self._dev = dev
        self._formatted = False
        self.path = f"{dev.baseDir}/{dev.name}"

    def run(self, cmdArgs: list[str]) -> str:
        return self._dev.runCommand([self._dev.wdevcPath, "device", *cmdArgs])

    def exists(self) -> bool:
        return path_test(self._dev.runCommand, "-f", f"{self.path}/device.toml")

    def format_ldev(self, doDiscard: bool) -> None:
        del doDiscard  # a file needs none, and what is formatted is overwritten in any case
        self._dev.runCommand([self._dev.wdevcPath, "ldev", "format", self._dev.ldev, self._dev.ddev, "--force"])
        self._formatted = True

    def create(self, kernel: dict[str, int], own: dict[str, str], force: bool) -> None:
        if kernel:
            raise NotSupported(
                "a userspace device has no such options",
                hint="see docs/device.md for its settings",
                options=", ".join(kernel),
            )
        options = [word for pair in own.items() for word in pair]
        forced = ["--force"] if force or self._formatted else []
        ldev_ddev = ["--ldev", self._dev.ldev, "--ddev", self._dev.ddev]
        self.run(["create", self._dev.name, "--base-dir", self._dev.baseDir, *ldev_ddev, *options, *forced])

    def delete(self) -> None:
        self.run(["delete", self._dev.name, "--base-dir", self._dev.baseDir])

    def resize(self, newSizeMb: int) -> None:
        self.run(["resize", self._dev.name, f"{newSizeMb}m", "--base-dir", self._dev.baseDir])

    def reset(self) -> None:
        from walbd.daemon.env import Env
        from walbd.storage.device.userspace import UserspaceDevice

        async def reset() -> None:
            await UserspaceDevice(env, Path(self.path), node="walbc").reset_wal()

        env = Env()
        try:
            asyncio.run(reset())
        finally:
            env.pools.close()

    def info(self) -> dict[str, Any]:
        text = self.run(["info", self._dev.name, "--base-dir", self._dev.baseDir, "--json"])
        facts: dict[str, Any] = json.loads(text)
        return facts

    def get_size_lb(self) -> int:
        return int(self.info()["size_lb"])

    def get_log_size_lb(self) -> int:
        facts = self.info()
        return int(facts["capacity_pb"]) * int(facts["pbs"]) // Lbs

    def lsids(self) -> dict[str, int]:
        lsids: dict[str, int] = self.info()["lsids"]
        if "completed" not in lsids:
            name = self._dev.name
            raise Refused("the device is not served", hint=f"walbd device serve {name}", path=self.path)
        return lsids


class _Kernel:
    """Devices of the kernel driver, by its tool and its files under /sys."""

    def __init__(self, dev: Device) -> None:
        self._dev = dev
        self._sys = f"/sys/block/walb!{dev.name}"
        self.path = f"/dev/walb/{dev.name}"

    def run(self, cmdArgs: list[str]) -> str:
        return self._dev.runCommand([self._dev.wdevcPath, *cmdArgs])

    def exists(self) -> bool:
        return path_test(self._dev.runCommand, "-b", self.path)

    def format_ldev(self, doDiscard: bool) -> None:
        self.run(["format-ldev", self._dev.ldev, self._dev.ddev, *([] if doDiscard else ["-nd"])])

    def create(self, kernel: dict[str, int], own: dict[str, str], force: bool) -> None:
        if own or force:
            raise NotSupported(
                "the kernel driver has no such options",
                hint="prepare the block devices, and use format_ldev",
                options=", ".join([*own, *(["--force"] if force else [])]),
            )
        options = [word for name, value in kernel.items() for word in (f"-{name}", str(value))]
        self.run(["create-wdev", self._dev.ldev, self._dev.ddev, "-n", self._dev.name, *options])

    def delete(self) -> None:
        self.run(["delete-wdev", self.path])

    def resize(self, newSizeMb: int) -> None:
        self.run(["resize", self.path, str(newSizeMb * Mebi // Lbs)])

    def reset(self) -> None:
        self.run(["reset-wal", self.path])

    def get_size_lb(self) -> int:
        return int(self._read("size"))

    def get_log_size_lb(self) -> int:
        return int(self._dev.runCommand(["/sbin/blockdev", "--getsz", self._dev.ldev]))

    def lsids(self) -> dict[str, int]:
        words = self._read("walb/lsids").split()
        return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}

    def _read(self, name: str) -> str:
        return self._dev.runCommand(["/bin/cat", f"{self._sys}/{name}"])
