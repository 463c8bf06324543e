"""Things of a host: programs, block devices, userspace devices. Source: docs/controller.md, "Devices"."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from walbd.controller.constants import TIMEOUT_SEC, Lbs, Mebi
from walbd.controller.verify import verify_function, verify_int, verify_size_unit, verify_timeout, verify_type
from walbd.errors import Refused, TimedOut, UsageError, WalbError

POLL_S: Final = 0.3
DEVICE_BASE_DIR: Final = "/var/lib/walbd/device"


class RunCommand(Protocol):
    """Runs a program somewhere and returns what it printed; raises WalbError when it fails."""

    def __call__(self, args: list[str], putMsg: bool = False) -> str: ...


def run_local_command(args: list[str], putMsg: bool = False, quietErr: bool = False) -> str:
    """Run a program on this host and return its standard output, stripped.

    Raises WalbError when it cannot be run or exits with another status than 0. Its standard error passes
    through unless `quietErr`.
    """
    verify_type(args, list, str)
    if putMsg:
        sys.stderr.write(f"run: {shlex.join(args)}\n")
    try:
        done = subprocess.run(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quietErr else None, text=True, check=False
        )
    except OSError as exc:
        raise WalbError("cannot run the program", program=args[0] if args else "", reason=exc.strerror) from exc
    if done.returncode != 0:
        raise WalbError("the program failed", command=shlex.join(args), status=done.returncode)
    text = done.stdout.strip()
    if putMsg:
        sys.stderr.write(f"{text}\n")
    return text


def exists_file(path: str, runCommand: RunCommand = run_local_command) -> bool:
    """Say whether there is a block device at a path, where `runCommand` runs programs."""
    verify_type(path, str)
    verify_function(runCommand)
    return _test(runCommand, "-b", path)


def printL(ls: Sequence[object]) -> None:
    """Print one item a line."""
    for item in ls:
        sys.stdout.write(f"{item}\n")


class Device:
    """A userspace WalB device: its directory, and the program that makes and looks at it.

    `wdevcPath` is the `walbd` program; `runCommand` runs it on the device's host. `path` is what a storage takes
    (`init_storage(sx, vol, dev.path)`). The device is served by a process of its own (`walbd device serve`).
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

    @classmethod
    def at(cls, path: str) -> Device:
        """Return the device that has this directory, on this host."""
        verify_type(path, str)
        return cls(Path(path).name, baseDir=str(Path(path).parent))

    @property
    def path(self) -> str:
        """The device's directory."""
        return f"{self.baseDir}/{self.name}"

    def run_wdevc(self, cmdArgs: list[str]) -> str:
        """Run `walbd device ...` and return its output."""
        verify_type(cmdArgs, list, str)
        return self.runCommand([self.wdevcPath, "device", *cmdArgs])

    def exists(self) -> bool:
        """Say whether the device has been created."""
        return _test(self.runCommand, "-f", f"{self.path}/device.toml")

    def create(
        self,
        sizeU: str | None = None,
        ldevSizeU: str | None = None,
        pbs: int | None = None,
        force: bool = False,
    ) -> None:
        """Make the device out of `ldev` and `ddev`, which are created as files where sizes are given.

        A log device that holds a log already is refused unless `force`: that log is lost.
        """
        args = ["create", self.name, "--base-dir", self.baseDir, "--ldev", self.ldev, "--ddev", self.ddev]
        for option, size in (("--size", sizeU), ("--ldev-size", ldevSizeU)):
            if size is not None:
                verify_size_unit(size)
                args += [option, size]
        if pbs is not None:
            verify_int(pbs)
            args += ["--pbs", str(pbs)]
        self.run_wdevc([*args, *(["--force"] if force else [])])

    def delete(self) -> None:
        """Remove the device, which must not be served. Its log and data devices are kept."""
        self.run_wdevc(["delete", self.name, "--base-dir", self.baseDir])

    def resize(self, newSizeMb: int) -> None:
        """Grow the volume. One that a storage manages is grown there, not with this."""
        verify_int(newSizeMb)
        self.run_wdevc(["resize", self.name, f"{newSizeMb}m", "--base-dir", self.baseDir])

    def reset(self) -> None:
        """Throw away the log of a device that is served on this host: new uuid, no overflow.

        A volume that is managed needs a full or hash backup afterwards.
        """
        from walbd.daemon.env import Env
        from walbd.storage.device.userspace import UserspaceDevice

        env = Env()
        try:
            asyncio.run(_reset(UserspaceDevice(env, Path(self.path), node="walbc")))
        finally:
            env.pools.close()

    def info(self) -> dict[str, Any]:
        """Return what the device tells of itself (`walbd device info --json`)."""
        text = self.run_wdevc(["info", self.name, "--base-dir", self.baseDir, "--json"])
        facts: dict[str, Any] = json.loads(text)
        return facts

    def get_size_lb(self) -> int:
        """Return the size of the volume [logical block]."""
        return int(self.info()["size_lb"])

    def get_size_mb(self) -> int:
        """Return the size of the volume [MiB]; raises Refused when it is not a whole number of them."""
        size_b = self.get_size_lb() * Lbs
        if size_b % Mebi:
            raise Refused("the size is not a whole number of MiB", hint="use get_size_lb", size_b=size_b)
        return size_b // Mebi

    def get_log_size_lb(self) -> int:
        """Return how much log the device can hold [logical block]."""
        facts = self.info()
        return int(facts["capacity_pb"]) * int(facts["pbs"]) // Lbs

    def wait_for_log_empty(self, timeoutS: float = TIMEOUT_SEC) -> None:
        """Wait until a storage has taken all log of a device that is served. Raises TimedOut."""
        verify_timeout(timeoutS)
        deadline = time.monotonic() + timeoutS
        while True:
            facts = self.info()
            lsids = facts["lsids"]
            if "completed" not in lsids:
                raise Refused("the device is not served", hint=f"walbd device serve {self.name}", path=self.path)
            if lsids["completed"] == lsids["oldest"]:
                return
            if time.monotonic() >= deadline:
                raise TimedOut("waited too long for the log to be taken", path=self.path, timeout_s=timeoutS)
            time.sleep(POLL_S)

    def __str__(self) -> str:
        return ", ".join((self.name, self.ldev, self.ddev, self.wdevcPath))


async def _reset(device: Any) -> None:
    await device.reset_wal()


def _test(runCommand: RunCommand, flag: str, path: str) -> bool:
    answer = runCommand(["/bin/sh", "-c", f"if [ {flag} {shlex.quote(path)} ]; then echo 1; else echo 0; fi"])
    return answer.strip() == "1"
