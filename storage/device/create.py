"""Making and removing devices: the files, the log format, the device directory."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import msgspec

from walbd.errors import AlreadyExists, Busy, NotFound, UsageError
from walbd.format.superblock import Superblock
from walbd.fs import File, FileSystem, failpoints, physical_block_size
from walbd.storage.device.config import (
    CONFIG_NAME,
    DeviceConfig,
    control_address,
    device_name,
    load_config,
    nbd_address,
)
from walbd.storage.device.offline import format_ldev
from walbd.storage.device.start import RING_MIN_PB
from walbd.units import LB, MIB, size_lb

LDEV_SIZE_MIN_B = 1 * MIB

FP_BEFORE_DIRECTORY = failpoints.register(
    "device.create.before_directory", "perhaps new files, a formatted log device, and no device directory"
)


def create_device(
    fs: FileSystem,
    base_dir: Path,
    name: str,
    config: DeviceConfig,
    *,
    size_b: int | None,
    ldev_size_b: int | None,
    pbs: int | None,
    force: bool,
    rng: random.Random,
) -> Superblock:
    """Make a device: missing files of the given sizes, an empty log, the directory with `device.toml`.

    Existing files and block devices are taken as they are; the contents of the data device become the volume's.
    Raises AlreadyExists, Refused when the log device holds a log already and not `force`, UsageError. What was
    created here is removed again when it fails.
    """
    device_name(name)
    directory = base_dir / name
    for check in (control_address, nbd_address):
        check(directory)  # refuses a path that is too long for a socket
    if fs.exists(directory):
        raise AlreadyExists("the device exists", hint="`walbd device delete` removes it", path=str(directory))
    config.check(CONFIG_NAME)
    ldev_path, ddev_path = Path(config.ldev), Path(config.ddev)
    with ExitStack() as undo, ExitStack() as files:  # files are closed before they may be removed
        ddev = files.enter_context(_open_or_create(fs, ddev_path, size_b, "--size", undo, allocate=False))
        ldev = files.enter_context(_open_or_create(fs, ldev_path, ldev_size_b, "--ldev-size", undo, allocate=True))
        if ldev.size() < LDEV_SIZE_MIN_B:
            raise UsageError("the log device is too small", hint="1 MiB is the least", path=str(ldev_path))
        if ddev.size() < LB:
            raise UsageError("the data device is empty", hint="give --size", path=str(ddev_path))
        superblock = format_ldev(ldev, ddev, pbs=pbs, name=name, force=force, rng=rng)
        assert superblock.ring_size_pb >= RING_MIN_PB
        ddev.sync()
        failpoints.hit(FP_BEFORE_DIRECTORY)
        fs.make_dir(base_dir, parents=True)
        fs.make_dir(directory)
        undo.callback(fs.remove_tree, directory)
        fs.replace_durably(directory / CONFIG_NAME, config.to_toml().encode())
        undo.pop_all()  # it is done: nothing is undone
    return superblock


def _open_or_create(
    fs: FileSystem, path: Path, size_b: int | None, option: str, undo: ExitStack, *, allocate: bool
) -> File:
    """Open a file or device for us alone, or create the file with `size_b`.

    `allocate` takes the space at once: a log that runs out of disk would make the device read-only.
    """
    if fs.exists(path):
        file = fs.open(path, write=True, lock=True)
        if size_b is not None and file.size() != size_b:
            found_b = file.size()
            file.close()
            raise UsageError(
                "the file exists and has another size",
                hint=f"leave out {option} to take it as it is",
                path=str(path),
                size_b=found_b,
                wanted_b=size_b,
            )
        return file
    if size_b is None:
        raise NotFound("the file does not exist", hint=f"give {option} to create it", path=str(path))
    size_lb(size_b)
    if size_b == 0:
        raise UsageError("a size is zero", hint=f"give a larger {option}")
    file = fs.open(path, create=True, lock=True)
    undo.callback(fs.unlink, path)
    try:
        if allocate:
            file.allocate(size_b)
        else:
            file.truncate(size_b)
    except BaseException:
        file.close()
        raise
    fs.sync_dir(path.parent)
    return file


def delete_device(fs: FileSystem, base_dir: Path, name: str, *, with_files: bool) -> list[Path]:
    """Remove the directory of a device that is not served; with `with_files`, its plain files too.

    Returns the files that were kept. Raises NotFound, Busy while the device is served.
    """
    directory = base_dir / device_name(name)
    config = load_config(fs, directory)
    kept: list[Path] = []
    with ExitStack() as held:
        for path in (directory / config.ldev, directory / config.ddev):
            if not fs.exists(path):
                continue
            try:
                file = held.enter_context(fs.open(path, write=True, lock=True))
            except Busy as exc:
                raise Busy("the device is being served", hint="stop it first", path=str(path)) from exc
            if not with_files or physical_block_size(file) is not None:
                kept.append(path)
        fs.remove_tree(directory)
        for path in (directory / config.ldev, directory / config.ddev):
            if path not in kept:
                fs.unlink(path)
    return kept


def absolute(config: DeviceConfig) -> DeviceConfig:
    """Return the configuration with absolute paths, so that it means the same from anywhere."""
    return msgspec.structs.replace(
        config, ldev=str(Path(config.ldev).absolute()), ddev=str(Path(config.ddev).absolute())
    )
