"""Every wdiff, damaged wdiff, merge, virtual image, hash and conversion of the golden vectors.

All by the command line. What is expected is what the original tools said; where we are stricter on purpose, the
test says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit import golden
from tests.kit.cli import Cli
from tests.kit.golden import GOLDEN, Item, base_image, item_id, sha256
from walbd.cli.walbd import root
from walbd.format.compress import CompressOpt
from walbd.format.virtual import VirtualImage
from walbd.format.wdiff_log import sorted_from_wlogs
from walbd.format.wdiff_read import open_wdiff
from walbd.fs import OsFileSystem

WDIFFS = golden.items("wdiff")
DAMAGED = golden.items("corrupt-wdiff")
CONVERTED = [item for item in WDIFFS if item.get("made_from", "").endswith(".wlog")]
RECOMPRESSED = [item for item in WDIFFS if item["file"].startswith("cmpr_")]
WLOGS = [item for item in golden.items("corrupt-wlog") if "to_wdiff" in item]


@pytest.fixture
def walbd(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(root, "walbd", capsys)


def show(walbd: Cli, path: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(walbd.good("wdiff", "show", path, "--json"))
    return shown


def applied(walbd: Cli, tmp_path: Path, redo: dict[str, Any], *wdiffs: Path) -> str:
    """Apply to the base image of `redo` and return the digest."""
    image = tmp_path / "image"
    image.write_bytes(base_image(redo["base"], redo["image_size"]))
    walbd.good("wdiff", "apply", *wdiffs, image, "--discard", redo["discard"])
    return sha256(image.read_bytes())


def ranges(records: list[list[Any]]) -> list[list[Any]]:
    """The parts of records that do not depend on a compression library: address, blocks, flags."""
    return [[*record[:2], next(x for x in record[2:] if x in ("--", "Z-", "-D"))] for record in records]


def test_nothing_is_left_out() -> None:
    assert (len(WDIFFS), len(DAMAGED), len(CONVERTED), len(RECOMPRESSED), len(WLOGS)) == (23, 6, 13, 8, 5)
    assert len(golden.items("virtual-full")) == 1
    assert len(golden.items("hash")) == 1


@pytest.mark.parametrize("item", WDIFFS + DAMAGED + golden.items("hash"), ids=item_id)
def test_files_are_the_originals(item: Item) -> None:
    assert sha256(golden.path(item).read_bytes()) == item["sha256"]


# Whole wdiffs.


@pytest.mark.parametrize("item", WDIFFS, ids=item_id)
def test_show(walbd: Cli, item: Item) -> None:
    shown = show(walbd, golden.path(item))
    assert shown == {"header": item["show"]["header"], "records": item["show"]["records"]}
    text = walbd.good("wdiff", "show", golden.path(item))
    assert text.endswith(f"end    records {len(shown['records'])}\n")


@pytest.mark.parametrize("item", WDIFFS, ids=item_id)
def test_verify(walbd: Cli, item: Item) -> None:
    (verified,) = json.loads(walbd.good("wdiff", "verify", golden.path(item), "--json"))
    assert verified["good"] is True
    assert verified["records"] == len(item["show"]["records"])
    assert "good" in walbd.good("wdiff", "verify", golden.path(item))


@pytest.mark.parametrize("item", WDIFFS, ids=item_id)
def test_apply(walbd: Cli, item: Item, tmp_path: Path) -> None:
    for redo in item["redo"]:
        assert applied(walbd, tmp_path, redo, golden.path(item)) == redo["image_sha256"], redo


def test_apply_makes_discards_zero_by_default(walbd: Cli, tmp_path: Path) -> None:
    item = golden.item("overlap.s.wdiff")
    redo = next(r for r in item["redo"] if (r["base"], r["discard"]) == ("pattern", "zero"))
    (tmp_path / "image").write_bytes(base_image("pattern", redo["image_size"]))
    walbd.good("wdiff", "apply", golden.path(item), tmp_path / "image")
    assert sha256((tmp_path / "image").read_bytes()) == redo["image_sha256"]


# Merging.


def test_merge(walbd: Cli, tmp_path: Path) -> None:
    item = golden.item("merge3.wdiff")
    inputs = [GOLDEN / name for name in item["merged_from"]]
    for compress in ("none", "snappy", "gzip", "lzma:1", "lz4", "zstd:3"):
        out = tmp_path / "merged"
        walbd.good("wdiff", "merge", *inputs, "-o", out, "--compress", compress)
        for redo in item["redo"]:
            assert applied(walbd, tmp_path, redo, out) == redo["image_sha256"], (compress, redo)
        shown = show(walbd, out)
        assert shown["header"]["uuid"] == show(walbd, inputs[-1])["header"]["uuid"]
        kinds = {record[2] for record in shown["records"]}
        assert kinds == {"none"} if compress == "none" else kinds == {"none", compress.partition(":")[0]}


def test_apply_several_is_apply_of_their_merge(walbd: Cli, tmp_path: Path) -> None:
    item = golden.item("merge3.wdiff")
    for redo in item["redo"]:
        # The original was given the merged file: with `ignore`, what it overrode shows the base.
        inputs = [GOLDEN / name for name in item["merged_from"]]
        assert applied(walbd, tmp_path, redo, *inputs) == redo["image_sha256"], redo


@pytest.mark.parametrize("item", RECOMPRESSED, ids=item_id)
def test_recompress(walbd: Cli, item: Item, tmp_path: Path) -> None:
    _, kind, level, _ = item["file"].replace(".", "_").split("_")[:4]
    out = tmp_path / "out"
    walbd.good("wdiff", "merge", GOLDEN / item["made_from"], "-o", out, "--compress", f"{kind}:{level}")
    assert ranges(show(walbd, out)["records"]) == ranges(item["show"]["records"])
    for redo in item["redo"]:
        assert applied(walbd, tmp_path, redo, out) == redo["image_sha256"], redo


# Virtual images.


def test_virtual_full(walbd: Cli, tmp_path: Path) -> None:
    (item,) = golden.items("virtual-full")
    wdiffs = [GOLDEN / name for name in item["wdiffs"]]
    for result in item["result"]:
        base, out = tmp_path / "base", tmp_path / "out"
        content = base_image(result["base"], result["image_size"])
        base.write_bytes(content)
        walbd.good("image", "cat", base, *wdiffs, "-o", out)
        image = out.read_bytes()
        assert sha256(image) == result["image_sha256"]
        assert base.read_bytes() == content

        fs = OsFileSystem()
        files = [fs.open(path) for path in (base, *wdiffs)]
        virtual = VirtualImage(files[0], [open_wdiff(file) for file in files[1:]], len(image))
        assert b"".join(virtual.chunks(1536)) == image
        for offset in range(0, len(image), 4999):
            assert virtual.read(offset, 7000) == image[offset : offset + 7000]
        for file in files:
            file.close()


# Conversion.


@pytest.mark.parametrize("item", CONVERTED, ids=item_id)
def test_to_wdiff(walbd: Cli, item: Item, tmp_path: Path) -> None:
    wlog, out = GOLDEN / item["made_from"], tmp_path / "out"
    container = item["show"]["header"]["type"]
    if item["file"] == "mix512.x.wdiff":  # made with a largest record of 4 blocks, which has no option
        with OsFileSystem().open(wlog) as file:
            out.write_bytes(b"".join(sorted_from_wlogs([file], CompressOpt.parse("snappy"), record_max_lb=4)))
    else:
        walbd.good("wlog", "to-wdiff", wlog, "-o", out, "--format", container, "--compress", "snappy")
    shown = show(walbd, out)
    expected = item["show"]
    assert shown["header"] == expected["header"]
    assert ranges(shown["records"]) == ranges(expected["records"])
    if container == "indexed":
        parts = [(r[5], r[6]) for r in shown["records"] if r[-1] == "--"]
        assert parts == [(r[5], r[6]) for r in expected["records"] if r[-1] == "--"]
    for redo in item["redo"]:
        assert applied(walbd, tmp_path, redo, out) == redo["image_sha256"], redo


@pytest.mark.parametrize("container", ["sorted", "indexed"])
@pytest.mark.parametrize("item", WLOGS, ids=item_id)
def test_to_wdiff_of_damaged_logs(walbd: Cli, item: Item, container: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("wlog", "to-wdiff", golden.path(item), "-o", out, "--format", container)
    # The original takes a log that stops at the end of a pack for a whole one; we do not.
    if item["to_wdiff"]["rc"] != 0 or item["file"] == "bad_cutpack.wlog":
        err = walbd.fails(*args)
        assert str(golden.path(item)) in err
        assert "offset=" in err
        assert "hint: " in err
        assert list(tmp_path.iterdir()) == []
    else:
        walbd.good(*args)
        if container == "sorted":
            assert ranges(show(walbd, out)["records"]) == item["to_wdiff"]["records"]


# Damaged wdiffs.


@pytest.mark.parametrize("item", DAMAGED, ids=item_id)
def test_show_damaged(walbd: Cli, item: Item) -> None:
    path = golden.path(item)
    result = walbd("wdiff", "show", path, "--json")
    assert result.code == 1  # also for bad_idata.wdiff, where the original does not look at that image
    first, hint = result.err.splitlines()
    assert first.startswith(f"walbd: {path}: ")
    assert "offset=" in first
    assert hint.startswith("hint: ")
    if "header" not in item["show"] or item["file"] == "bad_isuper.wdiff":
        assert result.out == ""
        return
    shown = json.loads(result.out)
    assert shown["header"] == item["show"]["header"]
    if item["file"] == "bad_idata.wdiff":
        width = len(item["show"]["records"][0])
        assert [record[:width] for record in shown["records"]] == item["show"]["records"]
        assert any(len(record) > width for record in shown["records"])
    else:
        assert shown["records"] == item["show"]["records"]


@pytest.mark.parametrize("item", DAMAGED, ids=item_id)
def test_damaged_wdiffs_change_nothing(walbd: Cli, item: Item, tmp_path: Path) -> None:
    path, image, out = golden.path(item), tmp_path / "image", tmp_path / "out"
    content = base_image("pattern", item["device_size"])
    image.write_bytes(content)
    good = GOLDEN / "m1.wdiff"
    commands: list[tuple[str | Path, ...]] = [
        ("wdiff", "verify", path),
        ("wdiff", "merge", path, "-o", out),
        ("wdiff", "merge", path, good, "-o", out),
        ("wdiff", "apply", path, image),
        ("wdiff", "apply", good, path, image),
        ("image", "cat", image, path, "-o", out),
    ]
    for command in commands:
        # bad_noend.wdiff is a whole file for the original's merge and apply; for us it is not.
        err = walbd.fails(*command)
        assert f"{path}: " in err, command
        assert "offset=" in err, command
        assert "hint: " in err, command
    assert image.read_bytes() == content
    assert list(tmp_path.iterdir()) == [image]


# Hashes.


def test_hash(walbd: Cli) -> None:
    (item,) = golden.items("hash")
    path = golden.path(item)
    assert walbd.good("image", "hash", path) == item["bhash_tool_whole"] + "\n"
    lines = walbd.good("image", "hash", path, "--chunk", "64K").splitlines()
    assert [line.split("\t") for line in lines] == item["bhash_tool_chunk_65536"]


def test_block_hash(walbd: Cli) -> None:
    (item,) = golden.items("hash")
    for vector in item["block_hash"]:
        args = ("image", "hash", golden.path(item), "--algorithm", "murmur3", "--chunk", str(vector["chunk"]))
        seed = ("--seed", str(vector["seed"]))
        assert walbd.good(*args, *seed, "--combine") == vector["stream"] + "\n"
        if "per_chunk_with_fixed_seed" in vector:
            lines = walbd.good(*args, *seed).splitlines()
            assert [line.split("\t")[1] for line in lines] == vector["per_chunk_with_fixed_seed"]
