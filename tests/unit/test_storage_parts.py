"""The small parts of the storage daemon: pipelines, pace, log reading, cutting a volume, the record, settings."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lz4.block
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.fake_device import FakeDevice, FakeHandle, FakeLogReader
from tests.kit.virtual import InlinePools, run
from walbd.daemon.config import load as load_config
from walbd.daemon.flow import ahead, in_order, unless
from walbd.daemon.full_copy import Zeros, cut_piece, granule_of
from walbd.errors import ConfigError, CorruptData, ForceStopped, HistoryBroken, NotFound, Refused, WlogOverflow
from walbd.format.meta import LogPoint
from walbd.fs import OsFileSystem
from walbd.ids import Gid, Lsid
from walbd.protocol.transfer import FullChunk, Packing
from walbd.storage import record as records
from walbd.storage.config import StorageConfig
from walbd.storage.history import check_history
from walbd.storage.logread import BadLog, LogSource, PackRun, pack_runs
from walbd.storage.pace import Pace, SpeedLimit
from walbd.storage.record import VolumeRecord
from walbd.storage.states import State
from walbd.storage.worker import settle_delay_s
from walbd.units import KIB, LB, MIB

# pipelines


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_in_order_keeps_order_and_depth(depth: int) -> None:
    rng = random.Random(depth)
    running = most = 0

    async def step(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(rng.random())
        running -= 1
        return item * item

    async def main() -> list[int]:
        async with in_order(range(20), step, depth=depth) as results:
            return [result async for result in results]

    assert run(main()) == [i * i for i in range(20)]
    assert most == depth


def test_in_order_hands_out_an_error_in_its_place_and_ends_the_rest() -> None:
    ended: list[int] = []

    async def step(item: int) -> int:
        try:
            await asyncio.sleep(10 - item)
            if item == 2:
                raise Refused("two")
            return item
        finally:
            ended.append(item)

    async def main() -> list[int]:
        got: list[int] = []

        async def collect() -> None:
            async with in_order(range(9), step, depth=4) as results:
                async for result in results:
                    got.append(result)

        with pytest.raises(Refused, match="two"):
            await collect()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return got

    assert run(main()) == [0, 1]
    assert set(range(4)) <= set(ended)


def test_ahead_runs_ahead_a_little_and_closes_its_source() -> None:
    made, closed = [], []

    async def source() -> AsyncGenerator[int, None]:
        try:
            for i in range(100):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    async def main() -> None:
        async with ahead(source(), depth=2) as items:
            async for item in items:
                await asyncio.sleep(1)
                if item == 3:
                    break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
    assert closed == [True]
    assert 3 < len(made) <= 3 + 2 + 3


def test_ahead_hands_on_errors_after_what_came_before() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        raise Refused("three")

    async def main() -> list[int]:
        got: list[int] = []

        async def collect() -> None:
            async with ahead(source(), depth=5) as items:
                async for item in items:
                    got.append(item)

        with pytest.raises(Refused, match="three"):
            await collect()
        return got

    assert run(main()) == [1, 2]


def test_unless() -> None:
    async def after(delay_s: float, ended: list[str]) -> str:
        try:
            await asyncio.sleep(delay_s)
            return "done"
        finally:
            ended.append("work")

    async def main() -> None:
        ended: list[str] = []
        assert await unless(lambda: asyncio.sleep(5), after(1, ended), volume="v") == "done"
        with pytest.raises(ForceStopped) as caught:
            await unless(lambda: asyncio.sleep(1), after(5, ended), volume="v")
        assert caught.value.facts == {"volume": "v"}
        assert ended == ["work", "work"]
        both = asyncio.ensure_future(unless(lambda: asyncio.sleep(9), after(9, ended), volume="v"))
        await asyncio.sleep(1)
        both.cancel()
        with pytest.raises(asyncio.CancelledError):
            await both
        assert ended == ["work"] * 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_pace_holds_the_speed_and_obeys_changes() -> None:
    async def main() -> None:
        loop, ticks = asyncio.get_running_loop(), 0

        async def tick() -> None:
            nonlocal ticks
            ticks += 1

        limit = SpeedLimit(1000)
        pace = Pace(limit)
        for _ in range(10):
            await pace.spend(500, tick)
        assert loop.time() == pytest.approx(5, abs=0.2)
        assert ticks >= 40
        limit.bytes_per_s = 0
        await pace.spend(10**9, tick)
        assert loop.time() == pytest.approx(5, abs=0.2)
        limit.bytes_per_s = 1
        waiting = asyncio.ensure_future(pace.spend(10**6, tick))
        await asyncio.sleep(10)
        assert not waiting.done()
        limit.bytes_per_s = 10**6
        await waiting
        assert loop.time() < 18
        await asyncio.sleep(1000)  # idling gives no more credit than a second's worth
        began = loop.time()
        await pace.spend(3 * 10**6, tick)
        assert loop.time() - began == pytest.approx(2, abs=0.2)

    run(main())


def test_settle_delay() -> None:
    def delay(pending_mib: float) -> float:
        return settle_delay_s(int(pending_mib * MIB), size_max_b=100 * MIB, max_s=1.0)

    assert [delay(mib) for mib in (0, 1, 10)] == [1.0, 1.0, 1.0]
    assert delay(30) == pytest.approx(0.55)
    assert [delay(mib) for mib in (50, 51, 100, 1000)] == pytest.approx([0.1] * 4)
    assert settle_delay_s(0, size_max_b=MIB, max_s=0.0) == 0.0


# reading the log


def read_runs(
    device: FakeDevice, begin: int, limit: int, *, piece_b: int, packing: Packing = Packing.NONE, seed: int = 0
) -> list[PackRun]:
    async def main() -> list[PackRun]:
        source = LogSource(
            reader=FakeLogReader(FakeHandle(device)),
            path="/fake",
            pbs=device.pbs,
            salt=device.ring.superblock.salt,
            packing=packing,
            piece_b=piece_b,
        )
        return [found async for found in pack_runs(source, begin, limit, InlinePools(random.Random(seed)))]

    return run(main())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pack_runs_are_all_whole_packs_below_the_limit(data: st.DataObject) -> None:
    pbs = data.draw(st.sampled_from([512, 4096]))
    device = FakeDevice(pbs=pbs, ring_pb=256, seed=data.draw(st.integers(0, 99)))
    ends = [0]
    for _ in range(data.draw(st.integers(1, 12))):
        device.scribble(1, size_max_lb=data.draw(st.sampled_from([1, 8, 40])))
        device.oldest = ends[-1]
        ends.append(device.latest)
    begin = data.draw(st.sampled_from([end for end in ends if device.latest - end <= 256]))
    limit = data.draw(st.integers(begin, device.latest))
    piece_b = data.draw(st.sampled_from([1, 512, 4096, 8 * KIB, MIB]))
    packing = data.draw(st.sampled_from(list(Packing)))
    runs = read_runs(device, begin, limit, piece_b=piece_b, packing=packing)
    lsid = begin
    for found in runs:
        assert found.lsid == lsid
        raw = bytes(found.payload)
        if found.packing is Packing.LZ4:
            raw = lz4.block.decompress(raw, uncompressed_size=found.size_b)
        assert raw == bytes(device.ring.read(lsid, found.lsid_end - lsid))
        lsid = found.lsid_end
    packs = [end for end in ends if end <= limit]
    # A padding pack is a pack of its own: the runs may end behind one that no write ends with.
    assert max(packs) <= lsid <= limit
    assert lsid == limit or limit not in ends


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9), where=st.floats(0, 1, exclude_max=True), piece_b=st.sampled_from([512, 4096, MIB]))
def test_damage_anywhere_ends_the_runs_before_it(seed: int, where: float, piece_b: int) -> None:
    device = FakeDevice(seed=seed)
    device.scribble(10, size_max_lb=5)
    lsid = int(device.latest * where)
    device.damage(lsid)
    with pytest.raises(BadLog) as caught:
        read_runs(device, 0, device.latest, piece_b=piece_b)
    assert caught.value.lsid <= lsid
    assert len(caught.value.block) == 512
    assert {"path", "offset"} <= caught.value.facts.keys()


def test_other_log_in_the_place_is_refused() -> None:
    device = FakeDevice(ring_pb=64)
    while device.latest < 100:
        device.write(0, bytes(range(256)) * 2 * 3)
    with pytest.raises(BadLog):  # overwritten by the next lap
        read_runs(device, 0, 8, piece_b=4096)


# the volume in pieces


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=8),
    bulk_b=st.sampled_from([512, 4096, 64 * KIB, 96 * KIB]),
    packing=st.sampled_from(list(Packing)),
    piece_granules=st.integers(1, 4),
)
def test_cut_pieces_make_the_volume_again(
    runs: list[tuple[bool, int]], bulk_b: int, packing: Packing, piece_granules: int
) -> None:
    data = b"".join((b"walbdata" if full else bytes(8)) * (n * 8 * LB // 8) for full, n in runs)
    granule_b = granule_of(bulk_b)
    assert granule_b % bulk_b == 0
    piece_b = granule_b * piece_granules
    zeros, sent = Zeros(), list[tuple[FullChunk, Any]]()
    for at in range(0, len(data), piece_b):
        for chunk in cut_piece(memoryview(data[at : at + piece_b]), at, granule_b, packing):
            sent += zeros.join(*chunk)
    sent += zeros.flush()
    image = bytearray()
    for header, payload in sent:
        assert header.offset_b == len(image)
        if not len(payload):
            image += bytes(header.size_b)
            continue
        raw = bytes(payload)
        if header.packing is Packing.LZ4:
            raw = lz4.block.decompress(raw, uncompressed_size=header.size_b)
        assert header.xxh == xxhash.xxh3_64_intdigest(raw)
        assert any(raw)
        image += raw
    assert bytes(image) == data
    kinds = [not len(payload) for _, payload in sent]
    assert not any(a and b for a, b in pairwise(kinds)), "zeros are joined"


# history


def record_with(device: FakeDevice, lsid: int, *queue: int) -> VolumeRecord:
    points = [LogPoint(Lsid(at), Gid(i), False, 0) for i, at in enumerate((lsid, *queue))]
    return VolumeRecord(
        state=State.TARGET,
        device="/d",
        uuid_hex=device.uuid.hex(),
        done=points[0],
        queue=tuple(points[1:]),
    )


def test_check_history() -> None:
    device = FakeDevice()
    device.scribble(5)
    latest = device.latest
    check_history(record_with(device, 0), device.sample())
    check_history(record_with(device, latest), device.sample())
    check_history(record_with(device, 0, latest), device.sample())
    for bad in (record_with(device, latest + 1), record_with(device, 0, latest + 1)):
        with pytest.raises(HistoryBroken, match="lost log"):
            check_history(bad, device.sample())
    device.oldest = latest
    with pytest.raises(WlogOverflow, match="given up"):
        check_history(record_with(device, 0), device.sample())
    device.oldest = 0
    good = record_with(device, 0)
    device.overflow = True
    with pytest.raises(WlogOverflow):
        check_history(good, device.sample())
    device.reset_behind()
    with pytest.raises(HistoryBroken, match="was reset"):
        check_history(good, device.sample())


# the record


@st.composite
def volume_records(draw: st.DrawFn) -> VolumeRecord:
    points = []
    lsid = gid = 0
    for _ in range(draw(st.integers(1, 5))):
        lsid = min(lsid + draw(st.integers(0, 2**40)), 2**64 - 2)
        gid += draw(st.integers(1, 2**40))
        points.append(LogPoint(Lsid(lsid), Gid(gid), draw(st.booleans()), draw(st.integers(0, 2**31))))
    return VolumeRecord(
        state=draw(st.sampled_from(sorted(records.STEADY))),
        device="/" + draw(st.text(max_size=20)),
        uuid_hex=draw(st.binary(min_size=16, max_size=16).filter(any)).hex(),
        done=points[0],
        queue=tuple(points[1:]),
    )


@settings(max_examples=40, deadline=None)
@given(record=volume_records(), data=st.data())
def test_records_come_back_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, record: VolumeRecord, data: st.DataObject
) -> None:
    directory, fs = tmp_path_factory.mktemp("vol"), OsFileSystem()
    records.save(fs, directory, record)
    assert records.load(fs, directory) == record
    path = directory / "volume.json"
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole[: data.draw(st.integers(at, len(whole)))])
    try:
        again = records.load(fs, directory)
    except CorruptData:
        return
    assert again == record  # what was changed does not matter, such as white space


@pytest.mark.parametrize(
    "change",
    [
        {"state": "Broken"},
        {"state": "Clear"},
        {"state": "Dancing"},
        {"device": "relative"},
        {"uuid_hex": "12"},
        {"uuid_hex": "0" * 32},
        {"done": {"lsid": 2**64 - 1, "gid": 2**64 - 1, "mergeable": False, "timestamp": 0}},
        {"queue": [{"lsid": 5, "gid": 5, "mergeable": False, "timestamp": 0}]},
        {"queue": [{"lsid": 10, "gid": 3, "mergeable": False, "timestamp": 0}]},
        {"queue": [{"lsid": -1, "gid": 3, "mergeable": False, "timestamp": 0}]},
        {"queue": [{"lsid": 10, "gid": 9}]},
        {"queue": [{"lsid": 9, "gid": 4, "mergeable": False, "timestamp": 0}]},
        {"gid_past": 2**64 - 1},
        {"gid_past": -1},
        {"cut_lsid": 10},
        {"more": 1},
    ],
    ids=str,
)
def test_records_that_contradict_themselves(tmp_path: Path, change: dict[str, Any]) -> None:
    """Written by hand, without a checksum."""
    good = {
        "state": "Target",
        "device": "/d",
        "uuid_hex": "ab" * 16,
        "done": {"lsid": 10, "gid": 3, "mergeable": False, "timestamp": 0},
        "queue": [],
    }
    path = tmp_path / "volume.json"
    path.write_text(json.dumps({"format": 1, "record": good}))
    assert records.load(OsFileSystem(), tmp_path).state is State.TARGET
    path.write_text(json.dumps({"format": 1, "record": good | change}))
    with pytest.raises(CorruptData):
        records.load(OsFileSystem(), tmp_path)
    path.unlink()
    with pytest.raises(NotFound):
        records.load(OsFileSystem(), tmp_path)


def test_a_log_device_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.write(0, bytes(8 * LB))
    read = FakeLogReader.read

    async def cut_off(self: FakeLogReader, lsid: int, n_pb: int) -> memoryview:
        return (await read(self, lsid, n_pb))[:-1]

    monkeypatch.setattr(FakeLogReader, "read", cut_off)
    with pytest.raises(CorruptData, match="ended inside the log") as caught:
        read_runs(device, 0, device.latest, piece_b=1 << 20)
    assert caught.value.facts["offset"] == 0


def test_a_pack_that_fits_into_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    device.write(0, bytes(8 * LB))
    for size_max_b, runs in ((9 * LB, 1), (9 * LB - 1, 0)):
        monkeypatch.setattr("walbd.storage.logread.CHUNK_MAX_B", size_max_b)
        if runs:
            assert len(read_runs(device, 0, device.latest, piece_b=LB)) == runs
        else:
            with pytest.raises(Refused, match="too large"):
                read_runs(device, 0, device.latest, piece_b=LB)


# settings


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "storage.toml"
    file.write_text('base_dir = "/x"\narchive = "a:1"\nproxy = ["p:1", "q:2"]\nwlog_send_size_max = "64MiB"\n')
    config = load_config(StorageConfig, file, {"snapshot_interval_s": "5"})
    assert (config.wlog_send_size_max, config.snapshot_interval_s) == (64 * MIB, 5)
    assert [str(address) for address in config.proxy_addresses()] == ["p:1", "q:2"]
    assert config.wlog_packing == "lz4"
    assert load_config(StorageConfig, file, {"proxy": "r:3,s:4"}).proxy == ["r:3", "s:4"]


@pytest.mark.parametrize(
    "options",
    [
        {"archive": "nowhere"},
        {"archive": None},
        {"proxy": ""},
        {"proxy": "p"},
        {"proxy": "p:1,p:1"},
        {"wlog_send_size_max": "1k"},
        {"wlog_packing": "rar"},
        {"snapshot_interval_s": "0"},
        {"backups_max": "0"},
        {"probe_interval_s": "0"},
        {"unknown": "1"},
    ],
    ids=str,
)
def test_bad_settings(tmp_path: Path, options: dict[str, str | None]) -> None:
    file = tmp_path / "storage.toml"
    values = {"base_dir": "/x", "archive": "a:1", "proxy": "p:1"} | options
    unknown = values.pop("unknown", None)
    file.write_text(f"unknown = {unknown}\n" if unknown else "")
    with pytest.raises(ConfigError):
        load_config(StorageConfig, file, values)
