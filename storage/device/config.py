"""`device.toml`: what a device directory says about its device.

A device directory is BASE_DIR/NAME and holds `device.toml`, and while the device is served the sockets
`control.sock` and `nbd.sock`. The storage daemon knows a device by this directory.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from msgspec import Meta

from walbd.daemon.logs import LogFormat, LogLevel
from walbd.daemon.net import Address, parse_address
from walbd.errors import ConfigError, NotFound, UsageError
from walbd.format.schema import convert
from walbd.fs import FileSystem
from walbd.storage.device.engine import Tuning
from walbd.units import KIB, MIB, parse_size

CONFIG_NAME: Final = "device.toml"
CONTROL_NAME: Final = "control.sock"
NBD_NAME: Final = "nbd.sock"
SOCKET_PATH_MAX_B: Final = 107  # of a unix socket address
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,24}")
_SIZES: Final = ("log_flush_interval_size", "pending_max", "inflight_max", "inline_write_max")

Bytes = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


def device_name(text: str) -> str:
    """Check the name of a device; raises UsageError."""
    if _NAME.fullmatch(text) is None:
        raise UsageError("bad device name", hint="use 1 to 25 letters, digits, dots, - and _", name=text)
    return text


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one device. Sizes in the file may be text such as "64MiB"."""

    ldev: str  # path of the log device
    ddev: str  # path of the data device
    nbd_listen: list[str] = []  # HOST:PORT besides the unix socket
    nbd_tls_cert: str = ""  # PEM files; with them TCP clients must use TLS and show a certificate of nbd_tls_ca
    nbd_tls_key: str = ""
    nbd_tls_ca: str = ""
    nbd_insecure: bool = False  # allow a TCP address that other machines can reach without TLS
    nbd_connections_max: Annotated[int, Meta(ge=1, le=4096)] = 64
    checkpoint_interval_s: Seconds = 10.0
    log_flush_interval_s: Seconds = 0.1
    log_flush_interval_size: Annotated[int, Meta(ge=4 * KIB)] = 16 * MIB
    pending_max: Annotated[int, Meta(ge=2 * MIB)] = 64 * MIB
    inflight_max: Annotated[int, Meta(ge=MIB)] = 128 * MIB
    inline_write_max: Bytes = 512 * KIB
    log_level: LogLevel = "info"
    log_format: LogFormat = "console"

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read the contents of a `device.toml`. Raises ConfigError."""
        try:
            values = tomllib.loads(text)
            for name in _SIZES:
                if isinstance(values.get(name), str):
                    values[name] = parse_size(values[name])
            config = convert(values, cls)
        except (tomllib.TOMLDecodeError, msgspec.ValidationError, UsageError) as exc:
            raise ConfigError("bad device.toml", file=source, reason=str(exc)) from exc
        config.check(source)
        return config

    def check(self, source: str) -> None:
        """Raise ConfigError for settings that are wrong together."""
        if 2 * self.log_flush_interval_size > self.pending_max:
            raise ConfigError(
                "pending_max must be at least twice log_flush_interval_size",
                hint="otherwise writes would wait for a sync that is not due yet",
                file=source,
            )
        tls = [self.nbd_tls_cert, self.nbd_tls_key, self.nbd_tls_ca]
        if any(tls) and not all(tls):
            raise ConfigError("nbd_tls_cert, nbd_tls_key and nbd_tls_ca go together", file=source)
        for address in self.addresses():
            if not address.is_local and not all(tls) and not self.nbd_insecure:
                raise ConfigError(
                    "an NBD server that other machines can reach needs TLS",
                    hint="set nbd_tls_cert, nbd_tls_key and nbd_tls_ca, or say nbd_insecure = true",
                    file=source,
                    address=str(address),
                )

    def addresses(self) -> list[Address]:
        """Return the TCP addresses to listen on. Raises ConfigError."""
        found = []
        for text in self.nbd_listen:
            try:
                address = parse_address(text)
            except UsageError as exc:
                raise ConfigError("bad address in nbd_listen", hint=exc.hint, address=text) from exc
            if address.path:
                raise ConfigError("nbd_listen takes HOST:PORT; the unix socket is always there", address=text)
            found.append(address)
        return found

    def tuning(self) -> Tuning:
        """Return what the engine needs of it."""
        return Tuning(
            checkpoint_interval_s=self.checkpoint_interval_s,
            flush_interval_s=self.log_flush_interval_s,
            flush_interval_b=self.log_flush_interval_size,
            pending_max_b=self.pending_max,
            inline_max_b=self.inline_write_max,
        )

    def to_toml(self) -> str:
        """Write it as `parse` reads it, leaving out what is as by default."""
        lines = ["# A walb device; docs/device.md describes the settings."]
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
            if value == default:
                continue
            # TOML's basic strings, arrays of them, numbers and booleans are written as in JSON.
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def load_config(fs: FileSystem, directory: Path) -> DeviceConfig:
    """Read the settings of a device directory. Raises NotFound, ConfigError."""
    path = directory / CONFIG_NAME
    try:
        text = fs.read_bytes(path, size_max_b=1 << 20).decode()
    except NotFound as exc:
        raise NotFound(
            "no such device", hint="`walbd device create` makes one; check --base-dir", path=str(directory)
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("bad device.toml", file=str(path), reason=str(exc)) from exc
    return DeviceConfig.parse(text, str(path))


def control_address(directory: Path) -> Address:
    """Return where the control socket of a device is."""
    return socket_address(directory / CONTROL_NAME)


def nbd_address(directory: Path) -> Address:
    """Return where the NBD socket of a device is."""
    return socket_address(directory / NBD_NAME)


def socket_address(path: Path) -> Address:
    """Return the address of a unix socket; raises UsageError when the system cannot take its path."""
    if len(str(path).encode()) > SOCKET_PATH_MAX_B:
        raise UsageError(
            "the path of the socket is too long",
            hint=f"a unix socket takes {SOCKET_PATH_MAX_B} bytes; use a shorter base directory",
            path=str(path),
        )
    return Address(path=str(path))
