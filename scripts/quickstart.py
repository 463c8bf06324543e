"""What scripts/quickstart does once walbd is built. Also an example of the Python controller."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from walbd.controller import Controller, load_layout
from walbd.errors import WalbError
from walbd.storage.device.nbd_client import NbdVolume

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "var" / "quickstart"
BIN = Path(sys.executable).parent
PORTS = range(15000, 25000, 10)  # of the storage; proxy and archive have the next two. The first that are free
NAMES = ("device", "a0", "p0", "s0")  # of the processes, in the order in which they start
VOLUME = "vol0"
SIZE_B = 256 << 20
DEVICES = HOME / "device"
GROUP = HOME / "group.toml"
IMAGE = HOME / "truth.img"  # what the volume must hold, kept beside it to compare with


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "run"
    HOME.parent.mkdir(exist_ok=True)
    try:
        with only_one(HOME.with_suffix(".lock")):
            if what == "start":
                start()
            elif what in ("stop", "clean"):
                stop()
                if what == "clean":
                    shutil.rmtree(HOME, ignore_errors=True)
            else:
                stop(quiet=True)
                shutil.rmtree(HOME, ignore_errors=True)
                run()
    except WalbError as exc:
        sys.exit(f"quickstart: {exc}" + (f"\nhint: {exc.hint}" if exc.hint else "") + f"\nlogs: {HOME}/*.log")


def run() -> None:
    started = time.monotonic()
    HOME.mkdir(parents=True)
    say("A volume with a real file system: ext4, holding this Python's standard library")
    make_image()
    say("A WalB device, a storage, a proxy and an archive, all on this machine")
    start_group()
    layout = load_layout(GROUP)
    ctl = Controller("", layout.servers)
    s0, a0 = layout.servers.storageL[0], layout.servers.archiveL[0]

    walbc("init-storage", VOLUME)
    with volume() as disk:
        copy_image(disk)
    walbc("full-backup", VOLUME)

    say("More writes, then a snapshot, then writes that the snapshot must not have")
    with volume() as disk:
        scribble(disk, seed=1)
        gid = ctl.snapshot(s0, VOLUME, [a0])
        print(f"  snapshot {gid} is at the archive")
        truth = sha256(IMAGE)
        scribble(disk, seed=2)

    walbc("restore", VOLUME, str(gid))
    restored = Path(ctl.get_restored_path(a0, VOLUME, gid))
    found = sha256(restored)
    print(f"  the volume at snapshot {gid}:  sha256 {truth}")
    print(f"  the restored image:       sha256 {found}")
    if found != truth:
        sys.exit("quickstart: the restored image differs from the volume: this is a defect, please report it")
    if sha256(IMAGE) == truth:
        sys.exit("quickstart: the later writes are missing: the comparison proves nothing")
    print("  They match.")
    walbc("status")
    ctl.close()
    group = GROUP.relative_to(ROOT)
    print(f"""
Done in {time.monotonic() - started:.0f} s. The group keeps running; every write to {VOLUME} can be restored from
about two seconds later on. Look around:

  export PATH="$PWD/.venv/bin:$PATH" WALBD_GROUP={group}
  walbc status                      # servers, volumes, lag, jobs, alarms on one screen
  walbc info {VOLUME}                   # what can be restored
  walbc doctor                      # what is wrong, and the commands that mend it
  walbc policy explain {VOLUME}         # which restore points stay, and why
  walbc shell                       # Python, with s0, p0, a0, vol and walbc as variables
  walbc --help                      # everything else

  qemu-img info "{nbd_uri()}"   # the volume; any NBD client works
  dumpe2fs -h {restored.relative_to(ROOT)}   # the restored file system

docs/README.md says where to read on. scripts/quickstart stop ends it, start starts what does not run.""")


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Let others who come here wait until the block ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another quickstart is at work: waiting for its end")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def make_image() -> None:
    with IMAGE.open("wb") as file:
        file.truncate(SIZE_B)
    library = Path(os.__file__).parent
    tree = HOME / "tree"
    shutil.copytree(
        library,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "config-*", "__pycache__"),
    )
    done = subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-d", tree, IMAGE],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
    )
    if done.returncode != 0:
        sys.exit(f"quickstart: mkfs.ext4 failed: {done.stderr.strip()}")
    shutil.rmtree(tree)
    print(f"  {IMAGE.stat().st_blocks * 512 >> 20} MiB of files in a volume of {SIZE_B >> 20} MiB")


def start_group() -> None:
    create = ["device", "create", VOLUME, "--base-dir", str(DEVICES), "--size", str(SIZE_B), "--ldev-size", "128M"]
    files = ["--ldev", str(HOME / "vol0.ldev"), "--ddev", str(HOME / "vol0.ddev")]
    done = subprocess.run([BIN / "walbd", *create, *files], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"quickstart: {done.stderr.strip()}")
    spawn("device", "device", "serve", VOLUME, "--base-dir", str(DEVICES))
    # From the choice of ports until they are in use: in another checkout somebody may do the same.
    with only_one(Path(tempfile.gettempdir()) / f"walbd-quickstart-{os.getuid()}.lock"):
        start_servers(free_ports())


def start_servers(first: int) -> None:
    servers = [("s0", "storage", first), ("p0", "proxy", first + 1), ("a0", "archive", first + 2)]
    GROUP.write_text(
        'group = "default"\n'
        + "".join(
            f'\n[[{kind}]]\nname = "{name}"\nhost = "127.0.0.1"\nport = {port}\n' for name, kind, port in servers
        )
        + f'\n[volumes.{VOLUME}]\ntarget = "s0"\ndevices = {{ s0 = "{DEVICES / VOLUME}" }}\narchives = ["a0"]\n'
    )
    for name, kind, port in reversed(servers):
        base = HOME / name
        base.mkdir()
        args = [kind, "--node-id", name, "--port", str(port), "--base-dir", str(base)]
        if kind == "storage":
            args += ["--archive", f"127.0.0.1:{first + 2}", "--proxy", f"127.0.0.1:{first + 1}"]
        spawn(name, *args)


def free_ports() -> int:
    """Return the first of three ports on which nobody listens."""
    return next((first for first in PORTS if all(map(is_free, range(first, first + 3)))), PORTS[0])


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections are in nobody's way
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def spawn(name: str, *args: str) -> None:
    """Start a walbd process that outlives us, and wait until it says that it is ready (as systemd would)."""
    notify = HOME / f"{name}.notify"
    notify.unlink(missing_ok=True)
    (HOME / f"{name}.args").write_text(json.dumps(args))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (HOME / f"{name}.log").open("ab") as log:
        ready.bind(os.path.relpath(notify))
        ready.settimeout(60)
        child = subprocess.Popen(
            [BIN / "walbd", *args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"NOTIFY_SOCKET": os.path.relpath(notify)},
        )
        (HOME / f"{name}.pid").write_text(str(child.pid))
        ready.settimeout(0.5)
        for _ in range(120):
            try:
                if b"READY=1" in ready.recv(4096):
                    break
            except TimeoutError:
                if child.poll() is not None:
                    break
        else:
            sys.exit(f"quickstart: {name} did not become ready; see {HOME / name}.log")
        if child.poll() is not None:
            log_text = (HOME / f"{name}.log").read_text()
            sys.exit(f"quickstart: {name} ended at its start:\n{log_text[-2000:]}")
    notify.unlink()
    print(f"  started walbd {' '.join(args[:3])} ...")


def start() -> None:
    """Start again what does not run, as it was started before."""
    names = [name for name in NAMES if (HOME / f"{name}.args").exists()]
    if not names:
        sys.exit("quickstart: there is no group yet\nhint: scripts/quickstart makes one")
    away = [name for name in names if running(name) is None]
    for name in away:
        spawn(name, *json.loads((HOME / f"{name}.args").read_text()))
    if not away:
        print("everything runs")


def running(name: str) -> int | None:
    """Return the process of ours by that name, if it runs."""
    pid_file = HOME / f"{name}.pid"
    if not pid_file.exists():
        return None
    pid = int(pid_file.read_text())
    command = Path(f"/proc/{pid}/cmdline")
    return pid if command.exists() and os.fsencode(HOME) in command.read_bytes() else None


def stop(*, quiet: bool = False) -> None:
    stopped = 0
    for pid_file in sorted(HOME.glob("*.pid"), reverse=True):
        pid = running(pid_file.stem)
        command = Path(f"/proc/{pid}/cmdline")
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            for _ in range(300):
                if not command.exists() or not command.read_bytes():
                    break
                time.sleep(0.1)
            else:
                os.kill(pid, signal.SIGKILL)
            stopped += 1
        pid_file.unlink()
    if not quiet:
        print(f"stopped {stopped} processes" if stopped else "nothing was running")


def walbc(*args: str) -> None:
    """Run a walbc command as a user would, showing it."""
    print(f"\n$ walbc {' '.join(args)}", flush=True)
    done = subprocess.run([BIN / "walbc", *args], env=os.environ | {"WALBD_GROUP": str(GROUP)}, check=False)
    if done.returncode != 0:
        sys.exit(f"quickstart: the command failed; logs: {HOME}/*.log")


@contextmanager
def volume() -> Iterator[NbdVolume]:
    with NbdVolume(str(DEVICES / VOLUME / "nbd.sock")) as disk:
        yield disk
        disk.flush()


def copy_image(disk: NbdVolume) -> None:
    zeros = bytes(1 << 20)
    with IMAGE.open("rb") as file:
        for offset in range(0, SIZE_B, len(zeros)):
            data = file.read(len(zeros))
            if data != zeros:
                disk.write(offset, data)


def scribble(disk: NbdVolume, seed: int) -> None:
    """Write random blocks to the volume and to the truth beside it."""
    rng = random.Random(seed)
    with IMAGE.open("r+b") as file:
        for _ in range(500):
            offset = rng.randrange(SIZE_B // 4096) * 4096
            data = rng.randbytes(4096)
            disk.write(offset, data)
            file.seek(offset)
            file.write(data)
    disk.flush()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nbd_uri() -> str:
    return f"nbd+unix:///?socket={(DEVICES / VOLUME / 'nbd.sock').relative_to(ROOT)}"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
