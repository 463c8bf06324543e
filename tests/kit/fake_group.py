"""A backup group whose servers are small fakes behind the real network shell, for tests of the controller.

    with FakeGroup(storages=2) as group:
        group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
        group.kill("p0")                                  # as if its process had died
        group.fail("s0", TakeSnapshot, Busy("not now"))   # once

The fakes know states and move snapshots from storages over proxies to archives at once (`group.settle`), unless
`group.frozen` is set. They run in a thread of their own, as the controller is synchronous.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

import uvloop

from tests.kit.fake_kinds import FakeArchive, FakeProxy, FakeStorage
from tests.kit.fake_server import NOW, FakeServer, FakeVolume
from tests.kit.process import release_ports
from walbd.controller import Controller, ServerConnectionParam, ServerLayout
from walbd.controller.progress import Progress
from walbd.daemon.env import Env
from walbd.errors import WalbError
from walbd.protocol import control as c
from walbd.protocol.base import Kind
from walbd.protocol.codec import Request

__all__ = ["KINDS", "NOW", "FakeGroup", "FakeServer", "FakeVolume"]

T = TypeVar("T")
KINDS = {Kind.STORAGE: 0, Kind.PROXY: 1, Kind.ARCHIVE: 2}


class StoppedClock:
    """It is always `NOW`."""

    def now(self) -> int:
        return NOW


class FakeGroup:
    """All of it; leaving the block ends it."""

    def __init__(self, *, storages: int = 1, proxies: int = 1, archives: int = 1, timeoutS: float = 60) -> None:
        self.frozen = False
        self.requests: list[tuple[str, Request[Any]]] = []
        self.progress: list[Progress] = []
        self.env = Env(clock=StoppedClock())
        self._gates: dict[str, asyncio.Event] = {}
        self._failures: list[tuple[str, type[Request[Any]], WalbError | None]] = []
        self._job_failures: dict[str, WalbError] = {}
        self._loop = uvloop.new_event_loop()  # that of the daemons
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake group", daemon=True)
        self._thread.start()
        made: list[tuple[type[FakeServer], str, int, Kind]] = [
            (FakeStorage, "s", storages, Kind.STORAGE),
            (FakeProxy, "p", proxies, Kind.PROXY),
            (FakeArchive, "a", archives, Kind.ARCHIVE),
        ]
        self.servers: dict[str, FakeServer] = {
            f"{letter}{i}": cls(self, f"{letter}{i}", kind) for cls, letter, n, kind in made for i in range(n)
        }
        for name in self.servers:
            self.revive(name)
        params = [ServerConnectionParam(s.name, "127.0.0.1", s.port, KINDS[s.kind]) for s in self.servers.values()]
        self.s, self.p, self.a = ([param for param in params if param.kind == kind] for kind in range(3))
        self.layout = ServerLayout(self.s, self.p, self.a)
        self.ctl = Controller("", self.layout, timeoutS=timeoutS, progress=self.progress.append)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ctl.close()
        self.release_all()
        for name, server in self.servers.items():
            self.run(server.jobs.idle())
            self.kill(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.env.pools.close()
        release_ports(server.port for server in self.servers.values())

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Run on the fakes' loop."""
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(30)

    def kill(self, name: str) -> None:
        """End a server; its volumes stay for `revive`."""
        self.run(self.servers[name].down())

    def revive(self, name: str) -> None:
        """Start a server where it was."""
        self.run(self.servers[name].up())

    def volume(self, name: str, vol: str = "vol0") -> FakeVolume:
        """A server's volume, for tests to look at and to change."""
        return self.servers[name].volumes[vol]

    def fail(self, name: str, request: type[Request[Any]], error: WalbError | None, times: int = 1) -> None:
        """Refuse the next requests of a type; `error` None drops the connection instead."""
        self._failures += [(name, request, error)] * times

    def hold(self, what: str) -> None:
        """Make jobs of a name wait until `release`."""
        self._gates[what] = asyncio.Event()

    def release(self, what: str) -> None:
        """Let held jobs go on."""
        self._loop.call_soon_threadsafe(self._gates[what].set)

    def release_all(self) -> None:
        """Let everything go on."""
        for what in list(self._gates):
            self.release(what)

    async def gate(self, what: str) -> None:
        """Where jobs wait."""
        if what in self._gates:
            await self._gates[what].wait()
        if what in self._job_failures:
            raise self._job_failures.pop(what)

    def fail_job(self, what: str, error: WalbError) -> None:
        """Make the next job of a name fail."""
        self._job_failures[what] = error

    async def before(self, name: str, request: Request[Any]) -> None:
        """Called with every request before it is served."""
        for failure in self._failures:
            if failure[0] == name and failure[1] is type(request):
                self._failures.remove(failure)
                if failure[2] is None:
                    raise asyncio.CancelledError  # the connection is dropped without an answer
                raise failure[2]

    def settle(self) -> None:
        """Move snapshots as far as states allow."""
        if self.frozen:
            return
        by_kind = {kind: [s for s in self.servers.values() if s.kind is kind] for kind in KINDS}
        for storage in by_kind[Kind.STORAGE]:
            for vol, volume in storage.volumes.items():
                proxy = next((p for p in by_kind[Kind.PROXY] if p.state(vol) == "Started"), None)
                if volume.state != "Target" or proxy is None:
                    continue
                for archive in proxy.volumes[vol].infos:
                    proxy.volumes[vol].waiting.setdefault(archive, []).extend(volume.snapshots)
                volume.snapshots.clear()
        for proxy in by_kind[Kind.PROXY]:
            for vol, volume in proxy.volumes.items():
                for archive, gids in volume.waiting.items():
                    if volume.state == "Started" and self.servers[archive].state(vol) == "Archived":
                        self.servers[archive].volumes[vol].points += gids
                        gids.clear()

    def changes(self) -> list[str]:
        """Return the requests that may change something, oldest first, as `SERVER TAG [VOLUME]`.

        Kicks go to several servers at the same time: those that follow one another come by name.
        """
        changes = [
            (request.TAG, " ".join(filter(None, (name, request.TAG, getattr(request, "volume", "")))))
            for name, request in self.requests
            if not request.TAG.startswith(("get-", "wait-", "archive-info-list", "archive-info-get"))
        ]
        told: list[str] = []
        for tag, run in itertools.groupby(changes, key=lambda change: change[0]):
            texts = [text for _, text in run]
            told += sorted(texts) if tag == c.Kick.TAG else texts
        return told
