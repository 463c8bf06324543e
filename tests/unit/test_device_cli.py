"""`walbd device`: create, info, resize, delete; serving is tested with real processes in tests/e2e."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.cli import Cli
from walbd.cli.device import device
from walbd.format.superblock import read_superblock
from walbd.fs import OsFileSystem, failpoints
from walbd.units import MIB


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(device, "walbd device", capsys)


@pytest.fixture
def create(cli: Cli, tmp_path: Path) -> Callable[..., list[str | Path]]:
    def arguments(name: str = "vol0", *more: str) -> list[str | Path]:
        files: list[str | Path] = ["--ldev", tmp_path / "l", "--ddev", tmp_path / "d"]
        return ["create", name, "--base-dir", tmp_path / "dev", *files, *more]

    return arguments


SIZES = ("--size", "4M", "--ldev-size", "2M")


def test_create_makes_everything(cli: Cli, create: Callable[..., list[str]], tmp_path: Path) -> None:
    out = cli.good(*create("vol0", *SIZES, "--pbs", "4096", "--nbd-listen", "unix", "--nbd-listen", "127.0.0.1:1"))
    assert "4.0 MiB volume" in out
    assert (tmp_path / "d").stat().st_size == 4 * MIB
    assert (tmp_path / "d").stat().st_blocks == 0, "sparse"
    assert (tmp_path / "l").stat().st_size == 2 * MIB
    assert (tmp_path / "l").stat().st_blocks * 512 >= 2 * MIB, "the log's space is taken at once"
    with OsFileSystem().open(tmp_path / "l") as ldev:
        sb = read_superblock(ldev)
    assert (sb.pbs, sb.name, sb.device_size_lb) == (4096, "vol0", 8192)
    text = (tmp_path / "dev" / "vol0" / "device.toml").read_text()
    assert 'nbd_listen = ["127.0.0.1:1"]' in text
    assert str(tmp_path / "l") in text


def test_create_takes_existing_files_as_they_are(
    cli: Cli, create: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "d").write_bytes(b"contents" * 1024)
    cli.good(*create("vol0", "--ldev-size", "2M"))
    assert (tmp_path / "d").read_bytes() == b"contents" * 1024
    facts = json.loads(cli.good("info", "vol0", "--base-dir", tmp_path / "dev", "--json"))
    assert facts["state"] == "not served"
    assert facts["size_lb"] == 16
    assert facts["lsids"] == {"prev_written": 0, "oldest": 0}


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 5, "does not exist"),
        (("--size", "4M"), 5, "does not exist"),
        (("--size", "4M", "--ldev-size", "100k"), 2, "too small"),
        (("--size", "1000", "--ldev-size", "2M"), 2, "512"),
        (("--size", "0", "--ldev-size", "2M"), 2, "zero"),
        (("--size", "x", "--ldev-size", "2M"), 2, "not a size"),
        ((*SIZES, "--pbs", "1024"), 2, "1024"),
        ((*SIZES, "--nbd-listen", "0.0.0.0:10809"), 2, "TLS"),
        ((*SIZES, "--nbd-listen", "x"), 2, "nbd_listen"),
    ],
)
def test_what_create_refuses_leaves_nothing(
    cli: Cli, create: Callable[..., list[str]], tmp_path: Path, more: tuple[str, ...], code: int, said: str
) -> None:
    assert said in cli.fails(*create("vol0", *more), code=code)
    assert list(tmp_path.iterdir()) == []


def test_bad_names(cli: Cli, create: Callable[..., list[str]], tmp_path: Path) -> None:
    for name in ("", "a/b", "..", "x" * 26, "-"):
        cli.fails(*create(name, *SIZES), code=2)
    assert list(tmp_path.iterdir()) == []


def test_create_does_not_format_a_log_that_is_there(
    cli: Cli, create: Callable[..., list[str]], tmp_path: Path
) -> None:
    cli.good(*create("vol0", *SIZES))
    before = (tmp_path / "l").read_bytes()
    assert "exists" in cli.fails(*create("vol0"), code=5)
    assert "log device already" in cli.fails(*create("vol1"), code=5)
    assert "another size" in cli.fails(*create("vol1", "--size", "8M"), code=2)
    assert (tmp_path / "l").read_bytes() == before
    assert not (tmp_path / "dev" / "vol1").exists()
    cli.good(*create("vol1", "--force"))
    assert (tmp_path / "l").read_bytes() != before


def test_a_failed_create_can_be_repeated(cli: Cli, create: Callable[..., list[str]], tmp_path: Path) -> None:
    failpoints.arm("device.create.before_directory=enospc")
    try:
        cli.fails(*create("vol0", *SIZES))
    finally:
        failpoints.disarm()
    assert list(tmp_path.iterdir()) == []
    cli.good(*create("vol0", *SIZES))


def test_resize_and_delete_of_a_stopped_device(cli: Cli, create: Callable[..., list[str]], tmp_path: Path) -> None:
    base = ("--base-dir", tmp_path / "dev")
    cli.good(*create("vol0", *SIZES))
    assert cli.good("resize", "vol0", "8M", *base) == "vol0: 8.0 MiB\n"
    assert (tmp_path / "d").stat().st_size == 8 * MIB
    assert "shrink" in cli.fails("resize", "vol0", "4M", *base, code=5)
    cli.fails("resize", "vol0", "1000", *base, code=2)
    with (tmp_path / "l").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cli.fails("delete", "vol0", *base, code=5)
        cli.fails("resize", "vol0", "16M", *base, code=5)
    assert "kept" in cli.good("delete", "vol0", *base)
    assert (tmp_path / "l").exists()
    assert not (tmp_path / "dev" / "vol0").exists()
    for command in (["delete", "vol0"], ["info", "vol0"], ["resize", "vol0", "1M"], ["serve", "vol0"], ["vol0"]):
        assert "no such device" in cli.fails(*command, *base, code=5)
    cli.good(*create("vol0", "--force"))
    assert cli.good("delete", "vol0", *base, "--files") == ""
    assert list((tmp_path / "dev").iterdir()) == []
    assert not (tmp_path / "l").exists()
    assert not (tmp_path / "d").exists()


def test_one_file_cannot_be_both(cli: Cli, tmp_path: Path) -> None:
    both: list[str | Path] = [
        "--ldev",
        tmp_path / "x",
        "--ddev",
        tmp_path / "x",
        "--size",
        "4M",
        "--ldev-size",
        "4M",
    ]
    cli.fails("create", "vol0", "--base-dir", tmp_path / "dev", *both, code=5)
    assert not (tmp_path / "x").exists()


def test_info_is_readable(cli: Cli, create: Callable[..., list[str]], tmp_path: Path) -> None:
    cli.good(*create("vol0", *SIZES))
    out = cli.good("info", "vol0", "--base-dir", tmp_path / "dev")
    assert "state         not served\n" in out
    assert "capacity_pb   4086\n" in out
