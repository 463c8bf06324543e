"""Real walbd processes for tests, the ports that they listen on, and waiting for what they do."""

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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Deadlines only end what hangs; a machine that is busy with other things must not reach them.
READY_S = 180.0
WAIT_S = 120.0
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


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


_reserved: dict[int, int] = {}  # port: descriptor whose lock keeps it from other test processes


def _listening_ports() -> range:
    """Return ports that no outgoing connection is given by the kernel, if there are enough of them.

    A connection that happens to have the port of a server which was killed would keep it from starting again.
    """
    first, last = map(int, _OUTGOING.read_text().split())
    found = max(range(10000, first), range(last + 1, 1 << 16), key=len)
    return found if len(found) >= 1000 else range(10000, 30000)


def free_port() -> int:
    """Return a TCP port that is free, not used for outgoing connections, and ours until `release_ports`."""
    locks = Path(tempfile.gettempdir()) / f"walbd-test-ports-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    while True:
        port = random.SystemRandom().choice(_listening_ports())
        fd = os.open(locks / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            os.close(fd)
            continue
        _reserved[port] = fd
        return port


def release_ports(ports: Iterable[int]) -> None:
    """Let others have these ports: each one that is ours keeps a file open."""
    for port in ports:
        if (fd := _reserved.pop(port, None)) is not None:
            os.close(fd)


def run_walbd(
    *args: str | Path, failpoint: str = "", timeout_s: float = WAIT_S
) -> subprocess.CompletedProcess[str]:
    """Run a `walbd` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "walbd.cli", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env=os.environ | {"WALBD_FAILPOINTS": failpoint},
    )


class Process:
    """One walbd process that can be killed and started again with the same arguments."""

    def __init__(self, name: str, args: list[str], directory: Path) -> None:
        self.name = name
        self.args = args
        self.log = directory / f"{name}.log"
        self.program = ["-m", "walbd.cli"]
        self._notify = directory / f"{name}.ready"
        self._ready: socket.socket | None = None
        self._may_die = False
        self._child: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def paused(self) -> bool:
        return self._paused and self.running

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def launch(self, *, failpoints: str = "", more_args: Sequence[str] = ()) -> None:
        """Start, and return at once; `wait_ready` waits."""
        assert not self.running, self.name
        self._end_wait()
        self._may_die = bool(failpoints)
        self._paused = False
        self._ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ready.bind(str(self._notify))
        env = os.environ | {"NOTIFY_SOCKET": str(self._notify), "WALBD_FAILPOINTS": failpoints}
        env.pop("COLUMNS", None)
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, *self.program, *self.args, *more_args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Return when the process says that it is ready (or has died at a failpoint)."""
        assert self._ready is not None, f"{self.name} was not launched"
        self._ready.settimeout(0.2)
        deadline = time.monotonic() + READY_S
        try:
            while time.monotonic() < deadline:
                try:
                    if b"READY=1" in self._ready.recv(4096):
                        return
                except TimeoutError:
                    pass
                if not self.running:
                    if self._may_die:
                        return
                    assert self._child is not None
                    raise AssertionError(
                        f"{self.name} ended ({self._child.returncode}) at its start:\n{self.tail()}"
                    )
            raise AssertionError(f"{self.name} is not ready after {READY_S} s:\n{self.tail()}")
        finally:
            self._end_wait()

    def start(self, *, failpoints: str = "", more_args: Sequence[str] = ()) -> None:
        """Start, and return when the process is ready (or has died at a failpoint)."""
        self.launch(failpoints=failpoints, more_args=more_args)
        self.wait_ready()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self._child is not None:
            if self.running:
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._end_wait()

    def stop(self, *, timeout_s: float = WAIT_S) -> int:
        """SIGTERM, and return the exit status."""
        assert self._child is not None
        if self.running:
            self._child.terminate()
        return self._child.wait(timeout_s)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def restart(self, *, failpoints: str = "", more_args: Sequence[str] = ()) -> None:
        """Kill -9 (if it runs) and start again."""
        self.kill()
        self.start(failpoints=failpoints, more_args=more_args)

    def wait_killed(self, *, timeout_s: float = WAIT_S) -> None:
        """Wait until the process has been killed by its failpoint."""
        wait_until(lambda: not self.running, f"{self.name} to die", timeout_s=timeout_s)
        assert self._child is not None
        assert self._child.returncode == -signal.SIGKILL, f"{self.name} ended by itself:\n{self.tail()}"

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _end_wait(self) -> None:
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        self._notify.unlink(missing_ok=True)


def start_all(processes: Sequence[Process]) -> None:
    """Start several processes at the same time, and return when all are ready."""
    for process in processes:
        process.launch()
    for process in processes:
        process.wait_ready()
