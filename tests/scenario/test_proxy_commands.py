"""Each command of a proxy in each state, allowed and refused; and what the commands do."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_archive import FakeArchive
from tests.kit.proxy_rig import STORAGE, ProxyRig, StorageSide, proxy, write
from walbd.daemon.conn import Connection, dial
from walbd.errors import Busy, RemoteError
from walbd.protocol.base import GetJobs, JobState, Kind, WaitJob
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    AddArchiveInfo,
    ArchiveInfo,
    ClearVol,
    DeleteArchiveInfo,
    GetActions,
    GetArchiveInfo,
    GetHandlerStat,
    GetHostType,
    GetIsWdiffSendError,
    GetLatestSnap,
    GetNumAction,
    GetPid,
    GetProxyDiff,
    GetState,
    GetStatus,
    GetVersion,
    GetVolumes,
    Kick,
    ListArchiveInfo,
    Resize,
    Role,
    Start,
    Stop,
    StopHow,
    UpdateArchiveInfo,
)
from walbd.protocol.transfer import Verdict, WlogAccepted

INFO = ArchiveInfo(archive="a0", address="127.0.0.1:1")
NEW = ArchiveInfo(archive="new", address="127.0.0.1:1")

COMMANDS: dict[str, Request[Any]] = {
    "start": Start(volume="vol0"),
    "stop graceful": Stop(volume="vol0", how=StopHow.GRACEFUL),
    "stop force": Stop(volume="vol0", how=StopHow.FORCE),
    "stop empty": Stop(volume="vol0", how=StopHow.EMPTY),
    "archive-info add": AddArchiveInfo(volume="vol0", info=NEW),
    "archive-info update": UpdateArchiveInfo(volume="vol0", info=INFO),
    "archive-info delete": DeleteArchiveInfo(volume="vol0", archive="a0"),
    "archive-info get": GetArchiveInfo(volume="vol0", archive="a0"),
    "archive-info list": ListArchiveInfo(volume="vol0"),
    "clear-vol": ClearVol(volume="vol0"),
    "resize": Resize(volume="vol0", size_b=1 << 30),
    "kick": Kick(),
    "kick vol": Kick(volume="vol0"),
    "kick vol a0": Kick(volume="vol0", archive="a0"),
    "status": GetStatus(volume="vol0"),
    "get state": GetState(volume="vol0"),
    "get is-wdiff-send-error": GetIsWdiffSendError(volume="vol0", archive="a0"),
    "get latest-snap": GetLatestSnap(volume="vol0"),
    "get proxy-diff": GetProxyDiff(volume="vol0"),
    "get num-action": GetNumAction(volume="vol0", action="WdiffSend"),
}

# The codes of refusals; everything that is not named here is allowed.
NOT_STARTED = {
    "stop graceful": "bad-state",
    "stop force": "bad-state",
    "stop empty": "bad-state",
    "kick vol": "bad-state",
    "kick vol a0": "bad-state",
}
NOT_STOPPED = dict.fromkeys(
    ["start", "archive-info add", "archive-info update", "archive-info delete", "clear-vol", "resize"]
)
EXPECTED: dict[str, dict[str, str]] = {
    "Clear": NOT_STARTED
    | {
        "start": "bad-state",
        "archive-info update": "bad-state",
        "archive-info delete": "bad-state",
        "archive-info get": "not-found",
        "clear-vol": "bad-state",
        "resize": "bad-state",
        "get is-wdiff-send-error": "bad-state",
        "get latest-snap": "bad-state",
    },
    "Stopped": NOT_STARTED,
    "Started": dict.fromkeys(NOT_STOPPED, "bad-state"),
    "WlogRecv": dict.fromkeys(NOT_STOPPED, "busy"),
    "sending": dict.fromkeys(NOT_STOPPED, "bad-state"),
    # a stop is going on: only `stop force` may hurry it
    "stopping": dict.fromkeys([*NOT_STOPPED, "stop graceful", "stop empty"], "stopping"),
    "WaitForEmpty": dict.fromkeys([*NOT_STOPPED, "stop graceful", "stop empty"], "stopping"),
    "Broken": {
        name: "bad-state"
        for name in COMMANDS
        if name
        not in (
            "clear-vol",
            "kick",
            "status",
            "get state",
            "get proxy-diff",
            "get num-action",
            "archive-info get",
            "archive-info list",
        )
    }
    | {"archive-info get": "not-found"},
}


@asynccontextmanager
async def receiving(rig: ProxyRig) -> AsyncIterator[Connection]:
    async with dial(rig.env, STORAGE, rig.address) as conn:
        await conn.send(StorageSide(rig).offer())
        await conn.expect(WlogAccepted)
        yield conn


@asynccontextmanager
async def in_state(state: str, base: Path, a0: FakeArchive) -> AsyncIterator[ProxyRig]:
    """A proxy whose vol0 is in this state."""
    async with proxy(base) as rig:
        if state == "Clear":
            yield rig
        elif state == "Stopped":
            await rig.add(a0)
            yield rig
        elif state == "Broken":
            await rig.add(a0)
            (base / "vol0" / "volume.json").write_text("nonsense")
            await rig.restart()
            yield rig
        elif state == "Started":
            await rig.begin(a0)
            yield rig
        elif state == "sending":
            await rig.begin(a0)
            hold = a0.hold = asyncio.Event()
            await StorageSide(rig).send([write(0)])
            await rig.until(lambda: a0.streaming)
            yield rig
            hold.set()
        elif state == "WaitForEmpty":
            await rig.begin(a0)
            a0.refuse_all(Verdict.SYNCING)
            await StorageSide(rig).send([write(0)])
            await rig.call(Stop(volume="vol0", how=StopHow.EMPTY))
            await rig.until(lambda: rig.volume.machine.during)
            yield rig
        else:
            await rig.begin(a0)
            async with receiving(rig) as conn:
                if state == "stopping":
                    await rig.call(Stop(volume="vol0"))
                yield rig
                conn.abort()


CHANGING = [
    name for name in COMMANDS if not name.startswith(("get", "status", "archive-info get", "archive-info list"))
]
ALLOWED = [(state, name) for state in EXPECTED for name in CHANGING if name not in EXPECTED[state]]


@pytest.mark.parametrize("state", EXPECTED)
async def test_refused_commands_change_nothing_and_queries_answer(tmp_path: Path, state: str) -> None:
    async with FakeArchive() as a0, in_state(state, tmp_path, a0) as rig:
        if state not in ("sending", "stopping"):
            assert await rig.state() == state
        before = (await rig.state(), rig.files())
        for name, command in COMMANDS.items():
            code = EXPECTED[state].get(name)
            if code is not None:
                with pytest.raises(RemoteError) as caught:
                    await rig.call(command)
                assert caught.value.remote_code == code, name
                assert code == "stopping" or caught.value.hint, name
            elif name not in CHANGING:
                await rig.call(command)
            assert (await rig.state(), rig.files()) == before, name


@pytest.mark.parametrize(("state", "command"), ALLOWED)
async def test_allowed_commands(tmp_path: Path, state: str, command: str) -> None:
    async with FakeArchive() as a0, in_state(state, tmp_path, a0) as rig:
        await rig.call(COMMANDS[command])


async def test_life_of_a_volume(tmp_path: Path) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        assert await rig.state() == "Clear"
        assert (await rig.call(GetVolumes())).names == []
        await rig.add(a0)
        assert await rig.state() == "Stopped"
        await rig.add(a1, compress="lz4", delay_s=5)
        assert (await rig.call(ListArchiveInfo(volume="vol0"))).names == ["a0", "a1"]
        info = await rig.call(GetArchiveInfo(volume="vol0", archive="a1"))
        assert info == ArchiveInfo(archive="a1", address=str(a1.address), compress="lz4", delay_s=5)
        await rig.call(Start(volume="vol0"))
        assert await rig.state() == "Started"
        assert (await rig.stop_volume()).state is JobState.DONE
        await rig.call(DeleteArchiveInfo(volume="vol0", archive="a0"))
        assert await rig.state() == "Stopped"
        await rig.call(DeleteArchiveInfo(volume="vol0", archive="a0"))  # a missing one is fine
        await rig.call(DeleteArchiveInfo(volume="vol0", archive="a1"))
        assert await rig.state() == "Clear"
        assert (await rig.call(GetVolumes())).names == []
        assert not (tmp_path / "vol0").exists()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (AddArchiveInfo(volume="vol0", info=INFO), "already-exists"),
        (UpdateArchiveInfo(volume="vol0", info=NEW), "not-found"),
        (GetArchiveInfo(volume="vol0", archive="nobody"), "not-found"),
        (GetIsWdiffSendError(volume="vol0", archive="nobody"), "not-found"),
        (GetProxyDiff(volume="vol0", archive="nobody"), "not-found"),
        (GetNumAction(volume="vol0", action="Merge"), "not-found"),
        (AddArchiveInfo(volume="vol0", info=ArchiveInfo(archive="x", address="nowhere")), "usage"),
        (AddArchiveInfo(volume="vol0", info=ArchiveInfo(archive="x", address="host:0")), "usage"),
        (AddArchiveInfo(volume="vol0", info=ArchiveInfo(archive="x", address="h:1", compress="rar")), "usage"),
        (
            UpdateArchiveInfo(volume="vol0", info=ArchiveInfo(archive="a0", address="h:1", compress="zstd:99")),
            "usage",
        ),
        (Resize(volume="vol0", size_b=0), "usage"),
        (Resize(volume="vol0", size_b=1000), "usage"),
        (Resize(volume="vol0", size_b=512, zero=True), "usage"),
        (Start(volume="vol0", role=Role.TARGET), "usage"),
        (Kick(archive="a0"), "usage"),
        (Kick(volume="../x"), "usage"),
        (GetStatus(volume="../x"), "usage"),
        (WaitJob(job=77), "not-found"),
    ],
    ids=lambda value: value.TAG if isinstance(value, Request) else str(value),
)
async def test_bad_arguments_change_nothing(tmp_path: Path, request_: Request[Any], code: str) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.add(a0)
        record = (tmp_path / "vol0" / "volume.json").read_bytes()
        with pytest.raises(RemoteError) as caught:
            await rig.call(request_)
        assert caught.value.remote_code == code
        assert (tmp_path / "vol0" / "volume.json").read_bytes() == record
        assert rig.files() == ["volume.json"]


async def test_kick_of_an_archive_that_is_not_there(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        with pytest.raises(RemoteError) as caught:
            await rig.call(Kick(volume="vol0", archive="nobody"))
        assert caught.value.remote_code == "not-found"
        assert "a0" in caught.value.hint


async def test_update_is_used_by_the_next_transfer(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.call(AddArchiveInfo(volume="vol0", info=INFO))  # nobody listens there
        await rig.call(Start(volume="vol0"))
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: rig.server.prober.is_down("127.0.0.1:1"))
        await rig.stop_volume()
        info = ArchiveInfo(archive="a0", address=str(a0.address), compress="snappy", delay_s=0)
        await rig.call(UpdateArchiveInfo(volume="vol0", info=info))
        await rig.restart()
        assert await rig.call(GetArchiveInfo(volume="vol0", archive="a0")) == info
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|"]


async def test_deleting_an_archive_drops_its_wdiffs_only(tmp_path: Path) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        for archive in (a0, a1):
            archive.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0)])
        await rig.stop_volume()
        await rig.call(DeleteArchiveInfo(volume="vol0", archive="a0"))
        assert not (tmp_path / "vol0" / "sendto" / "a0").exists()
        await rig.add(a0)
        assert await rig.waiting("a0") == []
        assert await rig.waiting("a1") == ["|0|-->|1|"]


async def test_resize_is_kept_and_announced(tmp_path: Path) -> None:
    async with FakeArchive(size_b=4 << 20) as a0, proxy(tmp_path) as rig:
        await rig.add(a0)
        await rig.call(Resize(volume="vol0", size_b=2 << 20))
        await rig.restart()
        assert (await rig.status()).size_lb == 4096
        await StorageSide(rig).send([write(0)])
        await rig.drained()
        assert a0.offers[0].size_lb == 4096


async def test_queries_of_every_daemon(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        hold = a0.hold = asyncio.Event()
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: a0.streaming)
        assert (await rig.call(GetHostType())).kind is Kind.PROXY
        assert (await rig.call(GetPid())).value == os.getpid()
        assert (await rig.call(GetVersion())).protocol_min >= 1
        assert (await rig.call(GetVolumes())).names == ["vol0"]
        assert (await rig.call(GetNumAction(volume="vol0", action="WdiffSend"))).value == 1
        assert (await rig.call(GetNumAction(volume="vol0", action="a0"))).value == 1
        (row,) = (await rig.call(GetActions())).rows
        assert row[:3] == ("vol0", "WdiffSend", 1)
        hold.set()
        await rig.drained()
        assert (await rig.call(GetNumAction(volume="vol0", action="a0"))).value == 0
        tags = {(tag, node) for tag, node, _, _ in (await rig.call(GetHandlerStat())).rows}
        assert ("wlog-offer", "s0") in tags
        assert (await rig.call(GetJobs())).jobs == []
        await rig.stop_volume()
        (job,) = (await rig.call(GetJobs(volume="vol0"))).jobs
        assert (job.name, job.volume, job.state) == ("stop", "vol0", JobState.DONE)
        status = await rig.call(GetStatus())
        assert (status.node, status.kind) == ("p0", Kind.PROXY)
        assert status.server["receiving"] == 0
        assert int(status.server["free_b"] or 0) > 0


async def test_two_first_archives_at_once(tmp_path: Path) -> None:
    async with proxy(tmp_path) as rig:
        results = await asyncio.gather(
            rig.call(AddArchiveInfo(volume="vol0", info=INFO)),
            rig.call(AddArchiveInfo(volume="vol0", info=NEW)),
            return_exceptions=True,
        )
        failed = [result for result in results if isinstance(result, RemoteError)]
        assert all(error.remote_code == Busy.code for error in failed)
        names = (await rig.call(ListArchiveInfo(volume="vol0"))).names
        assert len(names) == 2 - len(failed)
