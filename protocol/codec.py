"""Messages to bytes and back: the one place that knows msgpack.

A header is the msgpack array [tag, fields]. `walbd.format.schema` checks names and types of the
fields, and the bounds written in the annotations. Unknown tags and unknown fields are refused: both sides
agree on a protocol version first (docs/protocol.md, "Versions").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar, cast, dataclass_transform, get_args, get_origin

import msgpack
import msgspec

from walbd.errors import LocalProtocolError, RemoteProtocolError
from walbd.format.schema import convert

R = TypeVar("R", bound="Message")
M = TypeVar("M", bound="type[Message]")

MESSAGES: dict[str, type[Message]] = {}


class Message:
    """Base of all messages: frozen dataclasses with a tag, declared with `@message(tag)`."""

    __slots__ = ()
    TAG: ClassVar[str]


class Request(Message, Generic[R]):
    """A message that opens a conversation; `R` is what the peer answers (first)."""

    __slots__ = ()
    REPLY: ClassVar[type[Message]]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def message(tag: str) -> Callable[[M], M]:
    """Make a class a message: a frozen dataclass with slots and keyword fields, known to `decode` as `tag`."""

    def declare(cls: M) -> M:
        made = cast(M, dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls))
        made.TAG = tag
        for base in getattr(cls, "__orig_bases__", ()):
            if get_origin(base) is Request:
                made.REPLY = get_args(base)[0]  # type: ignore[attr-defined]
        if tag in MESSAGES:
            raise LocalProtocolError("two messages have the same tag", tag=tag)
        MESSAGES[tag] = made
        return made

    return declare


def encode(message: Message) -> bytes:
    """Return the header bytes of a message."""
    header: bytes = msgpack.packb([message.TAG, to_plain(message)], use_bin_type=True)
    return header


def decode(header: bytes) -> Message:
    """Read a header; malformed input of any kind becomes RemoteProtocolError and nothing else."""
    try:
        tag, fields = msgpack.unpackb(header, raw=False, strict_map_key=True, use_list=True)
        cls = MESSAGES[tag]
        _check_names(cls, fields)
        return convert(fields, cls, builtin_types=(bytes,))
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as exc:
        raise RemoteProtocolError("malformed message", size_b=len(header), reason=str(exc)[:200]) from exc


def to_plain(value: object) -> Any:
    """Turn a message (or any dataclass) into dicts, lists, strings, integers and bytes, as on the wire."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


def to_json_ready(value: object) -> Any:
    """Turn a message into what `--json` prints: bytes become hexadecimal text."""
    plain = to_plain(value)
    return _hex_bytes(plain)


def _hex_bytes(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _hex_bytes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hex_bytes(item) for item in value]
    return value


def _check_names(cls: type[Message], fields: Any) -> None:
    """Refuse unknown fields at the top level; msgspec checks that the known ones are there and right."""
    if not isinstance(fields, dict):
        raise TypeError("fields are not a map")
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = fields.keys() - names
    if unknown:
        raise ValueError(f"unknown fields of {cls.TAG}: {sorted(unknown)}")
