"""`walbc`: operate a backup group, or one server of it.

walbc COMMAND ...                          servers by their names in the group file
walbc -a HOST -p PORT COMMAND ...          one server by its address, no group file
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from walbd import __version__
from walbd.cli.app import CONTEXT, Late, LateGroup, run

_V, _F, _I, _S = (f"walbd.cli.walbc_{name}" for name in ("volume", "feed", "image", "server"))
_D, _C, _T = (f"walbd.cli.walbc_{name}" for name in ("diffs", "copies", "settings"))

SECTIONS: dict[str, dict[str, Late]] = {
    "Look": {
        "status": Late(f"{_S}:status", "The whole group on one screen: servers, volumes, lag, jobs, alarms."),
        "info": Late("walbd.cli.walbc_info:info", "From when to when, and to what, a volume can be restored."),
        "doctor": Late("walbd.cli.walbc_doctor:doctor", "Find what is wrong with the group, and mend it."),
        "shell": Late("walbd.cli.shell:shell", "Python, with the servers and the controller as variables."),
    },
    "Replace hosts": {
        "replace-storage": Late("walbd.cli.walbc_replace:replace_storage", "Move volumes to another storage."),
        "replace-proxy": Late("walbd.cli.walbc_replace:replace_proxy", "Empty a proxy into another one."),
        "replace-archive": Late("walbd.cli.walbc_replace:replace_archive", "Move volumes to another archive."),
    },
    "Back up": {
        "init-storage": Late(f"{_V}:init_storage", "Take over a device under a volume name, and stand by."),
        "full-backup": Late(f"{_V}:full_backup", "Copy a volume to the archive, then back it up continuously."),
        "hash-backup": Late(
            f"{_V}:hash_backup", "Send what differs from the archive's image, then back up continuously."
        ),
        "snapshot": Late(f"{_V}:snapshot", "Take a snapshot; prints its generation."),
    },
    "Restore": {
        "restorable": Late(f"{_I}:restorable", "List what can be restored."),
        "restore": Late(f"{_I}:restore", "Make an image of a snapshot."),
        "restored": Late(f"{_I}:restored", "List restored images."),
        "get-restored-path": Late(f"{_I}:get_restored_path", "Where a restored image is."),
        "del-restored": Late(f"{_I}:del_restored", "Remove a restored image."),
        "scan": Late(f"{_D}:scan", "Write the image of a snapshot to a file, without restoring it."),
        "block-hash": Late(f"{_D}:block_hash", "Hash of the image of a snapshot."),
    },
    "Archives": {
        "gaps": Late(f"{_D}:gaps", "Intervals for which no restore point can exist."),
        "apply": Late(f"{_I}:apply", "Write diffs into the base image; older snapshots vanish."),
        "merge": Late(f"{_D}:merge", "Make one diff of several; the snapshots between vanish."),
        "scrub": Late(f"{_D}:scrub", "Verify everything that an archive stores of a volume."),
        "enable-snapshot": Late(f"{_D}:enable_snapshot", "Protect snapshots from merging."),
        "disable-snapshot": Late(f"{_D}:disable_snapshot", "Let merging remove snapshots."),
        "gc-diff": Late(f"{_I}:gc_diff", "Remove diffs that nothing needs."),
        "get-base": Late(f"{_I}:get_base", "State of the base image."),
        "get-diff-list": Late(f"{_I}:get_diff_list", "List diffs."),
        "get-applicable-diff-list": Late(
            f"{_I}:get_applicable_diff_list", "List the diffs that continue the base."
        ),
        "get-num-diff": Late(f"{_D}:get_num_diff", "Count diffs."),
        "get-total-diff-size": Late(f"{_D}:get_total_diff_size", "Add up the sizes of diffs."),
        "cold": Late(f"{_D}:cold", "List cold images."),
        "del-cold": Late(f"{_D}:del_cold", "Remove a cold image."),
        "get-uuid": Late(f"{_I}:get_uuid", "Uuid of the log that is sent, or that a history continues."),
        "get-archive-uuid": Late(f"{_I}:get_archive_uuid", "Uuid of the lineage of images."),
    },
    "Policy": {
        "policy": Late(
            "walbd.cli.walbc_policy:policy", "Which points stay, and why: show, set, simulate, explain."
        ),
        "hold": Late("walbd.cli.walbc_policy:hold", "Points that no policy may remove: add, list, delete."),
    },
    "Copies": {
        "replicate": Late(f"{_C}:replicate", "Bring a volume at another archive up to date."),
        "synchronize": Late(f"{_C}:synchronize", "Feed another archive, too, without a gap."),
        "replicas": Late(f"{_C}:replicas", "Where an archive has replicated a volume to."),
        "forget-replica": Late(f"{_C}:forget_replica", "Keep nothing for a copy any more."),
    },
    "Volumes at servers": {
        "start": Late(f"{_V}:start", "Start a volume at a server."),
        "stop": Late(f"{_V}:stop", "Stop a volume at a server."),
        "reset": Late(f"{_V}:reset", "Bring a stopped volume back to SyncReady."),
        "clear": Late(f"{_V}:clear", "Forget a volume at a server, and remove its files there."),
        "go-standby": Late(f"{_V}:go_standby", "Make a volume Standby at a storage."),
        "resize": Late(f"{_T}:resize", "Grow a volume at all archives and storages."),
        "is-overflow": Late(f"{_V}:is_overflow", "Has the log of a volume overflowed?"),
        "set-full-scan-bps": Late(f"{_V}:set_full_scan_bps", "Limit the speed of full scans."),
        "get-state": Late(f"{_S}:get_state", "State of a volume at a server."),
        "get-state-all": Late(f"{_S}:get_state_all", "State of a volume at all servers."),
        "get-vol-list": Late(f"{_S}:get_vol_list", "Volumes of a server."),
        "get-ts-delta": Late(f"{_S}:get_ts_delta", "How far archives are behind."),
    },
    "Proxies": {
        "start-synchronizing": Late(f"{_F}:start_synchronizing", "Send a volume to an archive."),
        "stop-synchronizing": Late(f"{_F}:stop_synchronizing", "Send a volume to an archive no more."),
        "is-synchronizing": Late(f"{_F}:is_synchronizing", "Is a volume sent to an archive?"),
        "archive-info": Late(f"{_F}:archive_info", "Where one proxy sends a volume, and how."),
        "is-wdiff-send-error": Late(f"{_F}:is_wdiff_send_error", "Has an archive refused diffs for good?"),
        "kick-all": Late(f"{_F}:kick_all", "Hurry what waits at storages and proxies."),
        "kick-proxy": Late(f"{_F}:kick_proxy", "Hurry what waits for an archive at all proxies."),
    },
    "Servers": {
        "ping": Late(f"{_S}:ping", "Do the servers live?"),
        "version": Late(f"{_S}:version", "What runs at the servers."),
        "jobs": Late(f"{_S}:jobs", "Long work that runs or ran."),
        "wait": Late(f"{_S}:wait", "Wait for a job."),
        "reload": Late(f"{_T}:reload", "Make daemons read their configuration again."),
        "retarget": Late(f"{_T}:retarget", "Make storages use the archive and proxies of the group file."),
        "dump-log-header": Late(f"{_T}:dump_log_header", "Keep a block of a log as a file."),
        "shutdown": Late(f"{_S}:shutdown", "End daemons."),
        "on": Late(f"{_S}:on", "Run a command of one server, such as `get log-usage`."),
    },
}
COMMANDS = {name: late for section in SECTIONS.values() for name, late in section.items()}


class _Root(LateGroup):
    """Commands of a group; with -a and -p those of one server, which are only words here."""

    json_errors = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if (ctx.params.get("address") is None) != (ctx.params.get("port") is None):
            raise click.UsageError("-a HOST and -p PORT go together", ctx)
        return rest

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ctx.params.get("address") is None:
            if ctx.params.get("retry") is not None or ctx.params.get("node_id"):
                raise click.UsageError("-retry and -id need -a HOST and -p PORT", ctx)
            return super().resolve_command(ctx, args)
        from walbd.cli.walbc_one import one_server

        return "", one_server, args

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.params.get("address") is not None:
            _format_one_server(formatter)
            return
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, late.help) for name, late in commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.params.get("address") is None:
            formatter.write_paragraph()
            formatter.write_text("The commands of one server: walbc -a HOST -p PORT --help")


def _format_one_server(formatter: click.HelpFormatter) -> None:
    from walbd.controller.commands import COMMANDS as ONE_SERVER
    from walbd.controller.constants import serverKinds
    from walbd.controller.servers import server_kind_to_str

    sections = {"Every server": [c for c in ONE_SERVER if len(c.kinds) == len(serverKinds)]}
    for kind in serverKinds:
        mine = [c for c in ONE_SERVER if kind in c.kinds and len(c.kinds) < len(serverKinds)]
        sections[server_kind_to_str(kind).capitalize()] = mine
    for title, commands in sections.items():
        with formatter.section(title):
            formatter.write_dl([(f"{c.name} {c.usage}".rstrip(), c.help) for c in commands], col_max=48)


@click.group(cls=_Root, late=COMMANDS, context_settings=CONTEXT)
@click.option(
    "--group",
    "group_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The group file.  [default: $WALBD_GROUP, ./walbd-group.toml, /etc/walbd/group.toml]",
)
@click.option("--json", "as_json", is_flag=True, help="Print results (and errors) as JSON.")
@click.option("-debug", "--debug", is_flag=True, help="Write every request to stderr.")
@click.option(
    "-to",
    "--io-timeout",
    "timeout_s",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    help="Longest silence of a server.  [default: 10, or the group file's]",
)
@click.option("-a", "--address", is_eager=True, metavar="HOST", help="Address of one server.")
@click.option("-p", "--port", is_eager=True, type=click.IntRange(1, 65535), metavar="PORT", help="Its port.")
@click.option(
    "-id", "--id", "node_id", metavar="ID", help="With -a: who we say we are.  [default: the host's name]"
)
@click.option(
    "-retry",
    "--retry",
    type=click.IntRange(0, 1000),
    metavar="N",
    help="With -a: further tries of status and get.  [default: 2]",
)
@click.version_option(__version__, prog_name="walbc", message="%(prog)s %(version)s")
@click.pass_context
def root(
    ctx: click.Context,
    group_path: Path | None,
    as_json: bool,
    debug: bool,
    timeout_s: float | None,
    address: str | None,
    port: int | None,
    node_id: str | None,
    retry: int | None,
) -> None:
    """Operate a backup group: its servers are named in the group file.

    With -a HOST and -p PORT: one command at one server, without a group file.
    """
    from walbd.cli.walbc_app import App  # late: it brings the whole library

    del address, port, node_id, retry  # read from the context by those who need them
    ctx.obj = App(group_path=group_path, as_json=as_json, debug=debug, timeout_s=timeout_s or 0.0)


def main() -> None:
    """Run the `walbc` command; never returns."""
    sys.exit(run(root, "walbc"))


if __name__ == "__main__":
    main()
