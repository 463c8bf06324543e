"""A storage whose settings change while it runs: reload, and other archives and proxies by command."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.storage_rig import DEVICE, VOL, FakeProxy, Rig
from walbd.errors import RemoteError
from walbd.fs import failpoints
from walbd.protocol.base import JobState
from walbd.protocol.codec import Request
from walbd.protocol.control import FullBackup, GetStatus, GetTsDelta, ResetVol, StatusReply
from walbd.protocol.maintenance import DumpLogHeader, Reload, Retarget
from walbd.storage.retarget import NAME
from walbd.units import LB, MIB

QUICK = {"ts_delta_interval_s": 0.02}


async def status(rig: Rig) -> StatusReply:
    return await rig.call(GetStatus())


async def refused(rig: Rig, request: Request[Any]) -> str:
    with pytest.raises(RemoteError) as caught:
        await rig.call(request)
    return caught.value.remote_code


def health(rig: Rig) -> list[str]:
    return [row.address for row in rig.server.proxies.health()]


def addresses(*proxies: FakeProxy) -> list[str]:
    return [str(proxy.address) for proxy in proxies]


async def deliver(rig: Rig) -> str:
    """Write something, wait until it is delivered, and say through which proxy."""
    n = len(rig.pieces)
    rig.device.scribble(1)
    await rig.until_delivered()
    await rig.until(lambda: len(rig.pieces) > n)
    return rig.pieces[-1].proxy


async def test_reload(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2)
    async with rig.running():
        await rig.target()
        assert await deliver(rig) == "p0"
        rig.options |= {
            "proxy": addresses(rig.proxies[1], rig.proxies[0]),
            "wlog_send_size_max": 2 * MIB,
            "snapshot_interval_s": 77,
            "node_id": "other",
        }
        done = await rig.call(Reload())
        assert sorted(done.applied) == ["proxy", "snapshot_interval_s", "wlog_send_size_max"]
        assert done.needs_restart == ["node_id"]
        assert await deliver(rig) == "p1"
        server = (await status(rig)).server
        assert (server["wlog_send_size_max_b"], server["snapshot_interval_s"]) == (2 * MIB, 77)
        assert server["proxy"] == ",".join(rig.options["proxy"])

        rig.options["proxy"] = addresses(*rig.proxies[:1], *rig.proxies[:1])
        assert await refused(rig, Reload()) == "config"
        assert await deliver(rig) == "p1"


async def test_retarget_proxies_at_once_and_over_restarts(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2, options={"retry_delay_min_s": 60.0, "retry_delay_max_s": 60.0})
    async with rig.running():
        rig.options["proxy"] = configured = addresses(rig.proxies[0])
        await rig.restart()
        await rig.target()
        await rig.until_delivered()
        await rig.proxies[0].stop()
        rig.device.scribble(1)
        await rig.until(lambda: rig.server.volumes[VOL].send_error)
        wanted = addresses(rig.proxies[1])
        done = await rig.call(Retarget(proxies=wanted))
        assert (done.applied, done.needs_restart) == (["proxy"], [])
        await rig.until_delivered()  # at once: what waits does not sit out its delay
        assert rig.pieces[-1].proxy == "p1"
        shown = (await status(rig)).server
        assert (shown["proxy"], shown["proxy_configured"]) == (wanted[0], configured[0])
        assert "archive_configured" not in shown

        await rig.restart()
        assert health(rig) == wanted
        assert await deliver(rig) == "p1"
        assert (await rig.call(Reload())).applied == []  # the configuration still says what was replaced
        assert health(rig) == wanted

        await rig.restart_proxy(rig.proxies[0])
        done = await rig.call(Retarget(proxies=configured))  # back to what is configured
        assert done.applied == ["proxy"]
        assert not (rig.base_dir / NAME).exists()
        assert "proxy_configured" not in (await status(rig)).server
        assert await deliver(rig) == "p0"


@pytest.mark.parametrize("how", ["reload", "restart"])
async def test_a_changed_configuration_wins(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path / "s", n_proxies=3)
    async with rig.running():
        rig.options["proxy"] = addresses(rig.proxies[0])
        await rig.restart()
        await rig.target()
        await rig.call(Retarget(proxies=addresses(rig.proxies[1]), archive="127.0.0.1:9"))
        rig.options["proxy"] = addresses(rig.proxies[2])
        if how == "restart":
            await rig.restart()
        else:
            assert (await rig.call(Reload())).applied == ["proxy"]
        assert health(rig) == addresses(rig.proxies[2])
        assert await deliver(rig) == "p2"
        shown = (await status(rig)).server
        assert (shown["archive"], shown["archive_configured"]) == ("127.0.0.1:9", str(rig.archive.address))
        assert "proxy_configured" not in shown
        kept = json.loads((rig.base_dir / NAME).read_text())["record"]
        assert (kept["archive"], kept["proxy"]) == ("127.0.0.1:9", [])

        rig.options["proxy"] = addresses(rig.proxies[0])  # back to what an earlier retargeting had replaced
        await rig.restart()
        assert health(rig) == addresses(rig.proxies[0])


async def test_retarget_archive(tmp_path: Path) -> None:
    """Backups and the lag follow; a backup that runs goes on with the archive that it began with."""
    rig = Rig(tmp_path / "s", options=QUICK)
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.until(lambda: rig.server.lag.rows)
        done = await rig.call(Retarget(archive="127.0.0.1:9"))
        assert done.applied == ["archive"]
        assert (await rig.call(GetTsDelta())).rows == []  # those were another archive's
        await rig.stop_volume()
        await rig.call(ResetVol(volume=VOL))
        assert await refused(rig, FullBackup(volume=VOL)) == "connect"

        await rig.call(Retarget(archive=str(rig.archive.address)))
        rig.archive.hold = hold = asyncio.Event()
        offers = len(rig.archive.offers)
        job = (await rig.call(FullBackup(volume=VOL))).job
        await rig.until(lambda: len(rig.archive.offers) > offers)
        await rig.call(Retarget(archive="127.0.0.1:9"))
        hold.set()
        assert (await rig.job(job)).state is JobState.DONE


async def test_a_running_transfer_is_not_dropped(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2)
    async with rig.running():
        rig.options["proxy"] = addresses(rig.proxies[0])
        await rig.restart()
        await rig.target()
        await rig.until_delivered()
        first = rig.proxies[0]
        first.hold = hold = asyncio.Event()
        chunks, pieces = first.chunks, len(rig.pieces)
        rig.device.scribble(1)
        await rig.until(lambda: first.chunks > chunks)
        await rig.call(Retarget(proxies=addresses(rig.proxies[1])))
        first.hold = None
        hold.set()
        await rig.until_delivered()
        assert rig.pieces[pieces].proxy == "p0"
        assert await deliver(rig) == "p1"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Retarget(), "usage"),
        (Retarget(archive="nowhere"), "usage"),
        (Retarget(archive="h:0"), "usage"),
        (Retarget(proxies=["h:1", "h:1"]), "usage"),
        (Retarget(proxies=["h:1", "unix"]), "usage"),
        (Retarget(archive="h:1", proxies=["h:65536"]), "usage"),
    ],
)
async def test_bad_targets_change_nothing(tmp_path: Path, request_: Retarget, code: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        before = rig.server.settings.current
        assert await refused(rig, request_) == code
        assert rig.server.settings.current is before
        assert not (rig.base_dir / NAME).exists()


async def test_a_failing_disk_changes_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        before = rig.server.settings.current
        for point in ("storage.retarget.before_save", "storage.retarget.before_drop"):
            if point.endswith("drop"):
                await rig.call(Retarget(proxies=["h:1"]))
                before = rig.server.settings.current
            failpoints.arm(f"{point}=eio")
            try:
                wanted = ["h:1"] if point.endswith("save") else addresses(*rig.proxies)
                assert await refused(rig, Retarget(proxies=wanted)) == "disk-failed"
            finally:
                failpoints.disarm()
            assert rig.server.settings.current is before


@pytest.mark.parametrize("content", ["", "{}", "junk", '{"format": 1, "record": {"archive": 1}}'])
async def test_a_damaged_override_is_told_and_the_configuration_used(tmp_path: Path, content: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.die()
        (rig.base_dir / NAME).write_text(content)
        await rig.start()
        assert health(rig) == addresses(*rig.proxies)
        assert await deliver(rig) == "p0"
        errors = (await status(rig)).errors
        assert len(errors) == 1
        assert "retarget again" in errors[0]
        await rig.call(Retarget(proxies=addresses(*rig.proxies)))  # says what counts: the file goes
        assert not (rig.base_dir / NAME).exists()
        assert (await status(rig)).errors == []


async def test_an_override_that_would_be_bad_is_not_used(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running(start=False):
        rig.base_dir.mkdir()
        record = {"proxy": ["h:1", "h:1"], "proxy_replaced": addresses(*rig.proxies)}
        (rig.base_dir / NAME).write_text(json.dumps({"format": 1, "record": record}))
        await rig.start()
        assert health(rig) == addresses(*rig.proxies)
        assert "named twice" in (await status(rig)).errors[0]


async def test_a_log_block_is_kept_for_analysis(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.init()
        rig.device.write(0, bytes(range(256)) * 2)
        await rig.call(DumpLogHeader(volume=VOL, lsid=0))
        kept = (rig.base_dir / VOL / "logpackheader-0").read_bytes()
        assert kept == bytes(rig.devices[DEVICE].ring.read(0, 1))
        for lsid in (2, 1 << 40):
            assert await refused(rig, DumpLogHeader(volume=VOL, lsid=lsid)) == "refused"
        for _ in range(5000):
            rig.device.write(0, bytes(LB))
        assert await refused(rig, DumpLogHeader(volume=VOL, lsid=0)) == "refused"  # overwritten
        assert await refused(rig, DumpLogHeader(volume="other", lsid=0)) == "bad-state"
