"""Configuration: files, options over files, and everything that is refused."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from walbd.archive.config import ArchiveConfig
from walbd.daemon.config import DaemonConfig, Size, load, settings
from walbd.errors import ConfigError
from walbd.proxy.config import ProxyConfig
from walbd.storage.config import StorageConfig


class Config(DaemonConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A daemon's configuration as the daemons write theirs."""

    peer: Annotated[list[str], Meta(min_length=1)]
    limit_b: Size = 128 << 20


def test_wrong_words_have_hints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Config, write(tmp_path, 'base_dri = "/b"\n'), {})
    assert caught.value.hint == "did you mean base_dir?"
    with pytest.raises(ConfigError) as caught:
        load(Config, write(tmp_path, "xyzzy = 1\n"), {})
    assert caught.value.hint.startswith("known: base_dir, ")
    with pytest.raises(ConfigError) as caught:
        load(Config, None, {"peer": "h:1"})
    assert caught.value.hint == "give --base-dir, or --config FILE"
    with pytest.raises(ConfigError) as caught:
        load(Config, path := write(tmp_path, 'peer = ["h:1"]\n'), {})
    assert caught.value.hint == f"give --base-dir, or say it in {path}"


MINIMAL = {"base_dir": "/b", "peer": "h:1,h:2"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_file_and_options(tmp_path: Path) -> None:
    path = write(tmp_path, 'base_dir = "/b"\npeer = ["h:1"]\nlimit_b = "64MiB"\nport = 7\nio_timeout_s = 5\n')
    config = load(Config, path, {"port": "8", "listen": None})
    assert (config.base_dir, config.peer, config.limit_b, config.port) == ("/b", ["h:1"], 64 << 20, 8)
    assert config.io_timeout_s == 5.0
    assert config.name


def test_options_alone() -> None:
    config = load(Config, None, MINIMAL | {"limit_b": "1g", "insecure": True, "retry_delay_max_s": "2.5"})
    assert config.peer == ["h:1", "h:2"]
    assert (config.limit_b, config.insecure, config.retry_delay_max_s) == (1 << 30, True, 2.5)


@pytest.mark.parametrize(
    "options",
    [
        {"base_dir": None},
        {"peer": ""},
        {"port": "65536"},
        {"port": "-1"},
        {"port": "x"},
        {"limit_b": "1x"},
        {"limit_b": -1},
        {"log_level": "loud"},
        {"listen": "0.0.0.0"},
        {"tls_cert": "a"},
        {"node_id": "a b"},
        {"group": ""},
        {"connections_max": "0"},
        {"io_timeout_s": "0"},
        {"retry_delay_min_s": "9", "retry_delay_max_s": "1"},
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load(Config, None, MINIMAL | options)


def test_other_machines_need_tls_or_a_word() -> None:
    load(Config, None, MINIMAL | {"listen": "0.0.0.0", "insecure": True})
    load(Config, None, MINIMAL | {"listen": "::1"})
    with pytest.raises(ConfigError, match="TLS"):
        load(Config, None, MINIMAL | {"listen": "10.0.0.1"})


@pytest.mark.parametrize(
    "text",
    ["base_dir = 3", "surprise = 1", "base_dir = ", "[base_dir]\nx = 1", "\xff\xfe", 'peer = "a"\nport = 1.5'],
    ids=range(6),
)
def test_bad_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load(Config, path, MINIMAL if text.startswith("surprise") or text.startswith("peer") else {"peer": "h:1"})


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(Config, Path("/does/not/exist"), MINIMAL)


def test_settings_describe_every_field() -> None:
    rows = {row.name: row for row in settings(Config)}
    assert rows["limit_b"].is_size
    assert rows["peer"].type is list
    assert rows["peer"].required
    assert rows["log_format"].choices == ("console", "json")
    assert rows["io_timeout_s"].type is float
    assert rows["base_dir"].option == "--base-dir"
    for row in settings(DaemonConfig):
        assert row.description, row.name


@pytest.mark.parametrize(
    ("name", "cls"), [("storage", StorageConfig), ("proxy", ProxyConfig), ("archive", ArchiveConfig)]
)
def test_samples_are_valid(name: str, cls: type[DaemonConfig]) -> None:
    sample = Path(__file__).parents[2] / "packaging" / f"{name}.sample.toml"
    config = load(cls, sample, {})
    assert config.base_dir == f"/var/lib/walbd/{name}"
