"""A backup group of real processes for tests: start, kill, pause and restart any of them, and compare images.

    with Group(tmp_path) as group:                     # one storage, one proxy, one archive
        vol = group.add_volume("vol0", size_b=8 << 20)
        group.ctl.full_backup(group.s[0], "vol0")
        vol.write(0, b"x" * 4096)
        gid = group.snapshot(vol)
        assert group.restored(vol, gid) == vol.model

Readiness comes from sd_notify, as under systemd. Ports are fixed at creation, so a restarted server is found
where it was. Everything lives under one directory; the logs are printed when a test fails.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kit.nbd import NbdClient
from walbd.controller import Controller, ServerConnectionParam, ServerLayout

READY_S = 60.0
WAIT_S = 30.0


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float = WAIT_S) -> Any:
    """Poll until `condition()` is true and return its value; fail after the deadline."""
    deadline = time.monotonic() + timeout_s
    pause = 0.005
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return value


_reserved: list[int] = []  # descriptors whose locks keep our ports from other test processes


def free_port() -> int:
    """Return a TCP port that is free, lies below the range of outgoing connections, and is ours until we end."""
    locks = Path(tempfile.gettempdir()) / f"walbd-test-ports-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        fd = os.open(locks / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            os.close(fd)
            continue
        _reserved.append(fd)
        return port


class Process:
    """One walbd process that can be killed and started again with the same arguments."""

    def __init__(self, name: str, args: list[str], directory: Path) -> None:
        self.name = name
        self.args = args
        self.log = directory / f"{name}.log"
        self._notify = directory / f"{name}.ready"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def start(self, *, failpoints: str = "", wait: bool = True) -> None:
        """Start, and return when the process says that it is ready (or has died at a failpoint)."""
        assert not self.running, self.name
        self._notify.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(self._notify))
            env = os.environ | {"NOTIFY_SOCKET": str(self._notify), "WALBD_FAILPOINTS": failpoints}
            env.pop("COLUMNS", None)
            with self.log.open("ab") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "walbd.cli", *self.args],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=env,
                    start_new_session=True,
                )
            if wait:
                self._wait_ready(ready, bool(failpoints))

    def _wait_ready(self, ready: socket.socket, may_die: bool) -> None:
        ready.settimeout(0.2)
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            try:
                if b"READY=1" in ready.recv(4096):
                    return
            except TimeoutError:
                pass
            if not self.running:
                if may_die:
                    return
                raise AssertionError(f"{self.name} ended at its start:\n{self.tail()}")
        raise AssertionError(f"{self.name} is not ready after {READY_S} s:\n{self.tail()}")

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._child is not None:
            if self.running:
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def stop(self, *, timeout_s: float = WAIT_S) -> int:
        """SIGTERM, and return the exit status."""
        assert self._child is not None
        if self.running:
            self._child.terminate()
        return self._child.wait(timeout_s)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, failpoints: str = "") -> None:
        """Kill -9 (if it runs) and start again."""
        self.kill()
        self.start(failpoints=failpoints)

    def wait_killed(self, *, timeout_s: float = WAIT_S) -> None:
        """Wait until the process has been killed by its failpoint."""
        wait_until(lambda: not self.running, f"{self.name} to die", timeout_s=timeout_s)
        assert self._child is not None
        assert self._child.returncode == -signal.SIGKILL, f"{self.name} ended by itself:\n{self.tail()}"

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Volume:
    """A device with a model of its contents: what a restored snapshot must be."""

    def __init__(self, name: str, process: Process, directory: Path, size_b: int) -> None:
        self.name = name
        self.process = process
        self.directory = directory
        self.model = bytearray(size_b)
        self.rng = random.Random(f"{name} {size_b}")
        self.unsure: tuple[int, bytes] | None = None  # a write or trim that was not answered
        self._client: NbdClient | None = None

    @property
    def socket_path(self) -> Path:
        return self.directory / "nbd.sock"

    @property
    def nbd(self) -> NbdClient:
        if self._client is None:
            self._client = NbdClient(str(self.socket_path))
        return self._client

    def disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def write(self, offset_b: int, data: bytes) -> None:
        self.unsure = (offset_b, data)
        self.nbd.write(offset_b, data)
        self.model[offset_b : offset_b + len(data)] = data
        self.unsure = None

    def trim(self, offset_b: int, size_b: int) -> None:
        self.unsure = (offset_b, bytes(size_b))
        self.nbd.trim(offset_b, size_b)
        self.model[offset_b : offset_b + size_b] = bytes(size_b)
        self.unsure = None

    def reconcile(self) -> None:
        """After the device was killed: a write that was not answered has happened or not, block by block."""
        self.disconnect()
        if self.unsure is None:
            return
        offset, data = self.unsure
        for at in range(0, len(data), 512):
            old, new = self.model[offset + at : offset + at + 512], data[at : at + 512]
            found = self.nbd.read(offset + at, 512)
            assert found in (old, new), f"block at {offset + at} is neither old nor new"
            self.model[offset + at : offset + at + 512] = found
        self.unsure = None

    def scribble(self, count: int = 20) -> None:
        """Make `count` random writes, trims and zero writes, then flush."""
        for _ in range(count):
            size = self.rng.choice([512, 4096, 4096, 8192, 65536])
            offset = self.rng.randrange(0, (len(self.model) - size) // 512 + 1) * 512
            kind = self.rng.random()
            if kind < 0.1:
                self.trim(offset, size)
            elif kind < 0.2:
                self.write(offset, bytes(size))
            else:
                self.write(offset, self.rng.randbytes(size // 2) + b"walb" * (size // 8))
        self.nbd.flush()

    def read_all(self) -> bytes:
        step = 1 << 20
        size = len(self.model)
        return b"".join(self.nbd.read(at, min(step, size - at)) for at in range(0, size, step))


class Group:
    """Processes and a controller for them; leaving the block kills everything."""

    def __init__(
        self,
        root: Path,
        *,
        storages: int = 1,
        proxies: int = 1,
        archives: int = 1,
        options: dict[str, list[str]] | None = None,
    ) -> None:
        self.root = root
        self.options = options or {}
        self.processes: dict[str, Process] = {}
        self.volumes: dict[str, Volume] = {}
        self.a = [self._param(f"a{i}", 2) for i in range(archives)]
        self.p = [self._param(f"p{i}", 1) for i in range(proxies)]
        self.s = [self._param(f"s{i}", 0) for i in range(storages)]
        self.layout = ServerLayout(self.s, self.p, self.a)
        self.ctl = Controller("", self.layout)

    def __enter__(self) -> Self:
        try:
            for param in [*self.a, *self.p, *self.s]:
                self.processes[param.name].start(wait=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None:
            for process in self.processes.values():
                if process.log.exists():
                    print(f"--- {process.name}\n{process.tail()}")
        self.close()

    def close(self) -> None:
        for volume in self.volumes.values():
            volume.disconnect()
        for process in self.processes.values():
            process.kill()
        self.ctl.close()

    def process(self, server: ServerConnectionParam) -> Process:
        return self.processes[server.name]

    def add_volume(
        self,
        name: str,
        *,
        size_b: int = 8 << 20,
        log_b: int = 16 << 20,
        pbs: int = 512,
        storage: int = 0,
        init: bool = True,
    ) -> Volume:
        """Create and serve a device, and make it known to a storage (Standby)."""
        devices = self.root / "dev"
        devices.mkdir(exist_ok=True)
        directory = devices / name
        create = ["device", "create", name, "--base-dir", str(devices), "--size", str(size_b), "--pbs", str(pbs)]
        create += ["--ldev", str(self.root / f"{name}.ldev"), "--ddev", str(self.root / f"{name}.ddev")]
        create += ["--ldev-size", str(log_b)]
        done = subprocess.run(
            [sys.executable, "-m", "walbd.cli", *create],
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done.stderr
        with (directory / "device.toml").open("a") as config:
            config.write("checkpoint_interval_s = 0.5\n")  # log is given up after a checkpoint only
        process = Process(f"dev-{name}", ["device", "serve", name, "--base-dir", str(devices)], self.root)
        self.processes[process.name] = process
        process.start()
        volume = self.volumes[name] = Volume(name, process, directory, size_b)
        if init:
            self.ctl.init_storage(self.s[storage], name, str(directory))
        return volume

    def snapshot(self, volume: Volume, *, archives: list[int] | None = None) -> int:
        """Flush, take a snapshot, and wait until it can be restored at the archives (default: primary)."""
        volume.nbd.flush()
        targets = [self.a[i] for i in (archives if archives is not None else [0])]
        gid: int = self.ctl.snapshot(self.s[0], volume.name, targets, timeoutS=WAIT_S)
        return gid

    def restored(self, volume: Volume, gid: int, *, archive: int = 0) -> bytes:
        """Restore a snapshot, return the image's bytes, and remove the image again."""
        server = self.a[archive]
        self.ctl.restore(server, volume.name, gid, timeoutS=WAIT_S)
        data = Path(self.ctl.get_restored_path(server, volume.name, gid)).read_bytes()
        self.ctl.del_restored(server, volume.name, gid)
        return data

    def _param(self, name: str, kind: int) -> ServerConnectionParam:
        port = free_port()
        base = self.root / name
        base.mkdir(parents=True, exist_ok=True)
        word = ("storage", "proxy", "archive")[kind]
        args = [word, "--port", str(port), "--base-dir", str(base), "--node-id", name]
        args += ["--retry-delay-max-s", "2", *self.options.get(name, self.options.get(word, []))]
        if word == "storage":
            args += [
                "--archive",
                self.a[0].get_host_port(),
                "--proxy",
                ",".join(p.get_host_port() for p in self.p),
            ]
        self.processes[name] = Process(name, args, self.root)
        return ServerConnectionParam(name, "127.0.0.1", port, kind)
