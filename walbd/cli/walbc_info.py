"""`walbc info`: from when to when, and to which points, a volume can be restored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import click

from walbd.cli.output import fit, line_width, print_table
from walbd.cli.walbc_app import VOL, App, checked, command
from walbd.cli.walbc_image import restored_rows
from walbd.controller.constants import aActive
from walbd.controller.overview import Overview, VolumeView
from walbd.controller.servers import Server
from walbd.errors import NotFound, WalbError
from walbd.format.meta import RestorePoint
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.codec import to_json_ready
from walbd.units import format_size, format_time

_POINTS_SHOWN: Final = 20


@command("info")
@VOL
@click.option("--all", "all_points", is_flag=True, help="List every restore point, implicit ones too.")
def info(app: App, vol: str, all_points: bool) -> None:
    """Show from when to when, and to which points, the volume can be restored; gaps, sizes, lag, replicas."""
    view = app.ctl.overview(checked(vol))
    volume = next((v for v in view.volumes if v.volume == vol), None)
    if volume is None:
        raise NotFound("no server that answers knows the volume", hint="see `walbc status`", volume=vol)
    archives = [_archive_info(app, s, vol, view, volume, all_points) for s in app.layout.servers.archiveL]
    if app.as_json:
        about = to_json_ready(volume) | {"archives": archives}
        about["alarms"] = [to_json_ready(a) for a in view.alarms if a.volume in ("", vol)]
        app.tell(about)
        return
    app.end_progress()
    source = f"backed up from {', '.join(volume.targets)}" if volume.targets else "not backed up"
    print(f"{volume.word}  {vol}: {format_size(volume.size_b)}, {source}")
    for alarm in view.alarms:
        if alarm.volume in ("", vol):
            where = f"{alarm.server}: " if alarm.server else ""
            _say(f"    {alarm.word}: {where}{alarm.text}{f' - {alarm.hint}' if alarm.hint else ''}")
    for about in archives:
        _print_archive(about, all_points)


def _archive_info(
    app: App, s: Server, vol: str, view: Overview, volume: VolumeView, all_points: bool
) -> dict[str, Any]:
    """Ask one archive what it holds; an archive that cannot tell says why."""
    about: dict[str, Any] = {"archive": s.name}
    server = next(v for v in view.servers if v.name == s.name)
    mine = next((v for v in server.status.volumes if v.volume == vol), None) if server.status else None
    if mine is None:
        return about | {"state": "", "error": server.text}
    part = next((p for p in volume.parts if p.server == s.name and not p.dest), None)
    about |= {
        "state": mine.state,
        "diffs": mine.diffs,
        "diffs_b": mine.diffs_b,
        "lag_s": part.lag_s if part else None,
        "verified": mine.verified,
        "points": [],
        "restored": [],
        "gaps": [],
        "policy": None,
        "replicas": [to_json_ready(p) for p in volume.parts if p.server == s.name and p.dest],
    }
    if mine.state not in aActive:
        return about
    try:
        points = app.ctl.ask(s, c.GetRestorable(volume=vol, all_points=all_points)).points
        about["base"] = to_json_ready(app.ctl.ask(s, c.GetBase(volume=vol)).base)
        about["points"] = to_json_ready(points)
        about["gaps"] = to_json_ready(app.ctl.get_gaps(s, vol))
        about["restored"] = restored_rows(app, s, vol, mine.restored)
        plan = app.ctl.get_policy(s, vol)
        about["policy"] = to_json_ready(plan) | {"keep": str(plan.policy.keep)}
    except WalbError as exc:
        about["error"] = str(exc)
    return about


def recoverable(points: Sequence[RestorePoint], gaps: Sequence[m.Gap]) -> str:
    """Write the intervals that can be restored, and the gaps between them: `A -> B, GAP B -> C (why), C -> D`."""
    first, last = points[0], points[-1]
    parts = []
    begin = f"{format_time(first.timestamp)} (gid {first.gid})"
    for gap in gaps:
        if gap.end and gap.gid_e <= first.gid:
            continue  # nothing before it is kept any more
        end = format_time(gap.end) if gap.end else "now"
        if gap.gid_b >= first.gid:
            parts.append(f"{begin} -> {format_time(gap.begin)}")
        parts.append(f"GAP {format_time(gap.begin)} -> {end} ({gap.cause})")
        begin = end
    if not gaps or gaps[-1].end:
        parts.append(f"{begin} -> {format_time(last.timestamp)} (gid {last.gid})")
    return ", ".join(parts)


def policy_text(view: dict[str, Any]) -> str:
    """Write what a policy keeps, what it does next, and how much it could not do."""
    n = len(view["troubles"])
    troubles = f", {n} trouble{'s' * (n != 1)}: see `walbc policy show`" if n else ""
    if not view["enabled"]:
        return f"off{troubles}"
    return f"{view['keep']}; next: {view['next']}{troubles}"


def _say(line: str) -> None:
    print(fit(line, 8, line_width()))


def _print_archive(about: dict[str, Any], all_points: bool) -> None:
    name = about["archive"]
    if about.get("error"):
        print(f"\n{name}: {about['error']}")
        return
    points = [RestorePoint(**point) for point in about["points"]]
    n = about["diffs"]
    print(f"\n{name}: {about['state']}, {n} diff{'s' * (n != 1)} of {format_size(about['diffs_b'])}")
    for part in about["replicas"]:
        _say(f"    {part['state']} {part['dest']}: {part['text']}")
    if not points:
        print("    nothing can be restored")
        return
    behind = f", {about['lag_s']} s behind" if about["lag_s"] else ", nothing missing"
    _say(f"    recoverable: {recoverable(points, [m.Gap(**gap) for gap in about['gaps']])}{behind}")
    if about["policy"] is not None:
        _say(f"    policy: {policy_text(about['policy'])}")
    if about["verified"]:
        _say(f"    verified: {format_time(about['verified'])}")
    for row in about["restored"]:
        _say(f"    restored: {row['gid']} {row['path']}")
    shown = points if all_points else points[-_POINTS_SHOWN:]
    if len(shown) < len(points):
        _say(f"    the newest {len(shown)} of {len(points)} points (--all shows every one):")
    print_table(
        ["GID", "TIME", "KIND"],
        [(p.gid, format_time(p.timestamp), "explicit" if p.explicit else "implicit") for p in shown],
        right=["GID"],
    )
