"""Observations of a group made by hand, for the doctor to judge."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import msgspec

from walbd.cli.walbc import root
from walbd.cli.walbc_doctor import found_lines
from walbd.controller.doctor import Finding, Observation, Seen, diagnose
from walbd.controller.doctor.diagnose import confirmed
from walbd.controller.doctor.steps import METHODS
from walbd.controller.layout import GroupLayout, parse_layout
from walbd.errors import ConnectError, WalbError
from walbd.format.meta import Diff, Snapshot
from walbd.ids import Gid
from walbd.protocol.base import JobInfo, Kind
from walbd.protocol.control import HopStatus, ProxyHealth, StatusReply, VolumeStatus
from walbd.protocol.policy import PolicyView

NOW = 1_800_000_000
UUID, OTHER_UUID, LINEAGE, OTHER_LINEAGE = ("a" * 32, "b" * 32, "c" * 32, "d" * 32)


def group_file(
    *, storages: int = 2, proxies: int = 2, archives: int = 2, volume: str = 'devices = { s0 = "/dev/x" }'
) -> GroupLayout:
    text = ""
    for kind, n, port in (("storage", storages, 100), ("proxy", proxies, 200), ("archive", archives, 300)):
        for i in range(n):
            text += f'[[{kind}]]\nname = "{kind[0]}{i}"\nhost = "127.0.0.1"\nport = {port + i}\n'
    return parse_layout(f"{text}[volumes.vol0]\n{volume}\n", Path("group.toml"))


def diff(begin: int, end: int) -> Diff:
    return Diff(Snapshot.clean(Gid(begin)), Snapshot.clean(Gid(end)))


class Scene:
    """A healthy group (s0 target, s1 standby, p0 and p1 feed a0 and a1), to be damaged."""

    def __init__(self, group: GroupLayout | None = None) -> None:
        self.group = group or group_file(
            volume='target = "s0"\ndevices = { s0 = "/dev/x" }\narchives = ["a0", "a1"]'
        )
        self.status: dict[str, StatusReply] = {}
        self.error: dict[str, WalbError] = {}
        self.jobs: dict[str, list[JobInfo]] = {}
        self.policies: dict[tuple[str, str], PolicyView] = {}
        self.unsent: dict[tuple[str, str, str], tuple[Diff, ...]] = {}
        layout = self.group.servers
        for s in layout.get_all():
            kind = (Kind.STORAGE, Kind.PROXY, Kind.ARCHIVE)[s.kind]
            server: dict[str, Any] = {"base_dir": "/base", "free_b": 1 << 40, "free_reserve_b": 1 << 30}
            proxies = []
            if kind is Kind.STORAGE:
                server = {"archive": layout.archiveL[0].get_host_port()}
                proxies = [
                    ProxyHealth(address=p.get_host_port(), available=True, next_check_s=1) for p in layout.proxyL
                ]
            self.status[s.name] = StatusReply(
                node=s.name,
                kind=kind,
                version="0.1.0",
                pid=1,
                now=NOW,
                server=server,
                proxies=proxies,
                volumes=[self.healthy(s.name)],
            )

    def healthy(self, name: str) -> VolumeStatus:
        if name[0] == "p":
            hops = [
                HopStatus(
                    dest=a.name, address=a.get_host_port(), sending=False, diffs=0, size_b=0, gid_b=0, gid_e=0,
                    oldest=0, last_sent=NOW, error=False,
                )
                for a in self.group.servers.archiveL
            ]  # fmt: skip
            return VolumeStatus(volume="vol0", state="Started", hops=hops)
        if name[0] == "a":
            return VolumeStatus(
                volume="vol0", state="Archived", uuid=UUID, archive_uuid=LINEAGE, latest_gid=10, restorable=5,
                base="<|3|>-20260101000000", size_lb=1 << 15,
            )  # fmt: skip
        return VolumeStatus(
            volume="vol0", state="Target" if name == "s0" else "Standby", uuid=UUID, log_uuid=UUID, done_gid=10,
            latest_gid=10, size_lb=1 << 15, device="/dev/x", log_usage_pb=10, log_capacity_pb=1000, pbs=4096,
        )  # fmt: skip

    def part(self, server: str, **changes: Any) -> Scene:
        """Change what a server says of the volume."""
        (v,) = self.status[server].volumes
        return self.server(server, volumes=[msgspec.structs.replace(v, **changes)])

    def hop(self, proxy: str, archive: str, **changes: Any) -> Scene:
        """Change what a proxy says of one archive."""
        (v,) = self.status[proxy].volumes
        return self.part(
            proxy, hops=[msgspec.structs.replace(h, **changes) if h.dest == archive else h for h in v.hops]
        )

    def server(self, name: str, **changes: Any) -> Scene:
        """Change what a server says of itself."""
        fields = {f: getattr(self.status[name], f) for f in StatusReply.__dataclass_fields__}
        self.status[name] = StatusReply(**(fields | changes))
        return self

    def forget(self, *servers: str) -> Scene:
        """Make servers know nothing."""
        for name in servers:
            self.server(name, volumes=[])
        return self

    def dead(self, *servers: str, error: WalbError | None = None) -> Scene:
        for name in servers:
            self.error[name] = error or ConnectError("cannot connect", reason="Connection refused")
        return self

    def waits(self, proxy: str, archive: str, *diffs: Diff) -> Scene:
        """Let diffs wait at a proxy."""
        self.unsent[proxy, "vol0", archive] = diffs
        self.unsent.setdefault((proxy, "vol0", ""), ())
        (v,) = self.status[proxy].volumes
        for hop in v.hops:
            self.unsent.setdefault((proxy, "vol0", hop.dest), ())
        self.part(proxy, diffs=len(diffs))
        return self.hop(proxy, archive, diffs=len(diffs), size_b=4096 * len(diffs), oldest=NOW - 5)

    def observe(self, before: Observation | None = None, *, taken_s: float = 0.0) -> Observation:
        seen = {
            s.name: Seen(server=s, error=self.error[s.name])
            if s.name in self.error
            else Seen(server=s, status=self.status[s.name], jobs=tuple(self.jobs.get(s.name, ())))
            for s in self.group.servers.get_all()
        }
        return Observation(
            group=self.group,
            seen=seen,
            unsent=dict(self.unsent),
            policies=dict(self.policies),
            now=NOW,
            taken_s=taken_s,
            before=before,
        )

    def look(self, **more: Any) -> list[Finding]:
        """Look twice at the same thing."""
        o = self.observe()
        found = confirmed(diagnose(self.observe(o, taken_s=2.0), **more), diagnose(o, **more))
        for step in (step for f in found for step in f.steps):
            assert step.method in METHODS
            if step.method != "promote_archive":  # the group file is changed, not a server
                parse(shlex.split(step.command))
        return found

    def only(self, code: str, **more: Any) -> Finding:
        """Look, and require exactly one finding."""
        found = self.look(**more)
        assert [f.code for f in found] == [code], found_lines(found)
        return found[0]

    def codes(self) -> list[str]:
        return [f.code for f in self.look()]


def calls(finding: Finding) -> list[str]:
    return [step.python.removeprefix("walbc.") for step in finding.steps]


def parse(words: list[str]) -> None:
    """Let `walbc` parse a line that the doctor prints: it can be typed as it is."""
    assert words[0] == "walbc"
    command: click.Command = root
    args = words[1:]
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), args[0])
        assert found is not None, words
        name, command, args = args[0], found, args[1:]
    command.make_context(name, args)
