"""Programs of root for disks and file systems, and whether this machine can run them at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MKFS = {"ext4": ["mkfs.ext4", "-q"], "xfs": ["mkfs.xfs", "-q"]}
_SIZE_B = 512 << 20  # of an empty file system; xfs is refused below 300 MiB


class Failed(AssertionError):
    """A program did not end as it should."""


def run(*args: str | Path, code: int = 0) -> str:
    """Run a program to its end and return what it said; raises Failed."""
    done = subprocess.run(
        [str(arg) for arg in args],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PATH": PATH},
    )
    if done.returncode != code:
        raise Failed(f"{' '.join(map(str, args))}: {done.stdout}{done.stderr}".strip())
    return (done.stdout + done.stderr).strip()


@contextmanager
def mounted(disk: Path, point: Path, *options: str) -> Iterator[Path]:
    """Mount a file system while the block runs."""
    point.mkdir(exist_ok=True)
    run("mount", *options, disk, point)
    try:
        yield point
    finally:
        run("umount", point)


def impossible_here(directory: Path, kind: str, *tools: str, fuse: bool = False) -> str:
    """Say why this machine cannot use loop devices and such a file system, with nothing of walbd in it.

    It is tried with an empty one, since root alone tells nothing: containers may allow it or not. Empty: it can.
    """
    if os.geteuid() != 0:
        return "loop devices and mounts need root"
    wanted = ("losetup", "mount", "umount", MKFS[kind][0], *tools)
    if missing := [tool for tool in wanted if shutil.which(tool, path=PATH) is None]:
        return f"not installed: {' '.join(missing)}"
    image = directory / "empty.img"
    with image.open("wb") as file:
        file.truncate(_SIZE_B)
    try:
        if fuse:
            os.close(os.open("/dev/fuse", os.O_RDWR))
        run(*MKFS[kind], image)
        with mounted(image, directory / "empty", "-o", "loop"):
            pass
    except (OSError, Failed) as exc:
        return " ".join(str(exc).split())
    finally:
        image.unlink()
    return ""
