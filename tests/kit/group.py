"""A backup group of real processes for tests: any layout, any fault, and exact comparison of what is restored.

    with Group(tmp_path, archives=2) as group:         # s0, p0, a0, a1, each a process
        vol = group.add_volume("vol0", size_b=8 << 20)
        group.ctl.full_backup(group.s[0], "vol0")
        with vol.load():                               # a thread that writes all the time
            group.processes["p0"].restart()            # kill -9
            group.link("p0", "a0").cut()               # every link between two daemons is a relay of its own
            gid = group.snapshot(vol, archives=[1])
            group.heal()
        group.check_all(vol)                           # every restorable gid at every archive, byte for byte

Readiness comes from sd_notify, as under systemd. Ports are fixed at creation, so a restarted server is found
where it was. Everything lives under one directory; the logs are printed when a test fails. The controller asks
the daemons directly, and tells them the addresses of the relays. Documentation: docs/testing.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.kit.process import WAIT_S, Process, free_port, release_ports, run_walbd, start_all, wait_until
from tests.kit.relay import Link, Relay
from tests.kit.routes import RoutedClient
from tests.kit.volume import Leg, Volume
from walbd.controller import Controller, ServerConnectionParam, ServerLayout
from walbd.controller.doctor.mend import Doctor
from walbd.controller.layout import GroupLayout, VolumeEntry
from walbd.errors import WalbError
from walbd.protocol.control import FullBackup, GetState, GetStatus, HashBackup, VolumeStatus

__all__ = [
    "CHECKPOINT_LINE",
    "WAIT_S",
    "Group",
    "Inexact",
    "Leg",
    "Process",
    "Volume",
    "free_port",
    "run_walbd",
    "wait_until",
]

CHECKPOINT_LINE: Final = "checkpoint_interval_s = 0.5\n"  # log is given up after a checkpoint only
_FILLER: Final = ".filler"


class Inexact(AssertionError):
    """A restored image is not what the volume was: what must never happen, whatever else went wrong."""


class Group:
    """Processes and a controller for them; leaving the block kills everything.

    `options` are further arguments of daemons, by name (`a0`) or kind (`archive`). `disks` gives daemons a small
    file system of their own for their directory [byte]; that needs root.
    """

    def __init__(
        self,
        root: Path,
        *,
        storages: int = 1,
        proxies: int = 1,
        archives: int = 1,
        options: dict[str, list[str]] | None = None,
        disks: dict[str, int] | None = None,
    ) -> None:
        self.root = root
        self.options = options or {}
        self.disks = disks or {}
        self.processes: dict[str, Process] = {}
        self.volumes: dict[str, Volume] = {}
        self.relay = Relay()
        self.links: dict[tuple[str, str], Link] = {}
        self.show_logs = True  # when the block fails
        self._full: set[str] = set()
        self._lineages: dict[tuple[str, str], int] = {}  # (volume, archive uuid)
        self.a = [self._param(f"a{i}", 2) for i in range(archives)]
        self.p = [self._param(f"p{i}", 1) for i in range(proxies)]
        self.s = [self._param(f"s{i}", 0) for i in range(storages)]
        for server in [*self.a, *self.p, *self.s]:
            self._make_process(server)
        self.layout = ServerLayout(self.s, self.p, self.a)
        self.ctl = Controller("", self.layout, calls=RoutedClient(self.route, self._watch))

    def __enter__(self) -> Self:
        try:
            for name, size_b in self.disks.items():
                _run("mount", "-t", "tmpfs", "-o", f"size={size_b}", "walbd-test", str(self.root / name))
            start_all([self.processes[server.name] for server in self.servers])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None and self.show_logs:
            for process in self.processes.values():
                if process.log.exists():
                    print(f"--- {process.name}\n{process.tail()}")
        self.close()

    def close(self) -> None:
        for volume in self.volumes.values():
            if exc := _error_of(volume):
                print(f"--- load of {volume.name}: {exc!r}")
            volume.disconnect()
        for process in self.processes.values():
            process.kill()
        self.ctl.close()
        self.relay.close()
        release_ports(server.port for server in self.servers)
        for name in self.disks:
            if os.path.ismount(self.root / name):
                _run("umount", str(self.root / name))

    # Who is there

    @property
    def servers(self) -> list[ServerConnectionParam]:
        """All daemons, archives first."""
        return [*self.a, *self.p, *self.s]

    def server(self, name: str) -> ServerConnectionParam:
        return next(server for server in self.servers if server.name == name)

    def process(self, server: ServerConnectionParam) -> Process:
        return self.processes[server.name]

    def add_server(self, kind: int) -> ServerConnectionParam:
        """Start one more storage, proxy or archive. The layout of the controller stays as it is."""
        servers = (self.s, self.p, self.a)[kind]
        server = self._param(f"{'spa'[kind]}{len(servers)}", kind)
        servers.append(server)
        self._make_process(server)
        self.process(server).start()
        return server

    # Links

    def link(self, client: str, server: str) -> Link:
        """Return the link by which one daemon connects to another."""
        found = self.links.get((client, server))
        if found is None:
            target = self.server(server)
            found = self.relay.link(f"{client}>{server}", (target.address, target.port))
            self.links[client, server] = found
        return found

    def route(self, client: str) -> dict[str, str]:
        """Return, for the addresses that a daemon connects to, where it is to connect instead."""
        servers = [*self.a, *self.p] if client.startswith("s") else self.a
        return {s.get_host_port(): self.link(client, s.name).address for s in servers if s.name != client}

    def links_of(self, name: str) -> list[Link]:
        """Return all links of a daemon that are in use."""
        return [link for ends, link in self.links.items() if name in ends]

    def heal(self) -> None:
        """Heal all links."""
        for link in self.links.values():
            link.heal()

    # Processes and their disks

    def kill(self, *names: str) -> None:
        for name in names:
            self.processes[name].kill()

    def start(self, *names: str) -> None:
        """Start processes at the same time; default: all that do not run."""
        chosen = names or [name for name, process in self.processes.items() if not process.running]
        start_all([self.processes[name] for name in chosen])

    def wipe(self, name: str, volume: str = "") -> None:
        """Kill a daemon and remove everything that it has, or what it has of one volume. It is not started."""
        self.processes[name].kill()
        base = self.root / name
        for path in [base / volume] if volume else list(base.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def fill(self, name: str) -> None:
        """Fill the disk of a daemon. Without a disk of its own it restarts, and takes all space for reserved."""
        if name not in self.disks:
            self.processes[name].restart(more_args=["--free-reserve-b", "1p"])
            self._full.add(name)
            return
        with (self.root / name / _FILLER).open("wb") as filler:
            piece = 1 << 20
            while piece >= 4096:
                try:
                    os.write(filler.fileno(), bytes(piece))
                except OSError:
                    piece //= 2

    def unfill(self, name: str) -> None:
        """Give the space back."""
        if name in self.disks:
            (self.root / name / _FILLER).unlink()
        elif name in self._full:
            self._full.remove(name)
            self.processes[name].restart()

    # Volumes

    def add_volume(
        self,
        name: str,
        *,
        size_b: int = 8 << 20,
        log_b: int = 16 << 20,
        pbs: int = 512,
        storage: int = 0,
        mirror: int | None = None,
        init: bool = True,
    ) -> Volume:
        """Create and serve a device, and make it known to a storage (Standby).

        With `mirror` there is a second device at that storage, which all writes go to as well.
        """
        numbers = [storage] if mirror is None else [storage, mirror]
        legs = [self._make_leg(name, number, size_b, log_b, pbs) for number in numbers]
        start_all([leg.process for leg in legs])
        volume = self.volumes[name] = Volume(name, legs, size_b)
        if init:
            for leg in legs:
                self.ctl.init_storage(self.server(leg.storage), name, str(leg.directory))
        return volume

    def grow_device(self, volume: Volume, size_b: int) -> None:
        """Grow the devices of a volume: the storages and archives are told by `ctl.resize`."""
        for leg in volume.legs:
            base = str(leg.directory.parent)
            done = run_walbd("device", "resize", volume.name, str(size_b), "--base-dir", base)
            assert done.returncode == 0, done.stderr
        volume.grow(size_b)

    def doctor(self, volume: str = "") -> Doctor:
        """Return a doctor who knows which storages are to back the volumes up: those that do, or the first."""
        entries = {}
        for name, vol in self.volumes.items():
            storages = [self.server(leg.storage) for leg in vol.legs]
            states = self.ctl.ask_each(storages, GetState(volume=name))
            active = [s for s, state in states.items() if getattr(state, "value", "") in ("Target", "Stopped")]
            devices = {leg.storage: str(leg.directory) for leg in vol.legs}
            entries[name] = VolumeEntry(name=name, target=[*active, *storages][0], devices=devices)
        return Doctor(self.ctl, GroupLayout(self.ctl.sLayout, volumes=entries), vol=volume, pause_s=1.0)

    def follow(self) -> None:
        """Take over the order of the archives from the layout of the controller, after it has promoted one."""
        self.layout = self.ctl.sLayout
        self.a = [self.server(server.name) for server in self.layout.archiveL]

    def status(self, server: ServerConnectionParam, volume: str) -> VolumeStatus:
        """Return what a server says of a volume."""
        (row,) = self.ctl.ask(server, GetStatus(volume=volume)).volumes
        return row

    def target(self, volume: Volume) -> ServerConnectionParam:
        """Return the storage that backs the volume up."""
        servers = [self.server(leg.storage) for leg in volume.legs]
        if len(servers) == 1:
            return servers[0]
        return next(s for s in servers if self.ctl.get_state(s, volume.name) == "Target")

    def fed(self, volume: Volume) -> list[ServerConnectionParam]:
        """Return the archives that some proxy sends the volume to."""
        names = {name for p in self.p for name in self.ctl.get_archive_info_list(p, volume.name)}
        return [a for a in self.a if a.name in names]

    def is_fresh(self, volume: Volume) -> bool:
        """Tell whether all archives that are fed have everything that was written."""
        try:
            storage = self.status(self.target(volume), volume.name)
            if storage.state != "Target" or storage.lag_lb or storage.done_gid != storage.latest_gid:
                return False
            if storage.device_error or storage.overflow:
                return False
            gids = [self.status(a, volume.name).latest_gid for a in self.fed(volume)]
        except (WalbError, StopIteration, ValueError):
            return False
        return bool(gids) and all(gid == storage.done_gid for gid in gids)

    def wait_fresh(self, volume: Volume, *, timeout_s: float = WAIT_S) -> None:
        """Flush, and wait until all archives that are fed have everything, with no command given."""
        volume.flush()
        wait_until(lambda: self.is_fresh(volume), "the archives to have everything", timeout_s=timeout_s)

    def snapshot(self, volume: Volume, *, archives: list[int] | None = None, timeout_s: float = WAIT_S) -> int:
        """Flush, take a snapshot, and wait until it can be restored at the archives (default: primary)."""
        gid = self.mark(volume)
        for i in archives if archives is not None else [0]:
            self.ctl.wait_for_restorable(self.a[i], volume.name, gid, timeoutS=timeout_s)
        return gid

    def mark(self, volume: Volume) -> int:
        """Flush and take a snapshot, and remember what it must be."""
        before = volume.settle()
        gid: int = self.ctl.snapshot_nbk(self.target(volume), volume.name)
        volume.points[volume.lineage, gid] = (before, volume.seq)
        return gid

    # What can be restored

    def lineage(self, volume: Volume, server: ServerConnectionParam) -> int:
        """Return after how many full backups the history of an archive began; -1: not known."""
        key = (volume.name, self.ctl.get_archive_uuid(server, volume.name))
        if server is self.a[0]:
            self._lineages[key] = volume.lineage
        return self._lineages.get(key, -1)

    def restored(self, volume: Volume, gid: int, *, archive: int = 0) -> bytes:
        """Restore a snapshot, return the image's bytes, and remove the image again."""
        return self._restored(volume, gid, self.a[archive])

    def check(self, volume: Volume, gid: int, server: ServerConnectionParam) -> list[int]:
        """Restore a gid, show that the volume was once exactly that, and return the numbers of its states."""
        image = self._restored(volume, gid, server)
        seqs = volume.states_of(image)
        where = f"{volume.name} gid {gid} at {server.name}"
        if not seqs:
            raise Inexact(f"{where} is nothing that the volume ever was{_compare(image, volume)}")
        span = volume.points.get((self.lineage(volume, server), gid))
        if span is not None and not any(span[0] <= seq <= span[1] for seq in seqs):
            raise Inexact(f"{where} is state {seqs}, and the snapshot was taken in {span}")
        return seqs

    def check_all(self, volume: Volume, *, implicit_max: int | None = None) -> dict[str, list[int]]:
        """Check every restorable gid at every archive byte for byte; return the gids by archive.

        Explicit snapshots must be what the volume was when they were taken, and implicit ones what it was at
        some time, in their order. Of many implicit ones `implicit_max` are checked, evenly chosen.
        """
        found: dict[str, list[int]] = {}
        for server in self.a:
            if not self.processes[server.name].running:
                continue
            points = self.ctl.get_restorable(server, volume.name, "all")
            found[server.name] = [point.gid for point in points]
            asked_for = {point.gid for point in points if point.is_explicit} | set(found[server.name][-1:])
            others = [gid for gid in found[server.name] if gid not in asked_for]
            if implicit_max is not None and len(others) > implicit_max:
                others = [others[i * len(others) // implicit_max] for i in range(implicit_max)]
            last = 0
            for gid in sorted({*asked_for, *others}):
                try:
                    seqs = [seq for seq in self.check(volume, gid, server) if seq >= last]
                except WalbError:
                    if gid in asked_for or gid in self.ctl.get_restorable_gid(server, volume.name, "all"):
                        raise
                    continue  # the policy has merged over it meanwhile
                if not seqs:
                    raise Inexact(f"{volume.name} gid {gid} at {server.name} is older than the one before it")
                last = seqs[0]
        return found

    # Inner parts

    def _watch(self, request: object) -> Callable[[], object]:
        """See what makes generations begin anew, so that no point is taken for another with the same number."""
        volume = self.volumes.get(getattr(request, "volume", ""))
        if volume is not None and isinstance(request, FullBackup):
            return partial(volume.begin_lineage)
        if volume is not None and isinstance(request, HashBackup):
            # Generations go on behind what the archive has: what never came there is lost.
            return partial(volume.forget_after, self.status(self.a[0], volume.name).latest_gid)
        return lambda: None

    def _restored(self, volume: Volume, gid: int, server: ServerConnectionParam) -> bytes:
        self.ctl.restore(server, volume.name, gid, timeoutS=WAIT_S)
        data = Path(self.ctl.get_restored_path(server, volume.name, gid)).read_bytes()
        self.ctl.del_restored(server, volume.name, gid)
        return data

    def _param(self, name: str, kind: int) -> ServerConnectionParam:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return ServerConnectionParam(name, "127.0.0.1", free_port(), kind)

    def _make_process(self, server: ServerConnectionParam) -> None:
        name, word = server.name, ("storage", "proxy", "archive")[server.kind]
        args = [word, "--port", str(server.port), "--base-dir", str(self.root / name), "--node-id", name]
        args += ["--retry-delay-max-s", "2"]
        if word == "storage":
            args += ["--archive", self.link(name, self.a[0].name).address]
            args += ["--proxy", ",".join(self.link(name, p.name).address for p in self.p)]
        args += self.options.get(word, []) + self.options.get(name, [])
        self.processes[name] = Process(name, args, self.root)

    def _make_leg(self, name: str, storage: int, size_b: int, log_b: int, pbs: int) -> Leg:
        server = self.s[storage]
        suffix = "" if storage == 0 else f"-{server.name}"
        devices = self.root / f"dev{suffix}"
        devices.mkdir(exist_ok=True)
        directory = devices / name
        ldev, ddev = self.root / f"{name}{suffix}.ldev", self.root / f"{name}{suffix}.ddev"
        create: Sequence[str] = ["device", "create", name, "--base-dir", str(devices), "--size", str(size_b)]
        create = [*create, "--ldev", str(ldev), "--ddev", str(ddev), "--ldev-size", str(log_b), "--pbs", str(pbs)]
        done = run_walbd(*create)
        assert done.returncode == 0, done.stderr
        with (directory / "device.toml").open("a") as config:
            config.write(CHECKPOINT_LINE)
        process = Process(f"dev-{name}{suffix}", ["device", "serve", name, "--base-dir", str(devices)], self.root)
        self.processes[process.name] = process
        return Leg(server.name, process, directory, ldev, ddev)


def _compare(image: bytes, volume: Volume) -> str:
    """Say how an image differs from what the volume is now, for a person who looks for the reason."""
    model = bytes(volume.model)
    blocks = [at for at in range(0, len(image), 512) if image[at : at + 512] != model[at : at + 512]]
    return f"; {len(blocks)} blocks differ from now, first at {blocks[:5]}" if blocks else ""


def _error_of(volume: Volume) -> BaseException | None:
    """End a load that still runs; return what went wrong with it."""
    try:
        volume.stop_load()
    except Exception as exc:
        return exc
    return None


def _run(*args: str) -> None:
    done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
