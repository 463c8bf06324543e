"""`walbc`: which archives the proxies feed, and kicks."""

from __future__ import annotations

import click

from walbd.cli.output import print_table
from walbd.cli.walbc_app import ARCHIVE, SERVERS, VOL, App, command
from walbd.cli.walbc_volume import COMPRESS, DELAY, sync_opt
from walbd.controller.constants import K_ARCHIVE
from walbd.controller.replies import compress_text
from walbd.controller.servers import get_server
from walbd.protocol.codec import to_json_ready
from walbd.protocol.control import ArchiveInfo, GetArchiveInfo

ARCHIVE_ARG = click.argument("archive", metavar="ARCHIVE")
PROXY_ARG = click.argument("proxy", metavar="PROXY")


@command("start-synchronizing")
@ARCHIVE_ARG
@VOL
@COMPRESS
@DELAY
def start_synchronizing(app: App, archive: str, vol: str, compress: str | None, delay_s: int | None) -> None:
    """Make all proxies send the volume to an archive. This also repairs a proxy that has lost its data."""
    ax = get_server(archive, app.layout.servers.archiveL)
    app.ctl.start_synchronizing(ax, vol, sync_opt(compress, delay_s))
    app.tell({"volume": vol, "archive": ax.name, "value": True}, f"{vol} is sent to {ax.name}")


@command("stop-synchronizing")
@ARCHIVE_ARG
@VOL
def stop_synchronizing(app: App, archive: str, vol: str) -> None:
    """Make all proxies send the volume to an archive no more; what is unsent is dropped."""
    ax = get_server(archive, app.layout.servers.archiveL)
    app.ctl.stop_synchronizing(ax, vol)
    app.tell({"volume": vol, "archive": ax.name, "value": False}, f"{vol} is not sent to {ax.name} any more")


@command("is-synchronizing")
@VOL
@ARCHIVE
def is_synchronizing(app: App, vol: str, archive: str | None) -> None:
    """Print 1 when all proxies send the volume to an archive, 0 when none does; an error when only some do."""
    value = app.ctl.is_synchronizing(app.archive(archive), vol)
    app.tell({"value": value}, str(int(value)))


@command("is-wdiff-send-error")
@PROXY_ARG
@VOL
@ARCHIVE
def is_wdiff_send_error(app: App, proxy: str, vol: str, archive: str | None) -> None:
    """Print 1 when an archive has refused the volume's diffs for a reason that needs a person, else 0."""
    value = app.ctl.is_wdiff_send_error(app.proxy(proxy), vol, app.archive(archive))
    app.tell({"value": value}, str(int(value)))


@command("kick-all")
@SERVERS
def kick_all(app: App, servers: tuple[str, ...]) -> None:
    """Hurry what waits, at storages and proxies (default: all). Nothing depends on it; it only saves seconds."""
    chosen = [s for s in app.servers(servers) if servers or s.kind != K_ARCHIVE]
    app.ctl.kick_all(chosen)
    app.tell({"servers": [s.name for s in chosen]}, "")


@command("kick-proxy")
@VOL
@ARCHIVE
def kick_proxy(app: App, vol: str, archive: str | None) -> None:
    """Hurry what waits for an archive at all proxies, and clear send errors."""
    ax = app.archive(archive)
    app.ctl.kick_proxy(vol, ax)
    app.tell({"volume": vol, "archive": ax.name}, "")


@click.group("archive-info")
def archive_info() -> None:
    """Which archives one proxy sends a volume to, and how.

    `start-synchronizing` and `stop-synchronizing` change all proxies at once.
    """


@command("list")
@VOL
@click.argument("proxies", metavar="[PROXY]...", nargs=-1)
def list_infos(app: App, vol: str, proxies: tuple[str, ...]) -> None:
    """Show where proxies (default: all) send the volume."""
    chosen = [app.proxy(name) for name in proxies] or app.layout.servers.proxyL
    found: dict[str, list[ArchiveInfo]] = {}
    for px in chosen:
        names = app.ctl.get_archive_info_list(px, vol)
        found[px.name] = [app.ctl.ask(px, GetArchiveInfo(volume=vol, archive=name)) for name in names]
    if app.as_json:
        app.tell({name: [to_json_ready(info) for info in infos] for name, infos in found.items()})
        return
    rows = [
        (name, info.archive, info.address, compress_text(info.compress), info.delay_s)
        for name, infos in found.items()
        for info in infos
    ]
    print_table(["PROXY", "ARCHIVE", "ADDRESS", "COMPRESS", "DELAY"], rows, right=["DELAY"])


@command("get")
@PROXY_ARG
@VOL
@ARCHIVE_ARG
def get_info(app: App, proxy: str, vol: str, archive: str) -> None:
    """Print HOST:PORT KIND:LEVEL:CPUS DELAY."""
    info = app.ctl.ask(app.proxy(proxy), GetArchiveInfo(volume=vol, archive=archive))
    app.tell(info, f"{info.address} {compress_text(info.compress)} {info.delay_s}")


@command("add")
@PROXY_ARG
@VOL
@ARCHIVE_ARG
@COMPRESS
@DELAY
@click.option("--no-start", is_flag=True, help="Leave the volume stopped there.")
def add_info(
    app: App, proxy: str, vol: str, archive: str, compress: str | None, delay_s: int | None, no_start: bool
) -> None:
    """Make one proxy send the volume to an archive of the group, or change how.

    Example: walbc archive-info add p0 vol0 a1 --delay 60
    """
    ax = get_server(archive, app.layout.servers.archiveL)
    app.ctl.add_archive_to_proxy(app.proxy(proxy), vol, ax, not no_start, sync_opt(compress, delay_s))
    app.tell({"proxy": proxy, "volume": vol, "archive": ax.name}, f"{proxy} sends {vol} to {ax.name}")


@command("update")
@PROXY_ARG
@VOL
@ARCHIVE_ARG
@COMPRESS
@DELAY
def update_info(app: App, proxy: str, vol: str, archive: str, compress: str | None, delay_s: int | None) -> None:
    """Change how a stopped proxy will send to an archive."""
    px, ax = app.proxy(proxy), get_server(archive, app.layout.servers.archiveL)
    _, known = app.ctl.get_archive_info(px, vol, ax)
    wanted = sync_opt(compress or known.cmprOpt.wire, known.delayS if delay_s is None else delay_s)
    assert wanted is not None
    app.ctl.update_archive_info(px, vol, ax, wanted)
    app.tell({"proxy": proxy, "volume": vol, "archive": ax.name}, "")


@command("delete")
@PROXY_ARG
@VOL
@ARCHIVE_ARG
@click.option("--empty", is_flag=True, help="First send what waits, however long that takes.")
def delete_info(app: App, proxy: str, vol: str, archive: str, empty: bool) -> None:
    """Make one proxy send the volume to an archive no more; what is unsent is dropped."""
    ax = get_server(archive, app.layout.servers.archiveL)
    app.ctl.del_archive_from_proxy(app.proxy(proxy), vol, ax, empty)
    app.tell(
        {"proxy": proxy, "volume": vol, "archive": ax.name}, f"{proxy} does not send {vol} to {ax.name} any more"
    )


@command("copy")
@click.argument("source", metavar="PROXY")
@VOL
@click.argument("dest", metavar="TO_PROXY")
def copy_info(app: App, source: str, vol: str, dest: str) -> None:
    """Make TO_PROXY send the volume wherever PROXY does, and start it there."""
    app.ctl.copy_archive_info(app.proxy(source), vol, app.proxy(dest))
    app.tell({"proxy": dest, "volume": vol}, f"{dest} sends {vol} as {source} does")


for each in (list_infos, get_info, add_info, update_info, delete_info, copy_info):
    archive_info.add_command(each)
