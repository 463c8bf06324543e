"""The base directory of a daemon: one process holds it, and each volume has a directory in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from walbd.errors import AlreadyExists, Busy, NotFound, UsageError
from walbd.fs import File, FileSystem
from walbd.ids import volume_name

LOCK_NAME: Final = ".lock"  # no volume name has a dot


def lock_base(fs: FileSystem, base: Path, *, create: bool) -> File:
    """Hold the base directory for this process until the returned file is closed. Blocking.

    A missing directory is made if `create`. Raises NotFound for a missing one, Busy when another process has it.
    """
    if not fs.is_dir(base):
        if not create:
            raise NotFound(
                "the base directory does not exist",
                hint="mount its disk, or create the directory",
                path=str(base),
            )
        fs.make_dir(base, parents=True)
    path = base / LOCK_NAME
    try:
        fs.open(path, create=True).close()
    except AlreadyExists:
        pass
    try:
        return fs.open(path, write=True, lock=True)
    except Busy as exc:
        raise Busy("another daemon uses this directory", hint="stop it first", path=str(base)) from exc


def volume_names(fs: FileSystem, base: Path) -> list[str]:
    """Return the names of the directories that can be volumes. Blocking."""
    return [name for name in fs.list_names(base) if _is_volume_name(name) and fs.is_dir(base / name)]


def _is_volume_name(name: str) -> bool:
    try:
        volume_name(name)
    except UsageError:
        return False
    return True
