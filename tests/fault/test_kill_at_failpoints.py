"""Each process is killed at each of its failpoints: nothing acknowledged is lost, and backup goes on by itself.

A failpoint is a durable step of real code (walbd/fs/failpoints.py). For each one, a process is started with it
armed and the group does its work until the process has killed itself there. The process is started again, and
then, with no command given, the archive must get everything, and every restore point must be exact. A
failpoint that no work reaches fails its test, so none can be added without being covered.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import pkgutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import walbd.archive
import walbd.proxy
import walbd.storage
from tests.kit.group import CHECKPOINT_LINE, WAIT_S, Group, Process, wait_until
from tests.kit.nbd import NbdError
from walbd.errors import WalbError
from walbd.fs import failpoints
from walbd.protocol.control import (
    AddArchiveInfo,
    ArchiveInfo,
    DeleteArchiveInfo,
    GetApplicableDiff,
    GetStatus,
    Resize,
    VolumeStatus,
)
from walbd.protocol.maintenance import DisableSnapshot, EnableSnapshot, Retarget

Failure = (WalbError, NbdError, OSError, AssertionError)
OWNERS = {"storage": "s0", "proxy": "p0", "archive": "a0", "device": "dev-vol0"}


def registered() -> list[str]:
    """Import everything that a process of a group may run, and return the names of its failpoints."""
    for package in (walbd.storage, walbd.proxy, walbd.archive):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return sorted(failpoints.registered())


class Rig:
    """A group with a volume that is backed up, and the contents of its restore points."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.volume = group.add_volume("vol0", size_b=2 << 20, log_b=8 << 20)
        self.points: dict[int, bytes] = {}
        self.volume.scribble()
        self.full_backup()

    # Work, each piece of which reaches some failpoints. All of it may be interrupted at any point.

    def full_backup(self) -> None:
        group = self.group
        if group.ctl.get_state(group.s[0], "vol0") == "Target":
            group.ctl.stop(group.s[0], "vol0")
        group.ctl.clear(group.a[0], "vol0")
        self.points = {}
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)

    def hash_backup(self) -> None:
        """Continue the history by comparing; the restore points from before stay."""
        group = self.group
        if group.ctl.get_state(group.s[0], "vol0") == "Target":
            group.ctl.stop(group.s[0], "vol0")
        self.volume.scribble(5)
        group.ctl.hash_backup(group.s[0], "vol0", timeoutS=WAIT_S)

    def damage(self) -> None:
        """Damage what waits at the proxy, and continue the history over the hole."""
        group, a0 = self.group, self.group.a[0]
        if group.ctl.get_state(a0, "vol0") != "Stopped":
            group.ctl.stop(a0, "vol0")
        self.volume.scribble(5)
        self.volume.nbd.flush()
        waiting = group.root / "p0" / "vol0" / "sendto" / "a0"
        wait_until(lambda: any(waiting.glob("*.wdiff")), "a diff to wait")
        for path in waiting.glob("*.wdiff"):
            path.write_bytes(b"?" * 100)
        group.ctl.start(a0, "vol0")
        wait_until(self.is_aside, "the damage to be found")
        self.hash_backup()

    def is_aside(self) -> bool:
        try:
            return bool(self.status(1).hops[0].damaged)
        except Failure:
            return False

    def write(self) -> None:
        self.volume.scribble()
        self.converge()

    def erase(self) -> None:
        """Write, and wait until the log of it has been given up: that takes a checkpoint of the device."""
        self.write()
        wait_until(self.log_is_empty, "the log to be erased")

    def snapshot(self) -> None:
        self.volume.scribble(5)
        self.points[self.group.snapshot(self.volume)] = bytes(self.volume.model)

    def restore(self) -> None:
        self.snapshot()
        gid = max(self.points)
        self.group.ctl.restore(self.group.a[0], "vol0", gid, timeoutS=WAIT_S)
        self.group.ctl.del_restored(self.group.a[0], "vol0", gid)

    def apply(self) -> None:
        self.snapshot()
        gid = max(self.points)
        self.group.ctl.apply(self.group.a[0], "vol0", gid, timeoutS=WAIT_S)

    def merge(self) -> None:
        """Give up one of two new snapshots, protect and give up the same again, and merge over it."""
        group, a0 = self.group, self.group.a[0]
        gids = []
        for _ in range(3):
            self.snapshot()
            gids.append(max(self.points))
            self.converge()
        del self.points[gids[1]]
        known = [diff.begin.gid_b for diff in group.ctl.ask(a0, GetApplicableDiff(volume="vol0")).diffs]
        inner = [int(gid) for gid in known if gids[0] < gid < gids[2]]
        group.ctl.ask(a0, DisableSnapshot(volume="vol0", gids=inner))
        group.ctl.ask(a0, EnableSnapshot(volume="vol0", gids=inner))
        group.ctl.ask(a0, DisableSnapshot(volume="vol0", gids=inner))
        group.ctl.merge(a0, "vol0", gids[0], gids[2], timeoutS=WAIT_S)

    def feed(self) -> None:
        """Take the archive from the proxy and give it back: what was unsent is lost, so all is sent first."""
        group = self.group
        self.converge()
        group.ctl.stop_synchronizing(group.a[0], "vol0")
        group.ctl.start_synchronizing(group.a[0], "vol0")

    def retarget(self) -> None:
        """Have the storage use another proxy besides, and then the configured ones again."""
        group = self.group
        configured = [proxy.get_host_port() for proxy in group.p]
        for proxies in ([*configured, "127.0.0.1:1"], configured):
            group.ctl.ask(group.s[0], Retarget(proxies=proxies))

    def second_archive(self) -> None:
        """Name another archive at the proxy and take it away again."""
        group, p0 = self.group, self.group.p[0]
        if group.ctl.get_state(p0, "vol0") != "Stopped":
            group.ctl.stop(p0, "vol0")
        info = ArchiveInfo(archive="another", address=group.a[0].get_host_port())
        if "another" not in group.ctl.get_archive_info_list(p0, "vol0"):
            group.ctl.ask(p0, AddArchiveInfo(volume="vol0", info=info))
        group.ctl.ask(p0, DeleteArchiveInfo(volume="vol0", archive="another"))
        group.ctl.start(p0, "vol0")

    def life(self) -> None:
        """The whole life of another volume: initialised, backed up, reset, and cleared everywhere."""
        group = self.group
        s0, p0, a0 = group.s[0], group.p[0], group.a[0]
        if "vol1" not in group.volumes:
            group.add_volume("vol1", size_b=1 << 20, log_b=4 << 20, init=False)
        volume = group.volumes["vol1"]
        if group.ctl.get_state(s0, "vol1") == "Clear":
            group.ctl.init_storage(s0, "vol1", str(volume.directory))
        if group.ctl.get_state(s0, "vol1") == "Target":
            group.ctl.stop(s0, "vol1")
        if group.ctl.get_state(a0, "vol1") != "Clear":
            group.ctl.clear(a0, "vol1")
        volume.scribble(5)
        gid = group.ctl.full_backup(s0, "vol1", timeoutS=WAIT_S)
        assert gid is not None
        assert group.restored(volume, gid) == volume.model
        group.ctl.ask(a0, Resize(volume="vol1", size_b=2 << 20))
        for server in (s0, p0, a0):
            group.ctl.clear(server, "vol1")

    # What must hold

    def status(self, which: int) -> VolumeStatus:
        server = (self.group.s[0], self.group.p[0], self.group.a[0])[which]
        (row,) = self.group.ctl.ask(server, GetStatus(volume="vol0")).volumes
        return row

    def has_all(self) -> bool:
        """Tell whether the archive has everything that was written."""
        try:
            storage, archive = self.status(0), self.status(2)
        except Failure:
            return False
        return (
            storage.state == "Target"
            and storage.lag_lb == 0
            and storage.done_gid == storage.latest_gid == archive.latest_gid
            and not storage.device_error
        )

    def log_is_empty(self) -> bool:
        try:
            return self.status(0).log_usage_pb == 0
        except Failure:
            return False

    def converge(self) -> None:
        self.volume.nbd.flush()
        wait_until(self.has_all, "the archive to have everything")

    def check(self) -> None:
        """With no command given, the archive gets everything; all restore points are exact."""
        assert self.volume.read_all() == self.volume.model, "the volume itself"
        self.volume.scribble()
        self.converge()
        group, a0 = self.group, self.group.a[0]
        newest = self.status(2).latest_gid
        assert group.restored(self.volume, newest) == self.volume.model, newest
        restorable = group.ctl.get_restorable_gid(a0, "vol0", "all")
        base = restorable[0]
        for gid in self.points:
            if gid >= base:
                assert gid in restorable
        kept = [gid for gid in self.points if gid >= base]
        for gid in {kept[0], kept[-1]} if kept else set():
            assert group.restored(self.volume, gid) == self.points[gid], gid


def drive(process: Process, work: Callable[[], None]) -> tuple[bool, bool]:
    """Do the work in a thread until it ends or the process has died; start a dead process again at once.

    Return whether it died, and whether the work failed: it sees what a user sees, errors, or waits that last
    until all is well.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Failure as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while thread.is_alive() and process.running and time.monotonic() < deadline:
        thread.join(0.01)
    if not thread.is_alive():  # a lost connection, or the end of the work, may be seen before the death
        deadline = time.monotonic() + WAIT_S
        while process.running and time.monotonic() < deadline:
            time.sleep(0.01)
    died = not process.running
    if died:
        process.wait_killed()
        process.start()
    thread.join(2 * WAIT_S)
    assert not thread.is_alive(), f"the work does not end: {work}"
    if not died and errors:
        raise errors[0]
    return died, bool(errors)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Group(tmp_path_factory.mktemp("group")) as group:
        yield Rig(group)


# Which work reaches which failpoints. Names are patterns; the first that fits counts.
WORK: list[tuple[str, Callable[[Rig], None]]] = [
    ("storage.backup.*", Rig.full_backup),
    ("storage.reset.*", Rig.full_backup),
    ("storage.snapshot.*", Rig.snapshot),
    ("storage.queue.*", Rig.snapshot),
    ("storage.retarget.*", Rig.retarget),
    ("storage.init.*", Rig.life),
    ("storage.clear.*", Rig.life),
    ("storage.record.*", Rig.life),
    ("storage.set_oldest.*", Rig.erase),
    ("storage.*", Rig.write),
    ("proxy.archive.*", Rig.second_archive),
    ("proxy.record.*", Rig.feed),
    ("proxy.volume.*", Rig.life),
    ("proxy.wdiff.*_aside", Rig.damage),
    ("proxy.*", Rig.write),
    ("archive.full.*", Rig.full_backup),
    ("archive.hash.*", Rig.hash_backup),
    ("archive.clear.*", Rig.life),
    ("archive.init.*", Rig.life),
    ("archive.restore.*", Rig.restore),
    ("archive.apply.*", Rig.apply),
    ("archive.record.*", Rig.apply),
    ("archive.merge.*", Rig.merge),
    ("archive.snapshot.*", Rig.merge),
    ("archive.resize.*", Rig.life),
    ("archive.*", Rig.write),
    ("device.reset.*", Rig.full_backup),
    ("device.*", Rig.erase),
    ("fs.*", Rig.snapshot),
]
# Cold images need a disk that shares blocks: tests/scenario/test_archive_crash.py has one.
COLD_POINTS = [name for name in registered() if name.startswith("archive.cold.")]
REPLICATION_POINTS = [
    name for name in registered() if name.startswith("archive.repl_")
]  # see test_kill_replication
DAEMON_POINTS = [
    name
    for name in registered()
    if name.split(".")[0] in ("storage", "proxy", "archive") and name not in (*COLD_POINTS, *REPLICATION_POINTS)
]
COMMIT_POINTS = [(name, owner) for name in registered() if name.startswith("fs.") for owner in ("s0", "p0", "a0")]
DEVICE_POINTS = [name for name in registered() if name.startswith("device.")]
# These are reached by something else than the work of a group: see their own tests.
AT_DEVICE_START = [name for name in DEVICE_POINTS if name.startswith(("device.redo.", "device.start."))]
OWN_TESTS = ["device.create.before_directory", "device.resize.before_superblock"]


def work_for(rig: Rig, name: str) -> Callable[[], None]:
    work = next(work for pattern, work in WORK if fnmatch.fnmatch(name, pattern))
    bound: Callable[[], None] = getattr(rig, work.__name__)
    return bound


def kill_at(rig: Rig, process: Process, name: str) -> None:
    rig.volume.disconnect()
    process.restart(failpoints=f"{name}=crash")
    if not process.running:  # reached at the start already
        process.wait_killed()
        process.start()
        return
    work = work_for(rig, name)
    died, failed = drive(process, work)
    assert died, f"{process.name} never came to {name}"
    rig.volume.reconcile()
    if failed and work.__name__ not in ("write", "erase"):  # told that a command failed, one gives it again
        work()


def test_every_failpoint_has_a_test() -> None:
    tested = {
        *DAEMON_POINTS,
        *COLD_POINTS,
        *REPLICATION_POINTS,
        *(name for name, _ in COMMIT_POINTS),
        *DEVICE_POINTS,
    }
    assert set(registered()) == tested
    assert set(OWN_TESTS) < set(DEVICE_POINTS)
    assert len(tested) > 60


@pytest.mark.parametrize("name", DAEMON_POINTS)
def test_daemon(rig: Rig, name: str) -> None:
    kill_at(rig, rig.group.processes[OWNERS[name.partition(".")[0]]], name)
    rig.check()


@pytest.mark.parametrize(("name", "owner"), COMMIT_POINTS)
def test_durable_replacement(rig: Rig, name: str, owner: str) -> None:
    kill_at(rig, rig.group.processes[owner], name)
    rig.check()


@pytest.mark.parametrize("name", [name for name in DEVICE_POINTS if name not in (*AT_DEVICE_START, *OWN_TESTS)])
def test_device(rig: Rig, name: str) -> None:
    kill_at(rig, rig.group.processes["dev-vol0"], name)
    rig.check()


@pytest.mark.parametrize("name", AT_DEVICE_START)
def test_device_start(rig: Rig, name: str) -> None:
    """Killed while it redoes the log that a first kill left."""
    process = rig.group.processes["dev-vol0"]
    with no_checkpoints(rig, process):
        rig.volume.scribble()
        if name == "device.redo.before_torn":
            tear(rig, process)
        process.kill()
    rig.volume.disconnect()
    process.restart(failpoints=f"{name}=crash")
    process.wait_killed()
    process.start()
    rig.volume.reconcile()
    rig.check()


@contextmanager
def no_checkpoints(rig: Rig, process: Process) -> Iterator[None]:
    """Serve the device without periodic checkpoints: what is written meanwhile is redone at the next start."""
    config = rig.volume.directory / "device.toml"
    text = config.read_text()
    seldom = text.replace(CHECKPOINT_LINE, "checkpoint_interval_s = 3600\n")
    assert seldom != text
    config.write_text(seldom)
    rig.volume.disconnect()
    process.restart()
    yield
    config.write_text(text)


def tear(rig: Rig, process: Process) -> None:
    """Damage the data of the last write in the log: it was answered and never flushed, so it may be lost."""
    volume = rig.volume
    volume.nbd.flush()
    old = bytes(volume.model[:4096])
    marker = os.urandom(4096)
    volume.write(0, marker)
    process.kill()
    log = rig.group.root / "vol0.ldev"
    data = log.read_bytes()
    at = data.find(marker)
    assert at >= 0, "the write is not in the log"
    with log.open("r+b") as file:
        file.seek(at)
        file.write(bytes(16))
    volume.model[:4096] = old


def test_device_resize(rig: Rig) -> None:
    """Killed before the superblock says the new size: whatever the command said is true, contents are kept."""
    group = rig.group
    if "vol1" not in group.volumes:
        group.add_volume("vol1", size_b=1 << 20, log_b=4 << 20, init=False)
    volume, process = group.volumes["vol1"], group.processes["dev-vol1"]
    volume.scribble()
    volume.disconnect()
    process.restart(failpoints="device.resize.before_superblock=crash")
    os.truncate(group.root / "vol1.ddev", 2 << 20)
    resize = ["device", "resize", "vol1", str(2 << 20), "--base-dir", str(volume.directory.parent)]
    first = run_walbd(*resize)  # when the device is gone, the command does it on the files itself
    process.wait_killed()
    process.start()
    if first.returncode != 0:
        assert volume.nbd.size_b == 1 << 20
        assert volume.read_all() == volume.model
        volume.disconnect()
        done = run_walbd(*resize)
        assert done.returncode == 0, done.stderr
    assert volume.nbd.size_b == 2 << 20
    volume.model += bytes(1 << 20)
    assert volume.read_all() == volume.model


def test_device_create(tmp_path: Path) -> None:
    create = ["device", "create", "v", "--base-dir", str(tmp_path), "--ldev", str(tmp_path / "l")]
    create += ["--ddev", str(tmp_path / "d"), "--size", "1M", "--ldev-size", "1M"]
    killed = run_walbd(*create, failpoint="device.create.before_directory=crash")
    assert killed.returncode < 0
    assert not (tmp_path / "v").exists()
    done = run_walbd(*create, "--force")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "v").is_dir()


def run_walbd(*args: str, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "walbd.cli", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env=os.environ | {failpoints.ENV: failpoint},
    )
