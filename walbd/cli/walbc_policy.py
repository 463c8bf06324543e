"""`walbc policy` and `walbc hold`: what an archive keeps, and why. Source: docs/policy.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from walbd.cli.output import fit, line_width, print_facts, print_table
from walbd.cli.walbc_app import ARCHIVE, GID, VOL, App, checked, command
from walbd.controller.servers import Server
from walbd.errors import UsageError
from walbd.format.policy import Grid, Policy, Replication, format_levels, format_span, parse_levels, parse_span
from walbd.protocol.policy import Explained
from walbd.units import format_size, format_time, parse_size, parse_time

F = TypeVar("F", bound=Callable[..., Any])


@click.group("policy")
def policy() -> None:
    """What an archive does with a volume by itself: which points stay, and what is merged, applied, replicated."""


@click.group("hold")
def hold() -> None:
    """Restore points that no policy may remove."""


def _changes(function: F) -> F:
    """Add the options that change a policy."""
    for option in reversed(
        (
            click.option(
                "--keep",
                metavar="RULES",
                help='Which points stay, such as "all=48h hourly=72 daily=31", or: everything.',
            ),
            click.option(
                "--level",
                "levels",
                metavar="AGE:INTERVAL",
                multiple=True,
                help="Of implicit points older than AGE one stays in each INTERVAL; may be repeated. Or: none.",
            ),
            click.option("--apply/--no-apply", "apply", default=None, help="Write what is too old into the base."),
            click.option("--apply-interval", metavar="TIME", help="No more applies than one in this time."),
            click.option("--merge-max", metavar="SIZE", help="A merge reads no more than this; 0: no limit."),
            click.option(
                "--replicate",
                metavar="NAME=HOST:PORT[,INTERVAL[,COMPRESS]]",
                multiple=True,
                help="Replicate to another archive again and again; may be repeated.",
            ),
            click.option("--no-replicate", metavar="NAME", multiple=True, help="Replicate there no more."),
            click.option("--replica-keep", metavar="TIME", help="How long a replica in no list is waited for."),
            click.option("--on/--off", "enabled", default=None, help="Switch the whole policy on or off."),
        )
    ):
        function = option(function)
    return function


def _changed(old: Policy, options: dict[str, Any]) -> Policy:
    """Return a policy with what the options say."""
    changes: dict[str, Any] = {}
    if options["keep"] is not None:
        changes["keep"] = Grid.parse(options["keep"])
    if options["levels"]:
        changes["levels"] = parse_levels(" ".join(options["levels"]))
    for name, key, parse in (
        ("apply_interval", "apply_interval_s", parse_span),
        ("merge_max", "merge_max_b", parse_size),
        ("replica_keep", "replica_keep_s", parse_span),
    ):
        if options[name] is not None:
            changes[key] = parse(options[name])
    for name in ("apply", "enabled"):
        if options[name] is not None:
            changes[name] = options[name]
    replications = {replication.name: replication for replication in old.replications}
    for name in options["no_replicate"]:
        if replications.pop(name, None) is None:
            raise UsageError(
                "the policy has no such replication",
                hint="there are: " + (", ".join(replications) or "none"),
                name=name,
            )
    for text in options["replicate"]:
        replication = Replication.parse(text)
        replications[replication.name] = replication
    changes["replications"] = tuple(replications.values())
    new = msgspec.structs.replace(old, **changes)
    new.check()
    return new


@command("show")
@VOL
@ARCHIVE
def show(app: App, vol: str, archive: str | None) -> None:
    """Show the policy of a volume, what it does next, and what it could not do."""
    ax = app.archive(archive)
    view = app.ctl.get_policy(ax, vol)
    if app.as_json:
        app.tell(view)
        return
    app.end_progress()
    print(f"policy of {vol} at {ax.name}: {'on' if view.enabled else 'off'}{', default' * view.is_default}")
    print_facts(
        _policy_facts(view.policy)
        | {
            "last merge": format_time(view.merged),
            "last apply": format_time(view.applied),
            "next": view.next,
        }
    )
    for row in view.replications:
        when = "at work" if row.running else f"next {format_time(row.next)}" if row.enabled else "off"
        print(f"replicate  {row.name} {row.dest}, last {format_time(row.last)}, {when}")
    for trouble in view.troubles:
        print(
            f"failing    {trouble.what}: {trouble.error} ({trouble.failures} times since"
            f" {format_time(trouble.since)}, again {format_time(trouble.retry)})"
        )


def _policy_facts(shown: Policy) -> dict[str, str]:
    return {
        "keep": str(shown.keep),
        "levels": format_levels(shown.levels),
        "apply": f"at most one in {format_span(shown.apply_interval_s)}" if shown.apply else "no",
        "merge max": format_size(shown.merge_max_b) if shown.merge_max_b else "-",
        "replicas": f"waited for {format_span(shown.replica_keep_s)} after they were seen",
    }


@command("set")
@VOL
@ARCHIVE
@_changes
@click.option(
    "--default", "default", is_flag=True, help="Forget the volume's policy: the archive's default counts."
)
def set_(app: App, vol: str, archive: str | None, default: bool, **options: Any) -> None:
    """Change the policy of a volume at an archive, from now on; what no option names stays as it is.

    Example: walbc policy set vol0 --keep "all=7d daily=31" --level 1h:5m
    """
    ax = app.archive(archive)
    if default:
        if any(value not in (None, ()) for value in options.values()):
            raise UsageError("--default stands alone", hint="leave the other options out")
        app.ctl.set_policy(ax, vol, None)
    else:
        if all(value in (None, ()) for value in options.values()):
            raise UsageError("nothing to change", hint="see `walbc policy set --help`")
        app.ctl.set_policy(ax, vol, _changed(app.ctl.get_policy(ax, vol).policy, options))
    view = app.ctl.get_policy(ax, vol)
    facts = _policy_facts(view.policy)
    word = "the default" if view.is_default else "on" if view.policy.enabled else "off"
    app.tell(view, f"the policy of {vol} at {ax.name} is {word}: keep {facts['keep']}; levels {facts['levels']}")


@command("explain")
@VOL
@ARCHIVE
@click.option("--dropped", is_flag=True, help="Show only points that do not stay.")
def explain(app: App, vol: str, archive: str | None, dropped: bool) -> None:
    """Show each restore point with the rule that keeps or drops it."""
    ax = app.archive(archive)
    _print_timeline(app, ax, app.ctl.explain_policy(ax, vol), dropped)


@command("simulate")
@VOL
@ARCHIVE
@_changes
@click.option("--dropped", is_flag=True, help="Show only points that would not stay.")
def simulate(app: App, vol: str, archive: str | None, dropped: bool, **options: Any) -> None:
    """Show what would become of each restore point if the policy were changed so; nothing is changed.

    Example: walbc policy simulate vol0 --keep "all=4h hourly=6" --dropped
    """
    ax = app.archive(archive)
    wanted = _changed(app.ctl.get_policy(ax, vol).policy, options)
    _print_timeline(app, ax, app.ctl.explain_policy(ax, vol, wanted), dropped)


def _print_timeline(app: App, ax: Server, explained: Explained, dropped: bool) -> None:
    if app.as_json:
        app.tell(explained)
        return
    app.end_progress()
    rows = [
        (
            point.gid,
            format_time(point.timestamp),
            "explicit" if point.explicit else "implicit",
            "kept" if point.kept else "dropped",
            ", ".join(point.rules),
            format_time(point.until) if point.until else "-",
        )
        for point in explained.points
        if not (dropped and point.kept)
    ]
    print_table(["GID", "TIME", "KIND", "VERDICT", "RULE", "UNTIL"], rows, right=["GID"])
    kept = sum(point.kept for point in explained.points)
    n = len(explained.points)
    told = f"{kept} of {n} points at {ax.name} stay by: {explained.policy.keep}; next: {explained.next}"
    print(fit(told, 4, line_width()))


@command("add")
@VOL
@GID
@click.option("--reason", required=True, metavar="TEXT", help="Why; it is shown wherever the hold is.")
@click.option("--until", metavar="TIME", help="YYYY-MM-DDThh:mm:ss (UTC), or how long from now, such as 30d.")
@ARCHIVE
def hold_add(app: App, vol: str, gid: int, reason: str, until: str | None, archive: str | None) -> None:
    """Keep a restore point whatever the policy says; replaces a hold of the same point.

    Example: walbc hold add vol0 482 --reason "before the upgrade" --until 30d
    """
    ax = app.archive(archive)
    end = _end(until) if until is not None else 0
    app.ctl.add_hold(ax, vol, gid, reason, end)
    value = {"volume": vol, "archive": ax.name, "gid": gid, "reason": reason, "until": end}
    app.tell(value, f"{vol} {gid} is held at {ax.name}{f' until {format_time(end)}' if end else ''}")


def _end(text: str) -> int:
    """Return a time [unix s] from the text of --until."""
    try:
        return parse_time(text) if "T" in text else int(time.time()) + parse_span(text)
    except UsageError as exc:
        raise UsageError("not a time", hint="write YYYY-MM-DDThh:mm:ss in UTC, or 30d", text=text) from exc


@command("list")
@VOL
@ARCHIVE
def hold_list(app: App, vol: str, archive: str | None) -> None:
    """List the holds of a volume."""
    holds = app.ctl.get_holds(app.archive(archive), checked(vol))
    app.tell_table(
        {"holds": holds},
        ["GID", "CREATED", "UNTIL", "REASON"],
        [
            (row.gid, format_time(row.created), format_time(row.until) if row.until else "-", row.reason)
            for row in holds
        ],
        right=["GID"],
    )


@command("delete")
@VOL
@GID
@ARCHIVE
def hold_delete(app: App, vol: str, gid: int, archive: str | None) -> None:
    """Let the policy decide about a restore point again."""
    ax = app.archive(archive)
    app.ctl.delete_hold(ax, vol, gid)
    app.tell({"volume": vol, "archive": ax.name, "gid": gid}, f"{vol} {gid} is held at {ax.name} no more")


for _sub in (show, set_, simulate, explain):
    policy.add_command(_sub)
for _sub in (hold_add, hold_list, hold_delete):
    hold.add_command(_sub)
