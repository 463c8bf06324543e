"""Every wlog, damaged wlog, log device and checksum of the golden vectors, through the command line.

What is expected is what the original tools said. Where we are stricter on purpose, the test says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.kit import golden
from tests.kit.cli import Cli
from tests.kit.golden import GOLDEN, Item, base_image, item_id, sha256
from tests.reference.checksum import checksum as reference_checksum
from walbd.cli.walbd import root
from walbd.ext.checksum import checksum
from walbd.format.superblock import Superblock

WLOGS = golden.items("wlog")
DAMAGED = golden.items("corrupt-wlog")
DEVICES = golden.items("log-device")


@pytest.fixture
def walbd(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(root, "walbd", capsys)


def test_nothing_is_left_out() -> None:
    assert (len(WLOGS), len(DAMAGED), len(DEVICES)) == (6, 5, 3)


@pytest.mark.parametrize("item", WLOGS + DAMAGED + DEVICES, ids=item_id)
def test_files_are_the_originals(item: Item) -> None:
    assert sha256(golden.path(item).read_bytes()) == item["sha256"]


# Whole wlogs. `ok_tail.wlog` stands among the damaged ones, but is good: only undefined bytes differ.

GOOD = [*WLOGS, golden.item("ok_tail.wlog")]


@pytest.mark.parametrize("item", GOOD, ids=item_id)
def test_show(walbd: Cli, item: Item) -> None:
    shown = json.loads(walbd.good("wlog", "show", golden.path(item), "--json"))
    assert shown == {"header": item["show"]["header"], "packs": item["show"]["packs"]}
    text = walbd.good("wlog", "show", golden.path(item))
    assert text.count("\npack ") == len(item["show"]["packs"])
    assert all(f" {r[5]}" in text for pack in item["show"]["packs"] for r in pack["records"])


@pytest.mark.parametrize("item", GOOD, ids=item_id)
def test_verify(walbd: Cli, item: Item) -> None:
    stat = item["show"]["stat"]
    verified = json.loads(walbd.good("wlog", "verify", golden.path(item), "--json"))
    assert verified["begin_lsid"] == stat["bgnLsid"]
    assert verified["end_lsid"] == stat["reallyEndLsid"]
    assert verified["packs"] == stat["nrPacks"]
    assert "good" in walbd.good("wlog", "verify", golden.path(item))


@pytest.mark.parametrize("item", GOOD, ids=item_id)
def test_redo(walbd: Cli, item: Item, tmp_path: Path) -> None:
    for redo in item["redo"]:
        image = tmp_path / "image"
        image.write_bytes(base_image(redo["base"], redo["image_size"]))
        walbd.good("wlog", "redo", golden.path(item), image, "--discard", redo["discard"])
        assert sha256(image.read_bytes()) == redo["image_sha256"], redo


def test_redo_makes_discards_zero_by_default(walbd: Cli, tmp_path: Path) -> None:
    item = golden.item("gen512.wlog")
    redo = next(r for r in item["redo"] if (r["base"], r["discard"]) == ("pattern", "zero"))
    (tmp_path / "image").write_bytes(base_image("pattern", redo["image_size"]))
    walbd.good("wlog", "redo", golden.path(item), tmp_path / "image")
    assert sha256((tmp_path / "image").read_bytes()) == redo["image_sha256"]


# Damaged wlogs: the place and the words that the error has, and up to which lsid redo gets.
# The original exits with 0 on bad_pack.wlog (it takes the damaged header for the end) and on bad_cutpack.wlog (no
# end block); we fail on both.

DAMAGE = {
    "bad_head.wlog": (0, "checksum of the wlog header", None),
    "bad_pack.wlog": (4096 + 37 * 512, "checksum of the logpack header", 37),
    "bad_data.wlog": (4096 + 54 * 512, "data of a log record does not match", 37),
    "bad_cutpack.wlog": (77312, "without an end block", 143),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(walbd: Cli, name: str) -> None:
    offset, text, _ = DAMAGE[name]
    path = GOLDEN / name
    error = walbd.fails("wlog", "verify", path)
    assert error.startswith(f"walbd: {path}: ")
    assert text in error
    assert f"offset={offset}" in error
    assert "\nhint: " in error


@pytest.mark.parametrize("name", DAMAGE)
def test_show_shows_what_can_be_read_and_fails(walbd: Cli, name: str) -> None:
    item = golden.item(name)
    if name in ("bad_pack.wlog", "bad_cutpack.wlog"):
        assert item["show"]["rc"] == 0  # the original sees no damage here
    result = walbd("wlog", "show", GOLDEN / name, "--json")
    assert result.code == 1
    assert f"offset={DAMAGE[name][0]}" in result.err
    if name == "bad_head.wlog":
        assert result.out == ""
        return
    assert json.loads(result.out) == {"header": item["show"]["header"], "packs": item["show"]["packs"]}
    if item["show"]["ng_records"]:
        assert f"bad_records={len(item['show']['ng_records'])}" in result.err


@pytest.mark.parametrize("name", DAMAGE)
def test_redo_stops_at_the_damage(walbd: Cli, name: str, tmp_path: Path) -> None:
    item, applied_to = golden.item(name), DAMAGE[name][2]
    prefix = golden.item("bad_pack.wlog")  # the original's image after lsid 37
    for redo in item["redo"]:
        base = base_image(redo["base"], redo["image_size"])
        (tmp_path / "image").write_bytes(base)
        error = walbd.fails("wlog", "redo", GOLDEN / name, tmp_path / "image", "--discard", redo["discard"])
        image = sha256((tmp_path / "image").read_bytes())
        if applied_to is None:
            assert image == sha256(base)
            continue
        assert f"applied_to={applied_to}" in error
        if applied_to == 37:
            same = next(r for r in prefix["redo"] if (r["base"], r["discard"]) == (redo["base"], redo["discard"]))
            assert image == same["image_sha256"]
        else:  # everything but the end block is there, and the original applies it too
            assert image == redo["image_sha256"]


# Log devices


def superblock(path: Path) -> dict[str, str]:
    """Return superblock 0 as the manifest writes it."""
    sb = Superblock.parse(path.read_bytes()[4096 : 4096 + 4096], source=str(path))
    return {
        "sectorType": "1",
        "version": "2",
        "checksum": str(int.from_bytes(sb.pack()[4:8], "little")),
        "lbs": "512",
        "pbs": str(sb.pbs),
        "metadataSize": str(sb.metadata_size_pb),
        "salt": str(sb.salt),
        "name": sb.name,
        "ringBufferSize": str(sb.ring_size_pb),
        "oldestLsid": str(sb.oldest_lsid),
        "writtenLsid": str(sb.written_lsid),
        "deviceSize": str(sb.device_size_lb),
        "ringBufferOffset": str(sb.ring_offset_pb),
        "uuid": sb.uuid.hex(),
    }


@pytest.mark.parametrize("item", DEVICES, ids=item_id)
def test_ldev_info(walbd: Cli, item: Item) -> None:
    expected = item["super"]
    assert superblock(golden.path(item)) == expected
    info = json.loads(walbd.good("ldev", "info", golden.path(item), "--json"))
    for ours, theirs in (
        ("pbs", "pbs"),
        ("ring_size_pb", "ringBufferSize"),
        ("ring_offset_pb", "ringBufferOffset"),
        ("oldest_lsid", "oldestLsid"),
        ("written_lsid", "writtenLsid"),
        ("device_size_lb", "deviceSize"),
        ("name", "name"),
        ("uuid", "uuid"),
    ):
        assert str(info[ours]) == expected[theirs], ours
    assert int(info["salt"], 16) == int(expected["salt"])


@pytest.mark.parametrize("item", DEVICES, ids=item_id)
def test_ldev_cat(walbd: Cli, item: Item, tmp_path: Path) -> None:
    out = tmp_path / "out.wlog"
    walbd.good("ldev", "cat", golden.path(item), "-o", out)
    assert sha256(out.read_bytes()) == item["wlog_cat"]["wlog_sha256"]
    assert out.stat().st_size == item["wlog_cat"]["wlog_size"]
    shown = json.loads(walbd.good("wlog", "show", out, "--json"))
    assert shown["header"] == item["wlog_cat"]["show"]["header"]
    assert shown["packs"] == item["wlog_cat"]["show"]["packs"]


@pytest.mark.parametrize("item", DEVICES, ids=item_id)
def test_ldev_check_and_redo(walbd: Cli, item: Item, tmp_path: Path) -> None:
    ldev, ddev = tmp_path / "ldev", tmp_path / "ddev"
    shutil.copyfile(golden.path(item), ldev)
    ddev.write_bytes(base_image(item["ddev_before"]["base"], item["ddev_before"]["image_size"]))
    walbd.good("ldev", "check", ldev)
    assert ldev.read_bytes() == golden.path(item).read_bytes()

    walbd.good("ldev", "redo", ldev, ddev)
    expected = item["redo"]
    assert sha256(ddev.read_bytes()) == expected["ddev_sha256"]
    assert superblock(ldev) == expected["super_after"]

    # The blocks that the original changes hold what it wrote; beyond those, we write superblock 1.
    before, after, pbs = golden.path(item).read_bytes(), bytearray(ldev.read_bytes()), item["pbs"]
    assert len(after) == len(before)
    changed = [i for i in range(len(after) // pbs) if after[i * pbs :][:pbs] != before[i * pbs :][:pbs]]
    superblock1 = 4096 // pbs + 1
    assert changed == sorted([*expected["changed_physical_blocks"], superblock1])
    for block, prefix in expected["changed_block_prefix_hex"].items():
        assert after[int(block) * pbs :].startswith(bytes.fromhex(prefix))
    assert after[superblock1 * pbs :][:pbs] == after[4096:][:pbs]
    # Without superblock 1, the device is the original's to the last byte.
    after[superblock1 * pbs : (superblock1 + 1) * pbs] = before[superblock1 * pbs :][:pbs]
    assert sha256(bytes(after)) == expected["ldev_sha256_after"]

    out = tmp_path / "after.wlog"
    walbd.good("ldev", "cat", ldev, "-o", out)
    assert sha256(out.read_bytes()) == item["wlog_cat_after_redo"]["wlog_sha256"]
    again = (ldev.read_bytes(), ddev.read_bytes())
    walbd.good("ldev", "redo", ldev, ddev)
    assert (ldev.read_bytes(), ddev.read_bytes()) == again
    check = json.loads(walbd.good("ldev", "check", ldev, "--json"))
    assert check["problems"] == check["notes"] == []
    assert check["end_lsid"] == item["wlog_cat_after_redo"]["reallyEndLsid"]


# Checksums


def test_checksums() -> None:
    (item,) = golden.items("checksum")
    assert len(item["vectors"]) == 8
    for vector in item["vectors"]:
        if vector["data_hex"] is None:
            data = (GOLDEN / f"data_{vector['size']}.bin").read_bytes()
        else:
            data = bytes.fromhex(vector["data_hex"])
        assert len(data) == vector["size"]
        salt, expected = int(vector["salt"], 16), int(vector["checksum"], 16)
        assert checksum(data, salt) == reference_checksum(data, salt) == expected
