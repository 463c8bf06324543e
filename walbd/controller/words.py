"""The form of a command of one server, and how its arguments become a request.

Source: docs/controller.md, "One server".
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from walbd.controller.data import create_compress_opt_from_str, create_meta_state_from_str
from walbd.controller.replies import SHOW
from walbd.controller.verify import verify_volume
from walbd.daemon.net import parse_address
from walbd.errors import NotSupported, UsageError
from walbd.format.meta import Diff, Snapshot
from walbd.ids import Gid, node_name, parse_uuid
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import WaitJob
from walbd.protocol.codec import Message, Request
from walbd.units import LB, UINT64_MAX, parse_size

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
    result: str = ""  # of the job that is begun: what of it is printed, when it has ended; empty: do not wait

    @property
    def counts(self) -> tuple[int, int]:
        """The least and the greatest number of arguments."""
        words = self.usage.split()
        most = sys.maxsize if self.usage.endswith("...") else len(words)
        return sum(not word.startswith("[") for word in words), most

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


# Arguments


def vol(text: str) -> str:
    verify_volume(text)
    return text


def opt_vol(args: list[str]) -> str:
    return vol(args[0]) if args else ""


def gid(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= UINT64_MAX):
        raise UsageError("not a generation", hint="write a decimal number", text=text)
    return int(text)


def gids(args: list[str]) -> dict[str, int]:
    return {name: gid(text) for name, text in zip(("gid_b", "gid_e"), args, strict=False)}


def opt_gid(args: list[str]) -> dict[str, int]:
    return {"gid": gid(args[0])} if args else {}


def bulk(args: list[str]) -> dict[str, int]:
    if not args:
        return {}
    size = parse_size(args[0])
    check_bulk(size)
    return {"bulk_b": size}


def check_bulk(size_b: int) -> None:
    """Raise UsageError unless a bulk size is allowed."""
    if not 512 <= size_b <= 4 << 20 or size_b % 512:
        raise UsageError("bad bulk size", hint="from 512 bytes to 4 MiB, a multiple of 512", size_b=size_b)


def word(text: str, words: Sequence[str]) -> str:
    if text not in words:
        raise UsageError("unknown word", hint="use " + " or ".join(words), word=text)
    return text


def start(args: list[str]) -> Request[Any]:
    role = c.Role(word(args[1], list(c.Role))) if len(args) > 1 else None
    return c.Start(volume=vol(args[0]), role=role)


def stop(args: list[str]) -> Request[Any]:
    how = c.StopHow(word(args[1], list(c.StopHow))) if len(args) > 1 else c.StopHow.GRACEFUL
    return c.Stop(volume=vol(args[0]), how=how)


def shutdown(args: list[str]) -> Request[Any]:
    return c.Shutdown(how=c.ShutdownHow(word(args[0], list(c.ShutdownHow)) if args else "graceful"))


def host_port(text: str) -> str:
    address = parse_address(text)
    if not address.port:
        raise UsageError("an address is HOST:PORT", address=text)
    return str(address)


def retarget(args: list[str]) -> Request[Any]:
    proxies = args[1].split(",") if len(args) > 1 else []
    return m.Retarget(archive=host_port(args[0]), proxies=[host_port(text) for text in proxies])


def archive_info(args: list[str]) -> c.ArchiveInfo:
    more: dict[str, Any] = {}
    if len(args) > 3:
        more["compress"] = create_compress_opt_from_str(args[3]).wire
    if len(args) > 4:
        if not (args[4].isascii() and args[4].isdecimal() and len(args[4]) < 6 and int(args[4]) <= 86400):
            raise UsageError("bad delay", hint="write seconds, at most 86400", delay=args[4])
        more["delay_s"] = int(args[4])
    return c.ArchiveInfo(archive=node_name(args[1]), address=host_port(args[2]), **more)


def meta_state(args: list[str]) -> Request[Any]:
    return c.GetMetaState(volume=vol(args[0]), applying=word(args[1], ("0", "1")) == "1", **opt_gid(args[2:]))


def restorable(args: list[str]) -> Request[Any]:
    return c.GetRestorable(volume=vol(args[0]), all_points=len(args) > 1 and word(args[1], ("all",)) == "all")


def wait_job(args: list[str]) -> Request[Any]:
    try:
        wait_s = float(args[1]) if len(args) > 1 else 0.0
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= 60:
        raise UsageError("bad time to wait", hint="write seconds, at most 60", text=args[1])
    return WaitJob(job=gid(args[0]), wait_s=wait_s)


def one(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=vol(args[0]))  # type: ignore[call-arg]


def any_volume(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=opt_vol(args))  # type: ignore[call-arg]


def with_gid(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=vol(args[0]), gid=gid(args[1]))  # type: ignore[call-arg]


def none(cls: type[Request[Any]]) -> Build:
    return lambda _args: cls()


def diffs(args: list[str]) -> Request[Any]:
    return c.GetDiff(volume=vol(args[0]), **gids(args[1:]))


def proxy_diff(args: list[str]) -> Request[Any]:
    return c.GetProxyDiff(
        volume=vol(args[0]),
        archive=node_name(args[1]) if len(args) > 1 else "",
        gid_b=gid(args[2]) if len(args) > 2 else 0,
    )


# Arguments of archives


def any_diffs(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=vol(args[0]), **gids(args[1:]))  # type: ignore[call-arg]


def with_gids(cls: type[Request[Any]]) -> Build:
    return lambda args: cls(volume=vol(args[0]), gids=[gid(text) for text in args[1:]])  # type: ignore[call-arg]


def merge(args: list[str]) -> Request[Any]:
    if word(args[2], ("gid", "size")) == "gid":
        return m.Merge(volume=vol(args[0]), gid_b=gid(args[1]), gid_e=gid(args[3]))
    return m.Merge(volume=vol(args[0]), gid_b=gid(args[1]), size_max_b=_mib(args[3]))


def replicate(args: list[str]) -> Request[Any]:
    more: dict[str, Any] = {}
    if word(args[1], ("gid", "size")) == "gid":
        more["gid"] = gid(args[2])
    else:
        more["size_b"] = _mib(args[2])
    for name, text in zip(("resync", "dont_merge"), args[4:6], strict=False):
        more[name] = word(text, ("0", "1")) == "1"
    if len(args) > 6:
        more["compress"] = create_compress_opt_from_str(args[6]).wire
    if len(args) > 7:
        more["merge_size_max_b"] = _merge_size(args[7])
    more |= bulk(args[8:])
    return m.Replicate(volume=vol(args[0]), dest=host_port(args[3]), **more)


def _mib(text: str) -> int:
    return gid(text) << 20


def _merge_size(text: str) -> int:
    size = parse_size(text)
    if size < 1 << 20:
        raise UsageError("a merge takes at least 1 MiB", size=text)
    return size


def resize(args: list[str]) -> Request[Any]:
    zero = len(args) > 2 and word(args[2], ("zeroclear",)) == "zeroclear"
    return c.Resize(volume=vol(args[0]), size_b=parse_size(args[1]), zero=zero)


def block_hash(args: list[str]) -> Request[Any]:
    more = bulk(args[2:3]) | _scan_size(args[3:4])
    return m.BlockHash(volume=vol(args[0]), gid=gid(args[1]), sleep_percent=_percent(args[4:]), **more)


def virt_full_scan(args: list[str]) -> Request[Any]:
    """Make the request of `virt-full-scan DEST VOL GID ...`; where it goes is the caller's business."""
    more = bulk(args[3:4]) | _scan_size(args[4:5])
    return m.VirtFullScan(volume=vol(args[1]), gid=gid(args[2]), sleep_percent=_percent(args[5:]), **more)


def _percent(args: list[str]) -> int:
    rest = gid(args[0]) if args else 0
    if rest > 99:
        raise UsageError("a share of rest is from 0 to 99 percent", text=args[0])
    return rest


def _scan_size(args: list[str]) -> dict[str, int]:
    if not args:
        return {}
    size = parse_size(args[0])
    if not size or size % LB:
        raise UsageError("the size to scan is a multiple of 512 bytes, and not 0", size=args[0])
    return {"size_lb": size // LB}


def exists_diff(args: list[str]) -> Request[Any]:
    bb, be, eb, ee = (Gid(gid(text)) for text in args[1:])
    return m.GetExistsDiff(volume=vol(args[0]), diff=Diff(Snapshot(bb, be), Snapshot(eb, ee)))


def set_uuid(args: list[str]) -> Request[Any]:
    return m.DbgSetUuid(volume=vol(args[0]), uuid=parse_uuid(args[1]))


def set_base(args: list[str]) -> Request[Any]:
    return m.DbgSetBase(volume=vol(args[0]), base=create_meta_state_from_str(args[1]).to_meta())


def refused(reason: str, hint: str) -> Build:
    """Make a command that walb-tools had and walbd refuses."""

    def build(_args: list[str]) -> Request[Any]:
        raise NotSupported(reason, hint=hint)

    return build
