"""Configuration: TOML to frozen structs, checked once at start; every setting is also an option.

A field's name is its key in the file and, with dashes, its option. The description and the bounds stand at
the field. A field of type `Size` also takes text such as "128MiB". Unknown keys are errors.
"""

from __future__ import annotations

import socket
import tomllib
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

import aiofiles
import msgspec
from msgspec import Meta

from walbd.daemon.logs import LogFormat, LogLevel
from walbd.errors import ConfigError, UsageError
from walbd.format.schema import convert
from walbd.ids import node_name
from walbd.units import parse_size

LIVE: Final = {"live": True}  # in a field's Meta: a reload changes the setting in the running daemon
_SIZE: Final = {"size": True}
Size = Annotated[int, Meta(extra=_SIZE)]  # [byte], never negative; a field may add bounds of its own
Seconds = Annotated[float, Meta(ge=0, le=86400 * 365)]
Delay = Annotated[float, Meta(gt=0, le=86400)]  # a deadline or a pause [s], never zero
Count = Annotated[int, Meta(ge=1, le=100_000)]

C = TypeVar("C", bound="DaemonConfig")


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all daemons have in common."""

    base_dir: Annotated[str, Meta(min_length=1, description="directory with a subdirectory for each volume")]
    node_id: Annotated[str, Meta(description="name of this server; default: the host's name")] = ""
    group: Annotated[str, Meta(description="backup group: servers of another group are refused")] = "default"
    listen: Annotated[str, Meta(min_length=1, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, lt=1 << 16, description="TCP port; 0: any free one")] = 5000
    tls_cert: Annotated[str, Meta(description="PEM file: certificate of this server")] = ""
    tls_key: Annotated[str, Meta(description="PEM file: its key")] = ""
    tls_ca: Annotated[str, Meta(description="PEM file: authority that signs the peers' certificates")] = ""
    insecure: Annotated[bool, Meta(description="allow a non-loopback address without TLS")] = False
    connections_max: Annotated[Count, Meta(description="connections served at the same time", extra=LIVE)] = 100
    io_timeout_s: Annotated[Delay, Meta(description="deadline of each network read and write", extra=LIVE)] = 30.0
    connect_timeout_s: Annotated[
        Delay, Meta(description="deadline of a connection attempt and its greeting", extra=LIVE)
    ] = 10.0
    retry_delay_min_s: Annotated[Delay, Meta(description="delay after a first failure", extra=LIVE)] = 1.0
    retry_delay_max_s: Annotated[Delay, Meta(description="cap of the doubling delay", extra=LIVE)] = 30.0
    log_level: Annotated[LogLevel, Meta(description="least level of log lines", extra=LIVE)] = "info"
    log_format: Annotated[LogFormat, Meta(description="log lines for people or as JSON")] = "console"

    @property
    def name(self) -> str:
        """The node id that is used."""
        return self.node_id or socket.gethostname()

    def check(self) -> None:
        """Raise ConfigError for settings that are wrong together."""
        try:
            node_name(self.name)
            node_name(self.group)
        except UsageError as exc:
            raise ConfigError(exc.message, hint=exc.hint, **exc.facts) from exc
        tls = [self.tls_cert, self.tls_key, self.tls_ca]
        if any(tls) and not all(tls):
            raise ConfigError("tls_cert, tls_key and tls_ca go together")
        local = self.listen in ("localhost", "::1") or self.listen.startswith("127.")
        if not local and not all(tls) and not self.insecure:
            raise ConfigError(
                "a server that other machines can reach needs TLS",
                hint="set tls_cert, tls_key and tls_ca, listen on 127.0.0.1, or say insecure = true",
                listen=self.listen,
            )
        if self.retry_delay_max_s < self.retry_delay_min_s:
            raise ConfigError("retry_delay_max_s is below retry_delay_min_s")


class Setting(msgspec.Struct, frozen=True):
    """One field of a configuration, for options and for the documentation."""

    name: str
    type: Any  # bool, int, float, str, list
    choices: tuple[str, ...]
    is_size: bool
    live: bool  # a reload changes it in the running daemon
    required: bool
    default: Any
    description: str

    @property
    def option(self) -> str:
        """The command-line option."""
        return "--" + self.name.replace("_", "-")


def settings(cls: type[DaemonConfig]) -> list[Setting]:
    """Return all fields of a configuration."""
    hints = get_type_hints(cls, include_extras=True)
    rows = []
    for f in msgspec.structs.fields(cls):
        base, metas = _unwrap(hints[f.name])
        extra: dict[str, Any] = {}
        description = ""
        for meta in metas:
            extra |= meta.extra or {}
            description = meta.description or description
        origin = get_origin(base)
        choices = tuple(str(a) for a in get_args(base)) if origin is not None and origin is not list else ()
        default = f.default if f.default is not msgspec.NODEFAULT else None
        if f.default_factory is not msgspec.NODEFAULT:
            default = f.default_factory()
        rows.append(
            Setting(
                name=f.name,
                type=list if origin is list else (str if choices else base),
                choices=choices,
                is_size=bool(extra.get("size")),
                live=bool(extra.get("live")),
                required=f.required,
                default=default,
                description=description,
            )
        )
    return rows


def load(cls: type[C], path: Path | None, options: Mapping[str, Any]) -> C:
    """Read a TOML file (if any), let options override it, check everything. Raises ConfigError.

    `options` holds the values given on the command line by field name, None for those not given; values may
    be text. Lists given as text are split at commas.
    """
    text = ""
    if path is not None:
        with _said(path):
            text = path.read_text(encoding="utf-8")
    return _checked(cls, text, path, options)


async def load_again(cls: type[C], path: Path | None, options: Mapping[str, Any]) -> C:
    """Like `load`, in a daemon that runs: a file on a slow disk does not hold up the loop."""
    text = ""
    if path is not None:
        with _said(path):
            async with aiofiles.open(path, encoding="utf-8") as file:
                text = await file.read()
    return _checked(cls, text, path, options)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turn what keeps a file from being read as text or TOML into ConfigError."""
    try:
        yield
    except OSError as exc:
        raise ConfigError("cannot read the configuration", file=str(path), reason=exc.strerror) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError("the configuration is no TOML", file=str(path), reason=str(exc)) from exc


def _checked(cls: type[C], text: str, path: Path | None, options: Mapping[str, Any]) -> C:
    values: dict[str, Any] = {}
    if path is not None:
        with _said(path):
            values = tomllib.loads(text)
    known = {setting.name: setting for setting in settings(cls)}
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(
                "unknown setting",
                hint=f"did you mean {near[0]}?" if near else "known: " + ", ".join(sorted(known)),
                file=str(path),
                setting=name,
            )
    values |= {name: value for name, value in options.items() if value is not None}
    for name, setting in known.items():
        value = values.get(name)
        if value is None:
            if setting.required:
                hint = f"give {setting.option}, or " + (f"say it in {path}" if path else "--config FILE")
                raise ConfigError("a setting is missing", hint=hint, setting=name)
            continue
        values[name] = _convert(setting, value)
    try:
        config = convert(values, cls)
    except msgspec.ValidationError as exc:
        raise ConfigError("bad setting", reason=str(exc), file=str(path or "options")) from exc
    config.check()
    return config


def _convert(setting: Setting, value: Any) -> Any:
    """Turn text from the command line, and sizes written as text, into the field's type."""
    if setting.is_size and type(value) is int and value < 0:
        raise ConfigError("a size cannot be negative", setting=setting.name, value=value)
    if not isinstance(value, str):
        return float(value) if setting.type is float and type(value) is int else value
    try:
        if setting.is_size:
            return parse_size(value)
        if setting.type is list:
            return [item.strip() for item in value.split(",") if item.strip()]
        if setting.type in (int, float):
            return setting.type(value)
    except (UsageError, ValueError) as exc:
        raise ConfigError("bad setting", setting=setting.name, value=value, reason=str(exc)) from exc
    return value


def _unwrap(hint: Any) -> tuple[Any, list[Meta]]:
    """Take `Annotated` and `| None` off a type; return the base type and all Metas, inner first."""
    metas: list[Meta] = []
    while True:
        if get_origin(hint) is Annotated:
            base, *extras = get_args(hint)
            metas = [meta for meta in extras if isinstance(meta, Meta)] + metas
            hint = base
        elif get_origin(hint) in (Union, types.UnionType):
            hint = next(arg for arg in get_args(hint) if arg is not type(None))
        else:
            return hint, metas
