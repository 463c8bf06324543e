"""One volume over all servers, as far as it can be seen: what is wanted, what there is, and what is proved.

Pure. The proof that nothing is missing: the archive's newest generation, then the diffs that proxies still hold,
reach without a hole the generation up to which the storage has delivered (docs/recovery.md, "Proof").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from walbd.controller import constants as k
from walbd.controller.doctor.observation import Intent, Observation
from walbd.controller.doctor.steps import Consent, Ref, Step
from walbd.controller.servers import Server
from walbd.format.meta import Diff
from walbd.protocol.control import HopStatus, VolumeStatus
from walbd.protocol.policy import ReplicationView

STEADY: Final[Mapping[int, frozenset[str]]] = {
    k.K_STORAGE: frozenset({k.sClear, k.sSyncReady, k.sStopped, k.sTarget, k.sStandby, k.BROKEN}),
    k.K_PROXY: frozenset({k.pClear, k.pStopped, k.pStarted, k.ptWlogRecv, k.BROKEN}),
    k.K_ARCHIVE: frozenset({k.aClear, k.aSyncReady, k.aArchived, k.aStopped, k.atWdiffRecv, k.BROKEN}),
}
HOLDING: Final = frozenset({k.aArchived, k.aStopped, k.atWdiffRecv})
HISTORY: Final = frozenset({k.sTarget, k.sStopped})
NIL_UUID: Final = "0" * 32


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What is known of the way to one archive."""

    head: int  # the archive's newest generation
    done: int | None  # what the storage has delivered; None: not known, or of another log
    missing: tuple[tuple[int, int], ...]  # generations that nobody who was asked has
    waiting: int  # diffs that wait at proxies
    not_asked: tuple[str, ...]  # proxies that may hold something and could not be asked

    @property
    def is_whole(self) -> bool:
        """Nothing is missing, and that is proved."""
        return not self.missing and self.done is not None

    @property
    def evidence(self) -> dict[str, str | int]:
        """The numbers."""
        found: dict[str, str | int] = {"archive_gid": self.head, "waiting_diffs": self.waiting}
        if self.done is not None:
            found["delivered_gid"] = self.done
        if self.missing:
            found["missing"] = ", ".join(f"{b}..{e}" for b, e in self.missing)
        if self.not_asked:
            found["not_asked"] = ", ".join(self.not_asked)
        return found

    @property
    def text(self) -> str:
        """The proof, or what stands against it, in words."""
        done = f"{self.done}" if self.done is not None else "not known"
        have = f"the archive has generation {self.head}, delivered is {done}"
        if self.waiting:
            have += f", {self.waiting} diffs wait at proxies"
        if self.missing:
            return f"{have}; nobody has {', '.join(f'{b} to {e}' for b, e in self.missing)}"
        return f"{have}; nothing is missing" if self.is_whole else have


def find_missing(head: int, done: int | None, diffs: Iterable[Diff]) -> tuple[tuple[int, int], ...]:
    """Return the generations between `head` and `done` (and between diffs) that no diff leads over."""
    missing = []
    at = head
    for begin, end in sorted((diff.begin.gid_b, diff.end.gid_b) for diff in diffs):
        if begin > at:
            missing.append((int(at), int(begin)))
        at = max(at, end)
    if done is not None and done > at:
        missing.append((int(at), done))
    return tuple(missing)


@dataclass
class Case:
    """A volume."""

    o: Observation
    vol: str
    intent: Intent
    lost: frozenset[str] = frozenset()  # archives that are given up
    known: dict[int, dict[str, VolumeStatus]] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {kind: {} for kind in k.serverKinds}
        for name, seen in self.o.seen.items():
            v = seen.volume(self.vol)
            if v is not None:
                self.known[seen.server.kind][name] = v

    # Servers

    def servers(self, kind: int) -> list[Server]:
        layout = self.o.layout
        return {k.K_STORAGE: layout.storageL, k.K_PROXY: layout.proxyL, k.K_ARCHIVE: layout.archiveL}[kind]

    def alive(self, kind: int) -> list[str]:
        return [s.name for s in self.servers(kind) if self.o.seen[s.name].status is not None]

    def dead(self, *kinds: int) -> list[str]:
        return [s.name for kind in kinds for s in self.servers(kind) if self.o.seen[s.name].status is None]

    @property
    def storages(self) -> dict[str, VolumeStatus]:
        return self.known[k.K_STORAGE]

    @property
    def proxies(self) -> dict[str, VolumeStatus]:
        return self.known[k.K_PROXY]

    @property
    def archives(self) -> dict[str, VolumeStatus]:
        return self.known[k.K_ARCHIVE]

    @property
    def primary(self) -> str:
        return self.o.layout.archiveL[0].name if self.o.layout.archiveL else ""

    @property
    def target(self) -> VolumeStatus | None:
        """The volume at the storage that is to back it up."""
        return self.storages.get(self.intent.target)

    def state_of(self, storage: str) -> str:
        """Return the state at a storage; nothing when it does not answer."""
        if self.o.seen[storage].status is None:
            return ""
        return self.storages[storage].state if storage in self.storages else k.sClear

    @property
    def has_history(self) -> bool:
        """The target continues a history: a backup was made."""
        return self.target is not None and self.target.state in HISTORY

    @property
    def at_work(self) -> list[tuple[str, str]]:
        """Servers where something other than a transfer is under way, with the passing state."""
        return [
            (name, v.state)
            for kind, parts in self.known.items()
            for name, v in parts.items()
            if v.state not in STEADY[kind]
        ]

    @property
    def replicating(self) -> bool:
        return any(v.actions.get(k.aaReplSync) for v in self.archives.values())

    def stopped_targets(self) -> list[str]:
        """Storages where the volume is Stopped, and whose log is the one that the primary archive continues."""
        first = self.archives.get(self.primary)
        return [
            s
            for s, v in self.storages.items()
            if v.state == k.sStopped and first is not None and self.holds(self.primary) and v.uuid == first.uuid
        ]

    # Proxies and archives

    def hop(self, proxy: str, archive: str) -> HopStatus | None:
        v = self.proxies.get(proxy)
        return next((hop for hop in v.hops if hop.dest == archive), None) if v is not None else None

    def feeders(self, archive: str) -> list[str]:
        """Proxies that send to an archive."""
        return [px for px in self.alive(k.K_PROXY) if self.hop(px, archive) is not None]

    def holds(self, archive: str) -> bool:
        """The archive has data that can be restored, or continued."""
        v = self.archives.get(archive)
        return v is not None and archive not in self.lost and v.state in HOLDING

    def is_empty(self, archive: str) -> bool:
        """The archive answers (or is given up) and has nothing of the volume."""
        if archive in self.lost:
            return True
        if self.o.seen[archive].status is None:
            return False
        v = self.archives.get(archive)
        return v is None or v.state in (k.aClear, k.aSyncReady)

    def not_asked(self) -> tuple[str, ...]:
        """Proxies that may hold diffs of the volume and could not be asked."""
        names = self.dead(k.K_PROXY)
        known = [s.get_host_port() for s in self.o.layout.proxyL]
        for s in self.alive(k.K_STORAGE):
            status = self.o.seen[s].status
            assert status is not None
            for proxy in status.proxies:
                if not any(self.o.same_address(proxy.address, address) for address in known):
                    names.append(proxy.address)
        for px, v in self.proxies.items():
            lists = [(px, self.vol, archive) for archive in ("", *(hop.dest for hop in v.hops))]
            if v.state == k.BROKEN or (v.diffs and any(key not in self.o.unsent for key in lists)):
                names.append(px)
        return tuple(dict.fromkeys(names))

    def chain(self, archive: str) -> Chain:
        """Follow the generations to an archive that holds the volume."""
        at_archive, target = self.archives[archive], self.target
        diffs: list[Diff] = []
        for px in self.feeders(archive):
            diffs += self.o.unsent.get((px, self.vol, archive), ())
            diffs += self.o.unsent.get((px, self.vol, ""), ())
        done = None
        if target is not None and target.state in HISTORY and target.uuid == at_archive.uuid:
            done = target.done_gid
        head = at_archive.latest_gid
        ahead = [diff for diff in diffs if diff.end.gid_b > head]
        return Chain(
            head=head,
            done=done,
            missing=find_missing(head, done, ahead),
            waiting=len(ahead),
            not_asked=self.not_asked(),
        )

    def damaged(self, proxy: str, archive: str) -> list[tuple[int, int]]:
        """Return the generations in diffs that were damaged at a proxy, where the archive does not have them."""
        hop = self.hop(proxy, archive)
        head = self.archives[archive].latest_gid if self.holds(archive) else 0
        return [(begin, end) for begin, end in hop.damaged if end > head] if hop is not None else []

    def replication_to(self, archive: str) -> ReplicationView | None:
        """Return the replication by which the primary archive's policy keeps another one up to date."""
        policy = self.o.policies.get((self.primary, self.vol))
        address = self.o.seen[archive].server.get_host_port()
        for row in policy.replications if policy is not None and policy.enabled else []:
            if row.enabled and self.o.same_address(row.dest, address):
                return row
        return None

    def is_good_copy(self, archive: str) -> bool:
        """An archive that has everything, or will have it: fed by every proxy, of the same log, without a hole."""
        target = self.target
        proxies = self.alive(k.K_PROXY)
        return (
            self.holds(archive)
            and self.archives[archive].state != k.aStopped
            and bool(proxies)
            and self.feeders(archive) == proxies
            and (target is None or target.state not in HISTORY or target.uuid == self.archives[archive].uuid)
            and not self.chain(archive).missing
        )

    # Backups

    def backup(self) -> tuple[tuple[Step, ...], tuple[str, ...]]:
        """Return the steps that make the target's contents and the primary archive agree again, and who must
        answer before they are taken. A comparing copy (hash backup) wherever there is anything to compare with.
        """
        steps: list[Step] = []
        vol, target = self.vol, Ref(self.intent.target)
        if self.target is not None and self.target.state == k.sTarget:
            steps.append(Step("stop", (target, vol)))
        for name, v in self.storages.items():
            if name == target.name or v.state in (k.sStandby, k.sTarget):
                continue
            if v.state == k.sStopped:
                steps.append(Step("reset", (Ref(name), vol), Consent.YES))
            if v.state in (k.sStopped, k.sSyncReady):
                steps.append(Step("go_standby", (Ref(name), vol)))
        waits = self.dead(k.K_STORAGE, k.K_PROXY)
        if self.o.seen[self.primary].status is None:
            waits.append(self.primary)
        if not self.is_empty(self.primary):
            steps.append(Step("hash_backup", (target, vol), Consent.YES, is_backup=True))
            return tuple(steps), tuple(waits)
        waits += [name for name in self.dead(k.K_ARCHIVE) if name not in self.lost]  # they may hold a base
        steps.append(Step("full_backup", (target, vol), Consent.YES, is_backup=True))
        return tuple(steps), tuple(dict.fromkeys(waits))


# What is wanted


def infer_intent(o: Observation, vol: str, lost: frozenset[str] = frozenset()) -> Intent:
    """Return what the group file says is wanted, and for what it does not say, what the servers suggest."""
    entry = o.group.volumes.get(vol)
    devices = dict(entry.devices) if entry is not None else {}
    bare = Case(o, vol, Intent(), lost)
    target = entry.target.name if entry is not None and entry.target is not None else ""
    wanted = entry.archives if entry is not None else None
    named = ""
    others = [s for s, v in bare.storages.items() if v.state == k.sTarget and s != target]
    if target and not others and bare.state_of(target) in (k.sClear, k.sSyncReady, k.sStandby):
        others = [s for s in bare.stopped_targets() if s != target]
    if target and len(others) == 1 and bare.state_of(target) in (k.sClear, k.sSyncReady, k.sStandby, k.sStopped):
        named, target = target, others[0]
    archives = tuple(a.name for a in wanted) if wanted is not None else _infer_archives(bare)
    return Intent(
        target=target or _infer_target(bare, devices),
        devices=devices,
        archives=archives,
        target_said=bool(target) and not named,
        archives_said=wanted is not None,
        named=named,
    )


def _infer_target(case: Case, devices: Mapping[str, str]) -> str:
    """The storage that is target, or else shows signs of having been it."""
    storages = case.storages
    backups = (k.stFullSync, k.stHashSync, k.stStartTarget, k.stStopTarget)
    wishes: Sequence[list[str]] = (
        [s for s, v in storages.items() if v.state == k.sTarget],
        [s for s, v in storages.items() if v.state in backups],
        # while a storage does not answer, that may be the target, and another a former one
        case.stopped_targets()
        if case.dead(k.K_STORAGE)
        else [s for s, v in storages.items() if v.state == k.sStopped],
        [s for s, v in storages.items() if v.state == k.sSyncReady],
        [s for s, v in storages.items() if v.state == k.BROKEN],
        [s for s in devices if s not in storages],
        [s.name for s in case.servers(k.K_STORAGE) if s.name not in storages],
        list(storages),
    )
    protected = bool(case.archives or case.proxies or storages)
    for found in wishes:
        if len(found) == 1 and protected:
            return found[0]
        if found:
            return ""  # not clear
    return ""


def _infer_archives(case: Case) -> tuple[str, ...]:
    """The archives that proxies send to, and the primary one."""
    fed = {hop.dest for v in case.proxies.values() for hop in v.hops}
    fed |= {case.primary} if case.archives or case.proxies or case.storages else set()
    return tuple(s.name for s in case.servers(k.K_ARCHIVE) if s.name in fed)
