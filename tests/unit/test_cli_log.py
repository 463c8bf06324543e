"""`walbd wlog` and `walbd ldev`: refusals, files left alone, and making log devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.cli import Cli
from tests.kit.golden import GOLDEN, base_image
from tests.kit.logs import Io, build_log, build_pack, build_wlog
from walbd.cli.walbd import root
from walbd.format.logpack import end_header
from walbd.format.superblock import Superblock, read_superblock, read_superblock1
from walbd.fs import OsFileSystem

FS = OsFileSystem()


@pytest.fixture
def walbd(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(root, "walbd", capsys)


@pytest.fixture
def devices(tmp_path: Path) -> tuple[Path, Path]:
    ldev, ddev = tmp_path / "ldev", tmp_path / "ddev"
    ldev.write_bytes(bytes(200 * 512))
    ddev.write_bytes(base_image("pattern", 64 * 512))
    return ldev, ddev


# wlog


def test_redo_refuses_an_image_that_is_too_small(walbd: Cli, tmp_path: Path) -> None:
    wlog, image = tmp_path / "a.wlog", tmp_path / "image"
    wlog.write_bytes(build_wlog(0, 512, 1, [[Io("write", 0, 1, 1), Io("discard", 7, 2)]]))
    image.write_bytes(b"\xee" * 8 * 512)
    error = walbd.fails("wlog", "redo", wlog, image)
    assert error.startswith(f"walbd: {wlog}: ")
    assert "target_size_lb=8" in error
    assert image.read_bytes() == b"\xee" * 8 * 512


def test_redo_never_makes_or_grows_a_file(walbd: Cli, tmp_path: Path) -> None:
    wlog = tmp_path / "a.wlog"
    wlog.write_bytes(build_wlog(0, 512, 1, [[Io("write", 0, 1, 1)]]))
    walbd.fails("wlog", "redo", wlog, tmp_path / "nothing", code=5)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "empty").touch()
    walbd.fails("wlog", "redo", wlog, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_size == 0


def test_redo_refuses_an_image_in_use(walbd: Cli, tmp_path: Path) -> None:
    wlog = tmp_path / "a.wlog"
    wlog.write_bytes(build_wlog(0, 512, 1, [[Io("write", 0, 1, 1)]]))
    (tmp_path / "image").write_bytes(bytes(4096))
    with FS.open(tmp_path / "image", write=True, lock=True):
        assert "in use" in walbd.fails("wlog", "redo", wlog, tmp_path / "image", code=5)


@pytest.mark.parametrize("command", ["show", "verify"])
def test_files_that_are_no_wlogs(walbd: Cli, tmp_path: Path, command: str) -> None:
    walbd.fails("wlog", command, tmp_path / "nothing", code=5)
    assert "cannot read" in walbd.fails("wlog", command, tmp_path)
    (tmp_path / "empty").touch()
    assert "too short" in walbd.fails("wlog", command, tmp_path / "empty")
    assert "not a wlog" in walbd.fails("wlog", command, GOLDEN / "dev512.ldev")


def test_show_of_packs_larger_than_its_buffer(walbd: Cli, tmp_path: Path) -> None:
    """A pack above 16 MiB comes in parts; bad data inside it is still found and named."""
    packs = [[Io("write", 0, 9000, 1), Io("write", 0, 9000), Io("write", 0, 9000)], [Io("discard", 1, 1)]] * 2
    packs[0].append(Io("write", 0, 9000))
    content = bytearray(build_wlog(10, 4096, 1, packs))
    (tmp_path / "a.wlog").write_bytes(content)
    shown = json.loads(walbd.good("wlog", "show", tmp_path / "a.wlog", "--json"))
    assert [len(pack["records"]) for pack in shown["packs"]] == [4, 1, 4, 1]
    assert "4 packs" in walbd.good("wlog", "verify", tmp_path / "a.wlog")
    content[4096 * 2 + 5] ^= 1
    (tmp_path / "a.wlog").write_bytes(content)
    result = walbd("wlog", "show", tmp_path / "a.wlog", "--json")
    assert result.code == 1
    assert json.loads(result.out) == shown
    assert "offset=8192" in result.err
    assert "offset=8192" in walbd.fails("wlog", "verify", tmp_path / "a.wlog")


# ldev format


@pytest.mark.parametrize(("options", "pbs"), [([], 512), (["--pbs", "512"], 512), (["--pbs", "4096"], 4096)])
def test_format(walbd: Cli, devices: tuple[Path, Path], options: list[str], pbs: int) -> None:
    ldev, ddev = devices
    walbd.good("ldev", "format", ldev, ddev, "--name", "vol é", *options)
    with FS.open(ldev) as file:
        sb = read_superblock(file)
        assert read_superblock1(file, uuid=sb.uuid) == sb
    assert (sb.pbs, sb.name, sb.device_size_lb) == (pbs, "vol é", 64)
    assert (sb.oldest_lsid, sb.written_lsid) == (0, 0)
    assert sb.salt != 0
    assert sb.ring_size_pb == 200 * 512 // pbs - 4096 // pbs - 2
    info = json.loads(walbd.good("ldev", "info", ldev, "--json"))
    assert (info["name"], info["superblock"], info["overflow"]) == ("vol é", 0, False)
    assert "vol é" in walbd.good("ldev", "info", ldev)
    assert walbd.good("ldev", "check", ldev).endswith("good\n")
    assert "0 packs" in walbd.good("ldev", "redo", ldev, ddev)
    assert ddev.read_bytes() == base_image("pattern", 64 * 512)


def test_format_does_not_destroy_a_log(walbd: Cli, devices: tuple[Path, Path]) -> None:
    ldev, ddev = devices
    shutil.copyfile(GOLDEN / "dev512.ldev", ldev)
    error = walbd.fails("ldev", "format", ldev, ddev, code=5)
    assert "log device already" in error
    assert ldev.read_bytes() == (GOLDEN / "dev512.ldev").read_bytes()
    walbd.good("ldev", "format", ldev, ddev, "--force")
    with FS.open(ldev) as file:
        sb = read_superblock(file)
    assert sb.uuid.hex() != "1d912f7b0c27ce936f82961836b8026c"
    assert sb.salt != 0x19BCB5BC
    assert "log ends at 0" in walbd.good("ldev", "check", ldev)


def test_format_refuses(walbd: Cli, devices: tuple[Path, Path]) -> None:
    ldev, ddev = devices
    before = ldev.read_bytes()
    assert "31 bytes" in walbd.fails("ldev", "format", ldev, ddev, "--name", "x" * 32, code=2)
    walbd.fails("ldev", "format", ldev, ddev, "--pbs", "1024", code=2)
    walbd.fails("ldev", "format", ldev, ldev, code=5)
    walbd.fails("ldev", "format", ldev, ddev.parent / "nothing", code=5)
    assert ldev.read_bytes() == before
    ldev.write_bytes(before[: 11 * 512])
    assert "too small" in walbd.fails("ldev", "format", ldev, ddev, code=2)
    ldev.write_bytes(before)
    with FS.open(ldev, write=True, lock=True):
        walbd.fails("ldev", "format", ldev, ddev, code=5)


# ldev with a log


PACKS = [[Io("write", 0, 4, 1)], [Io("write", 2, 4, 2), Io("discard", 1, 2)], [Io("write", 9, 1, 3)]]
LSIDS = [0, 5, 10]
END = 12


@pytest.fixture
def logged(walbd: Cli, devices: tuple[Path, Path]) -> tuple[Path, Path, Superblock]:
    ldev, ddev = devices
    walbd.good("ldev", "format", ldev, ddev)
    with FS.open(ldev, write=True) as file:
        sb = read_superblock(file)
        file.pwrite(build_log(0, 512, sb.salt, PACKS), sb.offset_b(0))
    return ldev, ddev, sb


Logged = tuple[Path, Path, Superblock]


def patch(path: Path, offset: int, data: bytes) -> None:
    with FS.open(path, write=True) as file:
        file.pwrite(data, offset)


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        ([], 0, END),
        (["--from", "5"], 5, END),
        (["--to", "10"], 0, 10),
        (["--from", "5", "--to", "10"], 5, 10),
        (["--to", "12"], 0, 12),
    ],
)
def test_cat_ranges(walbd: Cli, logged: Logged, options: list[str], begin: int, end: int) -> None:
    ldev, _, sb = logged
    out = ldev.parent / "out.wlog"
    walbd.good("ldev", "cat", ldev, "-o", out, *options)
    bound = end if "--to" in options else 2**64 - 1
    log = build_log(0, 512, sb.salt, PACKS)[begin * 512 : end * 512]
    head = build_wlog(begin, 512, sb.salt, [], uuid=sb.uuid, end_lsid=bound)[:4096]
    assert out.read_bytes() == head + log + end_header(512, sb.salt)
    assert f"lsid {begin} to {end}" in walbd.good("wlog", "verify", out)


@pytest.mark.parametrize(
    ("options", "text", "code"),
    [
        (["--from", "4"], "no logpack at this lsid", 5),
        (["--from", "12"], "no logpack at this lsid", 5),
        (["--from", "99999"], "no logpack at this lsid", 5),
        (["--to", "11"], "not the beginning of a logpack", 5),
        (["--to", "4"], "not the beginning of a logpack", 5),
        (["--to", "13"], "ends before", 5),
        (["--from", "5", "--to", "5"], "not a range", 2),
        (["--from", "-1"], "not a range", 2),
        (["--from", str(2**64)], "not a range", 2),
        (["--to", str(2**64)], "not a range", 2),
        (["--to", "x"], "not a valid integer", 2),
    ],
)
def test_cat_refuses(walbd: Cli, logged: Logged, options: list[str], text: str, code: int) -> None:
    ldev = logged[0]
    out = ldev.parent / "out.wlog"
    names = sorted(os.listdir(ldev.parent))
    assert text in walbd.fails("ldev", "cat", ldev, "-o", out, *options, code=code)
    assert sorted(os.listdir(ldev.parent)) == names


def test_cat_keeps_an_old_file_unless_all_is_well(walbd: Cli, logged: Logged) -> None:
    ldev, _, sb = logged
    out = ldev.parent / "out.wlog"
    out.write_bytes(b"old")
    written = Superblock(**{**{f: getattr(sb, f) for f in sb.__slots__}, "written_lsid": END})
    patch(ldev, 4096, written.pack())
    patch(ldev, sb.offset_b(5) + 30, b"\xff")
    error = walbd.fails("ldev", "cat", ldev, "-o", out)
    assert "breaks off below its written lsid" in error
    assert f"offset={sb.offset_b(5)}" in error
    assert out.read_bytes() == b"old"
    assert "breaks off" in walbd.fails("ldev", "check", ldev)
    patch(ldev, sb.offset_b(0), bytes(512))
    error = walbd.fails("ldev", "cat", ldev, "-o", out, code=5)
    assert "overwritten" in error
    walbd.fails("ldev", "cat", GOLDEN / "dev512.ldev", "-o", "/dev/null", code=2)
    walbd.fails("ldev", "cat", GOLDEN / "dev512.ldev", "-o", out.parent / "no" / "out", code=5)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(ldev.parent)) == ["ddev", "ldev", "out.wlog"]


def test_cat_of_a_pack_too_large_for_a_buffer_and_torn(walbd: Cli, tmp_path: Path) -> None:
    ldev, ddev = tmp_path / "ldev", tmp_path / "ddev"
    for path, size in ((ldev, 64 << 20), (ddev, 9000 * 512)):
        path.touch()
        os.truncate(path, size)
    walbd.good("ldev", "format", ldev, ddev, "--pbs", "4096")
    with FS.open(ldev, write=True) as file:
        sb = read_superblock(file)
        pack = bytearray(build_pack(0, 4096, sb.salt, [Io("write", 0, 9000, i) for i in range(1, 6)]))
        pack[-4096 * 1125] ^= 1  # in the last record
        file.pwrite(pack, sb.offset_b(0))
    walbd.good("ldev", "cat", ldev, "-o", tmp_path / "out.wlog")
    shown = json.loads(walbd.good("wlog", "show", tmp_path / "out.wlog", "--json"))
    assert [pack["n_records"] for pack in shown["packs"]] == [4]
    assert "to 4 records" in walbd.good("ldev", "redo", ldev, ddev)
    assert ddev.read_bytes() == Io("write", 0, 9000, 4).data()


def test_check_reports(walbd: Cli, logged: Logged) -> None:
    ldev, ddev, sb = logged
    assert "redo is needed: lsid 0 to 12" in walbd.good("ldev", "check", ldev)
    patch(ldev, sb.offset_b(6), b"\1" * 512)
    said = walbd.good("ldev", "check", ldev)
    assert "lsid 5, is torn at record 0" in said
    assert "1 logpacks of a log that is no more" in said
    assert "the first at lsid 10" in said
    said = walbd.good("ldev", "redo", ldev, ddev)
    assert "applied lsid 0 to 5" in said
    assert "to 0 records" in said
    assert "removed 1 logpacks" in said
    assert walbd.good("ldev", "check", ldev).splitlines()[1:] == ["good"]
    with FS.open(ldev, write=True) as file:
        file.truncate(file.size() + 512)
    assert "1 physical blocks behind the ring" in walbd.good("ldev", "check", ldev)


def test_everything_speaks_json(walbd: Cli, logged: Logged) -> None:
    ldev, ddev, sb = logged
    out = ldev.parent / "out.wlog"
    said = json.loads(walbd.good("ldev", "cat", ldev, "-o", out, "--json"))
    assert said == {"wlog": str(out), "begin_lsid": 0, "end_lsid": END}
    image = ddev.parent / "image"
    shutil.copyfile(ddev, image)
    said = json.loads(walbd.good("wlog", "redo", out, image, "--json"))
    assert said == {"image": str(image), "begin_lsid": 0, "end_lsid": END}
    patch(ldev, sb.offset_b(6), b"\1" * 512)
    assert json.loads(walbd.good("ldev", "redo", ldev, ddev, "--json")) == {
        "begin_lsid": 0,
        "end_lsid": 5,
        "packs": 1,
        "records": 1,
        "torn": {"lsid": 5, "records_kept": 0},
        "removed_lsids": [10],
    }
    made = json.loads(walbd.good("ldev", "format", ldev, ddev, "--force", "--name", "n", "--json"))
    assert (made["name"], made["pbs"], made["written_lsid"]) == ("n", 512, 0)


def test_check_of_an_overflowed_ring(walbd: Cli, logged: Logged) -> None:
    ldev, _, sb = logged
    fields = {f: getattr(sb, f) for f in sb.__slots__}
    fields.update(written_lsid=sb.ring_size_pb + 5)
    patch(ldev, 4096, Superblock(**fields).pack())
    assert "overflowed" in walbd.fails("ldev", "check", ldev)
    assert json.loads(walbd.good("ldev", "info", ldev, "--json"))["overflow"] is True
    report = walbd("ldev", "check", ldev, "--json")
    assert report.code == 1
    assert "overflowed" in json.loads(report.out)["problems"][0]


def test_the_second_superblock_is_used_and_said(walbd: Cli, logged: Logged) -> None:
    ldev, ddev, sb = logged
    patch(ldev, 4096 + 80, b"\xff")
    result = walbd("ldev", "info", ldev, "--json")
    assert (result.code, json.loads(result.out)["superblock"]) == (0, 1)
    assert "superblock 1 is used instead" in result.err
    assert "superblock 0" in walbd.fails("ldev", "check", ldev)
    assert walbd("ldev", "redo", ldev, ddev).code == 0
    walbd.good("ldev", "check", ldev)
    patch(ldev, 4096 + 80, b"\xff")
    patch(ldev, sb.superblock1_offset_b, b"\xff")
    commands: list[list[str | Path]] = [["info", ldev], ["check", ldev], ["redo", ldev, ddev]]
    commands.append(["cat", ldev, "-o", ldev.parent / "x"])
    for command in commands:
        assert "offset=4096" in walbd.fails("ldev", *command)


def test_redo_refuses(walbd: Cli, logged: Logged) -> None:
    ldev, ddev, _ = logged
    before = ldev.read_bytes(), ddev.read_bytes()
    with FS.open(ldev, write=True, lock=True):
        walbd.fails("ldev", "redo", ldev, ddev, code=5)
    with FS.open(ddev, write=True, lock=True):
        walbd.fails("ldev", "redo", ldev, ddev, code=5)
    walbd.fails("ldev", "redo", ldev, ddev.parent / "nothing", code=5)
    assert "smaller than the volume" in walbd.fails("ldev", "redo", ldev, GOLDEN / "tiny.wlog", code=5)
    walbd.fails("ldev", "redo", GOLDEN / "tiny.wlog", ddev)
    assert (ldev.read_bytes(), ddev.read_bytes()) == before


# The command itself


def test_starting_loads_only_what_runs() -> None:
    script = """
import sys
from walbd.cli.app import run
from walbd.cli.walbd import root
code = run(root, "walbd", ["--help"])
heavy = {"asyncio", "rich", "msgspec", "structlog", "uvloop", "walbd.fs", "walbd.daemon"} & set(sys.modules)
print(heavy, file=sys.stderr)
sys.exit(code or bool(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wlog" in done.stdout


def test_the_shell_is_told_how_to_complete() -> None:
    env = {**os.environ, "_WALBD_COMPLETE": "bash_complete", "COMP_WORDS": "walbd wlog ver", "COMP_CWORD": "2"}
    command = [sys.executable, "-m", "walbd.cli"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "verify" in done.stdout


def test_nobody_reads_the_output(tmp_path: Path) -> None:
    (tmp_path / "a.wlog").write_bytes(build_wlog(0, 512, 1, [[Io("discard", 0, 1)] * 15] * 200))
    command = [sys.executable, "-m", "walbd.cli", "wlog", "show", str(tmp_path / "a.wlog")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
