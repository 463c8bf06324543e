"""Replacing a host by another one, volume by volume, without losing anything. Source: docs/recovery.md.

A replacement is a list of moves. Each knows whether it is done already, so that one that was interrupted goes on
where it stopped when it is begun again. Nothing is done before everybody who is needed has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from walbd.controller import constants as k
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.controller import Controller
from walbd.controller.doctor import observe
from walbd.controller.doctor.case import Case, infer_intent
from walbd.controller.doctor.diagnose import volumes
from walbd.controller.doctor.observation import Observation
from walbd.controller.layout import GroupLayout
from walbd.controller.servers import Server, ServerLayout, server_kind_to_str
from walbd.errors import BadState, ConnectError, Refused, TimedOut, UsageError, WalbError
from walbd.protocol.control import GetStatus, StatusReply, VolumeStatus

VERIFY_S: Final = 600.0  # until a fresh snapshot can be restored
_GONE_S: Final = 60.0  # until a daemon that was told to end does not answer any more


class Move(NamedTuple):
    """One step of a replacement."""

    text: str  # the line that does it by hand
    done: Callable[[], bool]
    run: Callable[[], object]
    note: str = ""  # what a person should know before


@dataclass(frozen=True)
class Planned:
    """A move, as it is shown."""

    text: str
    is_done: bool
    note: str


class Replacement:
    """Replaces `old` by `new`, a server of the same kind.

    `gone`: `old` is lost for good and will never come back; otherwise it must answer. Raises UsageError,
    ConnectError or BadState when the replacement cannot be begun.
    """

    kind: int = -1

    def __init__(
        self, ctl: Controller, group: GroupLayout, old: Server, new: Server, *, gone: bool = False
    ) -> None:
        if old.kind != self.kind or new.kind != self.kind:
            raise UsageError(
                "both must be of the same kind", hint=f"name two servers of kind {server_kind_to_str(self.kind)}"
            )
        if old.name == new.name or old.get_host_port() == new.get_host_port():
            raise UsageError("a server cannot replace itself", server=old.name)
        self.ctl = ctl
        self.before = group
        self.old = old
        self.new = new
        self.gone = gone
        self.after = group.with_servers(self._layout_after(), {old.name: new.name})
        working = group.servers if any(s == new for s in group.servers.get_all()) else self._layout_with_both()
        self.working = group.with_servers(working)
        self.o = self._look()
        self.cases = {vol: Case(self.o, vol, infer_intent(self.o, vol)) for vol in volumes(self.o, "")}
        self._verify_alive()
        self._verify_primary()
        self.moves = self._moves()

    def plan(self) -> list[Planned]:
        """Return all moves, in order."""
        return [Planned(move.text, move.done(), move.note) for move in self.moves]

    def run(self, tell: Callable[[str], None] = lambda _text: None) -> None:
        """Make every move that is not made yet. Raises what went wrong; then it can be run again."""
        self.ctl.set_server_layout(self._layout_for_moves())
        for i, move in enumerate(self.moves, 1):
            where = f"{i}/{len(self.moves)} {move.text}"
            if move.done():
                tell(f"{where}: done already")
                continue
            tell(where)
            move.run()
            if not move.done():
                raise Refused("a step has ended without its effect", hint="run it again", step=move.text)
        self.ctl.set_server_layout(self.after.servers)

    def check(self, tell: Callable[[str], None] = lambda _text: None) -> list[str]:
        """Return why the replacement is not complete; nothing when it is. Takes a snapshot of each volume."""
        self.ctl.set_server_layout(self.after.servers)
        o = observe(self.ctl, self.after)
        problems = [f"{name} does not answer" for name, seen in o.seen.items() if seen.status is None]
        for vol, was in self.cases.items():
            case = Case(o, vol, infer_intent(o, vol))
            problems += self._problems(case, was, tell)
        return problems

    # What each kind does in its own way

    def _moves(self) -> list[Move]:
        raise AssertionError("an abstract replacement")

    def _layout_for_moves(self) -> ServerLayout:
        return self.working.servers

    # Inner parts

    def _layout_after(self) -> ServerLayout:
        """The new server takes the place of the old one."""

        def swapped(sL: Sequence[Server]) -> list[Server]:
            return [self.new if s.name == self.old.name else s for s in sL if s.name != self.new.name]

        layout = self.before.servers
        return ServerLayout(swapped(layout.storageL), swapped(layout.proxyL), swapped(layout.archiveL))

    def _layout_with_both(self) -> ServerLayout:
        layout = self.before.servers
        more: list[list[Server]] = [[self.new] if self.kind == kind else [] for kind in k.serverKinds]
        return ServerLayout([*layout.storageL, *more[0]], [*layout.proxyL, *more[1]], [*layout.archiveL, *more[2]])

    def _look(self) -> Observation:
        return observe(self.ctl, self.working)

    def _verify_alive(self) -> None:
        away = [name for name, seen in self.o.seen.items() if seen.status is None]
        if self.gone and self.old.name in away:
            away.remove(self.old.name)
        elif self.gone:
            raise BadState(
                "the server that is said to be gone answers", hint="leave out --gone", server=self.old.name
            )
        if away:
            hint = "start them, or take them out of the group file"
            if away == [self.old.name]:
                hint = f"start it; if it is lost for good, say --gone (walbc doctor --lost, for data of {away[0]})"
            raise ConnectError("servers that are needed do not answer", hint=hint, servers=", ".join(away))

    def _verify_primary(self) -> None:
        """The storages and the group file must agree, or the storages would be told of an archive that they have
        left.
        """
        known = [self.before.servers.get_primary_archive(), self.after.servers.get_primary_archive()]
        for sx in self.working.servers.storageL:
            status = self.o.seen[sx.name].status
            used = str(status.server.get("archive", "")) if status is not None else ""
            if used and not any(self.o.same_address(used, ax.get_host_port()) for ax in known):
                raise BadState(
                    "a storage uses another primary archive than the group file names",
                    hint="see wrong-primary in `walbc doctor`",
                    storage=sx.name,
                    archive=used,
                    group_file=known[0].name,
                )

    def _is_fed_whole(self, archive: str, vol: str, goal: int = 0) -> bool:
        """Tell whether all proxies send to an archive, and nothing is missing on the way to it.

        Whoever was cut off may have left it fed, and behind: then what it lacks would never come. `goal`: what it
        must have at least where no storage can tell.
        """
        if len(self._feeders(archive, vol)) != len(self.ctl.sLayout.proxyL):
            return False
        o = observe(self.ctl, self.working, vol)
        case = Case(o, vol, infer_intent(o, vol))
        return case.is_good_copy(archive) and (case.chain(archive).is_whole or case.chain(archive).head >= goal)

    def _state(self, s: Server, vol: str) -> str:
        return self.ctl.get_state(s, vol)

    def _status(self, s: Server, vol: str) -> VolumeStatus:
        (row,) = self.ctl.ask(s, GetStatus(volume=vol)).volumes
        return row

    def _feeders(self, archive: str, vol: str) -> list[str]:
        return [px.name for px in self.ctl.sLayout.proxyL if archive in self.ctl.get_archive_info_list(px, vol)]

    def _shutdown(self) -> list[Move]:
        if self.gone:
            return []

        def is_away() -> bool:
            try:
                self.ctl.get_host_type(self.old)
            except (ConnectError, TimedOut):
                return True
            return False

        def end() -> None:
            self.ctl.shutdown(self.old)
            self.ctl.wait_until(f"{self.old.name} to end", lambda: True if is_away() else None, _GONE_S)

        note = "disable its unit, too: a daemon of the old name must not come back"
        return [Move(f"walbc shutdown {self.old.name}", is_away, end, note)]

    def _problems(self, case: Case, was: Case, tell: Callable[[str], None]) -> list[str]:
        vol, found = case.vol, []
        targets = [name for name, v in case.storages.items() if v.state == k.sTarget]
        if was.storages and any(was.holds(a) for a in was.archives) and len(targets) != 1:
            found.append(f"{vol}: there should be one target, there is {', '.join(targets) or 'none'}")
        wanted = self._wanted(case, was)
        for px in case.alive(K_PROXY):
            feeds = sorted(hop.dest for hop in case.proxies[px].hops) if px in case.proxies else []
            if targets and feeds != sorted(wanted):
                found.append(f"{vol}: {px} sends to {', '.join(feeds) or 'nobody'}, wanted: {', '.join(wanted)}")
        for a in wanted:
            chain = case.chain(a) if case.holds(a) and case.has_history else None
            if chain is not None and chain.missing:
                found.append(f"{vol}: {a} cannot go on: {chain.text}")
        if targets and wanted and not found:
            try:
                storage = case.o.seen[targets[0]].server
                archives = [case.o.seen[a].server for a in wanted]
                gid = self.ctl.snapshot(storage, vol, archives, VERIFY_S)
                tell(f"{vol}: snapshot {gid} can be restored at {', '.join(wanted)}")
            except WalbError as exc:
                found.append(f"{vol}: a fresh snapshot does not become restorable: {exc}")
        return found

    def _wanted(self, case: Case, was: Case) -> list[str]:
        """Archives that should be fed afterwards: those that were, under their new names."""
        entry = self.after.volumes.get(case.vol)
        if entry is not None and entry.archives is not None:
            return [a.name for a in entry.archives]
        fed = {hop.dest for v in was.proxies.values() for hop in v.hops}
        fed |= {hop.dest for v in case.proxies.values() for hop in v.hops}
        fed = {self.new.name if name == self.old.name else name for name in fed}
        return [a.name for a in self.after.servers.archiveL if a.name in fed]


class StorageReplacement(Replacement):
    """A storage. `devices`: where the new one has each volume, beside what the group file says of it."""

    kind = K_STORAGE

    def __init__(self, *args: Any, devices: dict[str, str] | None = None, **kwargs: Any) -> None:
        self.devices = devices or {}
        super().__init__(*args, **kwargs)

    def _layout_for_moves(self) -> ServerLayout:
        """One that is gone must not be asked; one that is not must be seen to stand by."""
        return self.after.servers if self.gone else self.working.servers

    def _moves(self) -> list[Move]:
        mine = [vol for vol, case in self.cases.items() if self._is_mine(case)]
        moves: list[Move] = []
        for vol in mine:
            moves += self._one(vol, self.cases[vol])
        return [*moves, *self._shutdown()]

    def _is_mine(self, case: Case) -> bool:
        entry = self.before.volumes.get(case.vol)
        named = entry is not None and (self.old.name in entry.devices or entry.target == self.old)
        if self.gone:
            others = [name for name in case.storages if name != self.new.name]
            return named or not others
        return self.old.name in case.storages or (named and self.new.name not in case.storages)

    def _one(self, vol: str, case: Case) -> list[Move]:
        ctl, old, new = self.ctl, self.old, self.new
        moves = []
        entry = self.working.volumes.get(vol)
        path = self.devices.get(vol) or (entry.devices.get(new.name, "") if entry is not None else "")
        at_new = case.storages.get(new.name)
        if at_new is not None:
            path = path or at_new.device
        if not path:
            raise UsageError(
                "the device of the new storage is not known",
                hint=f"say --device {vol}=PATH, or name it in the group file",
                volume=vol,
                storage=new.name,
            )
        moves.append(
            Move(
                f"walbc init-storage {vol} {path} --storage {new.name}",
                lambda: self._state(new, vol) != k.sClear,
                lambda: ctl.init_storage(new, vol, path),
                "its device must hold a copy of the volume, and get all writes from now on",
            )
        )
        if not self.gone:
            moves.append(
                Move(
                    f"walbc go-standby {vol} --storage {old.name} --yes",
                    lambda: self._state(old, vol) in (k.sStandby, k.sClear),
                    lambda: self._go_standby(vol),
                    "from here to the end of the backup nothing is backed up",
                )
            )
        elsewhere = [
            name for name, v in case.storages.items() if v.state == k.sTarget and name not in (old.name, new.name)
        ]
        if not elsewhere and case.holds(case.primary):
            wanted = [a for a in case.intent.archives if a != case.primary and case.holds(a)]
            moves.append(
                Move(
                    f"walbc hash-backup {vol} --storage {new.name}",
                    lambda: self._state(new, vol) == k.sTarget,
                    lambda: self._backup(vol),
                    "reads the whole volume at both sides",
                )
            )
            moves += [self._refeed(vol, case, name) for name in wanted]
        if not self.gone:
            moves.append(
                Move(
                    f"walbc clear {old.name} {vol} --yes",
                    lambda: self._state(old, vol) == k.sClear,
                    lambda: ctl.clear(old, vol),
                )
            )
        return moves

    def _go_standby(self, vol: str) -> None:
        if self._state(self.old, vol) == k.sStopped:
            self.ctl.reset(self.old, vol)
        self.ctl.go_standby(self.old, vol)

    def _backup(self, vol: str) -> None:
        if self._state(self.new, vol) == k.sTarget:
            self.ctl.stop(self.new, vol)
        self.ctl.hash_backup(self.new, vol)

    def _refeed(self, vol: str, case: Case, name: str) -> Move:
        """After a backup only the primary archive is fed."""
        source, dest = case.o.seen[case.primary].server, case.o.seen[name].server
        return Move(
            f"walbc replicate {vol} {name} --from {source.name} --sync",
            lambda: self._is_fed_whole(name, vol),
            lambda: self.ctl.replicate(source, vol, dest, True),
        )


class ProxyReplacement(Replacement):
    """A proxy: the new one takes over, the old one delivers what it holds."""

    kind = K_PROXY

    def _moves(self) -> list[Move]:
        moves = []
        mine = [vol for vol, case in self.cases.items() if self.gone or self.old.name in case.proxies]
        for vol in mine:
            moves += self._take_over(vol, self.cases[vol])
        moves += [self._retarget(sx) for sx in self.after.servers.storageL]
        if not self.gone:
            moves += [move for vol in mine for move in self._empty(vol)]
        return [*moves, *self._shutdown()]

    def _take_over(self, vol: str, case: Case) -> list[Move]:
        ctl, new = self.ctl, self.new
        sources = [self.old.name] if not self.gone else [px for px in case.proxies if px != new.name]
        if sources:
            source = case.o.seen[sources[0]].server
            wanted = [hop.dest for hop in case.proxies[sources[0]].hops]
            text = f"walbc archive-info copy {source.name} {vol} {new.name}"

            def copy() -> None:
                ctl.copy_archive_info(source, vol, new)

        else:
            wanted = list(case.intent.archives)
            if not wanted or not case.storages:
                return []
            text = "; ".join(f"walbc archive-info add {new.name} {vol} {name}" for name in wanted)

            def copy() -> None:
                for name in wanted:
                    ctl.add_archive_to_proxy(new, vol, case.o.seen[name].server)

        def is_done() -> bool:
            return self._state(new, vol) in k.pActive and set(wanted) <= set(ctl.get_archive_info_list(new, vol))

        note = (
            f"what {self.old.name} held is lost: walbc doctor tells whether anything is missing"
            if self.gone
            else ""
        )
        return [Move(text, is_done, copy, note)]

    def _retarget(self, sx: Server) -> Move:
        proxies = self.after.servers.proxyL
        primary = self.after.servers.get_primary_archive()

        def is_done() -> bool:
            used = [proxy.address for proxy in _status(self.ctl, sx).proxies]
            return len(used) == len(proxies) and all(
                self.o.same_address(a, px.get_host_port()) for a, px in zip(used, proxies, strict=True)
            )

        names = " ".join(f"--proxy {px.name}" for px in proxies)
        return Move(f"walbc retarget {sx.name} {names}", is_done, lambda: self.ctl.retarget(sx, primary, proxies))

    def _empty(self, vol: str) -> list[Move]:
        ctl, old = self.ctl, self.old

        def is_empty() -> bool:
            status = self._status(old, vol)
            return status.state == k.pClear or (status.state == k.pStopped and not status.diffs)

        def empty() -> None:
            if self._state(old, vol) == k.pStopped:
                ctl.start(old, vol)
            ctl.stop(old, vol, "empty")

        return [
            Move(f"walbc stop {old.name} {vol} empty", is_empty, empty, "waits until every archive has all of it"),
            Move(
                f"walbc clear {old.name} {vol} --yes",
                lambda: self._state(old, vol) == k.pClear,
                lambda: ctl.clear(old, vol),
            ),
        ]


class ArchiveReplacement(Replacement):
    """An archive, primary or not. `clear`: remove the data of the old one, which keeps older restore points."""

    kind = K_ARCHIVE

    def __init__(self, *args: Any, clear: bool = False, **kwargs: Any) -> None:
        self.clear = clear
        super().__init__(*args, **kwargs)

    @property
    def is_primary(self) -> bool:
        """The old one is, or was, the primary."""
        return self.after.servers.get_primary_archive() == self.new

    def _moves(self) -> list[Move]:
        mine = {vol: case for vol, case in self.cases.items() if self._is_mine(case)}
        moves, copies = [], dict[str, Move]()
        for vol, case in mine.items():
            if self.gone:
                moves.append(self._stop_feeding(vol))
            if not (self.gone and case.is_good_copy(self.new.name)):  # a replica that has everything takes over
                copies[vol] = self._copy(vol, case)
                moves.append(copies[vol])
        if self.is_primary:
            moves += [self._retarget(sx) for sx in self.after.servers.storageL]
        if not self.gone:
            moves += [self._stop_feeding(vol) for vol in mine]
        if self.clear and not self.gone:
            moves += [
                Move(
                    f"walbc clear {self.old.name} {vol} --yes",
                    lambda vol=vol: self._state(self.old, vol) == k.aClear,  # type: ignore[misc]
                    lambda vol=vol: self._clear(vol, copies[vol]),  # type: ignore[misc]
                    "its restore points that the new one does not have are gone",
                )
                for vol in mine
            ]
        return [*moves, *self._shutdown()]

    def _clear(self, vol: str, copy: Move) -> None:
        """Remove the data of the old one, unless the new one has turned out to lack something."""
        if not copy.done():
            raise BadState(
                "the new archive does not have everything; nothing is removed",
                hint=f"walbc doctor {vol}; then run it again",
                archive=self.new.name,
                volume=vol,
            )
        self.ctl.clear(self.old, vol)

    def _is_mine(self, case: Case) -> bool:
        if case.holds(self.old.name) or case.feeders(self.old.name):
            return True
        return self.gone and self.is_primary and case.has_history

    def _copy(self, vol: str, case: Case) -> Move:
        source, dest = self._source(vol, case), self.new
        wanted = self._is_wanted(case)
        text = f"walbc replicate {vol} {dest.name} --from {source.name}" + (" --sync" if wanted else "")
        at_old = case.archives.get(self.old.name)
        goal = at_old.latest_gid if at_old is not None else 0

        def is_done() -> bool:
            if self._state(dest, vol) not in k.aActive:
                return False
            if wanted:
                return self._is_fed_whole(dest.name, vol, goal)
            return self._status(dest, vol).latest_gid >= goal

        return Move(
            text,
            is_done,
            lambda: self.ctl.replicate(source, vol, dest, wanted),
            "reads and copies the whole volume",
        )

    def _is_wanted(self, case: Case) -> bool:
        """Whether the new one is to be fed: as the old one is, or as a run before this one has made it."""
        return bool(self.is_primary or case.feeders(self.old.name) or case.feeders(self.new.name))

    def _source(self, vol: str, case: Case) -> Server:
        """Whence the copy comes: the primary if that is another one, else the old one, else a good copy."""
        primary = case.o.seen[case.primary].server
        if primary.name not in (self.old.name, self.new.name) and case.holds(primary.name):
            return primary
        if not self.gone and case.holds(self.old.name):
            return self.old
        for a in self.before.servers.archiveL:
            if a.name not in (self.old.name, self.new.name) and case.is_good_copy(a.name):
                return a
        raise BadState(
            "no archive has a complete copy to replicate from",
            hint=f"walbc doctor --lost {self.old.name} shows what can be done",
            volume=vol,
        )

    def _stop_feeding(self, vol: str) -> Move:
        return Move(
            f"walbc stop-synchronizing {self.old.name} {vol}",
            lambda: not self._feeders(self.old.name, vol),
            lambda: self.ctl.stop_synchronizing(self.old, vol),
        )

    def _retarget(self, sx: Server) -> Move:
        proxies = self.after.servers.proxyL

        def is_done() -> bool:
            used = str(_status(self.ctl, sx).server.get("archive", ""))
            return self.o.same_address(used, self.new.get_host_port())

        return Move(
            f"walbc retarget {sx.name} --archive {self.new.name}",
            is_done,
            lambda: self.ctl.retarget(sx, self.new, proxies),
        )


def _status(ctl: Controller, s: Server) -> StatusReply:
    return ctl.ask(s, GetStatus())
