"""Running the command line in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from walbd.cli.app import run


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Cli:
    """One command, to be run with different arguments."""

    command: click.Command
    prog: str
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *args: str | Path) -> Result:
        """Run with these arguments."""
        self.capsys.readouterr()
        code = run(self.command, self.prog, [str(arg) for arg in args])
        said = self.capsys.readouterr()
        return Result(code, said.out, said.err)

    def good(self, *args: str | Path) -> str:
        """Run, require success and silence on stderr, and return what was printed."""
        result = self(*args)
        assert (result.code, result.err) == (0, ""), result
        return result.out

    def fails(self, *args: str | Path, code: int = 1) -> str:
        """Run, require this exit status and one line of error with at most one hint; return stderr."""
        result = self(*args)
        assert result.code == code, result
        lines = result.err.splitlines()
        assert lines, result
        assert lines[0].startswith(f"{self.prog}: "), result
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), result
        return result.err
