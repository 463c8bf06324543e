"""Checking values against types from several threads at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import walbd
from walbd.format.schema import convert

# What msgspec alone dies of: the first use of types in several threads at once.
FIRST_USES = """
import sys, threading
import msgspec
from walbd.format.schema import convert

sys.setswitchinterval(1e-6)
kinds = [int, str, list[int], dict[str, int]]

def make(n):
    inner = msgspec.defstruct(f"I{n}", [(f"f{i}", kinds[i % 4]) for i in range(30)])
    return msgspec.defstruct(f"O{n}", [("a", inner), ("b", list[inner]), ("c", dict[str, inner])])

inner = {f"f{i}": [1, "x", [1], {"x": 1}][i % 4] for i in range(30)}
value = {"a": inner, "b": [inner], "c": {"x": inner}}
for n in range(100):
    cls, start, made = make(n), threading.Barrier(3), []
    def use():
        start.wait()
        made.append(convert(value, cls))
    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and made[0] == made[1] == made[2]
"""


class Point(msgspec.Struct):
    x: int


def test_strict() -> None:
    assert convert({"x": 1}, Point).x == 1
    for _ in range(2):
        with pytest.raises(msgspec.ValidationError):
            convert({"x": "1"}, Point)


def test_first_uses_at_the_same_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USES], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_the_only_door() -> None:
    package = Path(walbd.__file__).parent
    users = {
        path.name
        for folder in (package, *(path.resolve() for path in package.iterdir() if path.is_symlink()))
        for path in folder.rglob("*.py")
        if "msgspec.convert(" in path.read_text()
    }
    assert users == {"schema.py"}
