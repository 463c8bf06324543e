"""What is wrong with a volume at archives: lost data, holes, other histories, replicas. Pure.

Source: docs/recovery.md.
"""

from __future__ import annotations

import re
from typing import Final

from walbd.controller import constants as k
from walbd.controller.doctor.case import NIL_UUID, Case, Chain
from walbd.controller.doctor.check_proxies import size_mb
from walbd.controller.doctor.check_storages import orphan_or_gap
from walbd.controller.doctor.findings import Finding, finding
from walbd.controller.doctor.steps import Consent, Ref, Step
from walbd.protocol.control import VolumeStatus
from walbd.protocol.policy import ReplicationView
from walbd.units import LB, format_size

LAG_WARN_S: Final = 60
LATE_MIN_S: Final = 300  # a replication that is later than that, and than two intervals, is late
_BASE: Final = re.compile(r"<\|([0-9]+)(?:,[0-9]+)?\|(?:-->\|([0-9]+)(?:,[0-9]+)?\|)?>")


def base_gids(v: VolumeStatus) -> tuple[int, int | None] | None:
    """Return the generation of the base image, and the goal of an apply that is under way."""
    match = _BASE.match(v.base)
    return (int(match[1]), int(match[2]) if match[2] else None) if match is not None else None


def check_archives(case: Case, *, promote_to: str = "") -> list[Finding]:
    """Judge the volume at each archive. `promote_to`: the archive that takes over from a primary that lost all."""
    found: list[Finding] = []
    for name, v in case.archives.items():
        if name not in case.lost:
            found += _one(case, name, v)
    if case.at_work or not case.o.layout.archiveL:
        return found
    if case.has_history and case.is_empty(case.primary):
        return [*found, _primary_lost(case, promote_to)]
    for name in case.intent.archives:
        found += _primary(case) if name == case.primary else _secondary(case, name)
    return found


# Each archive by itself


def _one(case: Case, name: str, v: VolumeStatus) -> list[Finding]:
    found = []
    if v.state == k.BROKEN:
        return [_broken(case, name, v)]
    if v.state == k.aStopped:
        steps = (Step("start", (Ref(name), case.vol)), Step("kick_proxy", (case.vol, Ref(name))))
        text = f"{case.vol} is stopped at {name}: diffs wait at the proxies"
        found.append(
            finding(
                "archive-stopped",
                text,
                server=name,
                volume=case.vol,
                evidence=_waiting(case, name),
                steps=steps,
                look_again=True,
            )
        )
    base = base_gids(v)
    if base is not None and base[1] is not None and not v.actions.get(k.aaApply) and v.state != k.aStopped:
        found.append(
            finding(
                "apply-interrupted",
                f"an apply of {case.vol} at {name} was cut off between {base[0]} and {base[1]}",
                server=name,
                volume=case.vol,
                evidence={"base": v.base},
                steps=(Step("apply", (Ref(name), case.vol, base[1])),),
                look_again=True,
            )
        )
    target = case.target
    if target is not None and case.holds(name) and target.size_lb > v.size_lb and not v.actions.get(k.aaResize):
        found.append(_smaller(case, name, v, target.size_lb))
    policy = case.o.policies.get((name, case.vol))
    for trouble in policy.troubles if policy is not None and policy.enabled else []:
        found.append(
            finding(
                "policy-trouble",
                f"the policy of {case.vol} at {name}: {trouble.what}: {trouble.error}",
                server=name,
                volume=case.vol,
                evidence={"failures": trouble.failures, "since": trouble.since, "code": trouble.error_code},
                by_hand="it is tried again by itself; mend what the text names",
            )
        )
    if v.error:
        found.append(finding("put-aside", f"{name}: {v.error}", server=name, volume=case.vol))
    return found


def _waiting(case: Case, name: str) -> dict[str, str | int]:
    hops = [hop for px in case.feeders(name) if (hop := case.hop(px, name)) is not None]
    return {"waiting_diffs": sum(hop.diffs for hop in hops), "waiting_b": sum(hop.size_b for hop in hops)}


def _smaller(case: Case, name: str, v: VolumeStatus, size_lb: int) -> Finding:
    return finding(
        "archive-smaller",
        f"the image of {case.vol} at {name} has {format_size(v.size_lb * LB)}, "
        f"the volume {format_size(size_lb * LB)}",
        server=name,
        volume=case.vol,
        evidence={"archive_size_lb": v.size_lb, "device_size_lb": size_lb} | _waiting(case, name),
        steps=(
            Step("resize_archive", (Ref(name), case.vol, size_mb(size_lb), True)),
            Step("kick_proxy", (case.vol, Ref(name))),
        ),
    )


def _copies(case: Case, but: str) -> list[str]:
    """Other archives that hold the volume."""
    return [name for name in case.alive(k.K_ARCHIVE) if name != but and case.holds(name)]


def _broken(case: Case, name: str, v: VolumeStatus) -> Finding:
    """Its files may be the only ones: they go only when a person says so, or another copy is good."""
    good = [a for a in _copies(case, name) if case.is_good_copy(a) and case.chain(a).is_whole]
    clear = Step("clear", (Ref(name), case.vol), Consent.YES if good else Consent.LOSE)
    return finding(
        "archive-broken",
        f"{name} cannot read {case.vol}: {v.error}",
        server=name,
        volume=case.vol,
        evidence={"error": v.error, "other_copies": good},
        risk="" if good else "its restore points: no other archive has a complete copy",
        by_hand=f"put the file that the error names back and restart {name}, if you can; else it is cleared",
        steps=(clear,),
    )


# The primary


def _primary_lost(case: Case, promote_to: str) -> Finding:
    """Cases 2 and 3 of docs/recovery.md: a copy that goes on, an old copy, or none."""
    vol, primary = case.vol, case.primary
    vs = {name: case.archives[name] for name in _copies(case, primary)}
    good = [name for name in vs if case.is_good_copy(name)]
    given_up = primary in case.lost
    evidence: dict[str, str | int | list[str]] = {
        "state": "given up" if given_up else case.archives[primary].state if primary in case.archives else "Clear",
        "good_copies": good,
        "old_copies": [name for name in vs if name not in good],
        "proof": "; ".join(f"{name}: {case.chain(name).text}" for name in vs),
    }
    dead = tuple(name for name in case.dead(k.K_ARCHIVE) if name not in case.lost)
    steps: tuple[Step, ...]
    waits = tuple(case.dead(k.K_PROXY))  # all of them must be told
    by_hand = ""
    if promote_to in vs:
        is_good = promote_to in good
        steps = _promote(case, promote_to)
        if is_good:
            text = f"{promote_to} has everything and takes over; no backup is needed"
        else:
            text = f"{promote_to} has a copy up to {vs[promote_to].latest_gid}: it takes over, then a hash backup"
            waits += dead
    elif good:
        text = f"{good[0]} has everything: it is copied back from there"
        steps = (
            Step("stop_synchronizing", (Ref(primary), vol), Consent.YES),
            Step("replicate", (Ref(good[0]), vol, Ref(primary), True), Consent.YES),
        )
    elif vs:
        old = max(vs, key=lambda name: vs[name].latest_gid)
        text = f"{old} has an old copy: it is copied back from there, then a hash backup continues it"
        steps = (
            Step("stop_synchronizing", (Ref(primary), vol), Consent.YES),
            Step("replicate", (Ref(old), vol, Ref(primary), False), Consent.YES),
            *case_hash_backup(case),
        )
        waits += (*case.dead(k.K_STORAGE), *dead)
    else:
        text = "no archive has a copy: only a full backup helps"
        steps, waits = case.backup()
        if given_up:
            by_hand = f"set up a new archive under the name {primary}, or with another name in the group file"
    return finding(
        "primary-data-lost",
        f"{primary} is primary and has lost {vol}; {text}",
        server=primary,
        volume=vol,
        evidence=evidence,
        by_hand=by_hand,
        steps=steps,
        waits_for=tuple(dict.fromkeys(waits)),
        look_again=True,
    )


def case_hash_backup(case: Case) -> tuple[Step, ...]:
    """Stop the target and compare it with the primary archive, whatever that holds now."""
    target = Ref(case.intent.target)
    stop = (Step("stop", (target, case.vol)),) if case.target and case.target.state == k.sTarget else ()
    return (*stop, Step("hash_backup", (target, case.vol), Consent.YES, is_backup=True))


def _promote(case: Case, new: str) -> tuple[Step, ...]:
    old = Ref(case.primary)
    retarget = [Step("retarget", (Ref(s), Ref(new)), Consent.YES) for s in case.alive(k.K_STORAGE)]
    fed = bool(case.feeders(case.primary))
    drop = (Step("stop_synchronizing", (old, case.vol), Consent.YES),) if fed else ()
    return (*drop, *retarget, Step("promote_archive", (Ref(new),), Consent.YES))


def _primary(case: Case) -> list[Finding]:
    """Whether what the storage sends continues what the primary archive has."""
    name, target = case.primary, case.target
    if not case.holds(name) or target is None or not case.has_history:
        return []
    v = case.archives[name]
    if target.overflow or target.lost or v.state == k.aStopped:
        return []
    if v.uuid != target.uuid and NIL_UUID not in (v.uuid, target.uuid):
        text = f"{name} holds another history of {case.vol} than {case.intent.target} sends: its diffs are dropped"
        evidence: dict[str, str | int] = {
            "archive_uuid_of_log": v.uuid,
            "storage_uuid_of_log": target.uuid,
            "archive_gid": v.latest_gid,
        }
        return [orphan_or_gap(case, "orphan", text, evidence, look_again=True)]
    chain = case.chain(name)
    if not chain.missing:
        return _lag(case, name, v)
    if chain.not_asked:
        return [_possible(case, name, chain)]
    other = _has_missing(case, chain)
    text = f"{case.vol} has a hole on the way to {name}: {chain.text}"
    if other:
        bring = _bring_up(case, name, v, case.archives[other])
        step = Step("replicate", (Ref(other), case.vol, Ref(name), False), bring)
        return [
            finding(
                "gap",
                f"{text}; {other} has it",
                server=name,
                volume=case.vol,
                evidence=chain.evidence | {"filled_from": other},
                steps=(step, Step("kick_proxy", (case.vol, Ref(name)))),
                look_again=True,
            )
        ]
    return [orphan_or_gap(case, "gap", text, chain.evidence, look_again=True)]


def _has_missing(case: Case, chain: Chain) -> str:
    """Return a replica of the same history that has, or gets, what the primary lacks."""
    mine = case.archives[case.primary]
    for name in _copies(case, case.primary):
        v = case.archives[name]
        same = v.archive_uuid == mine.archive_uuid and v.uuid == mine.uuid and v.archive_uuid != NIL_UUID
        if same and v.latest_gid >= chain.missing[-1][1]:
            return name
    return ""


def _possible(case: Case, name: str, chain: Chain) -> Finding:
    return finding(
        "possible-gap",
        f"{case.vol}: {chain.text}; {', '.join(chain.not_asked)} may have it",
        server=name,
        volume=case.vol,
        evidence=dict(chain.evidence),
        by_hand=f"first bring back {', '.join(chain.not_asked)}; if it is lost for good, take it out of the "
        "group file (walbc replace-proxy), and look again",
        look_again=True,
    )


def _lag(case: Case, name: str, v: VolumeStatus) -> list[Finding]:
    hops = [hop for px in case.feeders(name) if (hop := case.hop(px, name)) is not None]
    oldest = min((hop.oldest for hop in hops if hop.oldest and hop.diffs), default=0)
    behind_s = case.o.now - oldest if oldest else 0
    if behind_s <= LAG_WARN_S or v.state == k.aStopped or any(hop.error for hop in hops):
        return []
    return [
        finding(
            "lagging",
            f"{name} is {behind_s} s behind with {case.vol}",
            server=name,
            volume=case.vol,
            evidence=_waiting(case, name) | {"oldest_waits_s": behind_s, "archive_gid": v.latest_gid},
            by_hand="if it grows: see the network and the disks of the archive",
            steps=(Step("kick_proxy", (case.vol, Ref(name))),),
            look_again=True,
        )
    ]


# Secondaries


def _secondary(case: Case, name: str) -> list[Finding]:
    vol, primary = case.vol, case.primary
    if case.is_empty(name):
        return _secondary_lost(case, name)
    if not case.holds(name) or not case.holds(primary) or case.replicating:
        return []
    v, first, target = case.archives[name], case.archives[primary], case.target
    if k.aStopped in (v.state, first.state):
        return []
    if v.archive_uuid != first.archive_uuid:
        return [_other_lineage(case, name, v, first)]
    fed = case.feeders(name)
    bring = _bring_up(case, name, v, first)
    by_policy = case.replication_to(name)
    if not fed and by_policy is not None:
        return _by_policy(case, name, by_policy, v, first)
    if not fed:
        if not case.alive(k.K_PROXY):
            return []
        text = (
            f"{name} holds {vol} and gets no diffs; {primary} is at {first.latest_gid}, {name} at {v.latest_gid}"
        )
        return [
            finding(
                "replica-not-fed",
                text,
                server=name,
                volume=vol,
                evidence={"primary_gid": first.latest_gid, "replica_gid": v.latest_gid},
                steps=(Step("replicate", (Ref(primary), vol, Ref(name), True), bring),),
                waits_for=_away_for_synchronize(case),
                look_again=True,
            )
        ]
    if target is None or not case.has_history or target.lost or target.overflow:
        return []
    chain = case.chain(name)
    is_orphan = v.uuid != target.uuid and first.uuid == target.uuid
    if not is_orphan and not chain.missing:
        return _lag(case, name, v)
    if chain.not_asked and not is_orphan:
        return [_possible(case, name, chain)]
    why = "it continues an older log" if is_orphan else chain.text
    return [
        finding(
            "replica-gap",
            f"{vol} has a hole on the way to {name}: {why}; {primary} has it",
            server=name,
            volume=vol,
            evidence=dict(chain.evidence) | {"primary_gid": first.latest_gid},
            steps=(
                Step("replicate", (Ref(primary), vol, Ref(name), False), bring),
                Step("kick_proxy", (vol, Ref(name))),
            ),
            look_again=True,
        )
    ]


def _by_policy(case: Case, name: str, row: ReplicationView, v: VolumeStatus, first: VolumeStatus) -> list[Finding]:
    """A replica that no proxy feeds, as the policy brings it up to date now and then."""
    policy = case.o.policies[case.primary, case.vol].policy
    interval_s = next((r.interval_s for r in policy.replications if r.name == row.name), 0)
    late_s = case.o.now - (row.last + interval_s) if row.last else 0
    if row.running or v.latest_gid >= first.latest_gid or late_s <= max(2 * interval_s, LATE_MIN_S):
        return []
    copy = Step("replicate", (Ref(case.primary), case.vol, Ref(name), False), _bring_up(case, name, v, first))
    return [
        finding(
            "replica-behind",
            f"the policy's replication of {case.vol} to {name} is {late_s} s late",
            server=name,
            volume=case.vol,
            evidence={
                "primary_gid": first.latest_gid,
                "replica_gid": v.latest_gid,
                "last_heard": row.last,
                "interval_s": interval_s,
            },
            steps=(copy,),
        )
    ]


def _away_for_synchronize(case: Case) -> tuple[str, ...]:
    """Who must answer before the proxies can be told of another archive: they deliver everything first."""
    return (*case.dead(k.K_PROXY), *(a for a in case.dead(k.K_ARCHIVE) if case.feeders(a)))


def _bring_up(case: Case, name: str, v: VolumeStatus, first: VolumeStatus) -> Consent:
    """Copying diffs is cheap; where the primary has applied them, both images are compared as a whole."""
    base = base_gids(first)
    return Consent.YES if base is None or base[0] > v.latest_gid else Consent.NONE


def _secondary_lost(case: Case, name: str) -> list[Finding]:
    """Case 1 of docs/recovery.md."""
    vol, primary = case.vol, case.primary
    if not case.has_history:
        return []
    fed = case.feeders(name)
    given_up = name in case.lost
    drop = (Step("stop_synchronizing", (Ref(name), vol), Consent.YES),) if fed else ()
    copy: tuple[Step, ...] = ()
    if not given_up and case.holds(primary):
        copy = (Step("replicate", (Ref(primary), vol, Ref(name), True), Consent.YES),)
    return [
        finding(
            "secondary-data-lost",
            f"{name} has nothing of {vol}" + (", and diffs wait for it at the proxies" if fed else ""),
            server=name,
            volume=vol,
            evidence=_waiting(case, name)
            | {"fed_by": ", ".join(fed), "primary_holds_it": int(case.holds(primary))},
            steps=(*drop, *copy),
            look_again=True,
            waits_for=_away_for_synchronize(case) if copy else tuple(case.dead(k.K_PROXY)),
        )
    ]


def _other_lineage(case: Case, name: str, v: VolumeStatus, first: VolumeStatus) -> Finding:
    return finding(
        "replica-other-lineage",
        f"{name} holds another history of {case.vol} than {case.primary}: its {v.restorable} points are "
        "lost when it is made a replica again",
        server=name,
        volume=case.vol,
        evidence={
            "replica_archive_uuid": v.archive_uuid,
            "primary_archive_uuid": first.archive_uuid,
            "points": v.restorable,
        },
        by_hand="if its points are wanted, keep it: give the replica to another archive",
        steps=(Step("replicate", (Ref(case.primary), case.vol, Ref(name), True, 86400, True), Consent.LOSE),),
        waits_for=_away_for_synchronize(case),
    )
