"""Since when log waits to be delivered. Source: docs/storage.md, "Lag"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from walbd.format.meta import LogPoint
from walbd.protocol.device import LsidSample

MARKS_MAX: Final = 512


@dataclass(slots=True)
class Backlog:
    """When log was first seen: pairs (lsid, time), both rising; all log below the lsid was there at that time.

    With many marks two are joined to (later lsid, earlier time), so log never seems younger than it is.
    """

    _uuid: bytes = b""
    _marks: list[tuple[int, int]] = field(default_factory=list)

    def restore(self, uuid: bytes, queue: Iterable[LogPoint]) -> None:
        """Begin with what an earlier life of the daemon knew: the snapshots that wait."""
        self._uuid, self._marks = uuid, [(point.lsid, point.timestamp) for point in queue]

    def see(self, sample: LsidSample, now: int) -> None:
        """Note how far the log reaches now [unix s]."""
        if sample.uuid != self._uuid:
            self._uuid, self._marks = sample.uuid, []
        if self._marks and sample.latest <= self._marks[-1][0]:
            return
        if self._marks and self._marks[-1][1] >= now:
            self._marks[-1] = (sample.latest, self._marks[-1][1])
            return
        self._marks.append((sample.latest, now))
        if len(self._marks) > MARKS_MAX:
            last = self._marks.pop()
            pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
            self._marks = [(later, time) for (_, time), (later, _) in pairs] + [last]

    def since(self, done_lsid: int) -> int:
        """Return when the oldest log at or above `done_lsid` was first seen [unix s]; 0: there is none."""
        while self._marks and self._marks[0][0] <= done_lsid:
            del self._marks[0]
        return self._marks[0][1] if self._marks else 0
