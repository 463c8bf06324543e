"""The group file: what volumes say of archives, other servers in place of old ones, and writing it back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walbd.controller.layout import GroupLayout, load_layout, parse_layout
from walbd.controller.servers import ServerConnectionParam, ServerLayout
from walbd.errors import ConfigError, UsageError
from walbd.fs import OsFileSystem

TEXT = """
group = "g"
timeout_s = 3.5
tls_cert = "cert.pem"
tls_key = "key.pem"
tls_ca = "ca.pem"
[[storage]]
name = "s0"
host = "storage0"
port = 1
[[storage]]
name = "s1"
host = "storage1"
port = 1
[[proxy]]
name = "p0"
host = "proxy0"
port = 2
[[archive]]
name = "a0"
host = "::1"
port = 3
[[archive]]
name = "a1"
host = "archive1"
port = 3
[volumes.vol0]
target = "s0"
devices = { s0 = "/dev/vol0", s1 = "/dev/other" }
archives = ["a0", "a1"]
[volumes.vol1]
archives = []
[volumes.vol2]
devices = { s0 = "/odd \\"path\\" \\\\ \\u00e9 \\t" }
"""


@pytest.fixture
def group(tmp_path: Path) -> GroupLayout:
    for name in ("cert.pem", "key.pem", "ca.pem"):
        (tmp_path / name).touch()
    path = tmp_path / "group.toml"
    path.write_text(TEXT)
    return load_layout(path)


def test_archives_of_a_volume(group: GroupLayout) -> None:
    said = {name: entry.archives for name, entry in group.volumes.items()}
    a0, a1 = group.servers.archiveL
    assert said == {"vol0": (a0, a1), "vol1": (), "vol2": None}


@pytest.mark.parametrize("archives", ['["a9"]', '["s0"]', '["a0", "a0"]', '"a0"', "[1]"])
def test_archives_that_cannot_be_meant(archives: str) -> None:
    text = '[[storage]]\nname="s0"\nhost="h"\nport=1\n[[archive]]\nname="a0"\nhost="h"\nport=2\n[volumes.v]\n'
    with pytest.raises(ConfigError) as caught:
        parse_layout(f"{text}archives = {archives}\n", Path("x.toml"))
    assert caught.value.facts["file"] == "x.toml"


def test_written_and_read_again_it_is_the_same(group: GroupLayout) -> None:
    assert group.path is not None
    again = parse_layout(group.to_toml(), group.path)
    assert (again.servers.get_all(), again.volumes) == (group.servers.get_all(), group.volumes)
    assert (again.group, again.timeout_s, again.tls) == (group.group, group.timeout_s, group.tls)
    assert tomllib.loads(group.to_toml())["tls_cert"] == "cert.pem"  # as it was, not made absolute


def test_a_replaced_storage_hands_over_its_volumes(group: GroupLayout) -> None:
    new = ServerConnectionParam("s2", "storage2", 1, 0)
    layout = group.servers
    after = group.with_servers(layout.replace(storageL=[new, layout.storageL[1]]), {"s0": "s2"})
    assert after.volumes["vol0"].target == new
    assert after.volumes["vol0"].devices == {"s2": "/dev/vol0", "s1": "/dev/other"}
    assert after.path == group.path
    assert after.tls == group.tls
    into_old = group.with_servers(ServerLayout([layout.storageL[1]], layout.proxyL, layout.archiveL), {"s0": "s1"})
    assert into_old.volumes["vol0"].target == layout.storageL[1]
    assert into_old.volumes["vol0"].devices == {"s1": "/dev/other"}  # what it says of its own device counts


def test_archives_are_replaced_reordered_and_dropped(group: GroupLayout) -> None:
    a0, a1 = group.servers.archiveL
    promoted = group.with_servers(group.servers.replace(archiveL=[a1, a0]))
    assert promoted.volumes["vol0"].archives == (a1, a0)
    new = ServerConnectionParam("a2", "archive2", 3, 2)
    replaced = group.with_servers(group.servers.replace(archiveL=[new, a1]), {"a0": "a2"})
    assert replaced.volumes["vol0"].archives == (new, a1)
    alone = group.with_servers(group.servers.replace(archiveL=[a1]))
    assert alone.volumes["vol0"].archives == (a1,)


def test_the_file_is_replaced(group: GroupLayout) -> None:
    a0, a1 = group.servers.archiveL
    changed = group.with_servers(group.servers.replace(archiveL=[a1, a0]))
    changed.write(OsFileSystem())
    assert group.path is not None
    assert load_layout(group.path).servers.archiveL == [a1, a0]
    assert [p.name for p in group.path.parent.glob("*.tmp")] == []


def test_a_group_without_a_file_cannot_be_written() -> None:
    servers = ServerLayout([ServerConnectionParam("s0", "h", 1, 0)], [], [])
    group = GroupLayout(servers).with_servers(servers)
    assert 'name = "s0"' in group.to_toml()
    with pytest.raises(UsageError):
        group.write(OsFileSystem())


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_device_path_is_written_so_that_it_is_read_again(path: str) -> None:
    servers = ServerLayout([ServerConnectionParam("s0", "h", 1, 0)], [], [])
    text = GroupLayout(servers).with_servers(servers).to_toml() + "[volumes.v]\n"
    group = parse_layout(text, Path("x.toml"))
    assert group._file is not None
    group._file.volumes["v"].devices["s0"] = path
    assert parse_layout(group.to_toml(), Path("x.toml")).volumes["v"].devices == {"s0": path}
