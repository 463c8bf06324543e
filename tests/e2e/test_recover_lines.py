"""The Python lines of the recovery document, typed in `walbc shell` as they stand, against real daemons."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.group import WAIT_S, Group, Volume, wait_until

FIRST = """\
walbc.init_storage(sx, vol, wdev.path)
walbc.full_backup(sx, vol)
"""


class Shell:
    """Types lines into a real `walbc shell`."""

    def __init__(self, group: Group, volume: Volume, path: Path) -> None:
        names = (("storage", group.s), ("proxy", group.p), ("archive", group.a))
        servers = "".join(
            f'[[{kind}]]\nname = "{s.name}"\nhost = "{s.address}"\nport = {s.port}\n'
            for kind, sL in names
            for s in sL
        )
        device = volume.legs[0].directory
        path.write_text(f'{servers}[volumes.vol0]\ntarget = "s0"\ndevices = {{ s0 = "{device}" }}\n')
        self.path = path

    def __call__(self, lines: str) -> str:
        """Type lines; return what was printed, notes included. Raises when one fails."""
        done = subprocess.run(
            [sys.executable, "-m", "walbd.cli.walbc", "--group", str(self.path), "shell"],
            input=lines,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=4 * WAIT_S,
            env=os.environ | {"NO_COLOR": "1"},
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


# One group for all tests of the module, as each of them ends with a healthy one.


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with Group(tmp_path_factory.mktemp("group"), storages=2, proxies=2, archives=2) as made:
        yield made


@pytest.fixture(scope="module")
def volume(group: Group) -> Volume:
    made = group.add_volume("vol0", size_b=4 << 20, log_b=2 << 20, init=False)
    made.scribble()
    return made


@pytest.fixture(scope="module")
def shell(group: Group, volume: Volume) -> Shell:
    made = Shell(group, volume, group.root / "group.toml")
    assert made(FIRST).split() == ["1"]
    volume.scribble()
    assert_fresh(group, volume)
    return made


def assert_fresh(group: Group, volume: Volume, archive: int = 0) -> None:
    """Show that what is written now can be restored."""
    volume.scribble(5)
    gid = group.snapshot(volume, archives=[archive])
    assert group.restored(volume, gid, archive=archive) == volume.model


def test_after_an_overflow(group: Group, volume: Volume, shell: Shell) -> None:
    group.kill("p0", "p1")
    while not group.ctl.is_overflow(group.s[0], "vol0"):
        volume.write(0, os.urandom(1 << 20))
    group.start("p0", "p1")
    lines = """\
python> isOverflow = walbc.is_overflow(sx, vol)
print(isOverflow)
python> walbc.hash_backup(s0, vol)
python> isOverflow = walbc.is_overflow(sx, vol)
print(isOverflow)
"""
    printed = shell(lines).split()
    assert (printed[0], printed[-1]) == ("True", "False")
    assert_fresh(group, volume)
    assert group.ctl.get_gaps(group.a[0], "vol0")[-1].cause == "hash-backup"


def test_after_proxies_and_archives_were_down(group: Group, volume: Volume, shell: Shell) -> None:
    group.kill("p0", "p1", "a0")
    volume.scribble()
    group.start("p0", "p1", "a0")
    lines = """\
python> walbc.kick_all([s0, s1])
python> walbc.kick_all([p0, p1])
python> isWdiffSendError = walbc.is_wdiff_send_error(p0, vol, a0)
print(isWdiffSendError)
"""
    assert shell(lines) == "False\n"
    assert_fresh(group, volume)


def test_after_a_storage_lost_its_metadata(group: Group, volume: Volume, shell: Shell) -> None:
    group.wipe("s0")
    volume.scribble()
    group.start("s0")
    lines = """\
python> walbc.init_storage(sx, vol, wdev.path)
python> walbc.hash_backup(sx, vol)
"""
    shell(lines)
    assert_fresh(group, volume)


def test_after_a_proxy_lost_its_data(group: Group, volume: Volume, shell: Shell) -> None:
    group.kill("a0")
    volume.scribble()
    volume.flush()
    s0 = group.s[0]
    group.ctl.snapshot_nbk(s0, "vol0")
    wait_until(lambda: not group.status(s0, "vol0").lag_lb, "the proxy to have everything")
    group.wipe("p0")
    group.start("a0", "p0")
    lines = """\
python> walbc.start_synchronizing(a0, vol)
python> walbc.hash_backup(sx, vol)
"""
    assert "are lost before a0: vol0 is stopped" in shell(lines)
    assert_fresh(group, volume)
    assert group.ctl.is_synchronizing(group.a[0], "vol0")


def test_after_the_only_archive_was_lost(group: Group, volume: Volume, shell: Shell) -> None:
    group.wipe("a0")
    group.start("a0")
    assert "no archive holds anything of vol0" in shell("python>  walbc.full_backup(sx, vol)\n")
    assert_fresh(group, volume)


def test_after_the_primary_archive_was_lost_and_a_secondary_has_everything(
    group: Group, volume: Volume, shell: Shell
) -> None:
    a0, a1 = group.a
    group.ctl.replicate(a0, "vol0", a1, True, timeoutS=2 * WAIT_S)
    group.wipe("a0")
    volume.scribble()
    shell("python> walbc.stop_synchronizing(a0, vol)\nwalbc.retarget(s0, a1)\nwalbc.retarget(s1, a1)\n")
    assert_fresh(group, volume, archive=1)
