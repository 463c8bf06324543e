"""What the doctor does: calls of Controller methods, as data that can be shown, compared and carried out.

Each step can be written as the Python line and as the `walbc` line that do the same by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Consent(StrEnum):
    """What a person must have agreed to before a step is taken. The later, the more."""

    NONE = "none"  # changes nothing that matters, or only for the better
    YES = "yes"  # reads whole volumes, or drops what is superseded: `--yes`
    LOSE = "lose"  # destroys what may be the only good copy: `--yes-lose VOL`


_RANK: Final = {consent: rank for rank, consent in enumerate(Consent)}


def greatest(consents: list[Consent]) -> Consent:
    """Return the consent that covers all."""
    return max(consents, key=_RANK.__getitem__, default=Consent.NONE)


@dataclass(frozen=True, slots=True)
class Ref:
    """A server, by its name."""

    name: str


Arg = Ref | str | int | bool | tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One call: `walbc.METHOD(*args)`."""

    method: str
    args: tuple[Arg, ...]
    consent: Consent = Consent.NONE
    is_backup: bool = False  # ends with a new point in time that must turn out to be restorable

    @property
    def python(self) -> str:
        """The line for `walbc shell`."""
        return f"walbc.{self.method}({', '.join(map(_python, self.args))})"

    @property
    def command(self) -> str:
        """The line for a shell."""
        return _COMMANDS[self.method](self.args)

    @property
    def volume(self) -> str:
        """The volume that it is about, or nothing."""
        words = [arg for arg in self.args if isinstance(arg, str)]
        return words[0] if words and self.method not in _NO_VOLUME else ""


def _python(arg: Arg) -> str:
    if isinstance(arg, tuple):
        return f"[{', '.join(ref.name for ref in arg)}]"
    return arg.name if isinstance(arg, Ref) else repr(arg)


_NO_VOLUME: Final = frozenset({"promote_archive", "kick_all", "kick_storage_all", "retarget"})
Args = tuple[Arg, ...]


def _names(arg: Arg) -> str:
    if isinstance(arg, tuple):
        return " ".join(ref.name for ref in arg)
    return arg.name if isinstance(arg, Ref) else str(arg)


def _words(*words: object) -> str:
    return " ".join(str(word) for word in words if word != "")


def _server_vol(name: str) -> Callable[[Args], str]:
    return lambda a: _words("walbc", name, *map(_names, a))


def _at_storage(name: str, *more: str) -> Callable[[Args], str]:
    return lambda a: _words("walbc", name, a[1], *map(_names, a[2:]), "--storage", _names(a[0]), *more)


def _resize(a: Args) -> str:
    return f"walbc resize {a[1]} {a[2]}m --at {_names(a[0])}{' --zero' if a[3] else ''}"


def _replicate(a: Args) -> str:
    synchronizing = len(a) > 3 and a[3] is True
    resync = len(a) > 5 and a[5] is True
    return _words(
        "walbc replicate",
        a[1],
        _names(a[2]),
        "--from",
        _names(a[0]),
        "--sync" if synchronizing else "",
        "--resync" if resync else "",
    )


_COMMANDS: Final[Mapping[str, Callable[[Args], str]]] = {
    "start": _server_vol("start"),
    "stop": _server_vol("stop"),
    "reset": lambda a: f"walbc reset {_names(a[0])} {a[1]} --yes",
    "clear": lambda a: f"walbc clear {_names(a[0])} {a[1]} --yes",
    "init_storage": _at_storage("init-storage"),
    "go_standby": _at_storage("go-standby", "--yes"),
    "hash_backup": _at_storage("hash-backup"),
    "full_backup": _at_storage("full-backup"),
    "start_synchronizing": _server_vol("start-synchronizing"),
    "stop_synchronizing": _server_vol("stop-synchronizing"),
    "add_archive_to_proxy": lambda a: f"walbc archive-info add {_names(a[0])} {a[1]} {_names(a[2])}",
    "del_archive_from_proxy": lambda a: f"walbc archive-info delete {_names(a[0])} {a[1]} {_names(a[2])}",
    "copy_archive_info": lambda a: f"walbc archive-info copy {_names(a[0])} {a[1]} {_names(a[2])}",
    "kick_all": _server_vol("kick-all"),
    "kick_storage_all": lambda _a: "walbc kick-all",
    "kick_proxy": lambda a: f"walbc kick-proxy {a[0]} --archive {_names(a[1])}",
    "resize_archive": _resize,
    "apply": lambda a: f"walbc apply {a[1]} {a[2]} --archive {_names(a[0])}",
    "synchronize": lambda a: f"walbc synchronize {a[1]} {_names(a[2])} --from {_names(a[0])}",
    "replicate": _replicate,
    "retarget": lambda a: _words(
        "walbc retarget", _names(a[0]), *(["--archive", _names(a[1])] if len(a) > 1 else [])
    ),
    "promote_archive": lambda a: f"(put {_names(a[0])} first among the [[archive]] of the group file)",
}
METHODS: Final = frozenset(_COMMANDS)
