"""The commands of one server as words, the requests they stand for, and replies as text.

This is what `walbc -a HOST -p PORT COMMAND ...` and `Controller.run_ctl` accept. Values are printed one per
line; tables as lines of tab-separated `label:value`. Source: docs/controller.md, "One server".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE, serverKinds
from walbd.controller.data import create_compress_opt_from_str
from walbd.controller.replies import SHOW, actions_text, latest_text, ts_delta_text
from walbd.controller.servers import Server, server_kind_to_str
from walbd.controller.verify import verify_volume
from walbd.daemon.net import parse_address
from walbd.errors import UsageError
from walbd.ids import node_name
from walbd.protocol import control as c
from walbd.protocol.base import GetJobs, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.units import UINT64_MAX, parse_size

_ALL: Final = frozenset(serverKinds)
_S, _P, _A = frozenset({K_STORAGE}), frozenset({K_PROXY}), frozenset({K_ARCHIVE})

Build = Callable[[list[str]], Request[Any]]
Show = Callable[[int, Any], str]


@dataclass(frozen=True)
class Command:
    """One command: its words, the form of its arguments, who knows it."""

    name: str  # one or two words
    usage: str
    kinds: frozenset[int]
    build: Build = field(repr=False)
    help: str
    show: Show | None = field(default=None, repr=False)  # None: by the type of the reply

    @property
    def counts(self) -> tuple[int, int]:
        """The least and the greatest number of arguments."""
        words = self.usage.split()
        return sum(not word.startswith("[") for word in words), len(words)

    def request(self, args: Sequence[str]) -> Request[Any]:
        """Check the arguments and make the request; raises UsageError."""
        least, most = self.counts
        if not least <= len(args) <= most or not all(args):
            raise UsageError(
                "wrong arguments", hint=f"write: {self.name} {self.usage}".rstrip(), command=self.name
            )
        return self.build(list(args))

    def text(self, kind: int, reply: Message) -> str:
        """Write the reply, without a newline at the end; empty where there is nothing to say."""
        return self.show(kind, reply) if self.show is not None else SHOW[type(reply)](reply)


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
    return cmd.text(s.kind, ask(s, cmd.request(rest)))


def _unknown(args: Sequence[str]) -> UsageError:
    first = args[0]
    below = [cmd.name for cmd in COMMANDS if cmd.name.split()[0] == first]
    if below:
        return UsageError("unknown command", hint="there are: " + ", ".join(below), command=" ".join(args[:2]))
    return UsageError("unknown command", hint="see `walbc -a HOST -p PORT --help`", command=first)


# Arguments


def _vol(text: str) -> str:
    verify_volume(text)
    return text


def _opt_vol(args: list[str]) -> str:
    return _vol(args[0]) if args else ""


def _gid(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= UINT64_MAX):
        raise UsageError("not a generation", hint="write a decimal number", text=text)
    return int(text)


def _gids(args: list[str]) -> dict[str, int]:
    return {name: _gid(text) for name, text in zip(("gid_b", "gid_e"), args, strict=False)}


def _opt_gid(args: list[str]) -> dict[str, int]:
    return {"gid": _gid(args[0])} if args else {}


def _bulk(args: list[str]) -> dict[str, int]:
    if not args:
        return {}
    size = parse_size(args[0])
    check_bulk(size)
    return {"bulk_b": size}


def check_bulk(size_b: int) -> None:
    """Raise UsageError unless a bulk size is allowed."""
    if not 512 <= size_b <= 4 << 20 or size_b % 512:
        raise UsageError("bad bulk size", hint="from 512 bytes to 4 MiB, a multiple of 512", size_b=size_b)


def _word(text: str, words: Sequence[str]) -> str:
    if text not in words:
        raise UsageError("unknown word", hint="use " + " or ".join(words), word=text)
    return text


def _start(args: list[str]) -> Request[Any]:
    role = c.Role(_word(args[1], list(c.Role))) if len(args) > 1 else None
    return c.Start(volume=_vol(args[0]), role=role)


def _stop(args: list[str]) -> Request[Any]:
    how = c.StopHow(_word(args[1], list(c.StopHow))) if len(args) > 1 else c.StopHow.GRACEFUL
    return c.Stop(volume=_vol(args[0]), how=how)


def _shutdown(args: list[str]) -> Request[Any]:
    return c.Shutdown(how=c.ShutdownHow(_word(args[0], list(c.ShutdownHow)) if args else "graceful"))


def _info(args: list[str]) -> c.ArchiveInfo:
    address = parse_address(args[2])
    if not address.port:
        raise UsageError("an archive needs HOST:PORT", address=args[2])
    more: dict[str, Any] = {}
    if len(args) > 3:
        more["compress"] = create_compress_opt_from_str(args[3]).wire
    if len(args) > 4:
        if not (args[4].isascii() and args[4].isdecimal() and len(args[4]) < 6 and int(args[4]) <= 86400):
            raise UsageError("bad delay", hint="write seconds, at most 86400", delay=args[4])
        more["delay_s"] = int(args[4])
    return c.ArchiveInfo(archive=node_name(args[1]), address=str(address), **more)


def _meta_state(args: list[str]) -> Request[Any]:
    return c.GetMetaState(volume=_vol(args[0]), applying=_word(args[1], ("0", "1")) == "1", **_opt_gid(args[2:]))


def _restorable(args: list[str]) -> Request[Any]:
    return c.GetRestorable(volume=_vol(args[0]), all_points=len(args) > 1 and _word(args[1], ("all",)) == "all")


def _wait_job(args: list[str]) -> Request[Any]:
    try:
        wait_s = float(args[1]) if len(args) > 1 else 0.0
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= 60:
        raise UsageError("bad time to wait", hint="write seconds, at most 60", text=args[1])
    return WaitJob(job=_gid(args[0]), wait_s=wait_s)


# Diffs are listed with one request; what is asked about them is worked out here


def _diff_count(_kind: int, reply: c.Diffs) -> str:
    return str(len(reply.diffs))


def _diff_size(_kind: int, reply: c.Diffs) -> str:
    return str(sum(diff.size_b for diff in reply.diffs))


def _one(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=_vol(args[0]))  # type: ignore[call-arg]


def _any(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=_opt_vol(args))  # type: ignore[call-arg]


def _with_gid(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=_vol(args[0]), gid=_gid(args[1]))  # type: ignore[call-arg]


def _none(cls: type[Request[Any]]) -> Build:
    return lambda _args: cls()


def _diffs(args: list[str]) -> Request[Any]:
    return c.GetDiff(volume=_vol(args[0]), **_gids(args[1:]))


COMMANDS: Final[tuple[Command, ...]] = (
    Command("status", "[VOL]", _ALL, _any(c.GetStatus), "everything that the server knows about itself"),
    Command("get state", "VOL", _ALL, _one(c.GetState), "state of a volume; Clear for an unknown one"),
    Command("get host-type", "", _ALL, _none(c.GetHostType), "storage, proxy or archive"),
    Command("get vol", "", _ALL, _none(c.GetVolumes), "names of volumes"),
    Command("get pid", "", _ALL, _none(c.GetPid), "process id"),
    Command("get latest-snap", "[VOL]", _ALL, _any(c.GetLatestSnap), "newest snapshots", latest_text),
    Command("get handler-stat", "", _ALL, _none(c.GetHandlerStat), "counts and latencies of requests"),
    Command(
        "get num-action",
        "VOL ACTION",
        _ALL,
        lambda args: c.GetNumAction(volume=_vol(args[0]), action=args[1]),
        "how many actions of a name run",
    ),
    Command("get all-actions", "", _ALL, _none(c.GetActions), "actions of all volumes", actions_text),
    Command("get jobs", "[VOL]", _ALL, _any(GetJobs), "jobs that run or ran"),
    Command("wait-job", "JOB [SECONDS]", _ALL, _wait_job, "state of a job, when it has ended or after a while"),
    Command("clear-vol", "VOL", _ALL, _one(c.ClearVol), "forget a volume and remove its files there"),
    Command("start", "VOL [ROLE]", _ALL, _start, "start a volume; ROLE at storages: target or standby"),
    Command("stop", "VOL [MODE]", _ALL, _stop, "stop a volume; MODE: graceful, force, at proxies also empty"),
    Command("shutdown", "[MODE]", _ALL, _shutdown, "end the daemon; MODE: graceful or force"),
    Command("version", "", _ALL, _none(c.GetVersion), "what runs there"),
    # storage
    Command(
        "init-vol",
        "VOL DEVICE",
        _S,
        lambda args: c.StorageInitVol(volume=_vol(args[0]), device=args[1]),
        "take over a device under a volume name",
    ),
    Command(
        "reset-vol",
        "VOL [GID]",
        _S,
        lambda args: c.ResetVol(volume=_vol(args[0]), **_opt_gid(args[1:])),
        "wipe the log of a stopped volume",
    ),
    Command(
        "full-bkp",
        "VOL [BULK]",
        _S,
        lambda args: c.FullBackup(volume=_vol(args[0]), **_bulk(args[1:])),
        "copy the whole device to the primary archive",
    ),
    Command("snapshot", "VOL", _S, _one(c.TakeSnapshot), "take a snapshot; prints its generation"),
    Command("kick", "", _S, _none(c.Kick), "hurry what waits"),
    Command(
        "set-full-scan-bps",
        "SIZE",
        _S,
        lambda args: c.SetFullScanBps(bytes_per_s=parse_size(args[0])),
        "limit full scans [byte/s]; 0: no limit",
    ),
    Command("get is-overflow", "VOL", _S, _one(c.GetIsOverflow), "1 when the log has overflowed"),
    Command("get log-usage", "[VOL]", _S, _any(c.GetLogUsage), "how full the log is"),
    Command("get uuid", "VOL", _S | _A, _one(c.GetUuid), "uuid of the log"),
    Command("get ts-delta", "", _S, _none(c.GetTsDelta), "how far destinations are behind", ts_delta_text),
    # proxy
    Command("archive-info list", "VOL", _P, _one(c.ListArchiveInfo), "archives that a volume is sent to"),
    Command(
        "archive-info get",
        "VOL ARCHIVE",
        _P,
        lambda args: c.GetArchiveInfo(volume=_vol(args[0]), archive=node_name(args[1])),
        "HOST:PORT KIND:LEVEL:CPUS DELAY",
    ),
    Command(
        "archive-info add",
        "VOL ARCHIVE HOST:PORT [COMPRESS] [DELAY]",
        _P,
        lambda args: c.AddArchiveInfo(volume=_vol(args[0]), info=_info(args)),
        "send a volume to an archive, too",
    ),
    Command(
        "archive-info update",
        "VOL ARCHIVE HOST:PORT [COMPRESS] [DELAY]",
        _P,
        lambda args: c.UpdateArchiveInfo(volume=_vol(args[0]), info=_info(args)),
        "change where and how",
    ),
    Command(
        "archive-info delete",
        "VOL ARCHIVE",
        _P,
        lambda args: c.DeleteArchiveInfo(volume=_vol(args[0]), archive=node_name(args[1])),
        "send no more; what is unsent is lost",
    ),
    Command(
        "kick",
        "[VOL] [ARCHIVE]",
        _P,
        lambda args: c.Kick(volume=_opt_vol(args), archive=node_name(args[1]) if len(args) > 1 else ""),
        "hurry what waits",
    ),
    Command(
        "get is-wdiff-send-error",
        "VOL ARCHIVE",
        _P,
        lambda args: c.GetIsWdiffSendError(volume=_vol(args[0]), archive=node_name(args[1])),
        "1 when the archive has refused for a reason that needs a person",
    ),
    Command(
        "get proxy-diff",
        "VOL [ARCHIVE]",
        _P,
        lambda args: c.GetProxyDiff(volume=_vol(args[0]), archive=node_name(args[1]) if len(args) > 1 else ""),
        "diffs that wait there",
    ),
    # archive
    Command("init-vol", "VOL", _A, _one(c.ArchiveInitVol), "make a volume known"),
    Command("reset-vol", "VOL", _A, _one(c.ResetVol), "remove all data of a volume, keep it known"),
    Command("restore", "VOL GID", _A, _with_gid(c.Restore), "make an image of a snapshot"),
    Command("del-restored", "VOL GID", _A, _with_gid(c.DelRestored), "remove such an image"),
    Command("apply", "VOL GID", _A, _with_gid(c.Apply), "write diffs into the base; older snapshots vanish"),
    Command("gc-diff", "VOL", _A, _one(c.GcDiff), "remove diffs that nothing needs; prints how many"),
    Command("get diff", "VOL [GIDB] [GIDE]", _A, _diffs, "diffs"),
    Command(
        "get applicable-diff",
        "VOL [GID]",
        _A,
        lambda args: c.GetApplicableDiff(volume=_vol(args[0]), **_opt_gid(args[1:])),
        "diffs that continue the base",
    ),
    Command("get num-diff", "VOL [GIDB] [GIDE]", _A, _diffs, "how many diffs", _diff_count),
    Command("get total-diff-size", "VOL [GIDB] [GIDE]", _A, _diffs, "their size [byte]", _diff_size),
    Command("get exists-base-image", "VOL", _A, _one(c.GetExistsBaseImage), "1 when there is a base image"),
    Command("get restored", "VOL", _A, _one(c.GetRestored), "generations with a restored image"),
    Command("get restored-path", "VOL GID", _A, _with_gid(c.GetRestoredPath), "where such an image is"),
    Command("get restorable", "VOL [all]", _A, _restorable, "GID TIME EXPLICIT: what can be restored"),
    Command("get archive-uuid", "VOL", _A, _one(c.GetArchiveUuid), "uuid of the lineage of images"),
    Command("get base", "VOL", _A, _one(c.GetBase), "state of the base image"),
    Command(
        "get meta-snap",
        "VOL [GID]",
        _A,
        lambda args: c.GetMetaSnap(volume=_vol(args[0]), **_opt_gid(args[1:])),
        "snapshot that the diffs lead to",
    ),
    Command("get meta-state", "VOL 0|1 [GID]", _A, _meta_state, "base state after (0) or during (1) an apply"),
    Command("get vol-size", "VOL", _A, _one(c.GetVolSize), "size of the base image [logical block]"),
    Command("get progress", "VOL", _A, _one(c.GetProgress), "how far a copy is [logical block]; 0: none runs"),
)
