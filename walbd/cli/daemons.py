"""`walbd storage`, `walbd proxy`, `walbd archive`: run one daemon in the foreground."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import click

from walbd.daemon.config import DaemonConfig, Setting, load, load_again, settings
from walbd.daemon.main import Daemon, run_daemon
from walbd.units import format_size

_METAVARS: Final = {
    "archive": "HOST:PORT",
    "proxy": "HOST:PORT[,HOST:PORT...]",
    "base_dir": "DIR",
    "listen": "ADDRESS",
    "node_id": "NAME",
    "group": "NAME",
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "tls_ca": "FILE",
    "keep": "RULES",
    "levels": "LEVELS",
    "merge_compress": "KIND[:LEVEL]",
    "policy_rest_percent": "PERCENT",
}


def _option(setting: Setting) -> Callable[[Any], Any]:
    """Make the option of a setting. Everything is text here; `walbd.daemon.config.load` checks it."""
    help_text = setting.description or setting.name.replace("_", " ")
    default: Any = None
    if setting.required:
        help_text += "  [required]"
    elif setting.default not in ("", None, [], False):
        default = format_size(setting.default) if setting.is_size else setting.default
        help_text += f"  [default: {'yes' if default is True else default}]"
    help_text = help_text[0].upper() + help_text[1:]
    if setting.type is bool:
        return click.option(
            f"{setting.option}/--no-{setting.option[2:]}", setting.name, default=None, help=help_text
        )
    kind: Any = click.Choice(setting.choices) if setting.choices else str
    metavar = None if setting.choices else _metavar(setting)
    return click.option(setting.option, setting.name, type=kind, default=None, metavar=metavar, help=help_text)


def _metavar(setting: Setting) -> str:
    if setting.is_size:
        return "SIZE"
    if setting.name.endswith("_s"):
        return "SECONDS"
    return _METAVARS.get(setting.name, "N" if setting.type is int else "TEXT")


class _DaemonCommand(click.Command):
    """A command whose help tells the settings of this daemon before those of every daemon."""

    config: type[DaemonConfig]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        everywhere = {setting.name for setting in settings(DaemonConfig)}
        own = {setting.name for setting in settings(self.config)} - everywhere
        rows = [(param.name, row) for param in self.get_params(ctx) if (row := param.get_help_record(ctx))]
        for title, names in (("Settings", own), ("Settings of every daemon", everywhere)):
            with formatter.section(title):
                formatter.write_dl([row for name, row in rows if name in names])
        with formatter.section("Options"):
            formatter.write_dl([row for name, row in rows if name not in own | everywhere])


def daemon_command(
    name: str, config: type[DaemonConfig], make: Callable[..., Daemon], help_text: str
) -> click.Command:
    """Make the command that runs a daemon: `--config FILE`, and an option for every setting.

    `make(config, env, shutdown, read=...)` makes the daemon; `read()` reads file and options again.
    """

    def run(config_path: Path | None, **options: Any) -> None:
        checked = load(config, config_path, options)

        def read() -> Awaitable[DaemonConfig]:
            return load_again(config, config_path, options)

        run_daemon(
            name,
            lambda env, shutdown: make(checked, env, shutdown, read=read),
            log_level=checked.log_level,
            log_format=checked.log_format,
        )

    command: Any = run
    for setting in reversed(settings(config)):
        command = _option(setting)(command)
    command = click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path, dir_okay=False),
        default=None,
        help="TOML file with the settings; options override it.",
    )(command)
    about = f"""{help_text}

    Every setting stands in the file or is an option (docs/configuration.md); SIGHUP reads the file again.

    Example: walbd {name} --config /etc/walbd/{name}.toml
    """
    made = click.command(name, cls=_DaemonCommand, help=about)(command)
    made.config = config
    return made


def _storage() -> click.Command:
    from walbd.storage.config import StorageConfig
    from walbd.storage.server import StorageServer

    return daemon_command(
        "storage", StorageConfig, StorageServer, "Run the storage daemon, on the host that has the volumes."
    )


def _proxy() -> click.Command:
    from walbd.proxy.config import ProxyConfig
    from walbd.proxy.server import ProxyServer

    return daemon_command(
        "proxy", ProxyConfig, ProxyServer, "Run a proxy daemon: turn wlogs into wdiffs and send them on."
    )


def _archive() -> click.Command:
    from walbd.archive.config import ArchiveConfig
    from walbd.archive.server import ArchiveServer

    return daemon_command(
        "archive", ArchiveConfig, ArchiveServer, "Run an archive daemon: keep images and wdiffs, and restore."
    )


COMMANDS: dict[str, Callable[[], click.Command]] = {"storage": _storage, "proxy": _proxy, "archive": _archive}
