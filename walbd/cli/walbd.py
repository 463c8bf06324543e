"""`walbd`: the daemons, the device, and the offline tools."""

from __future__ import annotations

import sys

import click

from walbd import __version__
from walbd.cli.app import CONTEXT, Late, LateGroup, run

COMMANDS = {
    "device": Late("walbd.cli.device:device", "Devices of this host: make, serve, look at, grow, remove."),
    "storage": Late(
        "walbd.cli.daemons:COMMANDS.storage", "Run the storage daemon, on the host that has the volumes."
    ),
    "proxy": Late(
        "walbd.cli.daemons:COMMANDS.proxy", "Run a proxy daemon: turn wlogs into wdiffs and send them on."
    ),
    "archive": Late(
        "walbd.cli.daemons:COMMANDS.archive", "Run an archive daemon: keep images and wdiffs, restore."
    ),
    "wlog": Late("walbd.cli.wlog:wlog", "Log files: show, verify, replay, convert to diffs."),
    "wdiff": Late("walbd.cli.wdiff:wdiff", "Diff files: show, verify, merge, apply."),
    "image": Late("walbd.cli.image:image", "Disk images: put together from diffs, hash."),
    "ldev": Late("walbd.cli.ldev:ldev", "Log devices: format, look inside, extract, replay, check."),
}


@click.group(cls=LateGroup, late=COMMANDS, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="walbd", message="%(prog)s %(version)s")
def root() -> None:
    """Continuous backup of block devices."""


def main() -> None:
    """Run the `walbd` command; never returns."""
    sys.exit(run(root, "walbd"))


if __name__ == "__main__":
    main()
