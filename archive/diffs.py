"""The wdiff files of one volume: `VOL/*.wdiff`, whose names carry all their metadata (docs/archive.md, "Files").

Functions here block and run in pools; none touches the collection in memory. Files that cannot take part are not
deleted but put aside: they get a longer name, which says why, and are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from walbd.format.meta import BadLabel, Diff, diff_name, is_diff_name, parse_diff_name
from walbd.format.wdiff_read import WdiffReader, open_wdiff
from walbd.fs import TMP_PREFIX, FileSystem

ASIDE_DUPLICATE: Final = ".duplicate"  # another file holds the same range
ASIDE_GAP: Final = ".beyond-gap"  # a diff before it is missing


class Found(NamedTuple):
    """What a directory holds, by name."""

    diffs: list[Diff]
    unfinished: list[str]  # garbage of a crash
    unreadable: list[str]  # they end in .wdiff and mean nothing
    aside: list[str]  # put aside by an earlier start


def find_diffs(fs: FileSystem, directory: Path) -> Found:
    """Read a volume's directory; raises DiskFailed."""
    found = Found([], [], [], [])
    for name in fs.list_names(directory):
        if name.startswith(TMP_PREFIX):
            found.unfinished.append(name)
        elif name.endswith((ASIDE_DUPLICATE, ASIDE_GAP)):
            found.aside.append(name)
        elif is_diff_name(name):
            try:
                found.diffs.append(parse_diff_name(name, size_b=fs.size_of(directory / name)))
            except BadLabel:
                found.unreadable.append(name)
    return found


def remove_diffs(fs: FileSystem, directory: Path, diffs: Iterable[Diff]) -> None:
    """Remove files of diffs that lead nowhere. Not synced: what comes back after a crash is removed again."""
    for diff in diffs:
        fs.unlink(directory / diff_name(diff))


def take_name(fs: FileSystem, path: Path) -> None:
    """Take the name of a file away, durably: after a failure, in which it may have got it, nobody knows of it."""
    fs.unlink(path)
    fs.sync_dir(path.parent)


def remove_all_diffs(fs: FileSystem, directory: Path) -> None:
    """Remove every wdiff, known or not, durably: a new history must never meet diffs of an old one."""
    diffs = find_diffs(fs, directory).diffs
    if diffs:
        remove_diffs(fs, directory, diffs)
        fs.sync_dir(directory)


def put_aside(fs: FileSystem, directory: Path, diffs: Iterable[Diff], why: str) -> None:
    """Take files out of use without deleting them; `why` is one of the ASIDE endings."""
    for diff in diffs:
        name = diff_name(diff)
        fs.rename(directory / name, directory / (name + why))


@contextmanager
def opened(fs: FileSystem, directory: Path, diffs: Sequence[Diff]) -> Iterator[list[WdiffReader]]:
    """Open the files of diffs; raises NotFound when one has vanished, CorruptData for a damaged header."""
    with ExitStack() as stack:
        yield [open_wdiff(stack.enter_context(fs.open(directory / diff_name(diff)))) for diff in diffs]
