"""From what was seen to what is wrong: one pure function. Source: docs/recovery.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walbd.controller import constants as k
from walbd.controller.doctor.case import Case, infer_intent
from walbd.controller.doctor.check_archives import check_archives
from walbd.controller.doctor.check_proxies import check_proxies
from walbd.controller.doctor.check_servers import check_servers
from walbd.controller.doctor.check_storages import check_storages
from walbd.controller.doctor.findings import Finding, finding
from walbd.controller.doctor.observation import Intent, Observation
from walbd.controller.overview import AS_ASKED
from walbd.protocol.base import JobInfo, JobState
from walbd.units import format_time

STUCK_S: Final = 600  # a job without progress for longer is stuck
JOB_NEWS_S: Final = 3600
_TOLD_ELSEWHERE: Final = ("stop",)  # jobs whose failure shows in the state


def diagnose(
    o: Observation,
    vol: str = "",
    *,
    intents: Mapping[str, Intent] | None = None,
    lost: frozenset[str] = frozenset(),
) -> list[Finding]:
    """Return what is wrong, in the order in which it should be mended.

    `vol`: only this volume (and the servers). `intents`: what is wanted, where that is known from an earlier look
    and can be seen no more. `lost`: archives whose data are given up for lost, although they do not answer.
    """
    cases = {name: _case(o, name, intents or {}, lost) for name in volumes(o, vol)}
    everything = {name: _case(o, name, intents or {}, lost) for name in volumes(o, "")}
    promote_to = _successor(o, everything, lost)
    found = check_servers(o, lost, everything.values())
    for case in cases.values():
        found += check_storages(case)
        found += check_proxies(case)
        found += check_archives(case, promote_to=promote_to)
        found += _stuck(case)
        found += _failed(case)
    return sorted(_once(found), key=lambda f: (f.rank.number, f.volume, f.server))


def volumes(o: Observation, vol: str) -> list[str]:
    """Return the volumes that are looked at."""
    if vol:
        return [vol]
    seen = {v.volume for s in o.seen.values() if s.status for v in s.status.volumes if v.state != k.sClear}
    return sorted(seen | set(o.group.volumes))


def intents_of(o: Observation, vol: str = "", lost: frozenset[str] = frozenset()) -> dict[str, Intent]:
    """Return what is wanted of each volume, as far as it can be known now."""
    return {name: infer_intent(o, name, lost) for name in volumes(o, vol)}


def needs_second_look(found: list[Finding]) -> bool:
    """Tell whether something was found that only a second look can confirm."""
    return any(f.look_again for f in found)


def confirmed(found: list[Finding], earlier: list[Finding]) -> list[Finding]:
    """Leave out what only one of two looks has shown."""
    before = {f.key for f in earlier}
    return [f for f in found if not f.look_again or f.key in before]


def _case(o: Observation, vol: str, intents: Mapping[str, Intent], lost: frozenset[str]) -> Case:
    intent = intents.get(vol)
    return Case(o, vol, intent if intent is not None else infer_intent(o, vol, lost), lost)


def _successor(o: Observation, cases: Mapping[str, Case], lost: frozenset[str]) -> str:
    """Return the archive that can take over from a primary that holds nothing any more: one that has every
    volume, good copies first. Nothing where the primary still holds a volume, or may do so.
    """
    layout = o.layout
    primary = layout.archiveL[0].name if layout.archiveL else ""
    protected = [case for case in cases.values() if case.has_history]
    if not primary or not protected or any(not case.is_empty(primary) for case in cases.values()):
        return ""
    others = [s.name for s in layout.archiveL[1:] if s.name not in lost]
    for wanted in (Case.is_good_copy, Case.holds):
        for name in others:
            if all(wanted(case, name) for case in protected):
                return name
    return ""


def _once(found: list[Finding]) -> list[Finding]:
    return list({(f.key, f.text): f for f in found}.values())


# Work that does not go on


def _stuck(case: Case) -> list[Finding]:
    """Passing states behind which nothing moves."""
    found = []
    for name, state in case.at_work:
        running = _running(case)
        evidence: dict[str, str | int] = {"state": state}
        if running:
            where, job = running[0]
            status = case.o.seen[where].status  # its own clock: that of the one who looks may be wrong
            age_s = (status.now if status is not None else case.o.now) - job.started
            if age_s < STUCK_S or _moved(case, running):
                continue
            evidence |= {
                "job": f"{where} {job.job} {job.name}",
                "age_s": age_s,
                "done": job.done,
                "total": job.total,
            }
            text = f"{case.vol} is {state} at {name}; {job.name} has made no progress and began {age_s} s ago"
        else:
            text = f"{case.vol} is {state} at {name}, and no job is at work"
        kind = ("storage", "proxy", "archive")[case.o.seen[name].server.kind]
        found.append(
            finding(
                "stuck",
                text,
                server=name,
                volume=case.vol,
                evidence=evidence,
                by_hand=f"look at the log of {name}; then on {case.o.seen[name].server.address}: "
                f"systemctl restart walbd-{kind}",
                look_again=True,
            )
        )
    return found


def _running(case: Case) -> list[tuple[str, JobInfo]]:
    return [
        (name, job)
        for name, seen in case.o.seen.items()
        for job in seen.jobs
        if job.volume == case.vol and job.state is JobState.RUNNING
    ]


def _moved(case: Case, running: list[tuple[str, JobInfo]]) -> bool:
    before = case.o.before
    if before is None:
        return False
    was = {
        (name, job.job): (job.phase, job.done)
        for name, seen in before.seen.items()
        for job in seen.jobs
        if job.volume == case.vol
    }
    return any(was.get((name, job.job)) != (job.phase, job.done) for name, job in running)


def _failed(case: Case) -> list[Finding]:
    """The last run of each kind of job, where it has failed not long ago."""
    found = []
    for name, seen in case.o.seen.items():
        last = {job.name: job for job in seen.jobs if job.volume == case.vol and job.name not in _TOLD_ELSEWHERE}
        now = seen.status.now if seen.status is not None else 0
        for job in last.values():
            if (job.name, job.error_code) in AS_ASKED:
                continue
            if job.state is JobState.FAILED and now - job.ended < JOB_NEWS_S:
                found.append(
                    finding(
                        "job-failed",
                        f"{job.name} of {case.vol} at {name} failed at {format_time(job.ended)}: {job.error}",
                        server=name,
                        volume=case.vol,
                        evidence={"job": job.job, "code": job.error_code},
                        by_hand=job.hint,
                    )
                )
    return found
