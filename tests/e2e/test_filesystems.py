"""Real file systems over a device: nbdfuse makes a file of the volume, a loop device makes a disk of the file.

500 MB of files are copied in while the full backup runs. A snapshot of the unmounted file system must be
restored clean and equal; one taken in the middle of the copying must mount, as after a power failure. A machine
that cannot mount an empty file system is told from a failure of walbd by trying that.
"""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.kit.disks import MKFS, Failed, impossible_here, mounted, run
from tests.kit.group import WAIT_S, Group, Volume, wait_until

SIZE_B = 1 << 30
FILES_B = 500_000_000
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}
MOUNT = {"ext4": [], "xfs": ["-o", "nouuid"]}

pytestmark = pytest.mark.root


@contextmanager
def as_disk(volume: Volume, directory: Path) -> Iterator[Path]:
    """Give the volume as a loop device."""
    point = directory / "volume"
    point.touch()
    child = subprocess.Popen(["nbdfuse", str(point), f"nbd+unix:///?socket={volume.socket_path}"])
    try:
        wait_until(lambda: point.stat().st_size == SIZE_B or child.poll() is not None, "nbdfuse")
        assert child.poll() is None
        disk = run("losetup", "--direct-io=on", "--show", "-f", point)
        try:
            yield Path(disk)
        finally:
            run("losetup", "-d", disk)
    finally:
        # The kernel lets go of the file once nobody looks at the loop device any more.
        wait_until(lambda: child.poll() is not None or not unmounted(point), "the end of nbdfuse")
        child.wait(WAIT_S)


def unmounted(point: Path) -> str:
    """Unmount; return what is in the way."""
    try:
        run("umount", point)
    except Failed as exc:
        return str(exc)
    return ""


def make_files(top: Path) -> None:
    """Make a tree with files from a few bytes to 20 MB, a link, a hole, and names in many directories."""
    rng = random.Random(1)
    left, number = FILES_B, 0
    while left > 0:
        size = min(left, rng.choice([300, 5_000, 40_000, 700_000, 4_000_000, 20_000_000]))
        directory = top / f"d{number % 17}" / f"e{number % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        half = size // 2
        (directory / f"f{number}").write_bytes(
            rng.randbytes(half) + b"a line of text\n" * ((size - half) // 15 + 1)
        )
        left, number = left - size, number + 1
    (top / "link").symlink_to("d1")
    with (top / "hole").open("wb") as file:
        file.truncate(10 << 20)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_file_system(tmp_path: Path, kind: str) -> None:
    if reason := impossible_here(tmp_path, kind, "nbdfuse", CHECK[kind][0], fuse=True):
        pytest.skip(f"impossible on this machine: {reason}")
    source = tmp_path / "source"
    source.mkdir()
    make_files(source)
    names = sorted(path.name for path in source.iterdir())
    with Group(tmp_path / "g") as group, ExitStack() as stack:
        volume = group.add_volume("vol0", size_b=SIZE_B, log_b=SIZE_B)
        s0, a0 = group.s[0], group.a[0]
        with as_disk(volume, tmp_path) as disk:
            run(*MKFS[kind], disk)
            with mounted(disk, tmp_path / "mnt") as top:
                errors: list[BaseException] = []

                def copy() -> None:
                    try:
                        for name in names:
                            run("cp", "-a", source / name, top / name)
                    except BaseException as exc:
                        errors.append(exc)

                copying = threading.Thread(target=copy)
                copying.start()
                stack.callback(copying.join)
                group.ctl.full_backup(s0, "vol0", block=False)
                wait_until(lambda: group.ctl.get_state(s0, "vol0") == "Target", "the full backup", timeout_s=300)
                live = group.ctl.snapshot(s0, "vol0", [a0], timeoutS=300)
                copying.join()
                assert not errors
            run("sync")
        clean = group.ctl.snapshot(s0, "vol0", [a0], timeoutS=300)

        for gid in (clean, live):
            group.ctl.restore(a0, "vol0", gid, timeoutS=300)
        image = Path(group.ctl.get_restored_path(a0, "vol0", clean))
        run(*CHECK[kind], image)
        with mounted(image, tmp_path / "restored", "-o", "loop,ro"):
            run("diff", "-r", "--no-dereference", source, tmp_path / "restored", "--exclude=lost+found")

        image = Path(group.ctl.get_restored_path(a0, "vol0", live))
        with mounted(image, tmp_path / "crashed", "-o", "loop", *MOUNT[kind]):
            pass  # the journal is replayed
        run(*CHECK[kind], image)
