"""What is wrong with servers and with who talks to whom. Pure. Source: docs/recovery.md."""

from __future__ import annotations

from collections.abc import Collection
from statistics import median_low
from typing import Final

from walbd.controller import constants as k
from walbd.controller.doctor.case import Case
from walbd.controller.doctor.findings import Finding, finding
from walbd.controller.doctor.observation import Observation, Seen
from walbd.controller.doctor.steps import Consent, Ref, Step
from walbd.controller.overview import Word
from walbd.controller.servers import Server, server_kind_to_str
from walbd.daemon.net import TLS_HINT
from walbd.errors import ConnectError, TimedOut, WalbError
from walbd.protocol.control import StatusReply, VolumeStatus
from walbd.units import format_duration, format_size

SKEW_MAX_S: Final = 30
DISK_SOON_S: Final = 86400
LOG_WARN: Final = 0.7


def check_servers(o: Observation, lost: frozenset[str], cases: Collection[Case]) -> list[Finding]:
    """Judge every server by itself, and the ways between them. `cases`: all volumes."""
    found: list[Finding] = []
    proxies = [o.seen[s.name] for s in o.layout.proxyL]
    if proxies and all(isinstance(seen.error, ConnectError | TimedOut) for seen in proxies):
        found.append(_no_proxies(o, proxies))
    for seen in o.seen.values():
        if seen.status is None:
            found.append(_down(o, seen, lost))
        else:
            found += _check_one(o, seen.server, seen.status, cases)
    return [*found, *_versions(o), *_clocks(o)]


def time_left_s(o: Observation, storage: str, v: VolumeStatus) -> int | None:
    """Return how long until the log of a volume is full, at the rate seen between two looks; None: not known."""
    before = o.before.seen.get(storage) if o.before is not None else None
    was = before.volume(v.volume) if before is not None else None
    if was is None or o.before is None or o.taken_s <= o.before.taken_s or not v.log_capacity_pb:
        return None
    grown = v.log_usage_pb - was.log_usage_pb
    if grown <= 0:
        return None
    return int((v.log_capacity_pb - v.log_usage_pb) * (o.taken_s - o.before.taken_s) / grown)


def format_left(seconds: int | None) -> str:
    """Write a time that is left."""
    return "not known" if seconds is None else format_duration(seconds)


# Servers that do not answer


def _unit(s: Server) -> str:
    return f"on {s.address}: systemctl restart walbd-{server_kind_to_str(s.kind)}"


def _down(o: Observation, seen: Seen, lost: frozenset[str]) -> Finding:
    s, error = seen.server, seen.error
    assert error is not None
    reason = str(error.facts.get("reason", error.message))
    if not isinstance(error, ConnectError | TimedOut):
        return _not_ours(s, error)
    code = {k.K_STORAGE: "storage-down", k.K_PROXY: "proxy-down", k.K_ARCHIVE: "archive-down"}[s.kind]
    evidence: dict[str, str | int] = {"address": s.get_host_port(), "reason": reason}
    text = f"{s.name} does not answer ({reason})"
    by_hand = error.hint if error.hint == TLS_HINT else f"{_unit(s)}; it goes on by itself then"
    if s.kind == k.K_ARCHIVE:
        hops = [hop for each in o.seen.values() if each.status for v in each.status.volumes for hop in v.hops]
        waiting = [hop for hop in hops if hop.dest == s.name and hop.diffs]
        evidence |= {
            "waiting_diffs": sum(hop.diffs for hop in waiting),
            "waiting_b": sum(hop.size_b for hop in waiting),
        }
        oldest = min((hop.oldest for hop in waiting if hop.oldest), default=0)
        if oldest:
            evidence["oldest_waits_s"] = max(0, o.now - oldest)
        text += f"; {format_size(evidence['waiting_b'])} wait for it at proxies"  # type: ignore[arg-type]
        if s.name in lost:
            by_hand = "it is given up (--lost): set it up anew under its name, or take it out of the group file"
        else:
            by_hand += f". If its data are lost for good: walbc doctor --fix --lost {s.name}"
    if s.kind == k.K_STORAGE:
        by_hand += ". If it never comes back, take it out of the group file: backups need all storages in it"
    return finding(code, text, server=s.name, evidence=evidence, by_hand=by_hand)


def _not_ours(s: Server, error: WalbError) -> Finding:
    return finding(
        "wrong-server",
        f"{s.name}: {error.message}",
        server=s.name,
        evidence={"address": s.get_host_port()} | {key: str(value) for key, value in error.facts.items()},
        by_hand=error.hint or "correct the address in the group file",
    )


def _no_proxies(o: Observation, proxies: list[Seen]) -> Finding:
    times = {}
    for name, seen in o.seen.items():
        for v in seen.status.volumes if seen.status is not None else []:
            if seen.server.kind == k.K_STORAGE and v.state in (k.sTarget, k.sStopped) and not v.overflow:
                fill = v.log_usage_pb / v.log_capacity_pb if v.log_capacity_pb else 0.0
                left = format_left(time_left_s(o, name, v))
                times[f"{name} {v.volume}"] = f"log {fill:.0%} full, time until it overflows: {left}"
    return finding(
        "all-proxies-down",
        "no proxy answers: " + ("; ".join(f"{where}: {text}" for where, text in times.items()) or "logs fill"),
        evidence=dict(times),
        by_hand="; ".join(_unit(seen.server) for seen in proxies),
        look_again=True,
    )


# Servers that answer


def _check_one(o: Observation, s: Server, status: StatusReply, cases: Collection[Case]) -> list[Finding]:
    found = []
    if status.node != s.name:
        found.append(
            finding(
                "wrong-server",
                f"{s.name} calls itself {status.node}",
                server=s.name,
                evidence={"address": s.get_host_port(), "node": status.node},
                by_hand="use one name in the group file and as the daemon's node_id",
            )
        )
    told = [text for v in status.volumes for text in (v.error, v.device_error) if text]
    for text in dict.fromkeys(status.errors):
        if text != "no proxy is available" and not any(each in text for each in told):
            found.append(finding("server-error", f"{s.name}: {text}", server=s.name))
    found += _disk(o, s, status)
    if s.kind == k.K_STORAGE:
        found += [*_check_primary(o, s, status, cases), *_check_proxies(o, s, status)]
    return found


def _disk(o: Observation, s: Server, status: StatusReply) -> list[Finding]:
    facts = status.server
    if "disk_error" in facts:
        return [finding("disk-full", f"{s.name}: {facts['disk_error']}", server=s.name)]
    free, reserve = facts.get("free_b"), facts.get("free_reserve_b")
    if not isinstance(free, int) or not isinstance(reserve, int):
        return []
    before = o.before.seen[s.name].status if o.before is not None else None
    was = before.server.get("free_b") if before is not None else None
    left = None
    if isinstance(was, int) and was > free and o.before is not None:
        left = int(max(0, free - reserve) * (o.taken_s - o.before.taken_s) / (was - free))
    if free >= 3 * reserve and (left is None or left > DISK_SOON_S or free > 100 * reserve):
        return []
    kind = (
        "archives that are away keep diffs here" if s.kind == k.K_PROXY else "apply or delete what is not needed"
    )
    is_full = free < reserve
    return [
        finding(
            "disk-full",
            f"{s.name} has {format_size(free)} left" + (", which is below its reserve" if is_full else ""),
            word=Word.ERROR if is_full else Word.WARN,
            server=s.name,
            evidence={"free_b": free, "free_reserve_b": reserve, "full_in": format_left(left)},
            by_hand=f"make room in {facts.get('base_dir', 'its directory')}: {kind}",
        )
    ]


def _check_primary(o: Observation, s: Server, status: StatusReply, cases: Collection[Case]) -> list[Finding]:
    """Which archive a storage uses. Neither the storage nor the group file is changed to name an archive that does
    not have every volume: then a person must say which is right.
    """
    named = status.server.get("archive")
    if not isinstance(named, str) or not named or not o.layout.archiveL:
        return []
    primary = o.layout.archiveL[0]
    if o.same_address(named, primary.get_host_port()):
        return []
    other = next((a for a in o.layout.archiveL if o.same_address(named, a.get_host_port())), None)
    evidence = {"storage_uses": named, "group_file_says": primary.get_host_port()}
    text = f"{s.name} backs up to {other.name if other else named}, the group file says {primary.name}"
    steps: tuple[Step, ...] = ()
    waits: tuple[str, ...] = ()
    by_hand = ""
    if _has_all(primary.name, cases):
        steps = (Step("retarget", (Ref(s.name), Ref(primary.name)), Consent.YES),)
    elif other is not None and _has_all(other.name, cases):
        text += ", which does not have everything"
        steps = (Step("promote_archive", (Ref(other.name),), Consent.YES),)
        waits = (primary.name,) if o.seen[primary.name].status is None and not _is_given_up(primary, cases) else ()
    else:
        text += ", which does not have everything"
        by_hand = f"put the archive that {s.name} uses first in the group file, if that is the right one"
    return [
        finding(
            "wrong-primary",
            text,
            server=s.name,
            evidence=evidence,
            by_hand=by_hand,
            steps=steps,
            waits_for=waits,
        )
    ]


def _is_given_up(archive: Server, cases: Collection[Case]) -> bool:
    return any(archive.name in case.lost for case in cases)


def _has_all(archive: str, cases: Collection[Case]) -> bool:
    """The archive has every volume that is backed up, or that any archive holds."""
    return all(
        case.is_good_copy(archive) if case.has_history else case.holds(archive)
        for case in cases
        if case.has_history or any(case.holds(a) for a in case.archives)
    )


def _check_proxies(o: Observation, s: Server, status: StatusReply) -> list[Finding]:
    used = [proxy.address for proxy in status.proxies]
    found = []
    extra = [a for a in used if not any(o.same_address(a, p.get_host_port()) for p in o.layout.proxyL)]
    unused = [p for p in o.layout.proxyL if not any(o.same_address(a, p.get_host_port()) for a in used)]
    if used and (extra or unused):
        # While the storage uses another archive that must be settled first: retargeting names both. And a storage
        # is not told to use proxies that do not answer: the group file may be behind a replacement.
        primary = o.layout.archiveL[0].get_host_port() if o.layout.archiveL else ""
        settled = o.same_address(str(status.server.get("archive", "") or primary), primary)
        away = tuple(p.name for p in unused if o.seen[p.name].status is None)
        words = [f"uses {', '.join(extra)}, which the group file does not name"] if extra else []
        words += [f"does not use {', '.join(p.name for p in unused)}"] if unused else []
        found.append(
            finding(
                "wrong-proxies",
                f"{s.name} {' and '.join(words)}",
                server=s.name,
                evidence={"storage_uses": used, "group_file_says": [p.get_host_port() for p in o.layout.proxyL]},
                by_hand="a proxy that is left out may still hold diffs: empty it first (walbc replace-proxy), "
                "or name it in the group file"
                if extra
                else "",
                steps=(Step("retarget", (Ref(s.name),), Consent.YES),) if settled else (),
                waits_for=away,
            )
        )
    for proxy in status.proxies:
        mine = next((p for p in o.layout.proxyL if o.same_address(proxy.address, p.get_host_port())), None)
        if mine is not None and not proxy.available and o.seen[mine.name].status is not None:
            found.append(
                finding(
                    "proxy-unreachable",
                    f"{s.name} does not reach {mine.name}, which answers here: {proxy.error}",
                    server=s.name,
                    evidence={"proxy": mine.name, "address": proxy.address, "error": proxy.error},
                    by_hand="see the network between them; a proxy that has just come back is noticed soon",
                    steps=(Step("kick_storage_all", ()),),
                    look_again=True,
                )
            )
    return found


def _versions(o: Observation) -> list[Finding]:
    versions: dict[str, list[str]] = {}
    for name, seen in o.seen.items():
        if seen.status is not None:
            versions.setdefault(seen.status.version, []).append(name)
    if len(versions) < 2:
        return []
    text = "; ".join(f"{version}: {', '.join(names)}" for version, names in sorted(versions.items()))
    return [
        finding(
            "version-mismatch",
            f"servers run different versions: {text}",
            evidence={name: version for version, names in versions.items() for name in names},
            by_hand="install one version everywhere: archives first, storages last",
        )
    ]


def _clocks(o: Observation) -> list[Finding]:
    clocks = {name: seen.status.now for name, seen in o.seen.items() if seen.status is not None}
    if len(clocks) < 2:
        return []
    middle = median_low(clocks.values())
    off = {name: now - middle for name, now in clocks.items() if abs(now - middle) > SKEW_MAX_S}
    return [
        finding(
            "clock-skew",
            f"the clock of {name} is {abs(by)} s {'ahead' if by > 0 else 'behind'}",
            server=name,
            evidence={"off_by_s": by},
            by_hand=f"set the clock of {o.seen[name].server.address} (NTP)",
        )
        for name, by in off.items()
    ]
