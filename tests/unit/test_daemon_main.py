"""The life of a daemon process: readiness, signals, failures, and defects that must not go unnoticed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DAEMON = """
import asyncio, sys
from walbd.daemon.main import ShutdownMode, run_daemon
from walbd.errors import DiskFailed, WalbError

class Daemon:
    async def start(self, tasks):
        loop = asyncio.get_running_loop()
        if sys.argv[1] == "callback":
            loop.call_soon(lambda: 1 / 0)
        if sys.argv[1] == "task":
            async def fail():
                raise DiskFailed("the disk is gone", path="/x")
            tasks.create_task(fail())
        if sys.argv[1] == "start":
            raise DiskFailed("no such disk")
    async def stop(self, mode):
        print("stopped", mode, flush=True)

try:
    run_daemon("test", lambda env, shutdown: Daemon(), log_level="info", log_format="json")
except WalbError as exc:
    print(type(exc).__name__, exc, flush=True)
    sys.exit(exc.exit_code)
"""


def start(what: str, notify: Path) -> tuple[subprocess.Popen[str], socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(notify))
    sock.settimeout(120)
    child = subprocess.Popen(
        [sys.executable, "-c", DAEMON, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NOTIFY_SOCKET": str(notify)},
    )
    return child, sock


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_ready_then_stopped_by_a_signal(tmp_path: Path, signum: signal.Signals) -> None:
    child, sock = start("nothing", tmp_path / "n")
    with sock:
        assert b"READY=1" in sock.recv(100)
        child.send_signal(signal.SIGHUP)  # harmless
        child.send_signal(signum)
        out, err = child.communicate(timeout=120)
        assert b"STOPPING=1" in sock.recv(100)
    assert (child.returncode, out) == (0, "stopped force\n")
    assert "daemon.stopped" in err


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        ("callback", 70, "a defect ended the daemon"),
        ("task", 1, "the disk is gone"),
        ("start", 1, "no such disk"),
    ],
)
def test_a_failure_ends_the_process_and_is_told(tmp_path: Path, what: str, code: int, text: str) -> None:
    child, sock = start(what, tmp_path / "n")
    with sock:
        out, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    assert text in out
    if what == "callback":
        assert "ZeroDivisionError" in err
