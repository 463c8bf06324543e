"""Real NBD clients against a served device, without special options: they must be happy, and the bytes right."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit.group import Process, wait_until
from tests.kit.nbd import NbdClient
from walbd.units import MIB

SIZE_B = 24 * MIB
PACKAGES = "qemu-utils libnbd-bin nbdkit fio"


def tool(name: str) -> str:
    """Return the path of a client; they are part of the test machine (scripts/bootstrap installs them)."""
    path = shutil.which(name)
    assert path, f"{name} is missing: apt-get install {PACKAGES}"
    return path


def run(name: str, *args: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [tool(name), *map(str, args)], capture_output=True, text=True, check=False, timeout=600, cwd=cwd
    )
    assert done.returncode == 0, f"{name} {args}: {done.stdout}{done.stderr}"
    return done.stdout


def walbd(*args: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "walbd.cli", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Served:
    """A device that is served by a process of its own."""

    base: Path
    process: Process

    @property
    def directory(self) -> Path:
        return self.base / "dev" / "vol0"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.directory / 'nbd.sock'}"

    @property
    def tcp_uri(self) -> str:
        address: str = self.info()["nbd"][1]
        return f"nbd://{address}"

    def info(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads(walbd("device", "info", "vol0", *self.base_dir, "--json"))
        return found

    @property
    def base_dir(self) -> tuple[str, Path]:
        return ("--base-dir", self.base / "dev")

    def contents(self) -> bytes:
        with NbdClient(str(self.directory / "nbd.sock")) as client:
            step = 8 * MIB
            return b"".join(client.read(at, step) for at in range(0, client.size_b, step))

    def stop(self) -> bytes:
        """Stop in an orderly way; return the data device's contents."""
        assert self.process.stop() == 0, self.process.tail()
        return (self.base / "d").read_bytes()


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    base = ("--base-dir", tmp_path / "dev", "--ldev", tmp_path / "l", "--ddev", tmp_path / "d")
    pbs = getattr(request, "param", 512)
    sizes = ("--size", str(SIZE_B), "--ldev-size", "16M", "--pbs", str(pbs))
    walbd("device", "create", "vol0", *base, *sizes, "--nbd-listen", "127.0.0.1:0")
    # `walbd device NAME` is short for `walbd device serve NAME`.
    process = Process("dev", ["device", "vol0", "--base-dir", str(tmp_path / "dev")], tmp_path)
    process.start()
    try:
        yield Served(tmp_path, process)
    finally:
        process.kill()


both_pbs = pytest.mark.parametrize("served", [512, 4096], indirect=True)


def pattern(seed: int, size_b: int) -> bytes:
    """Random data with runs of zeros, as disks have."""
    rng = random.Random(seed)
    return b"".join(rng.choice([bytes(65536), rng.randbytes(65536)]) for _ in range(size_b // 65536))


@both_pbs
def test_qemu_img_and_qemu_io(served: Served, tmp_path: Path) -> None:
    source = pattern(1, SIZE_B)
    (tmp_path / "in.raw").write_bytes(source)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", tmp_path / "in.raw", served.uri)
    assert served.contents() == source
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", served.uri, tmp_path / "out.qcow2")
    assert "identical" in run(
        "qemu-img", "compare", "-f", "raw", "-F", "qcow2", served.uri, tmp_path / "out.qcow2"
    )
    commands = [
        "write -P 0x5a 0 1M",
        "write -f -P 0x5b 1M 64k",
        "write -z 512k 128k",
        "write -z -u 768k 64k",
        "discard 2M 1M",
        "write -P 0x5c 100 200",
        "aio_write -P 0x5d 3M 2M",
        "aio_write -P 0x5e 5M 512",
        "aio_flush",
        "flush",
        "read -P 0 512k 128k",
        "read -P 0 768k 64k",
        "read -P 0 2M 1M",
        "read -P 0x5c 100 200",
        "read -P 0x5a 300 1k",
        "read -P 0x5d 3M 2M",
        "readv -P 0x5b 1M 4k 60k",
    ]
    out = run("qemu-io", "-f", "raw", *[part for c in commands for part in ("-c", c)], served.uri)
    assert "failed" not in out, out
    expected = bytearray(source)
    for at, size, byte in [
        (0, MIB, 0x5A), (MIB, 65536, 0x5B), (MIB // 2, 131072, 0), (3 * MIB // 4, 65536, 0), (2 * MIB, MIB, 0),
        (100, 200, 0x5C), (3 * MIB, 2 * MIB, 0x5D), (5 * MIB, 512, 0x5E),
    ]:  # fmt: skip
        expected[at : at + size] = bytes([byte]) * size
    assert served.contents() == expected
    assert served.stop() == expected


def test_libnbd_tools(served: Served, tmp_path: Path) -> None:
    source = pattern(2, SIZE_B)
    (tmp_path / "in.raw").write_bytes(source)
    run("nbdcopy", tmp_path / "in.raw", served.uri)
    assert served.contents() == source
    for uri in (served.uri, served.tcp_uri):
        (tmp_path / "out.raw").unlink(missing_ok=True)
        run("nbdcopy", uri, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == source
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE_B)
    info = json.loads(run("nbdinfo", "--json", served.uri))["exports"][0]
    can = ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df", "can_fast_zero")
    assert all(info[name] for name in can)
    assert not info["is_read_only"]
    assert (info["block_size_minimum"], info["block_size_preferred"]) == (512, 4096)
    assert info["contexts"] == ["base:allocation"]
    assert "vol0" in run("nbdinfo", "--list", served.uri)
    extents = json.loads(run("nbdinfo", "--map", "--json", served.uri))
    assert sum(extent["length"] for extent in extents) == SIZE_B
    for extent in extents:
        if extent["type"] == 3:
            assert source[extent["offset"] : extent["offset"] + extent["length"]] == bytes(extent["length"])


@both_pbs
def test_fio_verifies(served: Served, tmp_path: Path) -> None:
    for mode, block, depth in (("randrw", "4k", 16), ("randwrite", "512-64k", 32), ("write", "1m", 4)):
        out = run(
            "fio",
            "--name=job",
            "--ioengine=nbd",
            f"--uri={served.uri}",
            f"--rw={mode}",
            f"--bsrange={block}" if "-" in block else f"--bs={block}",
            f"--iodepth={depth}",
            "--size=16m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--fsync=64",
            "--output-format=json",
            cwd=tmp_path,
        )
        assert json.loads(out[out.index("{") :])["jobs"][0]["error"] == 0
    before = served.contents()
    assert served.stop() == before


def test_nbdkit_as_a_client_and_many_connections(served: Served, tmp_path: Path) -> None:
    """nbdkit's nbd plugin passes everything on to us; nbdcopy uses several connections to it."""
    source = pattern(3, SIZE_B)
    (tmp_path / "in.raw").write_bytes(source)
    script = f'nbdcopy --connections=4 --requests=32 "{tmp_path}/in.raw" "$uri"'
    socket_path = served.directory / "nbd.sock"
    run("nbdkit", "-U", "-", "nbd", f"socket={socket_path}", "shared=true", "--run", script)
    assert served.contents() == source


@both_pbs
def test_nothing_flushed_is_lost_by_kill(served: Served, tmp_path: Path) -> None:
    rng = random.Random(4)
    model = bytearray(SIZE_B)
    for _ in range(4):
        with NbdClient(str(served.directory / "nbd.sock")) as client:
            for _ in range(200):
                size = rng.choice([512, 4096, 32768])
                at = rng.randrange((SIZE_B - size) // 512) * 512
                data = rng.randbytes(size)
                client.write(at, data)
                model[at : at + size] = data
            client.flush()
            served.process.kill()
        served.process.start()
        assert served.contents() == model
    assert served.stop() == model
    assert "not served" in walbd("device", "info", "vol0", *served.base_dir)


def test_resize_while_served(served: Served) -> None:
    assert walbd("device", "resize", "vol0", "48M", *served.base_dir) == "vol0: 48.0 MiB\n"
    assert run("nbdinfo", "--size", served.uri).strip() == str(48 * MIB)
    run("qemu-io", "-f", "raw", "-c", "write -P 9 47M 1M", "-c", "read -P 0 24M 23M", served.uri)
    assert served.contents()[-MIB:] == b"\x09" * MIB


def test_the_socket_is_there_again_after_a_restart(served: Served) -> None:
    for signal_it in (served.process.kill, served.process.stop):
        signal_it()
        served.process.start()
        wait_until(lambda: (served.directory / "nbd.sock").exists(), "the socket")
        run("nbdinfo", "--size", served.uri)
