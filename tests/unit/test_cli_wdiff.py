"""`walbd wdiff`, `walbd image`, `walbd wlog to-wdiff`: what the golden vectors do not try."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.kit.cli import Cli
from tests.kit.golden import GOLDEN
from tests.kit.logs import Io, build_wlog, image_of
from tests.kit.wdiffs import UUID, make_indexed, make_sorted
from walbd.cli.walbd import root
from walbd.format.compress import CompressOpt, Kind
from walbd.format.hashes import BlockHash, murmur3, siphash, xxh3

LZ4 = CompressOpt(Kind.LZ4)
ONE = [Io("write", 4, 4, seed=1), Io("discard", 20, 64)]
TWO = [Io("write", 6, 4, seed=2), Io("write", 30, 2, seed=0)]
BASE = bytes(range(256)) * 2 * 100


@pytest.fixture
def walbd(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(root, "walbd", capsys)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "one").write_bytes(make_sorted(ONE, LZ4).data)
    (tmp_path / "two").write_bytes(make_indexed(TWO, LZ4).data)
    (tmp_path / "image").write_bytes(BASE)
    return tmp_path


def test_the_newest_is_given_last(walbd: Cli, files: Path) -> None:
    for order in ((ONE, TWO), (TWO, ONE)):
        names = [files / ("one" if ios is ONE else "two") for ios in order]
        (files / "image").write_bytes(BASE)
        walbd.good("wdiff", "merge", *names, "-o", files / "merged")
        walbd.good("image", "cat", files / "image", *names, "-o", files / "cat")
        said = walbd.good("wdiff", "apply", *names, files / "image")
        assert "applied" in said
        expected = image_of(BASE, order)
        assert (files / "image").read_bytes() == expected
        assert (files / "cat").read_bytes() == expected
        (files / "image").write_bytes(BASE)
        walbd.good("wdiff", "apply", files / "merged", files / "image")
        assert (files / "image").read_bytes() == expected


def test_output_replaces_a_file_only_when_it_is_good(walbd: Cli, files: Path) -> None:
    out = files / "out"
    out.write_bytes(b"precious")
    bad = GOLDEN / "bad_data.wdiff"
    walbd.fails("wdiff", "merge", files / "one", bad, "-o", out)
    walbd.fails("image", "cat", files / "image", bad, "-o", out)
    walbd.fails("wlog", "to-wdiff", GOLDEN / "bad_data.wlog", "-o", out)
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in files.iterdir()) == ["image", "one", "out", "two"]
    walbd.good("wdiff", "merge", files / "one", "-o", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    assert out.read_bytes() != b"precious"
    walbd.good("wdiff", "merge", out, files / "two", "-o", out)  # its own input
    walbd.good("wdiff", "verify", out)


def test_output_that_is_no_file(walbd: Cli, files: Path) -> None:
    assert "regular file" in walbd.fails("wdiff", "merge", files / "one", "-o", files, code=2)
    assert "regular file" in walbd.fails("wdiff", "merge", files / "one", "-o", "/dev/null", code=2)
    assert "no such directory" in walbd.fails("wdiff", "merge", files / "one", "-o", files / "a" / "b", code=5)


def test_missing_input(walbd: Cli, files: Path) -> None:
    for command in (
        ("wdiff", "show", "none"),
        ("wdiff", "verify", "none"),
        ("wdiff", "merge", files / "one", "none", "-o", files / "out"),
        ("wdiff", "apply", "none", files / "image"),
        ("wdiff", "apply", files / "one", "none"),
        ("image", "cat", files / "image", "none", "-o", files / "out"),
        ("image", "hash", "none"),
        ("wlog", "to-wdiff", "none", "-o", files / "out"),
    ):
        assert "none: " in walbd.fails(*command, code=5)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ("wdiff",),
        ("wdiff", "merge", "one"),
        ("wdiff", "merge", "-o", "out"),
        ("wdiff", "merge", "one", "-o", "out", "--compress", "zip"),
        ("wdiff", "merge", "one", "-o", "out", "--compress", "lzma:9"),
        ("wdiff", "apply", "image"),
        ("wdiff", "apply", "one", "image", "--discard", "passdown"),
        ("wlog", "to-wdiff", "one", "-o", "out", "--format", "both"),
        ("image", "hash", "image", "--chunk", "513"),
        ("image", "hash", "image", "--chunk", "0"),
        ("image", "hash", "image", "--chunk", "many"),
        ("image", "hash", "image", "--seed", "1"),
        ("image", "hash", "image", "--combine"),
        ("image", "hash", "image", "--algorithm", "xxh3", "--seed", "-1"),
        ("image", "hash", "image", "--algorithm", "md5"),
    ],
)
def test_wrong_usage(walbd: Cli, files: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    monkeypatch.chdir(files)
    result = walbd(*args)
    assert result.code == 2
    assert not (files / "out").exists()
    assert (files / "image").read_bytes() == BASE


def test_apply_refuses_a_small_image_before_it_writes(walbd: Cli, files: Path) -> None:
    content = BASE[: 80 * 512]
    (files / "image").write_bytes(content)
    said = walbd.fails("wdiff", "apply", files / "two", files / "one", files / "image")
    assert "beyond the end" in said
    assert f"{files / 'one'}: " in said
    assert (files / "image").read_bytes() == content
    walbd.fails("image", "cat", files / "image", files / "one", "-o", files / "out")
    assert not (files / "out").exists()


def test_apply_refuses_an_image_in_use(walbd: Cli, files: Path) -> None:
    import fcntl

    with (files / "image").open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert "in use" in walbd.fails("wdiff", "apply", files / "one", files / "image", code=5)
    assert (files / "image").read_bytes() == BASE


def test_verify_goes_on_after_a_bad_file(walbd: Cli, files: Path) -> None:
    bad = GOLDEN / "bad_pack.wdiff"
    result = walbd("wdiff", "verify", bad, files / "one", "none", "--json")
    assert result.code == 5  # the worst
    rows = json.loads(result.out)
    assert [row["good"] for row in rows] == [False, True, False]
    assert rows[0]["code"] == "corrupt-data"
    assert rows[1]["uuid"] == UUID.hex()
    assert result.err.count("walbd: ") == 2


def test_several_wlogs(walbd: Cli, files: Path) -> None:
    first = build_wlog(0, 512, 1, [ONE], uuid=UUID)  # a pack of 1 + 4 PBs
    second = build_wlog(5, 512, 2, [TWO], uuid=UUID)
    (files / "a").write_bytes(first)
    (files / "b").write_bytes(second)
    for container in ("sorted", "indexed"):
        out = files / f"{container}.wdiff"
        walbd.good("wlog", "to-wdiff", files / "a", files / "b", "-o", out, "--format", container)
        walbd.good("image", "cat", files / "image", out, "-o", files / "cat")
        assert (files / "cat").read_bytes() == image_of(BASE, [ONE, TWO])
    said = walbd.fails("wlog", "to-wdiff", files / "b", files / "a", "-o", files / "out", code=5)
    assert "does not continue" in said
    assert not (files / "out").exists()


def test_cat_of_an_image_alone_and_its_holes(walbd: Cli, files: Path) -> None:
    content = b"x" * 4096 + bytes((3 << 20) - 4096)
    (files / "image").write_bytes(content)
    walbd.good("image", "cat", files / "image", "-o", files / "out")
    assert (files / "out").read_bytes() == content
    assert (files / "out").stat().st_blocks * 512 <= 1 << 20
    (files / "image").write_bytes(b"x" * 513)
    walbd.fails("image", "cat", files / "image", "-o", files / "out2", code=2)


def test_hashes(walbd: Cli, files: Path) -> None:
    path = files / "image"

    def out(*args: str) -> list[str]:
        return walbd.good("image", "hash", path, *args).splitlines()

    chunks = [BASE[i : i + 10240] for i in range(0, len(BASE), 10240)]
    starts = [f"{i * 20:016x}" for i in range(len(chunks))]
    assert out() == [siphash(BASE).hex()]
    assert out("--chunk", "10K") == [f"{s}\t{siphash(c).hex()}" for s, c in zip(starts, chunks, strict=True)]
    for name, function in (("murmur3", murmur3), ("xxh3", xxh3)):
        seeded = ("--algorithm", name, "--seed", "4294967295")
        assert out(*seeded) == [function(BASE, 2**32 - 1).hex()]
        expected = [f"{s}\t{function(c, 2**32 - 1).hex()}" for s, c in zip(starts, chunks, strict=True)]
        assert out(*seeded, "--chunk", "10240") == expected
        state = BlockHash(function, 2**32 - 1)
        for chunk in chunks:
            state.update(chunk)
        assert out(*seeded, "--chunk", "10240", "--combine") == [state.digest().hex()]
        assert out("--algorithm", name) == [function(BASE, 0).hex()]
    path.write_bytes(b"")
    assert out() == [siphash(b"").hex()]
    assert out("--chunk", "1T") == [f"{0:016x}\t{siphash(b'').hex()}"]


def test_show_on_a_terminal_that_goes_away(files: Path) -> None:
    """Nobody reads: the command ends quietly, as every tool does."""
    import subprocess
    import sys

    ios = [Io("write", i * 2, 1, seed=1) for i in range(3000)]
    (files / "many").write_bytes(make_sorted(ios, LZ4).data)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "walbd.cli", "wdiff", "show", files / "many"],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
