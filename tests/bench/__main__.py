"""`python -m tests.bench`: measure the offline tools and the device, and print the tables of docs/performance.md.

Whole processes are measured, as a user would run them: CPU seconds (user + system), wall seconds and peak
memory as the operating system accounts them. The device is measured with fio beside nbdkit's file plugin and
qemu-nbd in the same run, as absolute rates mean little on a shared machine.

Inputs are made once, by mkwlog.py, in a work directory (--dir). Nothing here asserts anything about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "performance.md"
MARK = ("<!-- tables: python -m tests.bench --update-docs -->\n", "<!-- end of tables -->\n")
WALBD = [sys.executable, "-m", "walbd.cli"]
MIB = 1 << 20


class Usage(NamedTuple):
    cpu_s: float
    wall_s: float
    peak_mib: float


class Job(NamedTuple):
    """One row: what runs, and what the original tools needed on the yardstick machine [CPU s]."""

    name: str
    args: list[str]
    original_cpu_s: float
    before: Callable[[], None] = lambda: None


def measure(args: list[str]) -> Usage:
    """Run a command once and return what it used."""
    started = time.monotonic()
    # As for a user: modules are compiled once, not at every start.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(args)}: exit {child.returncode}: {errors.decode()}")
    return Usage(usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1024)


def make_inputs(where: Path) -> None:
    """Make the wlogs, their wdiffs and the base image, unless they are there."""

    def wlog(name: str, *args: str) -> Path:
        path = where / f"{name}.wlog"
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run(
                [sys.executable, Path(__file__).with_name("mkwlog.py"), "-o", part, *args],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            part.rename(path)
        return path

    def wdiff(source: Path, form: str) -> None:
        out = source.with_suffix(f".{form[0]}.wdiff")
        if not out.exists():
            options = ["--format", form, "--compress", "snappy"]
            subprocess.run([*WALBD, "wlog", "to-wdiff", source, "-o", out, *options], check=True)

    logs = [
        wlog("mixed", "--seed", "11", "--size", str(256 * MIB)),
        wlog("small", "--seed", "12", "--size", str(256 * MIB), "--sizes", "8"),
    ]
    logs += [wlog(f"part{i}", "--seed", f"2{i}", "--size", str(32 * MIB)) for i in range(8)]
    for log in logs:
        wdiff(log, "sorted")
        wdiff(log, "indexed")
    base = where / "base.img"
    if not base.exists():
        # In a process of its own: numpy in this one would count as memory of every command that it starts.
        code = (
            "import sys; from tests.bench.mkwlog import Content\n"
            "content = Content(99, ['text', 'table', 'rand', 'zero'])\n"
            "for _ in range(4096): sys.stdout.buffer.write(content.get(256 << 10))"
        )
        with base.open("wb") as file:
            subprocess.run([sys.executable, "-c", code], check=True, stdout=file, cwd=ROOT)


def offline_jobs(where: Path, memory: Path) -> list[Job]:
    image, out = memory / "image", where / "out"
    parts_s = [str(where / f"part{i}.s.wdiff") for i in range(8)]
    parts_i = [str(where / f"part{i}.i.wdiff") for i in range(8)]

    def fresh_image() -> None:
        if not image.exists():
            shutil.copyfile(where / "base.img", image)

    def only_base() -> None:
        fresh_image()
        (memory / "full").unlink(missing_ok=True)

    def no_out() -> None:
        out.unlink(missing_ok=True)

    def job(name: str, original: float, *args: str, before: Callable[[], None] = no_out) -> Job:
        return Job(name, [*WALBD, *args], original, before)

    rows = []
    for name, verify, sorted_, indexed, redo in (
        ("mixed", 0.082, 0.587, 0.467, 0.132),
        ("small", 0.142, 0.853, 0.662, 0.271),
    ):
        log = str(where / f"{name}.wlog")
        convert = ("wlog", "to-wdiff", log, "-o", str(out))
        rows += [
            job(f"wlog verify, {name}", verify, "wlog", "verify", log),
            job(f"wlog to sorted wdiff snappy, {name}", sorted_, *convert, "--compress", "snappy"),
            job(f"wlog to sorted wdiff lz4, {name}", sorted_, *convert, "--compress", "lz4"),
            job(f"wlog to sorted wdiff zstd:1, {name}", sorted_, *convert, "--compress", "zstd:1"),
            job(
                f"wlog to indexed wdiff snappy, {name}",
                indexed,
                *convert,
                "--format",
                "indexed",
                "--compress",
                "snappy",
            ),
            job(f"wlog redo, {name}", redo, "wlog", "redo", log, str(image), before=fresh_image),
        ]
        for form, original in (("sorted", (0.165, 0.199)), ("indexed", (0.240, 0.290))):
            diff = str(where / f"{name}.{form[0]}.wdiff")
            cpu = original[0 if name == "mixed" else 1]
            rows.append(
                job(f"wdiff apply {form}, {name}", cpu, "wdiff", "apply", diff, str(image), before=fresh_image)
            )
    merge = ("wdiff", "merge", *parts_s, "-o", str(out), "--compress")
    rows += [
        job("merge of 8 sorted, snappy", 0.507, *merge, "snappy"),
        job("merge of 8 sorted, lz4", 0.554, *merge, "lz4"),
        job("merge of 8 sorted, zstd:1", 0.896, *merge, "zstd:1"),
        job(
            "merge of 8 indexed, snappy", 0.558, "wdiff", "merge", *parts_i, "-o", str(out), "--compress", "snappy"
        ),
        job(
            "virtual full image, 1 GiB and 8 wdiffs",
            4.110,
            *("image", "cat", str(memory / "image"), *parts_s, "-o", str(memory / "full")),
            before=only_base,
        ),
        job("hash of 1 GiB", 0.492, "image", "hash", str(where / "base.img")),
        job("hash of 1 GiB, 64 KiB chunks", 0.540, "image", "hash", str(where / "base.img"), "--chunk", "65536"),
    ]
    return rows


def run_offline(where: Path, memory: Path, runs: int, only: str) -> str:
    make_inputs(where)
    lines = [
        "| job | CPU s | original CPU s | ratio | wall s (min to max) | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for job in offline_jobs(where, memory):
        if only not in job.name:
            continue
        usages = []
        for i in range(runs + 1):  # the first one warms up
            job.before()
            usage = measure(job.args)
            if i:
                usages.append(usage)
        cpu = statistics.median(usage.cpu_s for usage in usages)
        walls = [usage.wall_s for usage in usages]
        lines.append(
            f"| {job.name} | {cpu:.2f} | {job.original_cpu_s:.2f} | {cpu / job.original_cpu_s:.2f} "
            f"| {statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f}) "
            f"| {max(usage.peak_mib for usage in usages):.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


@contextmanager
def served(args: list[str], sock: Path) -> Iterator[None]:
    """Run an NBD server until the end of the block."""
    sock.unlink(missing_ok=True)
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not sock.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"cannot serve: {' '.join(args)}")
            time.sleep(0.01)
        yield
    finally:
        child.terminate()
        child.wait()


def fio(sock: Path, rw: str, bs: str, depth: int, seconds: float) -> tuple[float, float]:
    """Return operations per second and MB/s."""
    args = ["fio", "--name=job", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={sock}", f"--rw={rw}", f"--bs={bs}"]
    args += [
        f"--iodepth={depth}",
        "--time_based",
        f"--runtime={seconds}",
        "--output-format=json",
        "--randrepeat=1",
    ]
    done = subprocess.run(args, check=True, capture_output=True, text=True)
    side = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read" if "read" in rw else "write"]
    return side["iops"], side["bw_bytes"] / 1e6


def run_device(where: Path, runs: int, seconds: float) -> str:
    size = 256 * MIB
    plain = where / "plain.img"
    with plain.open("wb") as file:
        for _ in range(size // MIB):
            file.write(random.randbytes(MIB))
    devices = where / "device"
    shutil.rmtree(devices, ignore_errors=True)
    for name in ("bench.ldev", "bench.ddev"):
        (where / name).unlink(missing_ok=True)
    create = [*WALBD, "device", "create", "bench", "--base-dir", str(devices), "--size", str(size)]
    create += ["--ldev", str(where / "bench.ldev"), "--ldev-size", "512M", "--ddev", str(where / "bench.ddev")]
    subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
    own = devices / "bench" / "nbd.sock"
    other = where / "other.sock"
    servers = {
        "walbd": ([*WALBD, "device", "serve", "bench", "--base-dir", str(devices)], own),
        "nbdkit file": (["nbdkit", "-f", "-U", str(other), "file", str(plain)], other),
        "qemu-nbd": (
            ["qemu-nbd", "-t", "-e", "16", "-f", "raw", "--cache=writeback", "-k", str(other), str(plain)],
            other,
        ),
    }
    loads = [
        ("4 KiB random write, depth 1", "randwrite", "4k", 1),
        ("4 KiB random write, depth 16", "randwrite", "4k", 16),
        ("4 KiB random write, depth 64", "randwrite", "4k", 64),
        ("4 KiB random read, depth 16", "randread", "4k", 16),
        ("1 MiB sequential write, depth 4", "write", "1m", 4),
        ("1 MiB sequential read, depth 4", "read", "1m", 4),
    ]
    lines = [
        "| load | walbd | nbdkit file | qemu-nbd | walbd / nbdkit |",
        "|---|---:|---:|---:|---:|",
    ]
    # The data device is written once in full, as the others' file is: holes would be slower or faster.
    with served(*servers["walbd"]):
        subprocess.run(
            ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(plain), f"nbd+unix:///?socket={own}"],
            check=True,
        )
    for name, rw, bs, depth in loads:
        rates: dict[str, list[float]] = {server: [] for server in servers}
        for _ in range(runs):
            for server, (args, sock) in servers.items():
                with served(args, sock):
                    iops, mb_s = fio(sock, rw, bs, depth, seconds)
                    rates[server].append(iops if bs == "4k" else mb_s)
        median = {server: statistics.median(values) for server, values in rates.items()}
        ratio = statistics.median(a / b for a, b in zip(rates["walbd"], rates["nbdkit file"], strict=True))
        unit = "IOPS" if bs == "4k" else "MB/s"
        lines.append(
            f"| {name} | {median['walbd']:.0f} {unit} | {median['nbdkit file']:.0f} {unit} "
            f"| {median['qemu-nbd']:.0f} {unit} | {ratio:.2f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    return (
        f"Python {platform.python_version()}, Linux {platform.release().split('-')[0]}, {os.cpu_count()} x {cpu}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--dir", type=Path, help="work directory for the inputs (kept), default: a temporary one")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each job")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of each fio run")
    parser.add_argument("--only", default="", help="only offline jobs whose name contains this")
    parser.add_argument("--no-device", action="store_true", help="leave the device out")
    parser.add_argument("--no-offline", action="store_true", help="leave the offline tools out")
    parser.add_argument("--update-docs", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    shm = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as memory,
    ):
        where = args.dir or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        tables = [f"Measured with {machine()}; medians of {args.runs} runs.\n"]
        if not args.no_offline:
            tables.append("### Offline tools\n\n" + run_offline(where, Path(memory), args.runs, args.only) + "\n")
        if not args.no_device:
            tables.append("### The device\n\n" + run_device(where, args.runs, args.seconds) + "\n")
    if args.update_docs:
        text = DOC.read_text()
        begin, end = text.index(MARK[0]) + len(MARK[0]), text.index(MARK[1])
        DOC.write_text(text[:begin] + "\n" + "\n".join(tables) + "\n" + text[end:])


main()
