"""File names of diffs: they carry all metadata, so a directory listing rebuilds it (docs/metadata.md, File names).

    YYYYMMDDhhmmss-FL-Bb-Eb.wdiff              clean
    YYYYMMDDhhmmss-FL-Bb-Be-Eb-Ee.wdiff        dirty

FL is `M` or `-`, then `C` or `-`; the time is UTC; gids are decimal. A label has exactly one name: a file is
found again, renamed and deleted under the name computed from its label, so any other spelling is refused.
"""

from __future__ import annotations

import re
from typing import Final

from walbd.format.meta.diff import Diff
from walbd.format.meta.errors import BadLabel
from walbd.format.meta.snapshot import GID_PATTERN, Snapshot
from walbd.format.meta.times import format_compact, parse_compact
from walbd.ids import Gid

DIFF_SUFFIX: Final = ".wdiff"
_NAME: Final = re.compile(
    rf"([0-9]{{14}})-([M-])([C-])-((?:{GID_PATTERN}-)?(?:{GID_PATTERN}-){{1,2}}{GID_PATTERN})\.wdiff"
)


def diff_name(diff: Diff) -> str:
    """Return the file name of `diff`."""
    begin, end = diff.begin, diff.end
    if diff.is_clean:
        gids = f"{begin.gid_b}-{end.gid_b}"
    else:
        gids = f"{begin.gid_b}-{begin.gid_e}-{end.gid_b}-{end.gid_e}"
    return f"{format_compact(diff.timestamp)}-{diff.flags}-{gids}{DIFF_SUFFIX}"


def parse_diff_name(name: str, *, size_b: int = 0) -> Diff:
    """Return the diff that `diff_name` gives this name, with the file's size filled in; raises BadLabel."""
    match = _NAME.fullmatch(name)
    gids = [Gid(int(gid)) for gid in match[4].split("-")] if match else []
    if match is None or len(gids) not in (2, 4):
        raise BadLabel("not the name of a diff file", hint="write TIME-FL-BEGIN-END.wdiff", name=name)
    begin, end = (gids[:1] * 2, gids[1:] * 2) if len(gids) == 2 else (gids[:2], gids[2:])
    diff = Diff(
        Snapshot(*begin),
        Snapshot(*end),
        mergeable=match[2] == "M",
        comp=match[3] == "C",
        timestamp=parse_compact(match[1]),
        size_b=size_b,
    )
    if len(gids) == 4 and diff.is_clean:
        raise BadLabel("not the name of a diff file: a clean diff has two generations", name=name)
    return diff


def is_diff_name(name: str) -> bool:
    """Tell whether a file claims to be a diff, rightly or not."""
    return name.endswith(DIFF_SUFFIX)
