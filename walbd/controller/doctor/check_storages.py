"""What is wrong with a volume at storages. Pure. Source: docs/recovery.md."""

from __future__ import annotations

from walbd.controller import constants as k
from walbd.controller.doctor.case import Case
from walbd.controller.doctor.check_servers import LOG_WARN, format_left, time_left_s
from walbd.controller.doctor.findings import Finding, finding
from walbd.controller.doctor.steps import Consent, Ref, Step
from walbd.controller.overview import Word
from walbd.protocol.base import JobState
from walbd.protocol.control import VolumeStatus
from walbd.units import LB, format_size

NOT_SENT_S = 60  # log that waits for longer with an error is told of
LOG_ERROR_S = 3600  # a log that is full sooner is an error


def check_storages(case: Case) -> list[Finding]:
    """Judge the volume at each storage that answers, and what they are together."""
    found: list[Finding] = []
    for name, v in case.storages.items():
        found += _device(case, name, v)
        if v.state == k.BROKEN:
            found.append(_broken(case, name, v))
        elif v.overflow and v.state == k.sStandby:
            found.append(_standby_overflow(case, name, v))
        elif name != case.intent.target:
            found += _log(case, name, v)
    found += _forgotten(case)
    found += _two_targets(case)
    if case.intent.named:
        found.append(_other_target(case))
    target = case.target
    if target is not None and target.state != k.BROKEN and not target.device_error and not case.at_work:
        found += _target(case, target)
    elif not case.intent.target and case.storages and not case.at_work:
        found += _nobody(case)
    return found


def _device(case: Case, name: str, v: VolumeStatus) -> list[Finding]:
    if not v.device_error:
        return []
    device = v.device.rsplit("/", 1)[-1]
    address = case.o.seen[name].server.address
    return [
        finding(
            "device-down",
            f"the device of {case.vol} at {name}: {v.device_error}",
            server=name,
            volume=case.vol,
            evidence={"device": v.device, "error": v.device_error},
            by_hand=f"on {address}: systemctl restart walbd-device@{device} (or: walbd device serve {device})",
        )
    ]


def _device_path(case: Case, name: str) -> str:
    v = case.storages.get(name)
    return case.intent.devices.get(name, "") or (v.device if v is not None else "")


def _init_steps(case: Case, name: str) -> tuple[tuple[Step, ...], str]:
    """Return the step that makes the volume known, or what a person must say first."""
    path = _device_path(case, name)
    if not path:
        hint = f'name its device in the group file: [volumes.{case.vol}] devices = {{ {name} = "..." }}'
        return (), hint
    return (Step("init_storage", (Ref(name), case.vol, path)),), ""


def _broken(case: Case, name: str, v: VolumeStatus) -> Finding:
    init, by_hand = _init_steps(case, name)
    steps = (Step("clear", (Ref(name), case.vol), Consent.YES), *init) if init else ()
    more = _backup_after_init(case) if init and name == case.intent.target else ()
    return finding(
        "storage-broken",
        f"{name} cannot read its record of {case.vol}: {v.error}",
        server=name,
        volume=case.vol,
        evidence={"error": v.error, "device": _device_path(case, name)},
        by_hand=by_hand or "or put the file volume.json back from a copy and restart the storage",
        steps=(*steps, *more),
        waits_for=case.backup()[1] if more else (),
    )


def _backup_after_init(case: Case) -> tuple[Step, ...]:
    return tuple(step for step in case.backup()[0] if step.is_backup)


def _standby_overflow(case: Case, name: str, v: VolumeStatus) -> Finding:
    return finding(
        "overflow-standby",
        f"the log of {case.vol} at {name} has overflowed; it is standby, so nothing is lost",
        server=name,
        volume=case.vol,
        evidence={"state": v.state, "log_usage_pb": v.log_usage_pb, "log_capacity_pb": v.log_capacity_pb},
        steps=(Step("stop", (Ref(name), case.vol)), Step("go_standby", (Ref(name), case.vol))),
    )


def _log(case: Case, name: str, v: VolumeStatus) -> list[Finding]:
    if v.overflow or v.device_error or not v.log_capacity_pb:
        return []
    fill = v.log_usage_pb / v.log_capacity_pb
    left = time_left_s(case.o, name, v)
    if fill < LOG_WARN:
        return []
    is_soon = fill >= 0.9 or (left is not None and left < LOG_ERROR_S)
    return [
        finding(
            "log-filling",
            f"the log of {case.vol} at {name} is {fill:.0%} full; it overflows in: {format_left(left)}",
            word=Word.ERROR if is_soon else Word.WARN,
            server=name,
            volume=case.vol,
            evidence={
                "log_usage_b": v.log_usage_pb * v.pbs,
                "log_capacity_b": v.log_capacity_pb * v.pbs,
                "overflow_in": format_left(left),
                "not_delivered_b": v.lag_lb * LB,
                "error": v.error,
            },
            by_hand="mend what hinders the transfer: see the other findings",
            steps=(Step("kick_storage_all", ()),),
            look_again=True,
        )
    ]


def _forgotten(case: Case) -> list[Finding]:
    """Storages that ought to know the volume, and do not."""
    found = []
    for name in case.alive(k.K_STORAGE):
        is_target = name == case.intent.target
        said = name in case.intent.devices or (is_target and case.intent.target_said)
        if name in case.storages or not (said or is_target):
            continue
        if not said and not case.proxies:
            continue  # a volume that only archives know was given up on purpose, as far as one can see
        others = [s for s, v in case.storages.items() if v.state == k.sTarget]
        init, by_hand = _init_steps(case, name)
        more: tuple[Step, ...] = ()
        waits: tuple[str, ...] = ()
        if is_target and init and not others:
            more, waits = _backup_after_init(case), case.backup()[1]
        text = f"{name} does not know {case.vol}"
        if is_target:
            text += ", though it is to back it up" + ("" if case.intent.target_said else " (as it seems)")
        evidence: dict[str, str | int | list[str]] = {
            "state": k.sClear,
            "device": _device_path(case, name) or "not known",
            "archives_that_have_it": [a for a in case.archives if case.holds(a)],
            "proxies_that_have_it": list(case.proxies),
        }
        found.append(
            finding(
                "storage-metadata-lost",
                text,
                server=name,
                volume=case.vol,
                evidence=evidence,
                risk="nothing; it is not the target" if not is_target else "",
                word=None if is_target else Word.WARN,
                by_hand=by_hand,
                steps=(*init, *more),
                waits_for=waits,
            )
        )
    return found


def _two_targets(case: Case) -> list[Finding]:
    targets = [s for s, v in case.storages.items() if v.state == k.sTarget]
    if len(targets) < 2:
        return []
    steps: tuple[Step, ...] = ()
    said = case.intent.target if case.intent.target_said else ""
    if said in targets:
        for s in targets:
            if s != case.intent.target:
                steps += (
                    Step("stop", (Ref(s), case.vol, "force"), Consent.YES),
                    Step("reset", (Ref(s), case.vol), Consent.YES),
                    Step("go_standby", (Ref(s), case.vol)),
                )
    return [
        finding(
            "two-targets",
            f"{case.vol} is target at {' and '.join(targets)}",
            volume=case.vol,
            evidence={
                "targets": targets,
                "group_file_says": said,
            },
            by_hand="" if steps else f"say in the group file which one it is: [volumes.{case.vol}] target",
            steps=steps,
        )
    ]


def _other_target(case: Case) -> Finding:
    named, is_it = case.intent.named, case.intent.target
    return finding(
        "other-target",
        f"{is_it} backs {case.vol} up (it is {case.state_of(is_it)} there), "
        f"the group file names {named}, where it is {case.state_of(named)}",
        server=is_it,
        volume=case.vol,
        evidence={"target": is_it, "group_file_says": named, "state_there": case.state_of(named)},
        by_hand=f'correct the group file: [volumes.{case.vol}] target = "{is_it}"; or move the volume back: '
        f"walbc go-standby {case.vol} --storage {is_it}, walbc hash-backup {case.vol} --storage {named}",
    )


# The target


def _target(case: Case, v: VolumeStatus) -> list[Finding]:
    name = case.intent.target
    if v.overflow or v.lost == "wlog-overflow":
        return [_backup_finding(case, "overflow", _overflow_text(case, v), _log_evidence(v))]
    if v.lost:
        uuids: dict[str, str | int] = {"history_uuid": v.uuid, "device_log_uuid": v.log_uuid}
        text = f"the log of {case.vol} at {name} does not continue what was delivered: {v.error}"
        return [_backup_finding(case, "orphan", text, _log_evidence(v) | uuids)]
    others = [s for s, other in case.storages.items() if other.state == k.sTarget]
    if v.state == k.sStopped:
        if others:
            return []
        step = Step("start", (Ref(name), case.vol))
        text = f"{case.vol} is stopped at {name}: its log is kept and fills"
        return [
            finding(
                "storage-stopped",
                text,
                server=name,
                volume=case.vol,
                evidence=_log_evidence(v),
                steps=(step,),
                look_again=True,
            ),
            *_log(case, name, v),
        ]
    if v.state in (k.sSyncReady, k.sStandby) and not others:
        jobs = [job for job in case.o.seen[name].jobs if job.volume == case.vol and job.name.endswith("-backup")]
        last = jobs[-1] if jobs else None
        text = f"{case.vol} is {v.state} at {name}" + ("" if case.intent.target_said else ", and target nowhere")
        evidence: dict[str, str | int] = {"state": v.state}
        if last is not None:
            evidence |= {"last_job": last.name, "job_state": str(last.state), "job_error": last.error}
            words = {JobState.DONE: "is done", JobState.CANCELLED: "was given up"}
            how = words.get(last.state, f"has {last.state}")
            text += f"; the last {last.name} {how}" + (f": {last.error}" if last.error else "")
        return [_backup_finding(case, "no-target", text, evidence, look_again=True)]  # or a backup begins
    return [*_not_sent(case, name, v), *_log(case, name, v)]


def _not_sent(case: Case, name: str, v: VolumeStatus) -> list[Finding]:
    """A target that has had an error, and log waiting, for longer than any retry takes."""
    status = case.o.seen[name].status
    waits_s = status.now - v.waiting_since if status is not None and v.waiting_since and v.lag_lb else 0
    if v.state != k.sTarget or not v.error or waits_s <= NOT_SENT_S:
        return []
    return [
        finding(
            "log-not-sent",
            f"the log of {case.vol} at {name} has not been sent for {waits_s} s: {v.error}",
            server=name,
            volume=case.vol,
            evidence={"waits_s": waits_s, "not_delivered_b": v.lag_lb * LB, "error": v.error},
            by_hand="mend what the text names; it goes on by itself then. Where the log itself is damaged, only a "
            f"backup does: walbc stop {name} {case.vol}, walbc hash-backup {case.vol} --storage {name}",
            steps=(Step("kick_storage_all", ()),),
            look_again=True,
        )
    ]


def _nobody(case: Case) -> list[Finding]:
    states = {s: v.state for s, v in case.storages.items()}
    if k.sTarget in states.values() or case.dead(k.K_STORAGE):
        return []
    text = f"no storage is target of {case.vol}, and it is not clear which is to be"
    return [
        finding(
            "no-target",
            text,
            volume=case.vol,
            evidence=dict(states),
            by_hand=f'say it in the group file: [volumes.{case.vol}] target = "..."',
        )
    ]


def _log_evidence(v: VolumeStatus) -> dict[str, str | int]:
    return {
        "state": v.state,
        "overflow": int(v.overflow),
        "delivered_gid": v.done_gid,
        "delivered_time": v.done_time,
        "log_usage_pb": v.log_usage_pb,
        "log_capacity_pb": v.log_capacity_pb,
    }


def _overflow_text(case: Case, v: VolumeStatus) -> str:
    capacity = format_size(v.log_capacity_pb * v.pbs)
    return f"the log of {case.vol} at {case.intent.target} ({capacity}) has overflowed; the volume is {v.state}"


def _backup_finding(
    case: Case, code: str, text: str, evidence: dict[str, str | int], *, look_again: bool = False
) -> Finding:
    steps, waits = case.backup()
    by_hand = ""
    if waits:
        by_hand = f"first bring back {', '.join(waits)}, or take it out of the group file"
    if case.not_asked():
        by_hand += f"; {', '.join(case.not_asked())} may hold diffs that the archive still wants"
    return finding(
        code,
        text,
        server=case.intent.target,
        volume=case.vol,
        evidence=dict(evidence),
        by_hand=by_hand.removeprefix("; "),
        steps=steps,
        waits_for=waits,
        look_again=look_again,
    )


def orphan_or_gap(
    case: Case, code: str, text: str, evidence: dict[str, str | int], *, look_again: bool
) -> Finding:
    """A finding at the primary archive that only a backup mends."""
    found = _backup_finding(case, code, text, evidence)
    return finding(
        code,
        text,
        server=case.primary,
        volume=case.vol,
        evidence=found.evidence,
        by_hand=found.by_hand,
        steps=found.steps,
        waits_for=found.waits_for,
        look_again=look_again,
    )
