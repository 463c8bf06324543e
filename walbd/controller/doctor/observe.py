"""Looking at a group: all servers of the layout, dead ones included. Source: docs/recovery.md.

The order matters, see `Observation`. Nothing here changes anything at a server.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from walbd.controller.constants import aActive
from walbd.controller.controller import Controller
from walbd.controller.doctor.observation import Observation, Seen, UnsentKey
from walbd.controller.layout import GroupLayout
from walbd.controller.servers import Server
from walbd.controller.waiting import AT_ONCE, Place, list_waiting
from walbd.daemon.net import parse_address
from walbd.errors import WalbError
from walbd.format.meta import Diff
from walbd.protocol.base import GetJobs, JobList
from walbd.protocol.codec import Message
from walbd.protocol.control import GetStatus, StatusReply
from walbd.protocol.policy import GetPolicy, PolicyView


def observe(
    ctl: Controller, group: GroupLayout, vol: str = "", *, wall: Callable[[], float] = time.time
) -> Observation:
    """Ask every server of the group once; `vol`: what proxies hold is listed for this volume only."""
    layout = group.servers
    seen: dict[str, Seen] = {}
    seen |= _look(ctl, layout.storageL)
    seen |= _look(ctl, layout.proxyL)
    unsent = _unsent(ctl, [seen[s.name] for s in layout.proxyL], vol)
    seen |= _look(ctl, layout.archiveL)
    policies = _policies(ctl, [seen[s.name] for s in layout.archiveL], vol)
    return Observation(
        group=group,
        seen=seen,
        unsent=unsent,
        policies=policies,
        now=int(wall()),
        taken_s=ctl.calls.now(),
        same=_numeric(_addresses(group, seen.values(), policies.values())),
    )


def observe_again(
    ctl: Controller, first: Observation, vol: str, pause_s: float, *, wall: Callable[[], float] = time.time
) -> Observation:
    """Look a second time, `pause_s` later, so that rates and what lasts can be seen."""
    ctl.calls.sleep(pause_s)
    return dataclasses.replace(observe(ctl, first.group, vol, wall=wall), before=first)


def _look(ctl: Controller, sL: list[Server]) -> dict[str, Seen]:
    statuses = ctl.ask_each(sL, GetStatus())
    alive = [s for s, reply in statuses.items() if isinstance(reply, StatusReply)]
    jobs = ctl.ask_each(alive, GetJobs())
    return {s.name: _seen(s, reply, jobs.get(s)) for s, reply in statuses.items()}


def _seen(s: Server, reply: StatusReply | WalbError, jobs: JobList | WalbError | None) -> Seen:
    if isinstance(reply, WalbError):
        return Seen(server=s, error=reply)
    return Seen(server=s, status=reply, jobs=tuple(jobs.jobs) if isinstance(jobs, JobList) else ())


def _unsent(ctl: Controller, proxies: list[Seen], vol: str) -> dict[UnsentKey, tuple[Diff, ...]]:
    """List the diffs that wait at proxies. One that cannot be listed now is as if its proxy did not answer.

    Diffs go from what was received to the archives: so that is listed before these, and none is missed between.
    """
    received: list[Place] = []
    waiting: list[Place] = []
    for seen in proxies:
        for v in seen.status.volumes if seen.status is not None else []:
            if (vol and v.volume != vol) or not v.diffs:
                continue
            received.append((seen.server, v.volume, ""))
            waiting += [(seen.server, v.volume, hop.dest) for hop in v.hops]
    found: dict[UnsentKey, tuple[Diff, ...]] = {}
    for places in (received, waiting):
        lists = list_waiting(ctl.calls, places, ctl.timeoutS)
        for (s, name, archive), diffs in zip(places, lists, strict=True):
            if not isinstance(diffs, WalbError):
                found[s.name, name, archive] = tuple(diffs)
    return found


def _policies(ctl: Controller, archives: list[Seen], vol: str) -> dict[tuple[str, str], PolicyView]:
    """Ask what archives do by themselves; one that does not tell is left out."""
    keys = [
        (seen.server, v.volume)
        for seen in archives
        for v in (seen.status.volumes if seen.status is not None else [])
        if vol in ("", v.volume) and v.state in aActive
    ]
    replies = _ask_some(ctl, [(s, GetPolicy(volume=name)) for s, name in keys])
    return {
        (s.name, name): reply
        for (s, name), reply in zip(keys, replies, strict=True)
        if isinstance(reply, PolicyView)
    }


def _ask_some(ctl: Controller, calls: Sequence[tuple[Server, Any]]) -> list[Message | WalbError]:
    """Make many requests, some at a time."""
    replies: list[Message | WalbError] = []
    for at in range(0, len(calls), AT_ONCE):
        replies += ctl.calls.call_each(calls[at : at + AT_ONCE], ctl.timeoutS)
    return replies


def _addresses(group: GroupLayout, seen: Iterable[Seen], policies: Iterable[PolicyView]) -> set[str]:
    found = {s.get_host_port() for s in group.servers.get_all()}
    found |= {row.dest for policy in policies for row in policy.replications}
    for each in seen:
        if each.status is None:
            continue
        found |= {str(each.status.server.get("archive", ""))}
        found |= {proxy.address for proxy in each.status.proxies}
        found |= {hop.address for v in each.status.volumes for hop in v.hops}
    return found - {""}


def _numeric(addresses: set[str]) -> dict[str, frozenset[str]]:
    """Resolve names, so that a name and its number are not taken for two places."""
    found = {}
    for text in addresses:
        try:
            address = parse_address(text)
            infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except (OSError, WalbError):
            continue  # then only the text counts
        found[text] = frozenset(f"{info[4][0]!r} {info[4][1]!r}" for info in infos)
    return found
