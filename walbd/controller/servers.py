"""Servers of a backup group, and the layout that says which belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE, KIND_OF, serverKinds
from walbd.controller.verify import verify_type
from walbd.errors import UsageError
from walbd.ids import node_name

_REPEATER_PORTS: Final = 10000  # from the port of a server to the one that it really listens on


def server_kind_to_str(kind: int) -> str:
    """Return storage, proxy or archive."""
    verify_type(kind, int)
    if kind not in serverKinds:
        raise UsageError("unknown kind of server", hint="use K_STORAGE, K_PROXY or K_ARCHIVE", kind=kind)
    return str(KIND_OF[kind])


def str_to_server_kind(s: str) -> int:
    """Return the K_ number for storage, proxy or archive."""
    verify_type(s, str)
    for kind, name in KIND_OF.items():
        if name == s:
            return kind
    raise UsageError("unknown kind of server", hint="use storage, proxy or archive", kind=s)


@dataclass(frozen=True)
class ServerConnectionParam:
    """Where a server is. An archive's name is also its name at the proxies."""

    name: str
    address: str
    port: int
    kind: int  # K_STORAGE, K_PROXY or K_ARCHIVE

    def __post_init__(self) -> None:
        verify_type(self.name, str)
        verify_type(self.address, str)
        verify_type(self.port, int)
        server_kind_to_str(self.kind)
        node_name(self.name)
        if not self.address or self.address.split() != [self.address]:
            raise UsageError("a server needs an address", server=self.name, address=self.address)
        if not 0 < self.port < 1 << 16:
            raise UsageError("a port is from 1 to 65535", server=self.name, port=self.port)

    def get_host_port(self) -> str:
        """Return `address:port`."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def __str__(self) -> str:
        return f"{self.name}, {self.address}, {self.port}, {server_kind_to_str(self.kind)}"


@dataclass(frozen=True)
class ServerStartupParam:
    """A server, and how its process is started on its host.

    `vg` and `tp` name the volume group and thin pool of an archive on LVM; archives on files have none.
    """

    connParam: ServerConnectionParam
    binDir: str
    dataDir: str
    logPath: str | None = None
    vg: str | None = None
    tp: str | None = None

    def __post_init__(self) -> None:
        verify_type(self.connParam, ServerConnectionParam)
        verify_type(self.binDir, str)
        verify_type(self.dataDir, str)
        for text in (self.logPath, self.vg, self.tp):
            if text is not None:
                verify_type(text, str)

    @property
    def name(self) -> str:
        return self.connParam.name

    @property
    def address(self) -> str:
        return self.connParam.address

    @property
    def port(self) -> int:
        return self.connParam.port

    @property
    def kind(self) -> int:
        return self.connParam.kind

    def get_host_port(self) -> str:
        """Return `address:port`."""
        return self.connParam.get_host_port()

    def __str__(self) -> str:
        rest = [self.binDir, self.dataDir, self.logPath, self.vg, self.tp]
        return ", ".join([str(self.connParam), *(text for text in rest if text is not None)])


Server = ServerConnectionParam | ServerStartupParam
ServerParams: Final = (ServerConnectionParam, ServerStartupParam)


def verify_server_kind(s: Server, kindL: Sequence[int]) -> None:
    """Raise TypeError unless `s` is a server, UsageError unless its kind is among `kindL`."""
    verify_type(s, ServerParams)
    if s.kind not in kindL:
        wanted = " or ".join(server_kind_to_str(kind) for kind in kindL)
        raise UsageError(
            "wrong kind of server", hint=f"this needs {wanted}", server=s.name, kind=server_kind_to_str(s.kind)
        )


def get_server(name: str, sL: Sequence[Server]) -> Server:
    """Return the one server of that name; raises UsageError when there is none, or more than one."""
    verify_type(name, str)
    found = [s for s in sL if s.name == name]
    if len(found) != 1:
        names = ", ".join(s.name for s in sL) or "none"
        message = "no such server" if not found else "several servers have this name"
        raise UsageError(message, hint=f"servers here: {names}", server=name)
    return found[0]


class ServerLayout:
    """The servers of a backup group. The order of proxies is the order of preference; the first archive is the
    primary one. It tells the controller whom to ask; it changes nothing at servers.
    """

    def __init__(self, storageL: Sequence[Server], proxyL: Sequence[Server], archiveL: Sequence[Server]) -> None:
        for kind, sL in ((K_STORAGE, storageL), (K_PROXY, proxyL), (K_ARCHIVE, archiveL)):
            verify_type(sL, (list, tuple), ServerParams)
            for s in sL:
                verify_server_kind(s, [kind])
        self.storageL = list(storageL)
        self.proxyL = list(proxyL)
        self.archiveL = list(archiveL)
        for s in self.get_all():
            get_server(s.name, self.get_all())  # refuses names that are given twice

    def get_primary_archive(self) -> Server:
        """Return the first archive; raises UsageError when there is none."""
        self.verify(0, 0, 1)
        return self.archiveL[0]

    def get_all(self) -> list[Server]:
        """Return storages, proxies and archives, in this order."""
        return [*self.storageL, *self.proxyL, *self.archiveL]

    def replace(
        self,
        storageL: Sequence[Server] | None = None,
        proxyL: Sequence[Server] | None = None,
        archiveL: Sequence[Server] | None = None,
    ) -> ServerLayout:
        """Return a copy with the lists that are given, and not empty, in place of its own."""
        return ServerLayout(storageL or self.storageL, proxyL or self.proxyL, archiveL or self.archiveL)

    def verify(self, minNrStorage: int, minNrProxy: int, minNrArchive: int) -> None:
        """Raise UsageError when there are fewer servers of a kind than given."""
        for kind, sL, least in (
            (K_STORAGE, self.storageL, minNrStorage),
            (K_PROXY, self.proxyL, minNrProxy),
            (K_ARCHIVE, self.archiveL, minNrArchive),
        ):
            verify_type(least, int)
            if len(sL) < least:
                raise UsageError(
                    f"the layout has too few servers of kind {server_kind_to_str(kind)}",
                    hint="add them to the group file or to the ServerLayout",
                    needed=least,
                    present=len(sL),
                )

    def to_cmd_string(self) -> str:
        """Return the commands that start the servers, one a line. All must be ServerStartupParam."""
        return "\n".join(" ".join(get_server_args(s, self)) for s in self.get_all())

    def __str__(self) -> str:
        return ", ".join(s.name for s in self.get_all())


def get_server_params(
    s: Server,
    sLayout: ServerLayout | None = None,
    isDebug: bool = False,
    useRepeater: bool = False,
    maxFgTasks: int = 2,
    maxBgTasks: int = 1,
    maxConn: int | None = None,
    timeoutS: int | None = None,
) -> dict[str, str | int | None]:
    """Return the options of a daemon: name without dashes to value, None for a flag.

    A storage takes the primary archive and the proxies from `sLayout`, which it needs therefore. With
    `useRepeater` the daemon listens on its port + 10000, so that something else can stand between. The numbers of
    tasks are taken for scripts that give them and set nothing: what cannot run at once waits, see
    docs/configuration.md. So are the volume group and thin pool of an archive.
    """
    verify_type(s, ServerStartupParam)
    assert isinstance(s, ServerStartupParam)
    verify_type(useRepeater, bool)
    for number in (maxFgTasks, maxBgTasks):
        verify_type(number, int)
    params: dict[str, str | int | None] = {}
    if s.kind == K_STORAGE:
        verify_type(sLayout, ServerLayout)
        assert sLayout is not None
        params["archive"] = sLayout.get_primary_archive().get_host_port()
        params["proxy"] = ",".join(p.get_host_port() for p in sLayout.proxyL)
    port = s.port + (_REPEATER_PORTS if useRepeater else 0)
    params |= {"listen": s.address, "port": port, "base-dir": s.dataDir, "node-id": s.name}
    if isDebug:
        params["log-level"] = "debug"
    if maxConn is not None:
        params["connections-max"] = maxConn
    if timeoutS is not None:
        params["io-timeout-s"] = timeoutS
    return params


def get_server_args(
    s: Server,
    sLayout: ServerLayout | None = None,
    isDebug: bool = False,
    useRepeater: bool = False,
    maxFgTasks: int = 2,
    maxBgTasks: int = 1,
) -> list[str]:
    """Return the command line that starts a daemon; see `get_server_params`."""
    params = get_server_params(s, sLayout, isDebug, useRepeater, maxFgTasks, maxBgTasks)
    assert isinstance(s, ServerStartupParam)
    program = f"{s.binDir}/walbd" if s.binDir else "walbd"
    return [program, server_kind_to_str(s.kind), *dict2args(params)]


def dict2args(d: Mapping[str, object]) -> list[str]:
    """Turn options into arguments: `--name value`, `--name` alone for None, several values for a list."""
    verify_type(d, dict, str)
    args = []
    for name, value in d.items():
        args.append(f"--{name}")
        if isinstance(value, list | tuple):
            args += [str(item) for item in value]
        elif value is not None:
            args.append(str(value))
    return args
