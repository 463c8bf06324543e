"""The state table of the proxy, as the specification lists it; and the settings."""

from pathlib import Path

import pytest

from walbd.daemon.config import load
from walbd.errors import ConfigError
from walbd.proxy.config import ProxyConfig
from walbd.proxy.server import files_per_send
from walbd.proxy.states import TABLE, Command, State


def test_steps() -> None:
    steps = {
        (str(state), str(command), step.during, str(step.to)) for (state, command), step in TABLE.steps.items()
    }
    assert steps == {
        ("Clear", "archive-info add", "AddArchiveInfo", "Stopped"),
        ("Stopped", "archive-info add", "AddArchiveInfo", "Stopped"),
        ("Stopped", "archive-info update", "AddArchiveInfo", "Stopped"),
        ("Stopped", "archive-info delete", "DeleteArchiveInfo", "Stopped"),
        ("Stopped", "archive-info delete (the last one)", "DeleteArchiveInfo", "Clear"),
        ("Stopped", "clear-vol", "ClearVol", "Clear"),
        ("Broken", "clear-vol", "ClearVol", "Clear"),
        ("Stopped", "start", "Start", "Started"),
        ("Started", "stop", "Stop", "Stopped"),
        ("Started", "stop empty", "WaitForEmpty", "Stopped"),
        ("Started", "wlog-transfer", "WlogRecv", "Started"),
    }


def test_every_state_has_a_meaning_and_every_command_a_rule() -> None:
    assert set(TABLE.meanings) == set(State)
    for command in Command:
        assert TABLE.rule_of(command).states, command


def test_settings_from_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text('base_dir = "/x"\nwdiff_send_size_max = "2MiB"\nstart_stopped = true\n')
    config = load(ProxyConfig, path, {"wdiff_send_count_max": "7", "port": "1234"})
    assert (config.wdiff_send_size_max, config.wdiff_send_count_max, config.port) == (2 << 20, 7, 1234)
    assert config.start_stopped


def test_defaults() -> None:
    config = load(ProxyConfig, None, {"base_dir": "/x"})
    assert (config.wdiff_send_size_max, config.wdiff_send_count_max) == (128 << 20, 1000)
    assert not config.start_stopped


@pytest.mark.parametrize(
    "options",
    [
        {"wdiff_send_size_max": "0"},
        {"wdiff_send_count_max": "0"},
        {"sends_max": "0"},
        {"receives_max": "-1"},
        {"probe_interval_s": "0"},
        {"free_reserve_b": "lots"},
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        load(ProxyConfig, None, {"base_dir": "/x"} | options)


def test_unknown_setting(tmp_path: Path) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text('base_dir = "/x"\nwdiff_size = 1\n')
    with pytest.raises(ConfigError, match="unknown setting"):
        load(ProxyConfig, path, {})


def test_open_files_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {"now": (4096, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])

    def per_send(sends: int, count: int = 1000) -> int:
        return files_per_send(ProxyConfig(base_dir="/x", sends_max=sends, wdiff_send_count_max=count))

    assert per_send(2) == 1000
    assert per_send(8) == (4096 - 512) // 8
    limits["now"] = (600, 4096)
    assert per_send(8) == 16
    assert per_send(8, 10) == 10
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert per_send(8) == 1000
