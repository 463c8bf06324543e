"""scripts/quickstart beside others: on a machine where ports are taken, and where other groups run."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.kit.process import free_port, release_ports, wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, which works in a directory of its own."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HOME", tmp_path / "a b")
    module.HOME.mkdir()
    return module


@pytest.fixture
def foreign() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another group, which has `walbd` in its arguments, too."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "walbd"])
    yield child
    child.kill()
    child.wait()


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_ports_that_are_taken_are_left_alone(
    quickstart: ModuleType, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    first = port - taken
    monkeypatch.setattr(quickstart, "PORTS", range(first, first + 500, 10))
    with socket.create_server(("0.0.0.0", port)):
        found = quickstart.free_ports()
        assert found in quickstart.PORTS[1:]
    release_ports([port])


def test_start_brings_back_what_was_there(
    quickstart: ModuleType, foreign: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: what runs goes on, a process of others that has got the number is none of ours."""
    spawned: list[tuple[str, ...]] = []
    monkeypatch.setattr(quickstart, "spawn", lambda *args: spawned.append(args))
    with pytest.raises(SystemExit, match="no group yet"):
        quickstart.start()
    ours = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(quickstart.HOME)])
    try:
        for name, pid in (("s0", 0), ("p0", foreign.pid), ("a0", ours.pid)):
            (quickstart.HOME / f"{name}.args").write_text(f'["{name}", "--x"]')
            if pid:
                (quickstart.HOME / f"{name}.pid").write_text(str(pid))
        wait_until(lambda: quickstart.running("a0") == ours.pid, "the process to have its arguments")
        quickstart.start()
        assert spawned == [("p0", "p0", "--x"), ("s0", "s0", "--x")]
    finally:
        ours.kill()
        ours.wait()


def test_one_after_the_other(quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock, order = tmp_path / "lock", []

    def second() -> None:
        with quickstart.only_one(lock):
            order.append("second")

    with quickstart.only_one(lock):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: "waiting for its end" in capsys.readouterr().out, "the second to wait")
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_processes_of_others_are_not_stopped(
    quickstart: ModuleType, foreign: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """A number in a file from before a restart of the machine may be that of another group's daemon."""
    (quickstart.HOME / "s0.pid").write_text(str(foreign.pid))
    quickstart.stop()
    assert foreign.poll() is None
    assert capsys.readouterr().out == "nothing was running\n"
    assert list(quickstart.HOME.iterdir()) == []
