"""`walbc -a HOST -p PORT COMMAND ...`: one command at one server, by its address."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from walbd.cli.output import note
from walbd.cli.walbc_app import App, WalbcCommand
from walbd.controller.client import Client, identity
from walbd.controller.commands import find_command, finish
from walbd.controller.scan import image_sink
from walbd.controller.servers import Server
from walbd.daemon.conn import Me
from walbd.errors import ConnectError, TimedOut, UsageError
from walbd.protocol.codec import Message
from walbd.protocol.maintenance import ScanBegin, VirtFullScan

T = TypeVar("T")

_RETRIES: Final = 2
_RETRY_DELAY_S: Final = 0.1
_RETRIED: Final = ("status", "get")  # first words of commands that change nothing


@click.command("one-server", cls=WalbcCommand)
@click.argument("words", nargs=-1, required=True)
@click.pass_context
def one_server(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Run one command at one server."""
    app = ctx.find_object(App)
    assert app is not None
    assert ctx.parent is not None
    options = ctx.parent.params
    cmd, args = find_command(words)
    cmd.request(args)  # wrong arguments are told before anything is asked
    if options["retry"] is not None and words[0] not in _RETRIED:
        raise UsageError("-retry is only for status and get", command=cmd.name)
    client = Client(_identity(app, options["node_id"] or ""))

    def ask() -> tuple[int, Message, Any]:
        s = client.find_out(options["address"], options["port"])
        found, rest = find_command(words, s.kind)
        request = found.request(rest)
        if app.debug:
            note(f"{s.name} <- {request}")
        if isinstance(request, VirtFullScan):
            return s.kind, scan(client, s, request, rest[0]), found
        return s.kind, finish(client.call, s, found, client.call(s, request)), found

    try:
        tries = options["retry"] if options["retry"] is not None else _RETRIES
        kind, reply, found = _retried(ask, tries if words[0] in _RETRIED else 0)
    finally:
        client.close()
    if not isinstance(reply, ScanBegin):
        app.tell(reply, found.text(kind, reply))


def scan(client: Client, s: Server, request: VirtFullScan, dest: str) -> ScanBegin:
    """Write an image to a file or device, or to standard output for `stdout`."""
    with image_sink(sys.stdout.buffer if dest == "stdout" else dest, s.name) as sink:
        reply = client.stream(s, request, sink.take)
        sink.finish()
        return reply


def _identity(app: App, node: str) -> Me:
    """Return who we are; the backup group and TLS files are those of the group file, if one is named."""
    if app.group_path is None:
        return identity(node=node, timeoutS=app.timeout_s)
    layout = app.layout
    return identity(group=layout.group, node=node, timeoutS=app.timeout_s or layout.timeout_s, tls=layout.tls)


def _retried(ask: Callable[[], T], tries: int) -> T:
    """Call again after errors of the connection, `tries` times at most."""
    while True:
        try:
            return ask()
        except (ConnectError, TimedOut) as exc:
            if tries <= 0:
                raise
            note(f"walbc: {exc}; trying again")
        tries -= 1
        time.sleep(_RETRY_DELAY_S)
