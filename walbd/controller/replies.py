"""Replies of servers as text, one function for each type of reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.data import create_compress_opt_from_str
from walbd.controller.servers import server_kind_to_str
from walbd.errors import UsageError
from walbd.ids import NO_GID
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import JobAccepted, JobInfo, JobList, JobState, Ok
from walbd.protocol.codec import Message, to_json_ready
from walbd.units import format_time


def ltsv(**values: object) -> str:
    """Write one line of tab-separated `label:value`."""
    return "\t".join(f"{name}:{value}" for name, value in values.items())


def lines(rows: Iterable[object]) -> str:
    """Write one row a line."""
    return "\n".join(str(row) for row in rows)


def compress_text(compress: str) -> str:
    """Write a proxy's `KIND[:LEVEL]` as KIND:LEVEL:CPUS; as it is where it has a form that we do not know."""
    try:
        return str(create_compress_opt_from_str(compress))
    except UsageError:
        return compress


def diffs_text(reply: c.Diffs) -> str:
    """Write one diff a line, and after them where to go on when one message did not hold all."""
    rows = [diff.describe() for diff in reply.diffs]
    return lines([*rows, f"more from generation {reply.diffs[-1].begin.gid_b + 1} on"] if reply.more else rows)


def job_text(job: JobInfo) -> str:
    """Write a job as one line: number, state, name, volume, how far, result or error."""
    parts = [f"{job.job} {job.state} {job.name} {job.volume or '-'}"]
    if job.state is JobState.RUNNING:
        parts.append(job_progress_text(job))
    parts += [f"{name}={value}" for name, value in job.result.items() if name != "code" or not job.error]
    if job.error:
        parts.append(f"{job.error_code}: {job.error}")
    return " ".join(part for part in parts if part)


def job_progress_text(job: JobInfo) -> str:
    """Write how far a running job is: its phase, and a percentage where the end is known."""
    if not job.total:
        return job.phase
    return f"{job.phase} {100 * job.done // job.total}%".strip()


def latest_text(kind: int, reply: c.Latest) -> str:
    """Write the newest snapshots; what a kind of server does not have is left out."""
    word = server_kind_to_str(kind)
    rows = []
    for volume, archive, gid, lsid, timestamp in reply.rows:
        when = format_time(timestamp)
        if gid == NO_GID:  # nothing waits there
            rows.append(ltsv(name=volume, kind=word, archive=archive, gid="", timestamp=""))
        elif kind == K_STORAGE:
            rows.append(ltsv(name=volume, kind=word, gid=gid, lsid=lsid, timestamp=when))
        elif kind == K_PROXY:
            rows.append(ltsv(name=volume, kind=word, archive=archive, gid=gid, timestamp=when))
        else:
            rows.append(ltsv(name=volume, kind=word, gid=gid, timestamp=when))
    return lines(rows)


def actions_text(_kind: int, reply: c.Actions) -> str:
    """Write `VOL (ACTION COUNT TIME)...`, one volume a line."""
    volumes: dict[str, list[str]] = {}
    for volume, action, count, began in reply.rows:
        volumes.setdefault(volume, []).append(f"{action} {count} {format_time(began)}")
    return lines(" ".join([volume, *rows]) for volume, rows in volumes.items())


def _stats(reply: c.RequestStats) -> str:
    total: dict[str, tuple[int, float]] = {}
    rows = []
    for name, client, count, mean_s in reply.rows:
        rows.append(f"PROTOCOL_COUNT\t{name}\t{client}\t{count}")
        before, elapsed = total.get(name, (0, 0.0))
        total[name] = (before + count, elapsed + count * mean_s)
    rows += [f"PROTOCOL_LATENCY\t{name}\t{s / n:.6f}" for name, (n, s) in total.items() if n]
    return lines(rows)


def _log_usage(reply: c.LogUsages) -> str:
    return lines(
        ltsv(name=row.volume, usage_pb=row.usage_pb, capacity_pb=row.capacity_pb, pbs=row.pbs)
        for row in reply.rows
    )


def ts_delta_text(kind: int, reply: c.TsDeltas) -> str:
    """Write the lag, one volume and destination a line."""
    return lines(ltsv(**ts_delta_dict(kind, row)) for row in reply.rows)


def ts_delta_dict(kind: int, row: c.TsDelta) -> dict[str, Any]:
    """Return one row of the lag by label; `kind` is that of the server which was asked."""
    return {
        "name": row.volume,
        "dest": row.dest,
        "kind": server_kind_to_str(kind),
        "dest_kind": server_kind_to_str(K_ARCHIVE),
        "gid": row.gid,
        "ts": format_time(row.timestamp),
        "dest_gid": row.dest_gid,
        "dest_ts": format_time(row.dest_timestamp),
        "ts_delta": row.delta_s,
    }


def gap_text(gap: m.Gap) -> str:
    """Write a gap as `GIDB TIME GIDE TIME CAUSE`; `---` for the end of one that is open."""
    end = f"{gap.gid_e} {format_time(gap.end)}" if gap.end else "--- ---"
    return f"{gap.gid_b} {format_time(gap.begin)} {end} {gap.cause}"


def _replicas(reply: m.ReplicaPositions) -> str:
    return lines(
        ltsv(
            name=row.node,
            address=row.address,
            gid=row.gid,
            timestamp=format_time(row.timestamp),
            seen=format_time(row.seen),
            failures=row.failures,
            error=row.error,
        )
        for row in reply.rows
    )


def reloaded_lines(reply: m.Reloaded) -> list[str]:
    """Write what a reload did: `applied NAME` and `needs-restart NAME` lines."""
    return [f"applied {name}" for name in reply.applied] + [
        f"needs-restart {name}" for name in reply.needs_restart
    ]


def _version(reply: c.VersionInfo) -> str:
    return ltsv(
        version=reply.version,
        log_version=reply.log_format,
        protocol=f"{reply.protocol_min}-{reply.protocol_max}",
        python=reply.python,
    )


def _status(reply: c.StatusReply) -> str:
    """Write a status as `path value` lines, so that fields which are new here are printed, too."""
    rows: list[str] = []
    _flatten("", to_json_ready(reply), rows)
    return lines(rows)


def _flatten(path: str, value: Any, rows: list[str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{path}.{key}" if path else key, item, rows)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            label = str(item.get("volume") or item.get("dest") or i) if isinstance(item, dict) else str(i)
            _flatten(f"{path}.{label}", item, rows)
    elif value not in ("", None):
        rows.append(f"{path} {value}")


SHOW: Final[dict[type[Message], Callable[[Any], str]]] = {
    Ok: lambda _: "",
    JobAccepted: lambda reply: str(reply.job),
    JobInfo: job_text,
    JobList: lambda reply: lines(job_text(job) for job in reply.jobs),
    c.TextValue: lambda reply: reply.value,
    c.IntValue: lambda reply: str(reply.value),
    c.BoolValue: lambda reply: str(int(reply.value)),
    c.UuidValue: lambda reply: reply.value.hex(),
    c.Names: lambda reply: lines(reply.names),
    c.Gids: lambda reply: lines(reply.gids),
    c.GidValue: lambda reply: str(reply.gid),
    c.HostType: lambda reply: str(reply.kind),
    c.VersionInfo: _version,
    c.RequestStats: _stats,
    c.Kicked: lambda reply: str(reply.tasks),
    c.LogUsages: _log_usage,
    c.ArchiveInfo: lambda reply: f"{reply.address} {compress_text(reply.compress)} {reply.delay_s}",
    c.Diffs: diffs_text,
    c.RestorePoints: lambda reply: lines(reply.points),
    c.BaseValue: lambda reply: reply.base.describe(),
    c.SnapshotValue: lambda reply: str(reply.snapshot),
    c.StatusReply: _status,
    m.BaseStates: lambda reply: lines(ltsv(name=name, metastate=base.describe()) for name, base in reply.rows),
    m.Gaps: lambda reply: lines(map(gap_text, reply.gaps)),
    m.ReplicaPositions: _replicas,
    m.Reloaded: lambda reply: lines(reloaded_lines(reply)),
}
