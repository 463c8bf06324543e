"""`walbd device`: make, serve and look at the devices of this host."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from walbd.cli.output import note, print_facts, print_json
from walbd.errors import ConnectError
from walbd.units import format_size, parse_size, size_lb

T = TypeVar("T")

BASE_DIR = click.option(
    "--base-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/var/lib/walbd/device"),
    show_default=True,
    envvar="WALBD_DEVICE_DIR",
    show_envvar=True,
    help="Directory with a subdirectory for each device.",
)
NAME = click.argument("name")


class _DeviceGroup(click.Group):
    """`walbd device NAME` is short for `walbd device serve NAME`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["serve", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_DeviceGroup)
def device() -> None:
    """Userspace WalB devices: volumes served over NBD whose writes are logged for the backup.

    `walbd device NAME` is short for `walbd device serve NAME`.
    """


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)


@device.command()
@NAME
@BASE_DIR
@click.option("--ldev", required=True, metavar="PATH", help="Log device: a block device, or a file.")
@click.option("--ddev", required=True, metavar="PATH", help="Data device: a block device, or a file.")
@click.option("--size", metavar="SIZE", help="Create DDEV as a file of this size, if it does not exist.")
@click.option("--ldev-size", metavar="SIZE", help="Create LDEV as a file of this size, if it does not exist.")
@click.option(
    "--pbs",
    type=click.Choice(["512", "4096"]),
    default=None,
    help="Physical block size; by default that of the devices, 512 for files.",
)
@click.option(
    "--nbd-listen",
    metavar="unix|HOST:PORT",
    multiple=True,
    help="Where to serve NBD besides the unix socket, which is always there. May be repeated.",
)
@click.option("--nbd-insecure", is_flag=True, help="Allow an address that other machines can reach without TLS.")
@click.option("--force", is_flag=True, help="Format LDEV though it holds a log already; that log is lost.")
def create(
    name: str,
    base_dir: Path,
    ldev: str,
    ddev: str,
    size: str | None,
    ldev_size: str | None,
    pbs: str | None,
    nbd_listen: tuple[str, ...],
    nbd_insecure: bool,
    force: bool,
) -> None:
    """Make the device NAME out of a log device and a data device.

    What DDEV contains becomes the contents of the volume.

    Example: walbd device create vol0 --ldev /dev/vg/vol0-log --ddev /dev/vg/vol0-data
    """
    from walbd.fs import OsFileSystem
    from walbd.storage.device.config import DeviceConfig
    from walbd.storage.device.create import absolute, create_device

    config = DeviceConfig(
        ldev=ldev,
        ddev=ddev,
        nbd_listen=[address for address in nbd_listen if address != "unix"],
        nbd_insecure=nbd_insecure,
    )
    superblock = create_device(
        OsFileSystem(),
        base_dir,
        name,
        absolute(config),
        size_b=_size(size),
        ldev_size_b=_size(ldev_size),
        pbs=int(pbs) if pbs else None,
        force=force,
        rng=random.SystemRandom(),
    )
    ring_b = superblock.ring_size_pb * superblock.pbs
    print(
        f"{base_dir / name}: {format_size(superblock.device_size_lb * 512)} volume, "
        f"{format_size(ring_b)} of log, {superblock.pbs}-byte blocks"
    )


@device.command()
@NAME
@BASE_DIR
@click.option(
    "--expect-lsid",
    type=int,
    metavar="LSID",
    help="Refuse to start if the log ends before LSID: somebody has taken the log up to there.",
)
def serve(name: str, base_dir: Path, expect_lsid: int | None) -> None:
    """Serve the device NAME in the foreground until SIGTERM."""
    from walbd.daemon.main import run_daemon
    from walbd.fs import OsFileSystem
    from walbd.storage.device.config import device_name, load_config
    from walbd.storage.device.server import DeviceServer

    directory = base_dir.absolute() / device_name(name)
    config = load_config(OsFileSystem(), directory)
    run_daemon(
        "device",
        lambda env, shutdown: DeviceServer(config, directory, env, shutdown, expect_lsid=expect_lsid),
        log_level=config.log_level,
        log_format=config.log_format,
    )


@device.command()
@NAME
@BASE_DIR
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, base_dir: Path, as_json: bool) -> None:
    """Show the device NAME: what it is, and how far its log is."""
    from walbd.daemon.env import Env
    from walbd.storage.device.config import device_name, load_config
    from walbd.storage.device.userspace import UserspaceDevice

    directory = base_dir.absolute() / device_name(name)
    env = Env()
    config = load_config(env.fs, directory)
    try:
        facts = _served_facts(_run(UserspaceDevice(env, directory, node="walbd").info()))
    except ConnectError:
        facts = _stopped_facts(name, directory / config.ldev, directory / config.ddev)
    if as_json:
        print_json(facts)
        return
    lsids = facts.pop("lsids")
    shown = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    print_facts({name: "-" if value == "" else value for name, value in (shown | lsids).items()})


def _served_facts(found: Any) -> dict[str, Any]:
    from walbd.protocol.codec import to_json_ready

    facts: dict[str, Any] = to_json_ready(found)
    lsids = facts.pop("lsids")
    del lsids["uuid"], lsids["read_only"]
    flags = {flag: lsids.pop(flag) for flag in ("overflow", "frozen")}
    return {"state": "served", **facts, **flags, "usage_pb": lsids["latest"] - lsids["oldest"], "lsids": lsids}


def _stopped_facts(name: str, ldev: Path, ddev: Path) -> dict[str, Any]:
    from walbd.fs import OsFileSystem
    from walbd.storage.device.offline import open_ldev

    with open_ldev(OsFileSystem(), ldev) as (_, opened):
        sb = opened.superblock
    if opened.problem is not None:
        note(f"walbd: {opened.problem}; superblock 1 is used instead")
    return {
        "state": "not served",
        "name": name,
        "uuid": sb.uuid.hex(),
        "pbs": sb.pbs,
        "salt": sb.salt,
        "size_lb": sb.device_size_lb,
        "capacity_pb": sb.ring_size_pb,
        "ldev": str(ldev),
        "ddev": str(ddev),
        "nbd": [],
        "read_only": "",
        "overflow": sb.written_lsid - sb.oldest_lsid > sb.ring_size_pb,
        "frozen": False,
        "usage_pb": sb.written_lsid - sb.oldest_lsid,
        "lsids": {"prev_written": sb.written_lsid, "oldest": sb.oldest_lsid},
    }


@device.command()
@NAME
@click.argument("size")
@BASE_DIR
def resize(name: str, size: str, base_dir: Path) -> None:
    """Grow the volume of the device NAME to SIZE (0: to the size of its data device), served or not.

    A data device that is a file grows along; a block device must have been grown before. NBD clients see the
    new size when they connect again.

    Example: walbd device resize vol0 0
    """
    from walbd.daemon.env import Env
    from walbd.storage.device.config import device_name, load_config
    from walbd.storage.device.userspace import UserspaceDevice

    directory = base_dir.absolute() / device_name(name)
    env = Env()
    config = load_config(env.fs, directory)
    new_lb = size_lb(parse_size(size))
    try:
        now_lb = _run(UserspaceDevice(env, directory, node="walbd").resize(new_lb)).size_lb
    except ConnectError:
        from walbd.daemon.logs import configure
        from walbd.storage.device.engine import resize_stopped

        configure("warning", "console")
        now_lb = _run(resize_stopped(env, directory / config.ldev, directory / config.ddev, name, new_lb))
    print(f"{name}: {format_size(now_lb * 512)}")


@device.command()
@NAME
@BASE_DIR
@click.option("--files", is_flag=True, help="Remove the log and data devices too, where they are plain files.")
def delete(name: str, base_dir: Path, files: bool) -> None:
    """Remove the device NAME, which must not be served. Its log and data devices are kept."""
    from walbd.fs import OsFileSystem
    from walbd.storage.device.create import delete_device

    for path in delete_device(OsFileSystem(), base_dir, name, with_files=files):
        print(f"kept {path}")


def _run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
