"""The commands of one server as words, the requests they stand for, and replies as text.

This is what `walbc -a HOST -p PORT COMMAND ...` and `Controller.run_ctl` accept. Values are printed one per
line; tables as lines of tab-separated `label:value`. Source: docs/controller.md, "One server".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from walbd.controller import words as w
from walbd.controller.client import ended_job
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE, serverKinds
from walbd.controller.replies import actions_text, latest_text, ts_delta_text
from walbd.controller.servers import Server, server_kind_to_str
from walbd.controller.words import Command
from walbd.errors import UsageError
from walbd.ids import node_name
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobAccepted, JobInfo, JobState, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.units import parse_size

_JOB_WAIT_S: Final = 20.0  # of one request
_ALL: Final = frozenset(serverKinds)
_S, _P, _A = frozenset({K_STORAGE}), frozenset({K_PROXY}), frozenset({K_ARCHIVE})


def find_command(args: Sequence[str], kind: int | None = None) -> tuple[Command, list[str]]:
    """Return the command that the words begin with and its arguments; `kind` None: of any server.

    Raises UsageError for an unknown one, and for one that this kind of server does not know.
    """
    if not args:
        raise UsageError("no command", hint="see `walbc -a HOST -p PORT --help`")
    found = [(cmd, list(args[n:])) for n in (2, 1) for cmd in COMMANDS if cmd.name == " ".join(args[:n])]
    if not found:
        raise _unknown(args)
    for cmd, rest in found:
        if kind is not None and kind in cmd.kinds:
            return cmd, rest
        if kind is None and cmd.counts[0] <= len(rest) <= cmd.counts[1]:
            return cmd, rest
    cmd, rest = found[0]
    if kind is None:
        return cmd, rest
    kinds = " or ".join(server_kind_to_str(k) for k in sorted({k for cmd, _ in found for k in cmd.kinds}))
    raise UsageError(
        "this kind of server does not know the command",
        hint=f"it is for: {kinds}",
        command=cmd.name,
        kind=server_kind_to_str(kind),
    )


def run_command(ask: Callable[[Server, Request[Any]], Message], s: Server, args: Sequence[str]) -> str:
    """Carry out one command at a server and return its text."""
    cmd, rest = find_command(args, s.kind)
    request = cmd.request(rest)
    if isinstance(request, m.VirtFullScan):
        raise UsageError("an image is no text", hint="use virt_full_scan, or `walbc scan`", command=cmd.name)
    return cmd.text(s.kind, finish(ask, s, cmd, ask(s, request)))


def finish(ask: Callable[[Server, Request[Any]], Message], s: Server, cmd: Command, reply: Message) -> Message:
    """Return the reply of a command; one that waits for the job it has begun: the result of that."""
    if not cmd.result or not isinstance(reply, JobAccepted):
        return reply
    while True:
        job = ask(s, WaitJob(job=reply.job, wait_s=_JOB_WAIT_S))
        assert isinstance(job, JobInfo)
        if job.state is not JobState.RUNNING:
            return c.TextValue(value=str(ended_job(s, job).result.get(cmd.result, "")))


def _unknown(args: Sequence[str]) -> UsageError:
    first = args[0]
    below = [cmd.name for cmd in COMMANDS if cmd.name.split()[0] == first]
    if below:
        return UsageError("unknown command", hint="there are: " + ", ".join(below), command=" ".join(args[:2]))
    return UsageError("unknown command", hint="see `walbc -a HOST -p PORT --help`", command=first)


COMMANDS: Final[tuple[Command, ...]] = (
    Command("status", "[VOL]", _ALL, w.any_volume(c.GetStatus), "everything that the server knows about itself"),
    Command("get state", "VOL", _ALL, w.one(c.GetState), "state of a volume; Clear for an unknown one"),
    Command("get host-type", "", _ALL, w.none(c.GetHostType), "storage, proxy or archive"),
    Command("get vol", "", _ALL, w.none(c.GetVolumes), "names of volumes"),
    Command("get pid", "", _ALL, w.none(c.GetPid), "process id"),
    Command("get latest-snap", "[VOL]", _ALL, w.any_volume(c.GetLatestSnap), "newest snapshots", latest_text),
    Command("get handler-stat", "", _ALL, w.none(c.GetHandlerStat), "counts and latencies of requests"),
    Command(
        "get num-action",
        "VOL ACTION",
        _ALL,
        lambda args: c.GetNumAction(volume=w.vol(args[0]), action=args[1]),
        "how many actions of a name run",
    ),
    Command("get all-actions", "", _ALL, w.none(c.GetActions), "actions of all volumes", actions_text),
    Command("get jobs", "[VOL]", _ALL, w.any_volume(GetJobs), "jobs that run or ran"),
    Command("wait-job", "JOB [SECONDS]", _ALL, w.wait_job, "state of a job, when it has ended or after a while"),
    Command("clear-vol", "VOL", _ALL, w.one(c.ClearVol), "forget a volume and remove its files there"),
    Command("start", "VOL [ROLE]", _ALL, w.start, "start a volume; ROLE at storages: target or standby"),
    Command("stop", "VOL [MODE]", _ALL, w.stop, "stop a volume; MODE: graceful, force, at proxies also empty"),
    Command("shutdown", "[MODE]", _ALL, w.shutdown, "end the daemon; MODE: graceful or force"),
    Command("version", "", _ALL, w.none(c.GetVersion), "what runs there"),
    Command("reload", "", _ALL, w.none(m.Reload), "read the configuration again"),
    Command(
        "exec",
        "ARG...",
        _ALL,
        w.refused("daemons run no programs for others", "use ssh"),
        "refused: daemons run no programs",
    ),
    Command(
        "sleep",
        "[SECONDS]",
        _ALL,
        w.refused("daemons do not sleep on request", "use `wait-job` to wait for work"),
        "refused: daemons do not sleep on request",
    ),
    # storage
    Command(
        "init-vol",
        "VOL DEVICE",
        _S,
        lambda args: c.StorageInitVol(volume=w.vol(args[0]), device=args[1]),
        "take over a device under a volume name",
    ),
    Command(
        "reset-vol",
        "VOL [GID]",
        _S,
        lambda args: c.ResetVol(volume=w.vol(args[0]), **w.opt_gid(args[1:])),
        "wipe the log of a stopped volume",
    ),
    Command(
        "full-bkp",
        "VOL [BULK]",
        _S,
        lambda args: c.FullBackup(volume=w.vol(args[0]), **w.bulk(args[1:])),
        "copy the whole device to the primary archive",
    ),
    Command(
        "hash-bkp",
        "VOL [BULK]",
        _S,
        lambda args: c.HashBackup(volume=w.vol(args[0]), **w.bulk(args[1:])),
        "send what differs from the primary archive's image",
    ),
    Command(
        "retarget",
        "HOST:PORT [HOST:PORT,...]",
        _S,
        w.retarget,
        "use another primary archive and other proxies",
    ),
    Command("resize", "VOL SIZE", _S | _P, w.resize, "grow a volume; at storages 0: size of the data device"),
    Command(
        "dbg-dump-logpack-header",
        "VOL LSID",
        _S,
        lambda args: m.DumpLogHeader(volume=w.vol(args[0]), lsid=w.gid(args[1])),
        "keep a block of the log as a file in the volume's directory",
    ),
    Command("snapshot", "VOL", _S, w.one(c.TakeSnapshot), "take a snapshot; prints its generation"),
    Command("kick", "", _S, w.none(c.Kick), "hurry what waits"),
    Command(
        "set-full-scan-bps",
        "SIZE",
        _S,
        lambda args: c.SetFullScanBps(bytes_per_s=parse_size(args[0])),
        "limit full scans [byte/s]; 0: no limit",
    ),
    Command("get is-overflow", "VOL", _S, w.one(c.GetIsOverflow), "1 when the log has overflowed"),
    Command("get log-usage", "[VOL]", _S, w.any_volume(c.GetLogUsage), "how full the log is"),
    Command("get uuid", "VOL", _S | _A, w.one(c.GetUuid), "uuid of the log"),
    Command("get ts-delta", "", _S | _A, w.none(c.GetTsDelta), "how far destinations are behind", ts_delta_text),
    # proxy
    Command("archive-info list", "VOL", _P, w.one(c.ListArchiveInfo), "archives that a volume is sent to"),
    Command(
        "archive-info get",
        "VOL ARCHIVE",
        _P,
        lambda args: c.GetArchiveInfo(volume=w.vol(args[0]), archive=node_name(args[1])),
        "HOST:PORT KIND:LEVEL:CPUS DELAY",
    ),
    Command(
        "archive-info add",
        "VOL ARCHIVE HOST:PORT [COMPRESS] [DELAY]",
        _P,
        lambda args: c.AddArchiveInfo(volume=w.vol(args[0]), info=w.archive_info(args)),
        "send a volume to an archive, too",
    ),
    Command(
        "archive-info update",
        "VOL ARCHIVE HOST:PORT [COMPRESS] [DELAY]",
        _P,
        lambda args: c.UpdateArchiveInfo(volume=w.vol(args[0]), info=w.archive_info(args)),
        "change where and how",
    ),
    Command(
        "archive-info delete",
        "VOL ARCHIVE",
        _P,
        lambda args: c.DeleteArchiveInfo(volume=w.vol(args[0]), archive=node_name(args[1])),
        "send no more; what is unsent is lost",
    ),
    Command(
        "kick",
        "[VOL] [ARCHIVE]",
        _P,
        lambda args: c.Kick(volume=w.opt_vol(args), archive=node_name(args[1]) if len(args) > 1 else ""),
        "hurry what waits",
    ),
    Command(
        "get is-wdiff-send-error",
        "VOL ARCHIVE",
        _P,
        lambda args: c.GetIsWdiffSendError(volume=w.vol(args[0]), archive=node_name(args[1])),
        "1 when the archive has refused for a reason that needs a person",
    ),
    Command(
        "get proxy-diff",
        "VOL [ARCHIVE] [GID]",
        _P,
        w.proxy_diff,
        "diffs that wait there, from a generation on",
    ),
    # archive
    Command("init-vol", "VOL", _A, w.one(c.ArchiveInitVol), "make a volume known"),
    Command("reset-vol", "VOL", _A, w.one(c.ResetVol), "remove all data of a volume, keep it known"),
    Command("restore", "VOL GID", _A, w.with_gid(c.Restore), "make an image of a snapshot"),
    Command("del-restored", "VOL GID", _A, w.with_gid(c.DelRestored), "remove such an image"),
    Command("apply", "VOL GID", _A, w.with_gid(c.Apply), "write diffs into the base; older snapshots vanish"),
    Command("del-cold", "VOL GID", _A, w.with_gid(m.DelCold), "remove a cold image"),
    Command("merge", "VOL GIDB gid|size GIDE|MIB", _A, w.merge, "make one diff of several"),
    Command(
        "replicate",
        "VOL gid|size GID|MIB HOST:PORT [RESYNC] [DONTMERGE] [COMPRESS] [MERGESIZE] [BULK]",
        _A,
        w.replicate,
        "bring another archive up to this one; RESYNC, DONTMERGE: 0 or 1",
    ),
    Command("resize", "VOL SIZE [zeroclear]", _A, w.resize, "grow the base image"),
    Command("enable-snapshot", "VOL GID...", _A, w.with_gids(m.EnableSnapshot), "protect snapshots from merging"),
    Command("disable-snapshot", "VOL GID...", _A, w.with_gids(m.DisableSnapshot), "let merging remove snapshots"),
    Command(
        "bhash",
        "VOL GID [BULK] [SIZE] [SLEEP%]",
        _A,
        w.block_hash,
        "hash of the image of a snapshot",
        result="hash",
    ),
    Command(
        "virt-full-scan",
        "DEST|stdout VOL GID [BULK] [SIZE] [SLEEP%]",
        _A,
        w.virt_full_scan,
        "write the image of a snapshot to a file or device",
    ),
    Command("scrub", "VOL", _A, w.one(m.Scrub), "read and verify everything that is stored of a volume"),
    Command("gc-diff", "VOL", _A, w.one(c.GcDiff), "remove diffs that nothing needs; prints how many"),
    Command("get diff", "VOL [GIDB] [GIDE]", _A, w.any_diffs(c.GetDiff), "diffs"),
    Command(
        "get applicable-diff",
        "VOL [GID]",
        _A,
        lambda args: c.GetApplicableDiff(volume=w.vol(args[0]), **w.opt_gid(args[1:])),
        "diffs that continue the base",
    ),
    Command("get num-diff", "VOL [GIDB] [GIDE]", _A, w.any_diffs(m.GetNumDiff), "how many diffs"),
    Command("get total-diff-size", "VOL [GIDB] [GIDE]", _A, w.any_diffs(m.GetTotalDiffSize), "their size [byte]"),
    Command("get exists-diff", "VOL BB BE EB EE", _A, w.exists_diff, "1 when there is a diff |BB,BE|-->|EB,EE|"),
    Command("get exists-base-image", "VOL", _A, w.one(c.GetExistsBaseImage), "1 when there is a base image"),
    Command("get restored", "VOL", _A, w.one(c.GetRestored), "generations with a restored image"),
    Command("get restored-path", "VOL GID", _A, w.with_gid(c.GetRestoredPath), "where such an image is"),
    Command("get restorable", "VOL [all]", _A, w.restorable, "GID TIME EXPLICIT: what can be restored"),
    Command("get cold", "VOL", _A, w.one(m.GetCold), "generations with a cold image"),
    Command("get gaps", "VOL", _A, w.one(m.GetGaps), "intervals for which no restore point can exist"),
    Command("get replicas", "VOL", _A, w.one(m.GetReplicaPositions), "how far other archives are"),
    Command(
        "forget-replica",
        "VOL ARCHIVE",
        _A,
        lambda args: m.ForgetReplica(volume=w.vol(args[0]), node=node_name(args[1])),
        "keep nothing for another archive any more",
    ),
    Command("get base-all", "", _A, w.none(m.GetBaseAll), "state of the base images of all volumes"),
    Command("get volume-group", "", _A, w.none(m.GetVolumeGroup), "LVM volume group of the images, if any"),
    Command("get thinpool", "", _A, w.none(m.GetThinpool), "LVM thin pool of the images, if any"),
    Command("dbg-reload-metadata", "VOL", _A, w.one(m.DbgReloadMetadata), "know a volume anew from its files"),
    Command("dbg-set-uuid", "VOL UUID", _A, w.set_uuid, "set the uuid of the log history"),
    Command(
        "dbg-set-state",
        "VOL STATE",
        _A,
        lambda args: m.DbgSetState(volume=w.vol(args[0]), state=args[1]),
        "set the state of a stopped volume",
    ),
    Command("dbg-set-base", "VOL METASTATE", _A, w.set_base, "say what the base image is"),
    Command("get archive-uuid", "VOL", _A, w.one(c.GetArchiveUuid), "uuid of the lineage of images"),
    Command("get base", "VOL", _A, w.one(c.GetBase), "state of the base image"),
    Command(
        "get meta-snap",
        "VOL [GID]",
        _A,
        lambda args: c.GetMetaSnap(volume=w.vol(args[0]), **w.opt_gid(args[1:])),
        "snapshot that the diffs lead to",
    ),
    Command("get meta-state", "VOL 0|1 [GID]", _A, w.meta_state, "base state after (0) or during (1) an apply"),
    Command("get vol-size", "VOL", _A, w.one(c.GetVolSize), "size of the base image [logical block]"),
    Command("get progress", "VOL", _A, w.one(c.GetProgress), "how far a copy is [logical block]; 0: none runs"),
)
