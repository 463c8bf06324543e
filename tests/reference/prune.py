"""The prune rules of Proxmox Backup Server, read from its documentation, with calendar text instead of numbers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

FORMATS = {
    "hourly": "%Y/%m/%d %H",
    "daily": "%Y/%m/%d",
    "weekly": "%G/%V",
    "monthly": "%Y/%m",
    "yearly": "%Y",
}


def prune(times: Sequence[int], keep: Mapping[str, int]) -> dict[int, str]:
    """Return for each time that is kept the rule that does it; `times` are distinct [unix s]."""
    newest_first = sorted(times, reverse=True)
    kept = dict.fromkeys(newest_first[: keep.get("last", 0)], "last")
    dropped: set[int] = set()
    for rule, pattern in FORMATS.items():
        name = {time: dt.datetime.fromtimestamp(time, dt.UTC).strftime(pattern) for time in times}
        covered = {name[time] for time in kept}
        chosen: list[str] = []
        for time in newest_first:
            if time in kept or time in dropped or name[time] in covered:
                continue
            if name[time] in chosen:
                dropped.add(time)
            elif len(chosen) == keep.get(rule, 0):
                break
            else:
                chosen.append(name[time])
                kept[time] = rule
    return kept
