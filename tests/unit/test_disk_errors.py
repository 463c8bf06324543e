"""What the operating system refuses is told as an error of ours, with what a person can do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from walbd.daemon.env import Env
from walbd.errors import Busy, ConnectError, DiskFailed
from walbd.fs import OsFileSystem
from walbd.storage.device.userspace import UserspaceDevice


def test_a_directory_that_we_may_not_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is when a daemon is started by hand as another user."""

    def refuse(*_: object, **__: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))

    fs = OsFileSystem()
    monkeypatch.setattr(os, "stat", refuse)
    for look in (fs.is_dir, fs.exists, fs.size_of):
        with pytest.raises(DiskFailed) as caught:
            look(tmp_path / "x")
        assert "Permission denied" in caught.value.message
        assert f"user {os.geteuid()}" in caught.value.hint
        assert caught.value.facts["path"] == str(tmp_path / "x")


def test_a_file_that_another_process_has(tmp_path: Path) -> None:
    fs = OsFileSystem()
    path = tmp_path / "ldev"
    path.write_bytes(bytes(4096))
    with fs.open(path, write=True, lock=True):
        with pytest.raises(Busy) as caught:
            fs.open(path, write=True, lock=True)
        assert "stop that one" in caught.value.hint


async def test_a_device_that_is_not_served(tmp_path: Path) -> None:
    env = Env()
    with pytest.raises(ConnectError) as caught:
        await UserspaceDevice(env, tmp_path / "vol7").info()
    assert "walbd-device@vol7" in caught.value.hint
    env.pools.close()
