"""Servers, layouts, the group file, and checks of arguments."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import walbd.controller as library
from walbd.controller import (
    K_ARCHIVE,
    K_PROXY,
    K_STORAGE,
    ServerConnectionParam,
    ServerLayout,
    ServerStartupParam,
    dict2args,
    find_layout,
    get_server,
    get_server_args,
    get_server_params,
    load_layout,
    server_kind_to_str,
    str_to_server_kind,
    verify_gid_range,
    verify_server_kind,
    verify_shutdown_mode,
    verify_size_unit,
    verify_type,
    verify_u64,
)
from walbd.controller.layout import parse_layout
from walbd.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[2]
S0 = ServerConnectionParam("s0", "host-s", 10000, K_STORAGE)
P0 = ServerConnectionParam("p0", "host-p", 10001, K_PROXY)
P1 = ServerConnectionParam("p1", "::1", 10003, K_PROXY)
A0 = ServerConnectionParam("a0", "host-a", 10002, K_ARCHIVE)
A1 = ServerConnectionParam("a1", "host-b", 10002, K_ARCHIVE)
LAYOUT = ServerLayout([S0], [P0, P1], [A0, A1])


def test_every_public_name_exists() -> None:
    assert len(set(library.__all__)) == len(library.__all__)
    for name in library.__all__:
        assert getattr(library, name) is not None


def test_connection_param() -> None:
    assert S0.get_host_port() == "host-s:10000"
    assert P1.get_host_port() == "[::1]:10003"
    assert ServerConnectionParam("s0", "host-s", 10000, K_STORAGE) == S0
    assert ServerConnectionParam("s0", "host-s", 10001, K_STORAGE) != S0
    assert str(S0) == "s0, host-s, 10000, storage"


@pytest.mark.parametrize(
    "args",
    [("s 0", "h", 1, 0), ("", "h", 1, 0), ("s0", "", 1, 0), ("s0", "a b", 1, 0), ("s0", "h", 0, 0),
     ("s0", "h", 65536, 0), ("s0", "h", 1, 3)],
)  # fmt: skip
def test_bad_connection_values(args: tuple[str, str, int, int]) -> None:
    with pytest.raises(UsageError):
        ServerConnectionParam(*args)


@pytest.mark.parametrize(
    "args", [(1, "h", 1, 0), ("s0", None, 1, 0), ("s0", "h", "1", 0), ("s0", "h", 1, "storage")]
)
def test_bad_connection_types(args: tuple[str, str, int, int]) -> None:
    with pytest.raises(TypeError):
        ServerConnectionParam(*args)


def test_startup_param() -> None:
    s = ServerStartupParam(S0, "/usr/bin", "/var/walb")
    assert (s.name, s.address, s.port, s.kind, s.vg, s.tp) == ("s0", "host-s", 10000, K_STORAGE, None, None)
    assert s.get_host_port() == S0.get_host_port()
    assert get_server_args(s, LAYOUT) == [
        "/usr/bin/walbd", "storage", "--archive", "host-a:10002", "--proxy", "host-p:10001,[::1]:10003",
        "--listen", "host-s", "--port", "10000", "--base-dir", "/var/walb", "--node-id", "s0",
    ]  # fmt: skip
    archive = ServerStartupParam(A0, "", "/data", vg="vg0")
    assert get_server_params(archive, isDebug=True, maxConn=5, timeoutS=7) == {
        "listen": "host-a", "port": 10002, "base-dir": "/data", "node-id": "a0", "log-level": "debug",
        "connections-max": 5, "io-timeout-s": 7,
    }  # fmt: skip
    assert get_server_params(archive, None, False, True, 3, 2)["port"] == 20002
    assert get_server_args(archive, useRepeater=True)[4:6] == ["--port", "20002"]
    with pytest.raises(TypeError):
        get_server_params(archive, maxFgTasks="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        get_server_params(s)  # a storage needs the layout
    with pytest.raises(TypeError):
        get_server_params(S0, LAYOUT)
    with pytest.raises(TypeError):
        ServerStartupParam(S0, "/usr/bin", None)  # type: ignore[arg-type]


def test_start_commands_are_understood_by_the_daemons() -> None:
    from walbd.daemon.config import load, settings
    from walbd.storage.config import StorageConfig

    args = get_server_args(ServerStartupParam(S0, "", "/var/walb"), LAYOUT)
    by_option = {setting.option: setting.name for setting in settings(StorageConfig)}
    options = {by_option[name]: value for name, value in zip(args[2::2], args[3::2], strict=True)}
    config = load(StorageConfig, None, options | {"insecure": True})
    assert config.name == "s0"


def test_layout() -> None:
    assert LAYOUT.get_primary_archive() is A0
    assert [s.name for s in LAYOUT.get_all()] == ["s0", "p0", "p1", "a0", "a1"]
    assert str(LAYOUT) == "s0, p0, p1, a0, a1"
    other = LAYOUT.replace(archiveL=[A1, A0])
    assert other.get_primary_archive() is A1
    assert other.proxyL == LAYOUT.proxyL
    assert LAYOUT.replace([], [], []).get_all() == LAYOUT.get_all()
    LAYOUT.verify(1, 2, 2)
    with pytest.raises(UsageError, match="too few"):
        LAYOUT.verify(2, 0, 0)
    with pytest.raises(UsageError):
        ServerLayout([S0], [], []).get_primary_archive()
    with pytest.raises(UsageError, match="wrong kind"):
        ServerLayout([P0], [], [])
    with pytest.raises(UsageError, match="several"):
        ServerLayout([], [P0, P0], [])
    with pytest.raises(TypeError):
        ServerLayout(S0, [], [])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        LAYOUT.to_cmd_string()


def test_layout_commands() -> None:
    layout = ServerLayout(
        [ServerStartupParam(S0, "", "/s")], [ServerStartupParam(P0, "", "/p")], [ServerStartupParam(A0, "", "/a")]
    )
    assert [line.split()[:2] for line in layout.to_cmd_string().splitlines()] == [
        ["walbd", "storage"], ["walbd", "proxy"], ["walbd", "archive"],
    ]  # fmt: skip


def test_get_server() -> None:
    assert get_server("p1", LAYOUT.get_all()) is P1
    with pytest.raises(UsageError) as caught:
        get_server("p2", LAYOUT.proxyL)
    assert "p0, p1" in caught.value.hint


def test_kinds() -> None:
    for kind, word in ((K_STORAGE, "storage"), (K_PROXY, "proxy"), (K_ARCHIVE, "archive")):
        assert server_kind_to_str(kind) == word
        assert str_to_server_kind(word) == kind
    with pytest.raises(UsageError):
        server_kind_to_str(7)
    with pytest.raises(UsageError):
        str_to_server_kind("device")
    verify_server_kind(S0, [K_STORAGE, K_PROXY])
    with pytest.raises(UsageError) as caught:
        verify_server_kind(S0, [K_ARCHIVE])
    assert "archive" in caught.value.hint
    with pytest.raises(TypeError):
        verify_server_kind("s0", [K_STORAGE])  # type: ignore[arg-type]


def test_dict2args() -> None:
    assert dict2args({"a": 1, "b": None, "c": ["x", 2]}) == ["--a", "1", "--b", "--c", "x", "2"]
    with pytest.raises(TypeError):
        dict2args({1: 2})  # type: ignore[dict-item]


# Checks


def test_verify() -> None:
    verify_type([1, 2], list, int)
    verify_type(True, bool)
    for obj, wanted, element in ((1, str, None), (None, int, None), ([1, "a"], list, int), (True, int, None)):
        with pytest.raises(TypeError):
            verify_type(obj, wanted, element)
    verify_u64((1 << 64) - 1)
    verify_gid_range(3, 3, "x")
    verify_shutdown_mode("force", "x")
    with pytest.raises(UsageError):
        verify_u64(-1)
    with pytest.raises(UsageError):
        verify_gid_range(4, 3, "x")
    with pytest.raises(UsageError):
        verify_shutdown_mode("empty", "x")
    with pytest.raises(UsageError):
        verify_size_unit("64Kx")
    verify_size_unit("64K")


# The group file

GOOD = """
group = "g1"
timeout_s = 5
[[storage]]
name = "s0"
host = "h"
port = 1
[[proxy]]
name = "p0"
host = "h"
port = 2
[[archive]]
name = "a0"
host = "h"
port = 3
[volumes.vol0]
target = "s0"
devices = { s0 = "/dev/x" }
"""


def test_group_file(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text(GOOD)
    layout = load_layout(path)
    assert (layout.group, layout.timeout_s, layout.tls, layout.path) == ("g1", 5.0, None, path)
    assert [s.name for s in layout.servers.get_all()] == ["s0", "p0", "a0"]
    volume = layout.volumes["vol0"]
    assert volume.target is layout.servers.storageL[0]
    assert volume.devices == {"s0": "/dev/x"}
    assert layout.server("a0").port == 3
    with layout.controller() as ctl:
        assert ctl.sLayout is layout.servers


def test_sample_loads() -> None:
    layout = load_layout(ROOT / "packaging" / "group.sample.toml")
    assert [s.name for s in layout.servers.get_all()] == ["s0", "s1", "p0", "p1", "a0", "a1"]
    assert layout.servers.get_primary_archive().name == "a0"
    assert layout.volumes["vol0"].devices.keys() == {"s0", "s1"}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("", ""), "", ""),
        (("group =", "grupo ="), "bad entry", "did you mean group?"),
        (("host =", "hots ="), "bad entry", "did you mean host?"),
        (("target =", "targte ="), "bad entry", "did you mean target?"),
        (('port = 1\n', 'port = "1"\n'), "bad entry", ""),
        (('port = 1\n', "port = 0\n"), "bad entry", ""),
        (('port = 2', "port = 1"), "same address", "port of its own"),
        (('"a0"', '"p0"'), "same name|several servers", ""),
        (('"s0"\nhost', '"s 0"\nhost'), "bad node name", ""),
        (('target = "s0"', 'target = "s9"'), "a storage that is not there", "s0"),
        (('{ s0 =', "{ p0 ="), "a storage that is not there", "s0"),
        (('"/dev/x"', '""'), "empty device", ""),
        (("vol0", '"vol 0"'), "bad volume name", ""),
        (('"g1"', '"g 1"'), "bad node name", ""),
        (("timeout_s = 5", "timeout_s = 0"), "bad entry", ""),
        (("timeout_s = 5", "timeout_s = true"), "bad entry", ""),
        (("[[storage]]", "[storage]"), "bad entry", ""),
        (("group", 'tls_cert = "x"\ngroup'), "go together", ""),
        (("group", 'tls_cert = "x"\ntls_key = "x"\ntls_ca = "x"\ngroup'), "TLS file is missing", ""),
        (("group", "= 3\ngroup"), "no TOML", ""),
    ],
)  # fmt: skip
def test_group_file_errors(change: tuple[str, str], message: str, hint: str, tmp_path: Path) -> None:
    text = GOOD.replace(*change, 1) if change[0] else GOOD
    if not message:
        parse_layout(text, tmp_path / "g.toml")
        return
    with pytest.raises(ConfigError, match=message) as caught:
        parse_layout(text, tmp_path / "g.toml")
    assert hint in caught.value.hint
    assert caught.value.facts["file"] == str(tmp_path / "g.toml")


def test_group_file_without_servers_or_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no server"):
        parse_layout("", tmp_path / "g")
    with pytest.raises(ConfigError, match="cannot read"):
        load_layout(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML"):
        load_layout(tmp_path / "bytes")


@given(st.text(max_size=200))
def test_any_text_is_a_layout_or_a_config_error(text: str) -> None:
    try:
        parse_layout(text, Path("g"))
    except ConfigError:
        pass


def test_where_the_group_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("walbd.controller.layout.GROUP_PLACES", (Path("walbd-group.toml"), tmp_path / "etc.toml"))
    with pytest.raises(ConfigError, match="no group file"):
        find_layout(environ={})
    for name in ("etc.toml", "walbd-group.toml", "var.toml", "arg.toml"):
        Path(name).write_text(GOOD.replace("g1", name.partition(".")[0]))
    assert find_layout(Path("arg.toml"), {"WALBD_GROUP": "var.toml"}).group == "arg"
    assert find_layout(environ={"WALBD_GROUP": "var.toml"}).group == "var"
    assert find_layout(environ={}).group == "walbd-group"
    Path("walbd-group.toml").unlink()
    assert find_layout(environ={}).group == "etc"
    with pytest.raises(ConfigError, match="cannot read"):
        find_layout(environ={"WALBD_GROUP": "gone.toml"})  # one that is named must be there
