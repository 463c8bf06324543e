"""One look at a whole group: every server, volume and hop, how far behind it is, and what is wrong.

Pure: replies in, judgement and text out. Each line of the text begins with one of four words: ok, warn (look
at it), error (backup does not go on, or will stop), down (does not answer). Source: docs/controller.md,
"Status".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from walbd.controller import constants as k
from walbd.controller.servers import Server, ServerLayout, server_kind_to_str
from walbd.daemon.net import TLS_HINT
from walbd.errors import BadState, ConnectError, TimedOut, WalbError, code_of
from walbd.protocol.base import JobInfo, JobList, JobState
from walbd.protocol.codec import to_json_ready
from walbd.protocol.control import HopStatus, StatusReply, VolumeStatus
from walbd.units import LB, format_size, format_time

LAG_WARN_S: Final = 60
DISK_WARN: Final = 2  # times the reserve: less free space than that is told of
LOG_WARN: Final = 0.7  # of the capacity
LOG_ERROR: Final = 0.9
JOB_FAILED_RECENTLY_S: Final = 3600
# Jobs that end with an error because somebody wanted it so: they trouble nobody.
AS_ASKED: Final = {
    ("stop", BadState.code),  # it ended a backup: the volume is SyncReady then, and not Stopped
    ("virt-full-scan", ConnectError.code),  # who read the image has gone, and knows it
}


class Word(StrEnum):
    """How something is. The later, the worse."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"
    DOWN = "down"


_RANK: Final = {word: rank for rank, word in enumerate(Word)}


def worst(words: Sequence[Word]) -> Word:
    """Return the worst of several words; ok for none."""
    return max(words, key=_RANK.__getitem__, default=Word.OK)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that a person should know."""

    word: Word
    code: str  # stable
    server: str
    volume: str
    text: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A volume at one server; at a proxy: one archive that it is sent to."""

    word: Word
    server: str
    kind: str
    state: str
    text: str
    dest: str = ""
    lag_s: int = 0
    lag_b: int = 0


@dataclass(frozen=True, kw_only=True)
class VolumeView:
    """A volume over all servers. The lag is that of the archive which is farthest ahead, None if not known."""

    word: Word
    volume: str
    size_b: int
    targets: list[str]
    lag_s: int | None
    restorable_until: int  # [unix s], 0: nothing can be restored
    away: list[str]  # archives that it is sent to and that do not answer
    parts: list[Part]


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """A server, and all that it told."""

    word: Word
    name: str
    kind: str
    address: str
    text: str
    status: StatusReply | None


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job that runs, or whose failure is news."""

    word: Word
    server: str
    job: JobInfo


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Everything together."""

    word: Word
    servers: list[ServerView]
    volumes: list[VolumeView]
    jobs: list[JobView]
    alarms: list[Alarm]

    def to_json(self) -> dict[str, Any]:
        """Return what `walbc status --json` prints; `status` of a server is the message that it sent."""
        ready: dict[str, Any] = to_json_ready(self)
        return ready


def make_overview(
    replies: Mapping[Server, StatusReply | WalbError],
    jobs: Mapping[Server, JobList | WalbError],
    vol: str,
    layout: ServerLayout,
) -> Overview:
    """Judge what the servers answered; `vol` empty: all volumes."""
    answers = {s: r for s, r in replies.items() if isinstance(r, StatusReply)}
    look = _Look(layout, answers, {s.name for s in replies if s not in answers})
    for s, reply in replies.items():
        if isinstance(reply, StatusReply):
            look.check_server(s, reply)
        else:
            look.check_silent(s, reply)
    names = sorted({v.volume for _, v in look.parts() if (not vol or v.volume == vol) and v.state != k.sClear})
    volumes = [look.volume(name) for name in names]
    running = [view for s, r in jobs.items() if isinstance(r, JobList) for view in look.jobs(s, r)]
    servers = [look.server(s, reply) for s, reply in replies.items()]
    everything = [*(a.word for a in look.alarms), *(s.word for s in servers), *(v.word for v in volumes)]
    return Overview(
        word=worst(everything),
        servers=servers,
        volumes=volumes,
        jobs=running,
        alarms=sorted(look.alarms, key=lambda alarm: -_RANK[alarm.word]),
    )


@dataclass
class _Look:
    """The work on one overview."""

    layout: ServerLayout
    replies: dict[Server, StatusReply]
    silent: set[str]  # names of servers that did not answer
    alarms: list[Alarm] = field(default_factory=list)

    def alarm(self, word: Word, code: str, server: str, volume: str, text: str, hint: str = "") -> Word:
        self.alarms.append(Alarm(word=word, code=code, server=server, volume=volume, text=text, hint=hint))
        return word

    def parts(self, kind: int | None = None, vol: str = "") -> list[tuple[Server, VolumeStatus]]:
        """Return the volume at each server that answered."""
        return [
            (s, v)
            for s, reply in self.replies.items()
            for v in reply.volumes
            if (kind is None or s.kind == kind) and (not vol or v.volume == vol)
        ]

    # Servers

    def check_silent(self, s: Server, error: WalbError) -> None:
        away = isinstance(error, ConnectError | TimedOut)
        reason = str(error.facts.get("reason", error.message))
        if away:
            hint = error.hint if error.hint == TLS_HINT else "start the daemon"
            self.alarm(Word.DOWN, "unreachable", s.name, "", f"does not answer ({reason})", hint)
        else:
            self.alarm(Word.ERROR, code_of(error), s.name, "", error.message, error.hint)

    def check_server(self, s: Server, reply: StatusReply) -> None:
        told = [text for v in reply.volumes for text in (v.error, v.device_error) if text]
        for text in dict.fromkeys(reply.errors):
            if not any(each in text for each in told):  # what a volume says itself is not said twice
                self.alarm(Word.ERROR, "server-error", s.name, "", text)
        if reply.node != s.name:
            self.alarm(
                Word.WARN,
                "other-name",
                s.name,
                "",
                f"calls itself {reply.node}",
                "use the same name in the group file and as node_id",
            )
        self.check_disk(s, reply)
        away = [proxy for proxy in reply.proxies if not proxy.available]
        if away:
            none_left = len(away) == len(reply.proxies)
            self.alarm(
                Word.ERROR if none_left else Word.WARN,
                "proxy-unavailable",
                s.name,
                "",
                ("no proxy is available: " if none_left else "sees no proxy at ")
                + ", ".join(p.address for p in away),
                "start the proxies before the log is full" if none_left else "",
            )

    def check_disk(self, s: Server, reply: StatusReply) -> None:
        free_b, reserve_b = reply.server.get("free_b"), reply.server.get("free_reserve_b")
        if isinstance(free_b, int) and isinstance(reserve_b, int) and free_b < DISK_WARN * reserve_b:
            text = f"{format_size(free_b)} are free, and {format_size(reserve_b)} must stay free"
            hint = (
                "archives that are away keep diffs here" if s.kind == k.K_PROXY else "apply or delete old points"
            )
            self.alarm(Word.ERROR if free_b < reserve_b else Word.WARN, "disk-full", s.name, "", text, hint)

    def server(self, s: Server, reply: StatusReply | WalbError) -> ServerView:
        mine = [a for a in self.alarms if a.server == s.name and not a.volume]
        if isinstance(reply, StatusReply):
            n = len([v for v in reply.volumes if v.state != k.sClear])
            waiting = len(reply.tasks)
            text = f"{n} volume{'s' * (n != 1)}, walbd {reply.version}, pid {reply.pid}"
            text += f", {waiting} task{'s' * (waiting != 1)} waiting" if waiting else ""
        else:
            text = mine[0].text if mine else reply.message
        return ServerView(
            word=worst([a.word for a in mine]),
            name=s.name,
            kind=server_kind_to_str(s.kind),
            address=s.get_host_port(),
            text=text,
            status=reply if isinstance(reply, StatusReply) else None,
        )

    # Volumes

    def volume(self, vol: str) -> VolumeView:
        before = len(self.alarms)
        parts = [self.storage_part(s, v) for s, v in self.parts(k.K_STORAGE, vol)]
        for s, v in self.parts(k.K_PROXY, vol):
            parts += self.proxy_parts(s, v)
        archives = self.parts(k.K_ARCHIVE, vol)
        for s, v in archives:
            parts.append(self.archive_part(s, v))
            parts += [self.replica(s, v, hop) for hop in v.hops if self.is_news(v, hop)]
        self.check_together(vol)
        away = sorted(self.fed(vol).keys() & self.silent)
        targets = [s.name for s, v in self.parts(k.K_STORAGE, vol) if v.state == k.sTarget]
        lags = [lag for _, v in archives if (lag := self.lag(vol, v)) is not None]
        sizes = [v.size_lb * LB for _, v in self.parts(vol=vol)]
        return VolumeView(
            word=worst(
                [*(p.word for p in parts), *(a.word for a in self.alarms[before:]), *([Word.DOWN] if away else [])]
            ),
            volume=vol,
            size_b=max(sizes, default=0),
            targets=targets,
            lag_s=min(lags, default=None),
            restorable_until=max((v.latest_time for _, v in archives if v.restorable), default=0),
            away=away,
            parts=parts,
        )

    def storage_part(self, s: Server, v: VolumeStatus) -> Part:
        words = [self.broken(s, v)]
        if v.device_error:
            words.append(
                self.alarm(
                    Word.DOWN, "device-down", s.name, v.volume, f"device: {v.device_error}", "start the device"
                )
            )
        if v.overflow:
            hint = f"walbc hash-backup {v.volume} --storage {s.name}"
            text = "the log has overflowed: what is written now is not backed up"
            words.append(self.alarm(Word.ERROR, "overflow", s.name, v.volume, text, hint))
        fill = v.log_usage_pb / v.log_capacity_pb if v.log_capacity_pb else 0.0
        if fill >= LOG_WARN and not v.overflow:
            word = Word.ERROR if fill >= LOG_ERROR else Word.WARN
            hint = "when it is full, only a backup can continue the volume: see what hinders the transfer"
            words.append(self.alarm(word, "log-fill", s.name, v.volume, f"the log is {fill:.0%} full", hint))
        if v.state == k.sStopped:
            hint = f"walbc start {s.name} {v.volume}" if not v.overflow else ""
            words.append(self.alarm(Word.WARN, "stopped", s.name, v.volume, "stopped: nothing is sent", hint))
        elif v.state == k.sSyncReady:
            hint = f"walbc full-backup {v.volume} --storage {s.name}"
            words.append(self.alarm(Word.WARN, "not-started", s.name, v.volume, "waits for a backup", hint))
        lag_b = v.lag_lb * LB
        lag_s = max(0, self.replies[s].now - v.waiting_since) if lag_b and v.waiting_since else 0
        if v.state == k.sTarget and lag_s > LAG_WARN_S:
            words.append(self.alarm(Word.WARN, "lag", s.name, v.volume, f"{_behind(lag_s, lag_b)} behind its log"))
        capacity = format_size(v.log_capacity_pb * v.pbs)
        text = f"log {fill:.0%} of {capacity}" if v.log_capacity_pb else "log unknown"
        if v.state != k.sStandby:
            text += f", {_behind(lag_s, lag_b)} to send"
        return Part(
            word=worst(words),
            server=s.name,
            kind="storage",
            state=v.state,
            text=text + _stopping(v),
            lag_s=lag_s,
            lag_b=lag_b,
        )

    def proxy_parts(self, s: Server, v: VolumeStatus) -> list[Part]:
        word = self.broken(s, v)
        if v.state == k.pStopped:
            word = worst(
                [
                    word,
                    self.alarm(
                        Word.WARN,
                        "stopped",
                        s.name,
                        v.volume,
                        "stopped: takes and sends nothing",
                        f"walbc start {s.name} {v.volume}",
                    ),
                ]
            )
        if not v.hops:
            text = "sends to no archive" + _stopping(v)
            return [Part(word=word, server=s.name, kind="proxy", state=v.state, text=text)]
        return [self.hop(s, v, hop, word) for hop in v.hops]

    def hop(self, s: Server, v: VolumeStatus, hop: HopStatus, word: Word) -> Part:
        lag_s = max(0, self.replies[s].now - hop.oldest) if hop.diffs and hop.oldest else 0
        text = f"{hop.diffs} diff{'s' * (hop.diffs != 1)}, {_behind(lag_s, hop.size_b)} to send"
        if hop.sending:
            text += ", sending"
        is_old = bool(hop.damaged) and not hop.diffs  # unless missed: it stays until the archive answers again
        if self.misses(v.volume, hop):
            why = f"wdiffs for {hop.dest} were damaged: {hop.error_text}"
            hint = f"see wdiff-damaged in `walbc doctor {v.volume}`"
            word = worst([word, self.alarm(Word.ERROR, "wdiff-damaged", s.name, v.volume, why, hint)])
        elif hop.error and not is_old:
            why = hop.error_text or "the archive refused them"
            hint = f"put it right at {hop.dest}, then: walbc kick-all {s.name}"
            word = worst(
                [
                    word,
                    self.alarm(
                        Word.ERROR, "send-error", s.name, v.volume, f"cannot send to {hop.dest}: {why}", hint
                    ),
                ]
            )
        elif lag_s > LAG_WARN_S:
            why = f": {hop.error_text}" if hop.error_text else ""
            behind = f"{_behind(lag_s, hop.size_b)} wait for {hop.dest}{why}"
            word = worst([word, self.alarm(Word.WARN, "lag", s.name, v.volume, behind)])
        return Part(
            word=word,
            server=s.name,
            kind="proxy",
            dest=hop.dest,
            state=v.state,
            text=text + _stopping(v),
            lag_s=lag_s,
            lag_b=hop.size_b,
        )

    def misses(self, vol: str, hop: HopStatus) -> bool:
        """Say whether an archive lacks what was damaged on its way, as far as it has told."""
        latest = [v.latest_gid for s, v in self.parts(k.K_ARCHIVE, vol) if s.name == hop.dest]
        return any(end > max(latest, default=0) for _, end in hop.damaged)

    def archive_part(self, s: Server, v: VolumeStatus) -> Part:
        words = [self.broken(s, v)]
        if v.state == k.aStopped:
            hint = f"walbc start {s.name} {v.volume}"
            words.append(self.alarm(Word.WARN, "stopped", s.name, v.volume, "stopped: takes no diffs", hint))
        elif v.state == k.aSyncReady:
            words.append(self.alarm(Word.WARN, "not-started", s.name, v.volume, "holds no image yet"))
        elif v.state == k.aArchived and not v.restorable:
            words.append(
                self.alarm(Word.WARN, "nothing-restorable", s.name, v.volume, "nothing can be restored yet")
            )
        lag_s = self.lag(v.volume, v)
        text = f"{v.restorable} point{'s' * (v.restorable != 1)}"
        if v.restorable:
            text += f" from {format_time(v.oldest_time)} to {format_time(v.latest_time)}"
        text += f", {v.diffs} diff{'s' * (v.diffs != 1)} {format_size(v.diffs_b)}"
        text += f", {lag_s} s behind" if lag_s is not None else ""
        busy = [f"{name} runs" for name, count in v.actions.items() if count]
        return Part(
            word=worst(words),
            server=s.name,
            kind="archive",
            state=v.state,
            text=", ".join([text, *busy]) + _stopping(v),
            lag_s=lag_s or 0,
        )

    def is_news(self, v: VolumeStatus, hop: HopStatus) -> bool:
        """Say whether the position of a replica tells anything: one that proxies feed tells of itself."""
        return hop.error or hop.sending or hop.dest not in self.fed(v.volume)

    def replica(self, s: Server, v: VolumeStatus, hop: HopStatus) -> Part:
        """Judge a copy that an archive has made at another one: it is as old as the last replication."""
        lag_s = max(0, self.replies[s].now - hop.oldest) if hop.diffs and hop.oldest else 0
        text = f"gid {hop.gid_b}, {hop.diffs} diff{'s' * (hop.diffs != 1)}, {_behind(lag_s, hop.size_b)} missing"
        text += f", seen {format_time(hop.last_sent)}"
        word = Word.OK
        if hop.error:
            why = f"cannot replicate to {hop.dest}: {hop.error_text or 'it refused'}"
            hint = f"put it right, then: walbc replicate {v.volume} {hop.dest} --from {s.name}"
            word = self.alarm(Word.WARN, "replica-error", s.name, v.volume, why, hint)
        return Part(
            word=word,
            server=s.name,
            kind="archive",
            dest=hop.dest,
            state="replicating" if hop.sending else "replica",
            text=text,
            lag_s=lag_s,
            lag_b=hop.size_b,
        )

    def broken(self, s: Server, v: VolumeStatus) -> Word:
        if v.state == k.BROKEN:
            return self.alarm(Word.ERROR, "broken", s.name, v.volume, v.error or "the volume is broken")
        if not v.error or v.error == v.device_error or v.overflow:  # the last two have alarms of their own
            return Word.OK
        return self.alarm(Word.ERROR, "trouble", s.name, v.volume, v.error)

    def lag(self, vol: str, at_archive: VolumeStatus) -> int | None:
        """Return how old the newest snapshot at an archive is, 0 when it has everything; None: not known."""
        for s, v in self.parts(k.K_STORAGE, vol):
            if v.state == k.sTarget and not v.device_error:
                if not v.lag_lb and at_archive.latest_gid >= v.done_gid:
                    return 0
                return max(0, self.replies[s].now - at_archive.latest_time) if at_archive.latest_time else None
        return None

    def fed(self, vol: str) -> dict[str, list[str]]:
        """Return the archives that a volume is sent to, each with the proxies that do so."""
        fed: dict[str, list[str]] = {}
        for s, v in self.parts(k.K_PROXY, vol):
            for hop in v.hops:
                fed.setdefault(hop.dest, []).append(s.name)
        return fed

    def all_seen(self, servers: Sequence[Server]) -> bool:
        """Tell whether all these servers have answered."""
        return all(s in self.replies for s in servers)

    def check_together(self, vol: str) -> None:
        """Find what shows only when several servers are compared."""
        targets = [(s, v) for s, v in self.parts(k.K_STORAGE, vol) if v.state == k.sTarget]
        if len(targets) > 1:
            text = f"several storages are Target: {', '.join(s.name for s, _ in targets)}"
            self.alarm(Word.ERROR, "two-targets", "", vol, text, "stop all but one: two corrupt the history")
        if not targets:
            states = {v.state for _, v in self.parts(k.K_STORAGE, vol)}
            if states == {k.sStandby} and self.all_seen(self.layout.storageL):
                hint = f"walbc full-backup {vol} --storage NAME"
                self.alarm(Word.WARN, "no-target", "", vol, "no storage is its target: nothing is sent", hint)
            return
        proxies = [s for s in self.replies if s.kind == k.K_PROXY]
        fed = self.fed(vol)
        if proxies and not fed and self.all_seen(self.layout.proxyL):
            hint = f"walbc start-synchronizing ARCHIVE {vol}"
            self.alarm(Word.ERROR, "not-fed", "", vol, "is sent to no archive", hint)
        for archive, senders in fed.items():
            missing = [p.name for p in proxies if p.name not in senders]
            if missing:
                text = f"{', '.join(missing)} does not send to {archive}"
                self.alarm(Word.WARN, "half-fed", "", vol, text, f"walbc start-synchronizing {archive} {vol}")
        known = {
            s.name: {v.volume for v in reply.volumes if v.state != k.sClear} for s, reply in self.replies.items()
        }
        names = {s.name for s in self.layout.archiveL}
        for archive in fed:
            if archive not in names:
                text = f"is sent to {archive}, which is not in the layout"
                self.alarm(Word.WARN, "unknown-archive", "", vol, text)
            elif archive in known and vol not in known[archive]:
                text = f"is sent to {archive}, which does not know it"
                hint = f"walbc stop-synchronizing {archive} {vol}, or fill that archive"
                self.alarm(Word.WARN, "clear-archive", archive, vol, text, hint)
        for s, v in self.parts(k.K_ARCHIVE, vol):
            source = targets[0][1]
            if s.name in fed and v.state == k.aArchived and source.uuid and v.uuid and v.uuid != source.uuid:
                text = f"{s.name} holds another history than {targets[0][0].name} sends"
                self.alarm(Word.ERROR, "other-history", s.name, vol, text, "take a full or hash backup")

    # Jobs

    def jobs(self, s: Server, reply: JobList) -> list[JobView]:
        newest = {(job.name, job.volume): job for job in reply.jobs}
        now = self.replies[s].now
        views = []
        for job in reply.jobs:
            if job.state is JobState.RUNNING:
                views.append(JobView(word=Word.OK, server=s.name, job=job))
            elif (
                job.state is JobState.FAILED
                and newest[job.name, job.volume] is job
                and now - job.ended < JOB_FAILED_RECENTLY_S
                and (job.name, job.error_code) not in AS_ASKED
            ):
                text = f"{job.name} failed at {format_time(job.ended)}: {job.error}"
                word = self.alarm(Word.WARN, "job-failed", s.name, job.volume, text, job.hint)
                views.append(JobView(word=word, server=s.name, job=job))
        return views


def _behind(lag_s: int, lag_b: int) -> str:
    return f"{lag_s} s {format_size(lag_b)}"


def _stopping(v: VolumeStatus) -> str:
    return f", stopping ({v.stopping})" if v.stopping else ""
