"""An overview as lines for people and scripts. Source: docs/controller.md, "Status"."""

from __future__ import annotations

import textwrap

from walbd.controller.overview import Overview, VolumeView
from walbd.controller.replies import job_progress_text
from walbd.protocol.base import JobInfo, JobState
from walbd.units import format_size, format_time

_NARROW = 40  # columns that a broken text must have at least


def overview_lines(view: Overview, width: int | None = None) -> list[str]:
    """Write an overview, one fact a line, each beginning with ok, warn, error or down; columns are aligned.

    With `width` a text that is too long for it goes on under itself, in the same string after a newline.
    """
    n_servers, n_volumes, n_alarms = len(view.servers), len(view.volumes), len(view.alarms)
    summary = f"{n_servers} server{'s' * (n_servers != 1)}, {n_volumes} volume{'s' * (n_volumes != 1)}, "
    summary += f"{n_alarms or 'no'} alarm{'s' * (n_alarms != 1)}"
    rows: list[tuple[str, str, str, str]] = [(view.word, "group", "", summary)]
    rows += [(s.word, s.kind, s.name, f"{s.address}, {s.text}") for s in view.servers]
    for volume in view.volumes:
        rows.append((volume.word, "volume", volume.volume, _volume_text(volume)))
        for part in volume.parts:
            where = f"{part.server} > {part.dest}" if part.dest else part.server
            rows.append((part.word, volume.volume, where, f"{part.state}, {part.text}"))
    rows += [(v.word, "job", f"{v.server} {v.job.job}", _job_text(v.job)) for v in view.jobs]
    for alarm in view.alarms:
        where = " ".join(word for word in (alarm.server, alarm.volume) if word)
        rows.append((alarm.word, "alarm", where, f"{alarm.text}{f' - {alarm.hint}' if alarm.hint else ''}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]
    indent = sum(widths) + 6
    if width is None or width < indent + _NARROW:
        return lines
    wrap = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return [wrap.fill(line) for line in lines]


def _volume_text(v: VolumeView) -> str:
    parts = [format_size(v.size_b)]
    parts.append(f"backed up from {', '.join(v.targets)}" if v.targets else "not backed up")
    if v.restorable_until:
        parts.append(f"restorable until {format_time(v.restorable_until)}")
    elif not v.away:
        parts.append("nothing restorable")
    if v.lag_s is not None:
        parts.append(f"{v.lag_s} s behind" if v.lag_s else "nothing missing")
    if v.away:
        parts.append(f"waits for {', '.join(v.away)}")
    return ", ".join(parts)


def _job_text(job: JobInfo) -> str:
    how_far = job_progress_text(job) if job.state is JobState.RUNNING else str(job.state)
    amount = f" ({format_size(job.done)} of {format_size(job.total)})" if job.total and job.unit == "B" else ""
    return f"{job.name} {job.volume}: {how_far}{amount}".replace("  ", " ")
