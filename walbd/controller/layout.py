"""The group file: which servers belong together, in TOML. Source: docs/controller.md, "The group file".

    group = "default"
    timeout_s = 10.0

    [[storage]]                       # also [[proxy]], in order of preference, and [[archive]], primary first
    name = "s0"
    host = "backup1.example"
    port = 15000

    [volumes.vol0]
    target = "s0"                     # the storage that backs it up
    devices = { s0 = "/var/lib/walbd/device/vol0" }
    archives = ["a0"]                 # where it is to be kept

Unknown keys and values that cannot be meant are refused, with a hint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.controller import Controller
from walbd.controller.progress import ShowProgress, ignore_progress
from walbd.controller.servers import Server, ServerConnectionParam, ServerLayout, get_server
from walbd.errors import ConfigError, UsageError
from walbd.format.schema import convert
from walbd.fs import FileSystem
from walbd.ids import node_name, volume_name

GROUP_VARIABLE: Final = "WALBD_GROUP"
GROUP_PLACES: Final = (Path("walbd-group.toml"), Path("/etc/walbd/group.toml"))
_SAMPLE: Final = "docs/controller.md shows one"


class _Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    host: str
    port: Annotated[int, Meta(gt=0, lt=1 << 16)]


class _Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    target: str = ""
    devices: dict[str, str] = {}
    archives: list[str] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    group: str = "default"
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    storage: list[_Server] = []
    proxy: list[_Server] = []
    archive: list[_Server] = []
    volumes: dict[str, _Volume] = {}


@dataclass(frozen=True)
class VolumeEntry:
    """What the group file says about a volume."""

    name: str
    target: Server | None  # the storage that backs it up, where that is said
    devices: Mapping[str, str]  # storage name to device path
    archives: tuple[Server, ...] | None = None  # where it is to be kept; None: not said


@dataclass(frozen=True)
class GroupLayout:
    """A backup group as its file describes it."""

    servers: ServerLayout
    group: str = "default"
    timeout_s: float = 10.0
    tls: tuple[str, str, str] | None = None  # certificate, key, authority
    volumes: Mapping[str, VolumeEntry] = field(default_factory=dict)
    path: Path | None = None  # the file
    _file: _File | None = field(default=None, repr=False, compare=False)  # as it was read

    def controller(self, *, isDebug: bool = False, progress: ShowProgress = ignore_progress) -> Controller:
        """Make a controller for the group."""
        return Controller(
            "", self.servers, isDebug, self.timeout_s, group=self.group, tls=self.tls, progress=progress
        )

    def server(self, name: str) -> Server:
        """Return a server by its name; raises UsageError."""
        return get_server(name, self.servers.get_all())

    def with_servers(self, servers: ServerLayout, renamed: Mapping[str, str] | None = None) -> GroupLayout:
        """Return the group with other servers; `renamed` maps servers that are replaced to their successors.

        A volume's device at a replaced storage is taken over under the successor's name. What volumes say about
        servers that are gone is dropped.
        """
        renamed = renamed or {}
        file = self._file if self._file is not None else _File(group=self.group, timeout_s=self.timeout_s)
        storages, archives = ({s.name for s in sL} for sL in (servers.storageL, servers.archiveL))
        volumes = {}
        for name, entry in file.volumes.items():
            target = renamed.get(entry.target, entry.target)
            devices = {renamed.get(s, s): path for s, path in entry.devices.items() if s in renamed}
            devices |= {s: path for s, path in entry.devices.items() if s not in renamed}
            wanted = entry.archives
            if wanted is not None:
                kept = dict.fromkeys(renamed.get(a, a) for a in wanted)
                wanted = sorted((a for a in kept if a in archives), key=[s.name for s in servers.archiveL].index)
            volumes[name] = _Volume(
                target if target in storages else "",
                {s: path for s, path in devices.items() if s in storages},
                wanted,
            )
        changed = msgspec.structs.replace(
            file,
            storage=[_entry(s) for s in servers.storageL],
            proxy=[_entry(s) for s in servers.proxyL],
            archive=[_entry(s) for s in servers.archiveL],
            volumes=volumes,
        )
        path = self.path if self.path is not None else Path("group.toml")
        made = _check(changed, path)
        return dataclasses.replace(made, servers=servers, path=self.path, tls=self.tls)

    def to_toml(self) -> str:
        """Write the group as a group file. Comments of the file that was read are not kept."""
        assert self._file is not None
        return _to_toml(self._file)

    def write(self, fs: FileSystem) -> None:
        """Replace the group file durably by what `to_toml` writes; raises UsageError when there is no file."""
        if self.path is None:
            raise UsageError("the group does not come from a file")
        fs.replace_durably(self.path.resolve(), self.to_toml().encode())


def find_layout(path: Path | None = None, environ: Mapping[str, str] | None = None) -> GroupLayout:
    """Load the group file: `path` if given, else $WALBD_GROUP, ./walbd-group.toml, /etc/walbd/group.toml.

    The first that is named or exists is used; `environ` None: the environment. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    if path is not None:
        return load_layout(path)
    if named := environ.get(GROUP_VARIABLE):
        return load_layout(Path(named))
    for place in GROUP_PLACES:
        if place.exists():
            return load_layout(place)
    raise ConfigError(
        "there is no group file",
        hint=f"name one with --group FILE or ${GROUP_VARIABLE}; {_SAMPLE}",
        looked_at=", ".join(map(str, GROUP_PLACES)),
    )


def load_layout(path: Path | str) -> GroupLayout:
    """Read a group file and check it. Raises ConfigError; paths of TLS files are relative to the file."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as exc:
        raise ConfigError(
            "cannot read the group file", hint=_SAMPLE, file=str(path), reason=exc.strerror or str(exc)
        ) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("the group file is no TOML", file=str(path), reason=str(exc)) from exc
    return parse_layout(text, path)


def parse_layout(text: str, path: Path) -> GroupLayout:
    """Check the contents of a group file; `path` names it in errors. Raises ConfigError."""
    try:
        values = tomllib.loads(text)
        if isinstance(values.get("timeout_s"), int) and not isinstance(values["timeout_s"], bool):
            values["timeout_s"] = float(values["timeout_s"])
        file = convert(values, _File)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError("the group file is no TOML", file=str(path), reason=str(exc)) from exc
    except msgspec.ValidationError as exc:
        raise ConfigError(
            "bad entry in the group file", hint=_hint(str(exc), values), file=str(path), reason=str(exc)
        ) from exc
    try:
        return _check(file, path)
    except ConfigError:
        raise
    except UsageError as exc:
        raise ConfigError(exc.message, hint=exc.hint, **{"file": str(path)} | exc.facts) from exc


def _check(file: _File, path: Path) -> GroupLayout:
    node_name(file.group)
    servers = ServerLayout(
        _servers(file.storage, K_STORAGE), _servers(file.proxy, K_PROXY), _servers(file.archive, K_ARCHIVE)
    )
    everyone = servers.get_all()
    if not everyone:
        raise ConfigError("the group file names no server", hint=_SAMPLE, file=str(path))
    places: dict[str, str] = {}
    for s in everyone:
        other = places.setdefault(s.get_host_port(), s.name)
        if other != s.name:
            raise ConfigError(
                "two servers have the same address",
                hint="each daemon listens on a port of its own",
                file=str(path),
                servers=f"{other}, {s.name}",
                address=s.get_host_port(),
            )
    return GroupLayout(
        servers=servers,
        group=file.group,
        timeout_s=file.timeout_s,
        tls=_tls(file, path),
        volumes={name: _volume(name, entry, servers, path) for name, entry in file.volumes.items()},
        path=path,
        _file=file,
    )


def _servers(entries: list[_Server], kind: int) -> list[Server]:
    return [ServerConnectionParam(entry.name, entry.host, entry.port, kind) for entry in entries]


def _tls(file: _File, path: Path) -> tuple[str, str, str] | None:
    names = (file.tls_cert, file.tls_key, file.tls_ca)
    if not any(names):
        return None
    if not all(names):
        raise ConfigError("tls_cert, tls_key and tls_ca go together", file=str(path))
    cert, key, ca = (str(path.parent / name) for name in names)
    for name in (cert, key, ca):
        if not Path(name).is_file():
            raise ConfigError("a TLS file is missing", file=str(path), missing=name)
    return cert, key, ca


def _volume(name: str, entry: _Volume, servers: ServerLayout, path: Path) -> VolumeEntry:
    volume_name(name)
    for storage in (entry.target, *entry.devices):
        if not storage:
            continue
        try:
            get_server(storage, servers.storageL)
        except UsageError as exc:
            raise ConfigError(
                "a volume names a storage that is not there",
                hint=exc.hint,
                file=str(path),
                volume=name,
                storage=storage,
            ) from exc
    if not all(entry.devices.values()):
        raise ConfigError("a volume has an empty device path", file=str(path), volume=name)
    target = get_server(entry.target, servers.storageL) if entry.target else None
    return VolumeEntry(name, target, dict(entry.devices), _wanted(name, entry, servers, path))


def _wanted(name: str, entry: _Volume, servers: ServerLayout, path: Path) -> tuple[Server, ...] | None:
    if entry.archives is None:
        return None
    try:
        wanted = tuple(get_server(archive, servers.archiveL) for archive in entry.archives)
    except UsageError as exc:
        raise ConfigError(
            "a volume names an archive that is not there", hint=exc.hint, file=str(path), volume=name, **exc.facts
        ) from exc
    if len(set(wanted)) != len(wanted):
        raise ConfigError("a volume names an archive twice", file=str(path), volume=name)
    return wanted


# Writing


def _entry(s: Server) -> _Server:
    return _Server(s.name, s.address, s.port)


def _to_toml(file: _File) -> str:
    lines = [f"group = {_text(file.group)}", f"timeout_s = {file.timeout_s!r}"]
    for key in ("tls_cert", "tls_key", "tls_ca"):
        if value := getattr(file, key):
            lines.append(f"{key} = {_text(value)}")
    for kind in ("storage", "proxy", "archive"):
        for s in getattr(file, kind):
            lines += ["", f"[[{kind}]]", f"name = {_text(s.name)}", f"host = {_text(s.host)}", f"port = {s.port}"]
    for name, entry in file.volumes.items():
        lines += ["", f"[volumes.{name}]"]
        if entry.target:
            lines.append(f"target = {_text(entry.target)}")
        if entry.devices:
            pairs = ", ".join(f"{_text(s)} = {_text(device)}" for s, device in entry.devices.items())
            lines.append(f"devices = {{ {pairs} }}")
        if entry.archives is not None:
            lines.append(f"archives = [{', '.join(map(_text, entry.archives))}]")
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """Write a TOML basic string: JSON's escapes are TOML's, but for the one character that JSON leaves alone."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _hint(reason: str, values: Mapping[str, object]) -> str:
    """Guess what was meant by an unknown key."""
    unknown = reason.partition("unknown field `")[2].partition("`")[0]
    if not unknown:
        return _SAMPLE
    known = (
        _File.__struct_fields__ if unknown in values else (*_Server.__struct_fields__, *_Volume.__struct_fields__)
    )
    near = get_close_matches(unknown, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
