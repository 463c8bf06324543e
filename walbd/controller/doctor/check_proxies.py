"""What is wrong with a volume at proxies. Pure. Source: docs/recovery.md."""

from __future__ import annotations

from walbd.controller import constants as k
from walbd.controller.doctor.case import Case
from walbd.controller.doctor.findings import Finding, finding
from walbd.controller.doctor.steps import Consent, Ref, Step
from walbd.controller.overview import Word
from walbd.protocol.control import HopStatus, VolumeStatus
from walbd.units import LB, format_size


def check_proxies(case: Case) -> list[Finding]:
    """Judge the volume at each proxy that answers."""
    if not case.has_history or case.at_work:
        return _stopped_and_wrong(case)
    return [*_lost(case), *_stopped_and_wrong(case), *_not_fed(case)]


def proof(case: Case) -> str:
    """Say for each archive whether diffs are missing on the way to it."""
    told = []
    for archive in case.intent.archives:
        if case.holds(archive):
            chain = case.chain(archive)
            word = (
                "proved" if chain.is_whole else "lost" if chain.missing and not chain.not_asked else "not proved"
            )
            told.append(f"{archive}: {word}: {chain.text}")
    return "; ".join(told)


def _wanted(case: Case) -> list[str]:
    """Archives that proxies must send to, as they hold the volume and others send to them already."""
    return [
        a
        for a in case.intent.archives
        if a not in case.lost and (a == case.primary or case.feeders(a) or not case.proxies)
    ]


def _feed_steps(case: Case, px: str) -> tuple[Step, ...]:
    wanted = _wanted(case)
    for other in case.alive(k.K_PROXY):
        v = case.proxies.get(other)
        if other == px or v is None or v.state == k.BROKEN:
            continue
        if sorted(hop.dest for hop in v.hops) == sorted(wanted):
            return (Step("copy_archive_info", (Ref(other), case.vol, Ref(px))),)
    return tuple(Step("add_archive_to_proxy", (Ref(px), case.vol, Ref(a))) for a in wanted)


def _lost(case: Case) -> list[Finding]:
    found = []
    for px in case.alive(k.K_PROXY):
        v = case.proxies.get(px)
        if v is not None and v.state != k.BROKEN and v.hops:
            continue
        steps = _feed_steps(case, px)
        evidence: dict[str, str | int] = {"state": v.state if v is not None else k.pClear, "proof": proof(case)}
        text = f"{px} does not know {case.vol}"
        if v is not None and v.state == k.BROKEN:
            text = f"{px} cannot read {case.vol}: {v.error}"
            steps = (Step("clear", (Ref(px), case.vol), Consent.YES), *steps)
        chains = [case.chain(a) for a in case.intent.archives if case.holds(a)]
        if chains and all(chain.is_whole for chain in chains):
            text += "; no diff is lost, so no backup is needed"
        elif any(chain.missing and not chain.not_asked for chain in chains):
            text += "; diffs are lost with it, see gap"
        else:
            text += "; whether diffs are lost with it is not known yet"
        found.append(
            finding(
                "proxy-data-lost",
                text,
                server=px,
                volume=case.vol,
                evidence=evidence,
                steps=steps,
                look_again=True,
            )
        )
    return found


def _not_fed(case: Case) -> list[Finding]:
    """Archives that some proxies send to and others do not; the primary one must be fed by all."""
    found = []
    for px in case.alive(k.K_PROXY):
        v = case.proxies.get(px)
        if v is None or v.state == k.BROKEN or not v.hops:
            continue  # it has lost the volume: said elsewhere
        for archive in _wanted(case):
            if case.hop(px, archive) is None and (archive == case.primary or case.holds(archive)):
                step = Step("add_archive_to_proxy", (Ref(px), case.vol, Ref(archive)))
                found.append(
                    finding(
                        "archive-not-fed",
                        f"{px} does not send {case.vol} to {archive}",
                        server=px,
                        volume=case.vol,
                        evidence={"sends_to": [hop.dest for hop in v.hops], "archive": archive},
                        steps=(step,),
                        look_again=True,
                    )
                )
    return found


def _stopped_and_wrong(case: Case) -> list[Finding]:
    found = []
    for px, v in case.proxies.items():
        if v.state == k.pStopped:
            found.append(_stopped(case, px, v))
        if v.state == k.BROKEN:
            continue
        for hop in v.hops:
            found += _hop(case, px, hop)
    return found


def _stopped(case: Case, px: str, v: VolumeStatus) -> Finding:
    return finding(
        "proxy-stopped",
        f"{case.vol} is stopped at {px}: it takes no logs and sends no diffs",
        server=px,
        volume=case.vol,
        evidence={"state": v.state, "waiting_diffs": v.diffs, "waiting_b": v.diffs_b},
        steps=(Step("start", (Ref(px), case.vol)), Step("kick_storage_all", ())),
        look_again=True,  # whoever adds an archive stops proxies for a moment
    )


def _hop(case: Case, px: str, hop: HopStatus) -> list[Finding]:
    layout = {s.name: s for s in case.o.layout.archiveL}
    waiting: dict[str, str | int] = {"waiting_diffs": hop.diffs, "waiting_b": hop.size_b}
    archive = layout.get(hop.dest)
    if archive is None or (case.intent.archives_said and hop.dest not in case.intent.archives):
        return [_unwanted(case, px, hop, known=archive is not None)]
    if not case.o.same_address(hop.address, archive.get_host_port()):
        return [
            finding(
                "wrong-archive-address",
                f"{px} sends {case.vol} for {hop.dest} to {hop.address}, which is not its address",
                server=px,
                volume=case.vol,
                evidence={"proxy_uses": hop.address, "group_file_says": archive.get_host_port()} | waiting,
                steps=(Step("add_archive_to_proxy", (Ref(px), case.vol, Ref(hop.dest))),),
            )
        ]
    if case.damaged(px, hop.dest):
        return [_damaged(case, px, hop)]
    is_old = bool(hop.damaged) and not hop.diffs  # a damage that the archive is past stays until it answers again
    if hop.error and not is_old and case.holds(hop.dest) and not _is_smaller(case, hop.dest):
        return [
            finding(
                "send-error",
                f"{hop.dest} refuses {case.vol} from {px}: {hop.error_text}",
                server=px,
                volume=case.vol,
                evidence={"archive": hop.dest, "error": hop.error_text} | waiting,
                by_hand="mend what the text names",
                steps=(Step("kick_proxy", (case.vol, Ref(hop.dest))),),
                look_again=True,
            )
        ]
    return []


def _damaged(case: Case, px: str, hop: HopStatus) -> Finding:
    """What mends it is the step of `gap` or `replica-gap`: those are proved from the generations, and may know of
    another archive that has what is missing.
    """
    lost = ", ".join(f"{begin}..{end}" for begin, end in case.damaged(px, hop.dest))
    is_primary = hop.dest == case.primary
    mends = f"walbc hash-backup {case.vol} --storage {case.intent.target or 'STORAGE'}"
    if not is_primary:
        mends = f"walbc replicate {case.vol} {hop.dest} --from {case.primary}"
    return finding(
        "wdiff-damaged",
        f"diffs of {case.vol} for {hop.dest} were damaged on the disk of {px} and are put aside: {lost}",
        word=Word.ERROR if is_primary else Word.WARN,
        server=px,
        volume=case.vol,
        evidence={
            "archive": hop.dest,
            "damaged": lost,
            "error": hop.error_text,
            "waiting_diffs": hop.diffs,
            "waiting_b": hop.size_b,
        },
        by_hand=f"see the disk of {px}; {'gap' if is_primary else 'replica-gap'} mends it, or by hand: {mends}",
        look_again=True,  # another proxy may bring the same
    )


def _is_smaller(case: Case, archive: str) -> bool:
    return case.target is not None and case.archives[archive].size_lb < case.target.size_lb


def _unwanted(case: Case, px: str, hop: HopStatus, *, known: bool) -> Finding:
    why = "is not wanted by the group file" if known else "is not in the group file"
    drops = f" ({hop.diffs} diffs, {format_size(hop.size_b)} wait for it)" if hop.diffs else ""
    steps = (Step("del_archive_from_proxy", (Ref(px), case.vol, Ref(hop.dest)), Consent.YES),)
    return finding(
        "unwanted-feed",
        f"{px} sends {case.vol} to {hop.dest}, which {why}{drops}",
        server=px,
        volume=case.vol,
        evidence={
            "archive": hop.dest,
            "address": hop.address,
            "waiting_diffs": hop.diffs,
            "waiting_b": hop.size_b,
        },
        by_hand=""
        if known
        else f"or name it in the group file; by hand: walbc stop {px} {case.vol}, "
        f"walbc on {px} archive-info delete {case.vol} {hop.dest}, walbc start {px} {case.vol}",
        steps=steps if known else (),
    )


def size_mb(size_lb: int) -> int:
    """Return the size in MiB, rounded up."""
    return -(-size_lb * LB // (1 << 20))
