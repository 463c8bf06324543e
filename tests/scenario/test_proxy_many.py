"""A proxy that holds more for an archive than one message can list."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import walbd.proxy.queries
from tests.kit.fake_archive import FakeArchive
from tests.kit.proxy_rig import CONTROL, WAIT_S, proxy
from walbd.controller import constants as k
from walbd.controller.client import Client
from walbd.controller.replies import diffs_text
from walbd.controller.servers import ServerConnectionParam
from walbd.controller.waiting import list_waiting
from walbd.errors import WalbError
from walbd.format.meta import Diff, DiffIndex, Snapshot
from walbd.ids import Gid
from walbd.protocol.control import Diffs, GetProxyDiff, GetStatus
from walbd.proxy.diffs import DiffSet
from walbd.proxy.queries import PAGE_MAX, Queries, page_of


def some(count: int) -> list[Diff]:
    """As many diffs as come in `count` seconds of a busy volume."""
    return [
        Diff(Snapshot.clean(Gid(gid)), Snapshot.clean(Gid(gid + 1)), mergeable=True, timestamp=1_700_000_000 + gid)
        for gid in range(1_000_000, 1_000_000 + count)
    ]


async def test_a_day_of_diffs_is_listed(tmp_path: Path) -> None:
    wanted = some(45_000)
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.add(a0)
        rig.hop().diffs = DiffSet(DiffIndex.load(wanted)[0])
        first = await rig.call(GetProxyDiff(volume="vol0", archive="a0"))
        assert (len(first.diffs), first.more) == (PAGE_MAX, True)
        assert diffs_text(first).endswith(f"\nmore from generation {first.diffs[-1].begin.gid_b + 1} on")
        client = Client()
        p0 = ServerConnectionParam("p0", "127.0.0.1", rig.address.port, k.K_PROXY)
        places = [(p0, "vol0", "a0"), (p0, "vol0", ""), (p0, "vol0", "nobody")]
        try:
            listed, received, error = await asyncio.to_thread(list_waiting, client, places, WAIT_S)
        finally:
            client.close()
        assert listed == wanted
        assert received == []
        assert isinstance(error, WalbError)
        assert error.code == "not-found"


async def test_a_status_lets_others_work_between_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for two archives that are both away takes long to be counted."""

    async def at_once(*_: object) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(walbd.proxy.queries, "free_space", at_once)
    names = [f"vol{i}" for i in range(20)]
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        for name in names:
            await rig.add(a0, volume=name)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        queries = Queries(
            rig.env,
            CONTROL,
            rig.config,
            rig.server.volumes,
            rig.server.find,
            rig.server.scheduler,
            rig.server.receiver,
        )
        task = asyncio.create_task(others())
        status = await queries.status(None, GetStatus())  # type: ignore[arg-type]
        task.cancel()
        assert [v.volume for v in status.volumes] == sorted(names)
        assert turns >= 2 * len(names)


def test_diffs_of_one_begin_stay_together() -> None:
    same = [Diff(Snapshot.clean(Gid(5)), Snapshot.clean(Gid(6 + i))) for i in range(PAGE_MAX + 10)]
    later = Diff(Snapshot.clean(Gid(7)), Snapshot.clean(Gid(9)))
    assert page_of([*same, later], 0) == Diffs(diffs=same, more=True)
    assert page_of([*same, later], 6) == Diffs(diffs=[later])
    assert page_of(same, 0) == Diffs(diffs=same)
    assert page_of([], 0) == Diffs(diffs=[])
