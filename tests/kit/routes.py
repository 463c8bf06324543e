"""A client that sends every daemon to its peers through relays, though the layout names the real addresses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from walbd.controller.client import Client
from walbd.controller.servers import Server
from walbd.errors import WalbError
from walbd.protocol.codec import Message, Request

R = TypeVar("R", bound=Message)
V = TypeVar("V")

_POLL_MAX_S: Final = 0.05  # tests have no time for the library's pauses between two looks


class RoutedClient(Client):
    """Calls in which the addresses of archives and proxies are replaced by those of links, and back."""

    def __init__(
        self,
        route: Callable[[str], Mapping[str, str]],
        watch: Callable[[Request[Any]], Callable[[], object]] = lambda _: lambda: None,
    ) -> None:
        """`route(name)`: where the daemon of that name is to connect, by address of the peer.

        `watch` is called before each single request, and what it returns when that was answered well.
        """
        super().__init__()
        self._route = route
        self._watch = watch

    def call(self, s: Server, request: Request[R], timeoutS: float = 0) -> R:
        there, back = self._ways(s)
        succeeded = self._watch(request)
        reply = translated(super().call(s, translated(request, there), timeoutS), back)
        succeeded()
        return reply

    def call_each(
        self, calls: Sequence[tuple[Server, Request[Any]]], timeoutS: float = 0
    ) -> list[Message | WalbError]:
        ways = [self._ways(s) for s, _ in calls]
        routed = [(s, translated(request, way[0])) for (s, request), way in zip(calls, ways, strict=True)]
        replies = super().call_each(routed, timeoutS)
        return [
            reply if isinstance(reply, WalbError) else translated(reply, way[1])
            for reply, way in zip(replies, ways, strict=True)
        ]

    def sleep(self, seconds: float) -> None:
        super().sleep(min(seconds, _POLL_MAX_S))

    def _ways(self, s: Server) -> tuple[Mapping[str, str], Mapping[str, str]]:
        there = self._route(s.name)
        return there, {relayed: direct for direct, relayed in there.items()}


def translated(value: V, words: Mapping[str, str]) -> V:
    """Return a message in which every text that is one of `words` is replaced."""
    return _translated(value, words)  # type: ignore[no-any-return]


def _translated(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return words.get(value, value) if type(value) is str else value
    if isinstance(value, list | tuple):
        return type(value)(_translated(item, words) for item in value)
    if isinstance(value, dict):
        return {key: _translated(item, words) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_changes(fields, words))
    if isinstance(value, msgspec.Struct):
        changes = _changes(msgspec.structs.asdict(value), words)
        return msgspec.structs.replace(value, **changes) if changes else value
    return value


def _changes(fields: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    changed = {name: _translated(item, words) for name, item in fields.items()}
    return {name: item for name, item in changed.items() if item is not fields[name]}
