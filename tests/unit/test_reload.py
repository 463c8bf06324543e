"""Settings at run time: what a reload changes, what it leaves, and who follows."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import pytest
import structlog
from msgspec import Meta

from walbd.archive.config import ArchiveConfig
from walbd.archive.server import ArchiveServer
from walbd.daemon.config import LIVE, Count, DaemonConfig, Size, load, load_again, settings
from walbd.daemon.conn import Me
from walbd.daemon.env import Env
from walbd.daemon.logs import configure, set_level
from walbd.daemon.main import Shutdown, raise_file_limit
from walbd.daemon.reload import Settings, follow_common, retry_policy
from walbd.daemon.server import Server
from walbd.errors import ConfigError
from walbd.protocol.base import Kind
from walbd.proxy.config import ProxyConfig
from walbd.proxy.server import ProxyServer
from walbd.storage.config import StorageConfig
from walbd.storage.server import StorageServer


class Config(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A daemon's configuration as the daemons write theirs."""

    size: Annotated[Size, Meta(le=1 << 30, extra=LIVE)] = 1 << 20
    count: Annotated[Count, Meta(extra=LIVE)] = 5
    place: Annotated[str, Meta(min_length=1)] = "here"

    def check(self) -> None:
        super().check()
        if self.count * 1024 > self.size:
            raise ConfigError("too many for the size")


class File:
    """A configuration file that changes."""

    def __init__(self, path: Path, cls: type[Any] = Config, **options: Any) -> None:
        self.path = path
        self.cls = cls
        self.options = options
        self.write("")

    def write(self, text: str) -> None:
        self.path.write_text(f'base_dir = "{self.path.parent}"\n{text}')

    def load(self) -> Any:
        return load(self.cls, self.path, self.options)

    async def load_again(self) -> Any:
        return await load_again(self.cls, self.path, self.options)


def opened(tmp_path: Path, **options: Any) -> tuple[File, Settings[Config]]:
    file = File(tmp_path / "c.toml", **options)
    return file, Settings(file.load(), file.load_again)


async def test_live_settings_count_at_once_and_others_are_named(tmp_path: Path) -> None:
    file, owner = opened(tmp_path)
    seen: list[tuple[int, int]] = []
    owner.follow(lambda old, new: seen.append((old.count, new.count)))
    file.write('count = 7\nsize = "2MiB"\nplace = "there"\nport = 1\n')
    done = await owner.reload()
    assert (done.applied, sorted(done.needs_restart)) == (["size", "count"], ["place", "port"])
    assert (owner.current.count, owner.current.size, owner.current.place, owner.current.port) == (
        7,
        2 << 20,
        "here",
        5000,
    )
    assert seen == [(5, 7)]

    again = await owner.reload()  # what needs a restart still does
    assert (again.applied, sorted(again.needs_restart)) == ([], ["place", "port"])
    file.write("")
    back = await owner.reload()
    assert (back.applied, back.needs_restart) == (["size", "count"], [])
    assert owner.current.count == 5


async def test_options_stay_on_top(tmp_path: Path) -> None:
    file, owner = opened(tmp_path, count="9")
    file.write('count = 7\nsize = "2MiB"\n')
    assert (await owner.reload()).applied == ["size"]
    assert owner.current.count == 9


@pytest.mark.parametrize(
    "text", ["count = 0\n", "colour = 1\n", "= ", "count = 2000\n", "io_timeout_s = -1\nsize = 2097152\n"]
)
async def test_an_error_changes_nothing(tmp_path: Path, text: str) -> None:
    file, owner = opened(tmp_path)
    before, told = owner.current, []
    owner.follow(lambda old, new: told.append(new))
    file.write(text)
    with pytest.raises(ConfigError):
        await owner.reload()
    file.path.unlink()
    with pytest.raises(ConfigError):
        await owner.reload()
    assert owner.current is before
    assert not told


async def test_what_runs_is_checked_too(tmp_path: Path) -> None:
    """The new file may be right as a whole, and the part of it that can be used now wrong without the rest."""

    class Two(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
        def check(self) -> None:
            if self.place == "here" and self.count > 5:
                raise ConfigError("not so many here")

    file = File(tmp_path / "c.toml", Two)
    owner = Settings(file.load(), file.load_again)
    file.write('place = "there"\ncount = 6\n')
    with pytest.raises(ConfigError, match="not so many here"):
        await owner.reload()
    assert owner.current.count == 5


async def test_without_a_source_nothing_changes() -> None:
    owner = Settings(Config(base_dir="/x"))
    done = await owner.reload()
    assert (done.applied, done.needs_restart) == ([], [])


async def test_what_all_daemons_have_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, owner = opened(tmp_path)
    me = Me(node="n", kind=Kind.PROXY)
    server = Server(Env(), me, {})
    follow_common(owner, me, server)
    before = structlog.get_config()
    configure("info", "json")
    try:
        bound = structlog.get_logger().bind(volume="vol0")
        bound.debug("before")
        file.write('log_level = "debug"\nio_timeout_s = 3.0\nconnect_timeout_s = 4.0\nconnections_max = 2\n')
        await owner.reload()
        assert (me.io_timeout_s, me.connect_timeout_s, server.connections_max) == (3.0, 4.0, 2)
        bound.debug("after")  # a logger that existed before
        set_level("error")
        bound.warning("too quiet")
        bound.error("loud")
        text = capsys.readouterr().err
        assert '"event": "after"' in text
        assert '"event": "loud"' in text
        assert "before" not in text
        assert "too quiet" not in text
    finally:
        set_level("info")
        structlog.configure(**before)


async def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, owner = opened(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "n"))
        sock.settimeout(120)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        file.write("count = 0\n")
        with pytest.raises(ConfigError):
            await owner.reload()
        first = sock.recv(200).decode()
        assert first.startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert int(first.partition("USEC=")[2]) > 0
        assert sock.recv(200) == b"READY=1"  # in any case: the daemon goes on


# The daemons: every live setting that somebody keeps a value of


async def reloaded(server: Any, config: dict[str, Any]) -> None:
    await server.reload()
    for name, value in config.items():
        assert getattr(server.settings.current, name) == value


def changing(cls: type[Any], **fixed: Any) -> tuple[Any, dict[str, Any], Callable[[], Any]]:
    """Return a configuration, changes to it, and what reads it again."""
    changes: dict[str, Any] = {}

    async def read() -> Any:
        return cls(**(fixed | changes))

    return cls(**fixed), changes, read


async def test_archive_follows(tmp_path: Path) -> None:
    config, changes, read = changing(ArchiveConfig, base_dir=str(tmp_path))
    server = ArchiveServer(config, Env(), Shutdown(), read=read)
    changes |= {"wdiffs_max": 3, "backups_max": 4, "maintain_max": 5, "free_reserve_b": 6, "auto_resize": True}
    await reloaded(server, changes)
    assert (server._wdiffs.n_max, server._backups.n_max, server._maintenance.n_max) == (3, 4, 5)
    assert (server.place.config.auto_resize, server.place.images.free_reserve_b) == (True, 6)  # type: ignore[attr-defined]


async def test_proxy_follows(tmp_path: Path) -> None:
    config, changes, read = changing(ProxyConfig, base_dir=str(tmp_path))
    server = ProxyServer(config, Env(), Shutdown(), read=read)
    changes |= {"sends_max": 1, "wdiff_send_count_max": 9, "retry_delay_max_s": 7.0, "io_timeout_s": 2.0}
    await reloaded(server, changes)
    assert (server.scheduler._workers, server.sender.n_max) == (1, 9)
    assert server.scheduler._retry == retry_policy(server.settings.current)
    assert server.sender._me.io_timeout_s == server.prober._me.io_timeout_s == 2.0


async def test_storage_follows(tmp_path: Path) -> None:
    fixed: dict[str, Any] = {"base_dir": str(tmp_path), "archive": "h:1", "proxy": ["h:2"]}
    config, changes, read = changing(StorageConfig, **fixed)
    server = StorageServer(config, Env(), Shutdown(), read=read)
    changes |= {"transfers_max": 1, "full_scan_bytes_per_s": 9, "io_timeout_s": 2.0, "proxy": ["h:3", "h:2"]}
    await reloaded(server, changes)
    assert server.scheduler._workers == 1
    assert server.shared.scan_limit.bytes_per_s == 9
    assert server._device_me.io_timeout_s == server.shared.me.io_timeout_s == 2.0
    assert [row.address for row in server.proxies.health()] == ["h:3", "h:2"]

    server.shared.scan_limit.bytes_per_s = 5  # set-full-scan-bps
    changes["transfers_max"] = 2
    await reloaded(server, changes)
    assert server.shared.scan_limit.bytes_per_s == 5

    slots = server.shared.scan_slots
    with ExitStack() as stack:
        for _ in range(2):
            await stack.enter_context(slots.turn())()
        with slots.turn() as comes:
            third = asyncio.ensure_future(comes())
            await asyncio.sleep(0)
            assert not third.done()
            changes["backups_max"] = 3
            await reloaded(server, changes)
            await third
    for taken_before_it_was_cancelled in (False, True):
        with slots.turn() as comes:
            wait = asyncio.ensure_future(comes())
            if taken_before_it_was_cancelled:
                await asyncio.sleep(0)
            wait.cancel()
            await asyncio.wait({wait})
    assert slots._running == 0


def test_which_settings_need_a_restart() -> None:
    """What cannot change in a running daemon: where it lives, who it is, how it listens."""
    fixed = {"base_dir", "node_id", "group", "listen", "port", "tls_cert", "tls_key", "tls_ca", "insecure"}
    fixed |= {"log_format", "start_stopped"}
    for cls in (StorageConfig, ProxyConfig, ArchiveConfig):
        assert {row.name for row in settings(cls) if not row.live} <= fixed


# Processes


def test_sighup(tmp_path: Path) -> None:
    path, notify = tmp_path / "proxy.toml", tmp_path / "n"
    base = f'base_dir = "{tmp_path}/p"\nport = 0\nlog_format = "json"\n'
    path.write_text(base)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(notify))
        sock.settimeout(120)
        child = subprocess.Popen(
            [sys.executable, "-m", "walbd.cli", "proxy", "--config", str(path)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NOTIFY_SOCKET": str(notify)},
        )
        try:
            assert sock.recv(200) == b"READY=1"
            for text in ("sends_max = 3\nport = 1\n", "sends_max = 0\n"):
                path.write_text(
                    base.replace("port = 0\n", "") + text + ("port = 0\n" if "port" not in text else "")
                )
                child.send_signal(signal.SIGHUP)
                assert sock.recv(200).startswith(b"RELOADING=1")
                assert sock.recv(200) == b"READY=1"
            child.send_signal(signal.SIGTERM)
            _, err = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 0, err
    assert '"applied": ["sends_max"], "needs_restart": ["port"]' in err
    assert '"event": "settings.reload_failed"' in err


def test_file_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    raise_file_limit()
    assert limits["now"] == (4096, 4096)
    limits["now"] = (1024, resource.RLIM_INFINITY)
    raise_file_limit()
    assert limits["now"] == (1 << 20, resource.RLIM_INFINITY)
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    raise_file_limit()
    assert limits["now"] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
