"""`walbc`: servers, states, jobs, and the status screen."""

from __future__ import annotations

import sys
from typing import Any

import click

from walbd.cli.output import line_width, print_table, use_colour
from walbd.cli.walbc_app import SERVER, SERVERS, TIMEOUT, VOL, YES, App, checked, command, sure
from walbd.controller.commands import find_command, finish
from walbd.controller.overview import Overview, Word
from walbd.controller.overview_text import overview_lines
from walbd.controller.replies import job_text, ltsv
from walbd.controller.servers import Server, server_kind_to_str
from walbd.errors import NotFound, UsageError, WalbError, exit_code_of
from walbd.protocol import control as c
from walbd.protocol.base import GetJobs, JobList, error_reply
from walbd.protocol.codec import to_json_ready
from walbd.protocol.maintenance import VirtFullScan
from walbd.units import format_time

NOT_OK = 6  # exit status of `status --check`
_COLOURS = {Word.OK: "green", Word.WARN: "yellow", Word.ERROR: "red", Word.DOWN: "red"}


@command("status")
@click.argument("vol", metavar="[VOL]", default="")
@click.option("--check", is_flag=True, help=f"Exit with {NOT_OK} unless everything is ok.")
def status(app: App, vol: str, check: bool) -> int:
    """Show the whole group on one screen: servers, volumes, lag, log usage, jobs, alarms.

    Each line begins with ok, warn, error or down. Works when servers are down.
    """
    view = app.ctl.overview(checked(vol) if vol else "")
    if vol and not view.volumes:
        raise NotFound("no server that answers knows the volume", hint="see `walbc status`", volume=vol)
    if app.as_json:
        app.tell(view.to_json())
    else:
        app.end_progress()
        print_overview(view)
    return NOT_OK if check and view.word is not Word.OK else 0


def print_overview(view: Overview) -> None:
    """Print the status screen; on a terminal the first word of each line has a colour."""
    for line in overview_lines(view, line_width()):
        print(_coloured(line) if use_colour() else line)


def _coloured(line: str) -> str:
    word = Word(line.split(" ", 1)[0])
    bold = True if word is not Word.OK else None
    return click.style(word, fg=_COLOURS[word], bold=bold) + line[len(word) :]


@command("ping")
@SERVERS
def ping(app: App, servers: tuple[str, ...]) -> int:
    """Ask servers (default: all) whether they live: `NAME KIND ADDRESS ok`, or the error. Exit 3 unless all do."""
    rows = []
    replies = app.ctl.ask_each(app.servers(servers), c.GetHostType())
    for s, reply in replies.items():
        row: dict[str, Any] = {"server": s.name, "kind": server_kind_to_str(s.kind), "address": s.get_host_port()}
        if isinstance(reply, WalbError):
            row["error"] = to_json_ready(error_reply(reply))
        rows.append(row | {"alive": not isinstance(reply, WalbError)})
    text = [
        f"{r['server']} {r['kind']} {r['address']} {r['error']['message'] if 'error' in r else 'ok'}" for r in rows
    ]
    app.tell_lines(rows, text)
    return 0 if all(row["alive"] for row in rows) else 3


@command("version")
@SERVERS
def version(app: App, servers: tuple[str, ...]) -> int:
    """Print what runs at servers (default: all). Works when servers are down; the exit status tells of it."""
    replies = app.ctl.ask_each(app.servers(servers), c.GetVersion())
    ready: dict[str, Any] = {}
    rows = []
    errors = {s: r for s, r in replies.items() if isinstance(r, WalbError)}
    for s, r in replies.items():
        if isinstance(r, WalbError):
            ready[s.name] = {"error": to_json_ready(error_reply(r))}
        else:
            ready[s.name] = to_json_ready(r)
            rows.append(ltsv(server=s.name, version=r.version, log_version=r.log_format, python=r.python))
    app.tell_lines(ready, rows)
    for s, error in errors.items():
        print(f"{s.name}: {error}", file=sys.stderr)
    return max(map(exit_code_of, errors.values()), default=0)


@command("get-state")
@SERVER
@VOL
def get_state(app: App, server: str, vol: str) -> None:
    """Print the state of a volume at a server; Clear where it is not known."""
    state = app.ctl.get_state(app.server(server), vol)
    app.tell({"value": state}, state)


@command("get-state-all")
@VOL
@SERVERS
def get_state_all(app: App, vol: str, servers: tuple[str, ...]) -> None:
    """Print `NAME ADDRESS KIND STATE` for each server (default: all); `err` where it cannot be asked."""
    replies = app.ctl.ask_each(app.servers(servers), c.GetState(volume=checked(vol)))
    states = {s: None if isinstance(r, WalbError) else r.value for s, r in replies.items()}
    rows = [
        f"{s.name} {s.get_host_port()} {server_kind_to_str(s.kind)} {state or 'err'}"
        for s, state in states.items()
    ]
    app.tell_lines({s.name: state for s, state in states.items()}, rows)


@command("get-vol-list")
@SERVER
def get_vol_list(app: App, server: str) -> None:
    """List the volumes that a server knows."""
    names = app.ctl.get_vol_list(app.server(server))
    app.tell_lines({"names": names}, names)


@command("get-ts-delta")
@SERVER
def get_ts_delta(app: App, server: str) -> None:
    """Show how far archives are behind a storage, or replicas behind an archive, as it last compared."""
    s = app.server(server)
    rows = app.ctl.get_ts_delta(s)
    app.tell_lines(rows, [ltsv(**row) for row in rows])


@command("jobs")
@SERVERS
@click.option("--volume", "vol", metavar="VOL", default="", help="Only jobs of this volume.")
def jobs(app: App, servers: tuple[str, ...], vol: str) -> None:
    """List the jobs that run or ran at servers (default: all). A restart of a daemon forgets its jobs."""
    replies = app.ctl.ask_each(app.servers(servers), GetJobs(volume=checked(vol) if vol else ""))
    lists = {s: r for s, r in replies.items() if isinstance(r, JobList)}
    errors = {s: r for s, r in replies.items() if isinstance(r, WalbError)}
    if app.as_json:
        ready: dict[str, Any] = {s.name: to_json_ready(r) for s, r in lists.items()}
        app.tell(ready | {s.name: {"error": to_json_ready(error_reply(r))} for s, r in errors.items()})
    else:
        app.end_progress()
        rows = [
            (s.name, job.job, job.name, job.volume, job.state, format_time(job.started), _how_it_is(job))
            for s, reply in lists.items()
            for job in reply.jobs
        ]
        print_table(["SERVER", "JOB", "NAME", "VOLUME", "STATE", "STARTED", "NOTE"], rows, right=["JOB"])
    for s, error in errors.items():
        print(f"{s.name}: {error}", file=sys.stderr)
    if errors and not lists:
        raise next(iter(errors.values()))


def _how_it_is(job: Any) -> str:
    return job_text(job).partition(f" {job.volume or '-'}")[2].strip()


@command("wait")
@SERVER
@click.argument("job", type=click.IntRange(1))
@TIMEOUT
def wait(app: App, server: str, job: int, timeout_s: float) -> None:
    """Wait until a job at a server has ended; exit as its error says when it failed."""
    s = app.server(server)
    info = app.ctl.wait_for_job(s, job, timeout_s)
    if info is None:
        raise NotFound(
            "no such job",
            hint="jobs are forgotten when a daemon restarts; see `walbc status`",
            server=s.name,
            job=job,
        )
    app.tell(info, job_text(info))


@command("shutdown")
@SERVERS
@click.option("--all", "everyone", is_flag=True, help="All servers of the group.")
@click.option("--mode", type=click.Choice(["graceful", "force"]), default="graceful", show_default=True)
@YES
def shutdown(app: App, servers: tuple[str, ...], everyone: bool, mode: str, yes: bool) -> None:
    """End daemons; graceful: after their running work."""
    if bool(servers) == everyone:
        raise UsageError("which servers?", hint="name them, or say --all")
    chosen = app.servers(servers)
    if everyone:
        sure(app, yes, f"{', '.join(s.name for s in chosen)} are shut down: nothing is backed up then")
    failed: dict[Server, WalbError] = {}
    for s in chosen:
        try:
            app.ctl.shutdown(s, mode)
        except WalbError as exc:
            failed[s] = exc
    for s, error in list(failed.items())[1:]:
        print(f"{s.name}: {error}", file=sys.stderr)
    if failed:
        raise next(iter(failed.values()))
    done = [s.name for s in chosen]
    app.tell({"servers": done, "mode": mode}, "")


@command("on")
@SERVER
@click.argument("words", metavar="COMMAND [ARG]...", nargs=-1, required=True)
def on(app: App, server: str, words: tuple[str, ...]) -> None:
    """Run a command of one server by the server's name, such as `walbc on s0 get log-usage vol0`.

    The commands are those of `walbc -a HOST -p PORT`, which lists them with --help.
    """
    s = app.server(server)
    cmd, args = find_command(words, s.kind)
    request = cmd.request(args)
    if isinstance(request, VirtFullScan):
        raise UsageError("an image is not printed", hint="use `walbc scan`", command=cmd.name)
    reply = finish(app.ctl.ask, s, cmd, app.ctl.ask(s, request))
    app.tell(reply, cmd.text(s.kind, reply))
