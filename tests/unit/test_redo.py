"""Log devices: reading the ring, redo, torn packs, forgetting the future, and the two superblocks."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import Io, build_pack, fit_ring, image_of, make_ldev, packs
from tests.reference import logpack as reference
from tests.reference.checksum import checksum
from walbd.errors import CorruptData, Refused
from walbd.ext.logpack import Stop
from walbd.format.logpack import end_header
from walbd.format.ring import Ring, find_end
from walbd.format.superblock import Superblock, read_superblock, read_superblock1
from walbd.fs import OsFileSystem, failpoints
from walbd.ids import Lsid
from walbd.storage.device import redo as redo_module
from walbd.storage.device import superblocks as superblocks_module
from walbd.storage.device.redo import forget_future, redo
from walbd.storage.device.superblocks import open_superblock, write_superblocks

FS = OsFileSystem()
DEVICE_LB = 256
SIZE_B = {512: 512 * 200, 4096: 4096 * 100}


class Devices:
    """A log device with some log, its data device, and what redo must make of it."""

    def __init__(
        self, directory: Path, pbs: int, lsid: int, plan: list[list[Io]], oldest: int | None = None
    ) -> None:
        self.ldev, self.ddev = directory / "ldev", directory / "ddev"
        self.base = random.Random(9).randbytes(DEVICE_LB * 512)
        self.ddev.write_bytes(self.base)
        ring_pb = SIZE_B[pbs] // pbs - 4096 // pbs - 2

        def lay(sb: Superblock) -> list[list[Io]]:
            assert sb.ring_size_pb == ring_pb
            laid, used = [], 0
            for ios in fit_ring(lsid, pbs, ring_pb, plan):
                used += len(build_pack(0, pbs, 0, ios)) // pbs
                if used >= ring_pb:
                    break
                laid.append(ios)
            return laid

        self.sb, self.packs, self.end = make_ldev(
            self.ldev,
            pbs=pbs,
            size_b=SIZE_B[pbs],
            device_size_lb=DEVICE_LB,
            salt=77,
            lsid=lsid,
            packs=lay,
            oldest_lsid=oldest,
        )

    def pack_lsids(self) -> list[int]:
        lsids, lsid = [], int(self.sb.written_lsid)
        for ios in self.packs:
            lsids.append(lsid)
            lsid += len(build_pack(0, self.sb.pbs, 0, ios)) // self.sb.pbs
        return lsids

    def run(self, *, zero_discards: bool = True, **bounds: Any) -> redo_module.RedoResult:
        with FS.open(self.ldev, write=True) as ldev, FS.open(self.ddev, write=True) as ddev:
            return redo(ldev, ddev, open_superblock(ldev).superblock, zero_discards=zero_discards, **bounds)

    def put(self, lsid: int, block: bytes | bytearray) -> None:
        with FS.open(self.ldev, write=True) as file:
            file.pwrite(block, self.sb.offset_b(lsid))

    def flip(self, lsid: int, byte: int = 0) -> None:
        content = bytearray(self.ldev.read_bytes())
        content[self.sb.offset_b(lsid) + byte] ^= 0x20
        self.ldev.write_bytes(content)

    def log(self, lsid: int, n_pb: int) -> bytes:
        with FS.open(self.ldev) as file:
            return bytes(Ring(file, self.sb).read(lsid, n_pb))

    def image(self) -> bytes:
        return self.ddev.read_bytes()

    def check_settled(self, end: int) -> None:
        """Redo is done: both superblocks say so, and doing it again changes nothing."""
        with FS.open(self.ldev) as file:
            sb = read_superblock(file)
            assert sb == replace(self.sb, written_lsid=Lsid(end))
            assert read_superblock1(file, uuid=sb.uuid) == sb
        before = (self.ldev.read_bytes(), self.image())
        result = self.run()
        assert (result.end.lsid, result.n_packs, result.forgotten) == (end, 0, ())
        assert (self.ldev.read_bytes(), self.image()) == before


PLANS = packs(DEVICE_LB, max_packs=8, paddings=False)
LSIDS = st.integers(0, 1000)


BOUNDS = st.sampled_from(
    [{}, {"chunk_b": 1}, {"chunk_b": 1, "whole_pack_max_b": 1}, {"chunk_b": 8192, "whole_pack_max_b": 4096}]
)


@given(PLANS, st.sampled_from([512, 4096]), LSIDS, BOUNDS)
@settings(max_examples=60, deadline=None)
def test_redo_applies_the_log(
    tmp_path_factory: pytest.TempPathFactory, plan: list[list[Io]], pbs: int, lsid: int, bounds: dict[str, Any]
) -> None:
    dev = Devices(tmp_path_factory.getbasetemp(), pbs, lsid, plan)
    result = dev.run(**bounds)
    assert (result.begin_lsid, result.end.lsid, result.n_packs) == (lsid, dev.end, len(dev.packs))
    assert result.end.torn is None
    assert dev.image() == image_of(dev.base, dev.packs)
    dev.check_settled(dev.end)


@given(PLANS, st.sampled_from([512, 4096]), LSIDS, st.data())
@settings(max_examples=60, deadline=None)
def test_redo_cuts_a_torn_pack(
    tmp_path_factory: pytest.TempPathFactory, plan: list[list[Io]], pbs: int, lsid: int, data: st.DataObject
) -> None:
    dev = Devices(tmp_path_factory.getbasetemp(), pbs, lsid, plan)
    log = dev.log(lsid, dev.end - lsid)
    writes = [r for r in reference.scan(log, pbs, 77, lsid)[1] if not r.flags & 6]
    if not writes:
        return
    bad = data.draw(st.sampled_from(writes))
    dev.flip(bad.lsid, data.draw(st.integers(0, 511)))
    torn_lsid = bad.lsid - bad.lsid_local
    header = log[(torn_lsid - lsid) * pbs :][:pbs]
    record = next(i for i, r in enumerate(reference.records(header)) if r.lsid == bad.lsid and r.flags == 1)
    index = dev.pack_lsids().index(torn_lsid)
    good = [*dev.packs[:index], dev.packs[index][:record]]
    with FS.open(dev.ldev) as file:
        found = find_end(file, dev.sb)
    bounds: dict[str, Any] = data.draw(BOUNDS)
    failpoints.arm(f"{redo_module.FP_BEFORE_TORN}=eio")
    try:
        with pytest.raises(OSError, match="Input/output"):
            dev.run(**bounds)
    finally:
        failpoints.disarm()
    assert dev.image() == image_of(dev.base, dev.packs[:index])  # nothing of the torn pack, before it is cut
    result = dev.run(**bounds)
    assert result.end == found
    assert result.end.torn is not None
    assert (result.end.torn.lsid, result.end.torn.record) == (torn_lsid, record)
    kept = reference.shrink(header, pbs, 77, record) if record else end_header(pbs, 77)
    assert dev.log(torn_lsid, 1) == kept
    end = torn_lsid + 1 + reference.u16(kept, 6) if record else torn_lsid
    assert result.end.lsid == end
    assert dev.image() == image_of(dev.base, good)
    dev.check_settled(end)


PLAN = [
    [Io("write", 0, 4, 1), Io("write", 2, 4, 2)],
    [Io("discard", 1, 3), Io("write", 10, 8, 3)],
    [Io("write", 0, 1, 4)],
    [Io("write", 20, 3, 5), Io("discard", 21, 1)],
]


@pytest.mark.parametrize("pbs", [512, 4096])
def test_pack_header_in_the_last_block_of_the_ring(tmp_path: Path, pbs: int) -> None:
    ring_pb = SIZE_B[pbs] // pbs - 4096 // pbs - 2
    dev = Devices(tmp_path, pbs, ring_pb * 3 - 1, PLAN)
    assert dev.pack_lsids()[0] % ring_pb == ring_pb - 1
    dev.run()
    assert dev.image() == image_of(dev.base, PLAN)


def test_discards_may_be_left_out(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, PLAN)
    dev.run(zero_discards=False)
    assert dev.image() == image_of(dev.base, PLAN, zero_discards=False)


def test_redo_forgets_the_future(tmp_path: Path) -> None:
    """Pack 1 is lost and packs 2 and 3 are not; a new pack 1 of the same size must not bring them back."""
    dev = Devices(tmp_path, 512, 40, PLAN)
    lsids = dev.pack_lsids()
    pack = dev.log(lsids[1], lsids[2] - lsids[1])
    dev.put(lsids[1], b"\x11" * 512)
    result = dev.run()
    assert result.end.lsid == lsids[1]
    assert result.forgotten == tuple(lsids[2:])
    dev.check_settled(lsids[1])
    dev.put(lsids[1], pack)  # a new write, exactly as large
    dev.run()
    assert dev.image() == image_of(dev.base, PLAN[:2])
    dev.check_settled(lsids[2])


def test_forgetting_leaves_kept_log_alone(tmp_path: Path) -> None:
    """The ring is full of log that the backup still needs; all of it has lsids below the end."""
    dev = Devices(tmp_path, 512, 170, PLAN * 8, oldest=0)
    used = dev.end - 170
    dev.sb = replace(dev.sb, oldest_lsid=Lsid(170), written_lsid=Lsid(dev.end))
    assert used > 150
    before = dev.ldev.read_bytes()
    with FS.open(dev.ldev, write=True) as file:
        assert forget_future(file, dev.sb, dev.end) == ()
    assert dev.ldev.read_bytes() == before


def test_forgetting_has_a_bound(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 40, PLAN)
    lsids = dev.pack_lsids()
    with FS.open(dev.ldev, write=True) as file:
        assert forget_future(file, dev.sb, lsids[2], max_b=512) == (lsids[2],)
        assert forget_future(file, dev.sb, lsids[2]) == (lsids[3],)


def test_an_end_header_ends_the_log(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, PLAN)
    lsids = dev.pack_lsids()
    dev.put(lsids[2], end_header(512, 77))
    result = dev.run()
    assert (result.end.lsid, result.end.stop) == (lsids[2], Stop.END)
    assert dev.image() == image_of(dev.base, PLAN[:2])


def test_packs_of_an_earlier_lap_or_salt_end_the_log(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 400, PLAN)
    stale = build_pack(dev.end - dev.sb.ring_size_pb, 512, 77, PLAN[0])
    dev.put(dev.end, stale[:512])
    assert dev.run().end.stop is Stop.WRONG_LSID
    dev.put(dev.end, build_pack(dev.end, 512, 78, PLAN[0])[:512])
    assert dev.run().end.stop is Stop.NOT_HEADER
    assert dev.image() == image_of(dev.base, PLAN)


def test_a_contradictory_header_is_no_end(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 400, PLAN)
    lsid = dev.pack_lsids()[1]
    header = bytearray(dev.log(lsid, 1))
    header[18] ^= 1
    header[0:4] = bytes(4)
    header[0:4] = checksum(bytes(header), 77).to_bytes(4, "little")
    dev.put(lsid, header)
    before = dev.ldev.read_bytes()
    with pytest.raises(CorruptData, match="paddings") as caught:
        dev.run()
    assert caught.value.facts["offset"] == dev.sb.offset_b(lsid)
    assert caught.value.hint
    assert dev.ldev.read_bytes() == before
    with FS.open(dev.ldev) as file, pytest.raises(CorruptData):
        find_end(file, dev.sb)


def test_records_outside_the_device_are_refused(tmp_path: Path) -> None:
    for io in (Io("write", DEVICE_LB - 1, 2, 1), Io("discard", DEVICE_LB, 1), Io("discard", 0, DEVICE_LB + 1)):
        dev = Devices(tmp_path, 512, 0, [[Io("write", 0, 1, 1)], [io]])
        before = dev.ldev.read_bytes()
        with pytest.raises(CorruptData, match="beyond the end"):
            dev.run()
        assert (dev.ldev.read_bytes(), dev.image()) == (before, dev.base)


def test_paddings_in_mid_lap_are_refused(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, [])
    dev.put(0, build_pack(0, 512, 77, [Io("padding", 0, 2)]))
    with pytest.raises(CorruptData, match="end of the ring"):
        dev.run()
    dev.put(0, build_pack(0, 512, 77, [Io("padding", 0, 0), Io("write", 0, 1, 1)]))
    dev.run()
    assert dev.image() == image_of(dev.base, [[Io("write", 0, 1, 1)]])


def test_a_data_device_that_is_too_small(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, PLAN)
    dev.ddev.write_bytes(dev.base[:-512])
    before = dev.ldev.read_bytes()
    with pytest.raises(Refused, match="smaller than the volume"):
        dev.run()
    assert (dev.ldev.read_bytes(), dev.image()) == (before, dev.base[:-512])


FAILPOINTS = sorted(
    {value for name, value in vars(redo_module).items() if name.startswith("FP_")}
    | {value for name, value in vars(superblocks_module).items() if name.startswith("FP_")}
)


@pytest.mark.parametrize("name", FAILPOINTS)
def test_redo_may_be_interrupted_anywhere(tmp_path: Path, name: str) -> None:
    dev = Devices(tmp_path, 512, 40, [*PLAN, [Io("write", 3, 2, 6), Io("write", 5, 2, 7)], PLAN[0]])
    torn = dev.pack_lsids()[4]
    dev.flip(torn + 3)
    failpoints.arm(f"{name}=eio")
    try:
        with pytest.raises(OSError, match="Input/output"):
            dev.run()
    finally:
        failpoints.disarm()
    dev.run()
    assert dev.image() == image_of(dev.base, [*PLAN, [Io("write", 3, 2, 6)]])
    dev.check_settled(torn + 3)


# The two superblocks


def damage(dev: Devices, *, copy: bool = False) -> None:
    content = bytearray(dev.ldev.read_bytes())
    content[(dev.sb.superblock1_offset_b if copy else 4096) + 90] ^= 1
    dev.ldev.write_bytes(content)


def with_copy(tmp_path: Path, copy_at: int = 0, lsid: int = 40) -> Devices:
    """A device whose superblock 1 says that pack `copy_at` is the first one not written."""
    dev = Devices(tmp_path, 512, lsid, PLAN)
    written = [*dev.pack_lsids(), dev.end][copy_at]
    with FS.open(dev.ldev, write=True) as file:
        write_superblocks(file, replace(dev.sb, written_lsid=Lsid(written)))
        file.pwrite(replace(dev.sb, written_lsid=Lsid(dev.end)).pack(), 4096)
    return dev


def opened(dev: Devices, uuid: bytes | None = None) -> tuple[int, bool]:
    with FS.open(dev.ldev) as file:
        found = open_superblock(file, uuid=uuid)
        return found.superblock.written_lsid, found.problem is not None


def test_superblock_0_wins(tmp_path: Path) -> None:
    dev = with_copy(tmp_path)
    assert opened(dev) == (dev.end, False)
    damage(dev, copy=True)
    assert opened(dev) == (dev.end, False)


@pytest.mark.parametrize("copy_at", [0, 2, 3])
def test_the_copy_counts_while_its_log_is_there(tmp_path: Path, copy_at: int) -> None:
    dev = with_copy(tmp_path, copy_at)
    damage(dev)
    assert opened(dev) == (dev.pack_lsids()[copy_at], True)
    dev.run()
    assert opened(dev) == (dev.end, False)


def test_the_copy_counts_when_nothing_came_after_it(tmp_path: Path) -> None:
    dev = with_copy(tmp_path, 4)
    damage(dev)
    assert opened(dev) == (dev.end, True)


def test_a_copy_whose_log_was_overwritten_does_not_count(tmp_path: Path) -> None:
    dev = with_copy(tmp_path, 0)
    dev.put(40, build_pack(40 + dev.sb.ring_size_pb, 512, 77, PLAN[0]))
    damage(dev)
    with pytest.raises(CorruptData, match="checksum of the superblock"):
        opened(dev)


def test_a_copy_of_another_log_does_not_count(tmp_path: Path) -> None:
    dev = with_copy(tmp_path, 0)
    damage(dev)
    with pytest.raises(CorruptData):
        opened(dev, uuid=bytes(16))
    content = bytearray(dev.ldev.read_bytes())
    content[4096 + 24] ^= 1
    dev.ldev.write_bytes(content)
    with pytest.raises(CorruptData):
        opened(dev)
    assert opened(dev, uuid=dev.sb.uuid)[1]


def test_both_damaged(tmp_path: Path) -> None:
    dev = with_copy(tmp_path, 0)
    damage(dev)
    damage(dev, copy=True)
    with pytest.raises(CorruptData, match="checksum of the superblock"):
        opened(dev)


@pytest.mark.parametrize("name", sorted(v for k, v in vars(superblocks_module).items() if k.startswith("FP_")))
def test_one_superblock_is_always_whole(tmp_path: Path, name: str) -> None:
    """Whatever a crash at this point leaves of the superblock being written, the device opens."""
    dev = with_copy(tmp_path, 2)
    after = replace(dev.sb, written_lsid=Lsid(dev.end))
    failpoints.arm(f"{name}=eio")
    try:
        with FS.open(dev.ldev, write=True) as file, pytest.raises(OSError, match="Input/output"):
            write_superblocks(file, after)
    finally:
        failpoints.disarm()
    if name == superblocks_module.FP_BEFORE_FIRST_SYNC:
        damage(dev)
    elif name == superblocks_module.FP_BEFORE_SECOND_SYNC:
        damage(dev, copy=True)
    assert opened(dev)[0] in (dev.pack_lsids()[2], dev.end)


# The ring


def test_reading_wraps(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, [])
    n = dev.sb.ring_size_pb
    for lsid in (n - 1, n, n + 1):
        dev.put(lsid, bytes([lsid % 251]) * 512)
    assert dev.log(n - 1, 3) == b"".join(bytes([lsid % 251]) * 512 for lsid in (n - 1, n, n + 1))
    with FS.open(dev.ldev) as file:
        ring = Ring(file, dev.sb)
        assert list(ring.segments(n - 1, 3)) == [(dev.sb.end_b - 512, 512), (5120, 1024)]
        assert list(ring.segments(2 * n, n)) == [(5120, n * 512)]


def test_a_device_cut_while_in_use(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 0, PLAN)
    with FS.open(dev.ldev, write=True) as file:
        file.truncate(dev.sb.offset_b(5))
        with pytest.raises(CorruptData, match="smaller than the ring"):
            find_end(file, dev.sb)


def test_headers_by_place(tmp_path: Path) -> None:
    dev = Devices(tmp_path, 512, 180, PLAN)
    with FS.open(dev.ldev) as file:
        ring = Ring(file, dev.sb)
        lap = list(ring.headers(180, 180 + dev.sb.ring_size_pb))
        assert lap == [(lsid, lsid) for lsid in dev.pack_lsids()]
        n = dev.sb.ring_size_pb
        assert list(ring.headers(180 + n, dev.end + n)) == [(lsid + n, lsid) for lsid in dev.pack_lsids()]
        assert ring.has_pack(180)
        assert not ring.has_pack(181)
        assert not ring.has_pack(180 + n)
