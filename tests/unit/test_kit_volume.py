"""The memory of what was written: a write that was not answered is in a snapshot or not, and both are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit import volume as module
from tests.kit.process import Process
from tests.kit.volume import Leg, Volume

SIZE_B = 1 << 20


class Disk:
    """What a device holds; connections to it may be lost before or after a write."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE_B)
        self.dies = ""

    def __call__(self, _path: str) -> Disk:
        return self

    def write(self, offset_b: int, data: bytes) -> None:
        dies, self.dies = self.dies, ""
        if dies == "before":
            raise ConnectionError
        self.data[offset_b : offset_b + len(data)] = data
        if dies == "after":
            raise ConnectionError

    def read(self, offset_b: int, size_b: int) -> bytes:
        return bytes(self.data[offset_b : offset_b + size_b])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_snapshot_after_a_write_that_was_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    disk = Disk()
    monkeypatch.setattr(module, "NbdClient", disk)
    leg = Leg("s0", Process("dev", [], tmp_path), tmp_path, tmp_path / "l", tmp_path / "d")
    volume = Volume("vol0", [leg], SIZE_B)
    volume.write(0, b"a" * 4096)
    disk.dies = dies
    with pytest.raises(ConnectionError):
        volume.write(4096, b"b" * 4096)
    seq = volume.settle()
    assert volume.states_of(bytes(disk.data))[-1] == seq
    assert volume.model == disk.data
    volume.write(0, b"c" * 4096)
    assert volume.states_of(bytes(disk.data)) == [seq + 1]
