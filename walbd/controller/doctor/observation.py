"""What is known of a group at one moment: the material of a diagnosis. Pure data, made by observe.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from walbd.controller.layout import GroupLayout
from walbd.controller.servers import Server, ServerLayout
from walbd.errors import WalbError
from walbd.format.meta import Diff
from walbd.protocol.base import JobInfo
from walbd.protocol.control import StatusReply, VolumeStatus
from walbd.protocol.policy import PolicyView

UnsentKey = tuple[str, str, str]  # proxy, volume, archive; archive "": received, for all archives


@dataclass(frozen=True, kw_only=True)
class Intent:
    """What a person wants of a volume."""

    target: str = ""  # the storage that backs it up; "": not known
    devices: Mapping[str, str] = field(default_factory=dict)  # storage to device path
    archives: tuple[str, ...] = ()  # where it is to be kept, the primary one first
    target_said: bool = False  # the group file says so; else it is inferred
    archives_said: bool = False
    named: str = ""  # the target of the group file, where another storage has become it


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One server: what it said, or why it said nothing."""

    server: Server
    status: StatusReply | None = None
    jobs: tuple[JobInfo, ...] = ()
    error: WalbError | None = None

    def volume(self, vol: str) -> VolumeStatus | None:
        """Return its part of a volume; None where it is not known."""
        if self.status is None:
            return None
        return next((v for v in self.status.volumes if v.volume == vol and v.state != "Clear"), None)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All servers at one moment.

    The order in which they were asked is part of the meaning: first storages, then proxies, then archives. So
    what a storage says to be delivered is at a proxy or an archive; and what a proxy did not have any more when
    it was asked, an archive had when that was asked. A generation that none of them has is lost.
    """

    group: GroupLayout
    seen: Mapping[str, Seen]
    unsent: Mapping[UnsentKey, tuple[Diff, ...]] = field(default_factory=dict)
    policies: Mapping[tuple[str, str], PolicyView] = field(default_factory=dict)  # by archive and volume
    now: int = 0  # of the one who looks [unix s]
    taken_s: float = 0.0  # on the caller's clock, for rates
    same: Mapping[str, frozenset[str]] = field(default_factory=dict)  # HOST:PORT to its numeric forms
    before: Observation | None = None  # an earlier look, if two were needed

    @property
    def layout(self) -> ServerLayout:
        """The servers."""
        return self.group.servers

    def same_address(self, one: str, other: str) -> bool:
        """Tell whether two ways to write HOST:PORT mean one place."""
        return one == other or bool(self.same.get(one, frozenset()) & self.same.get(other, frozenset()))
