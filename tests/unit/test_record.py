"""volume.json: inverse, readable, and every damage told."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbd.daemon.record import load_record, save_record
from walbd.errors import CorruptData, DiskFailed, NotFound
from walbd.format.meta import BaseState, LogPoint, Snapshot
from walbd.fs import OsFileSystem, failpoints
from walbd.ids import Gid, Lsid

FS = OsFileSystem()


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As daemons have them."""

    state: str
    done: LogPoint
    base: BaseState
    queue: list[LogPoint] = []


RECORD = Record(
    state="Target",
    done=LogPoint(Lsid(5), Gid(2**64 - 2), mergeable=True, timestamp=7),
    base=BaseState(Snapshot(Gid(0), Gid(3))),
)


def test_inverse_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "volume.json"
    save_record(FS, path, RECORD)
    assert load_record(FS, path, Record) == RECORD
    assert json.loads(path.read_text())["record"]["done"]["lsid"] == 5
    assert [file.name for file in tmp_path.iterdir()] == ["volume.json"]


def test_edited_by_hand_without_checksum(tmp_path: Path) -> None:
    path = tmp_path / "volume.json"
    save_record(FS, path, RECORD)
    whole = json.loads(path.read_text())
    del whole["checksum"]
    whole["record"]["state"] = "Stopped"
    path.write_text(json.dumps(whole))
    assert load_record(FS, path, Record).state == "Stopped"


@given(st.data())
def test_every_flipped_bit_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("r") / "volume.json"
    save_record(FS, path, RECORD)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        loaded = load_record(FS, path, Record)
    except CorruptData:
        return
    assert loaded == RECORD  # white space, or the name of the checksum


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_other_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-volume.json"
    path.write_bytes(data)
    with pytest.raises(CorruptData):
        load_record(FS, path, Record)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_record(FS, tmp_path / "volume.json", Record)


def test_a_failed_replacement_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "volume.json"
    save_record(FS, path, RECORD)
    failpoints.arm("fs.commit.before_rename=eio")
    with pytest.raises(DiskFailed):
        save_record(FS, path, msgspec.structs.replace(RECORD, state="Stopped"))
    assert load_record(FS, path, Record) == RECORD
    assert [file.name for file in tmp_path.iterdir()] == ["volume.json"]
