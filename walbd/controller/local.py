"""Things of a host: programs and files. Source: docs/controller.md, "Devices"."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Protocol

from walbd.controller.verify import verify_function, verify_type
from walbd.errors import WalbError


class RunCommand(Protocol):
    """Runs a program somewhere and returns what it printed; raises WalbError when it fails."""

    def __call__(self, args: list[str], putMsg: bool = False) -> str: ...


def run_local_command(args: list[str], putMsg: bool = False, quietErr: bool = False) -> str:
    """Run a program on this host and return its standard output, stripped.

    Raises WalbError when it cannot be run or exits with another status than 0. Its standard error passes
    through unless `quietErr`.
    """
    verify_type(args, list, str)
    if putMsg:
        sys.stderr.write(f"run: {shlex.join(args)}\n")
    try:
        done = subprocess.run(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE if quietErr else None, text=True, check=False
        )
    except OSError as exc:
        raise WalbError("cannot run the program", program=args[0] if args else "", reason=exc.strerror) from exc
    if done.returncode != 0:
        raise WalbError("the program failed", command=shlex.join(args), status=done.returncode)
    text = done.stdout.strip()
    if putMsg:
        sys.stderr.write(f"{text}\n")
    return text


def exists_file(path: str, runCommand: RunCommand = run_local_command) -> bool:
    """Say whether there is a block device at a path, where `runCommand` runs programs."""
    verify_type(path, str)
    verify_function(runCommand)
    return path_test(runCommand, "-b", path)


def printL(ls: Sequence[object]) -> None:
    """Print one item a line."""
    for item in ls:
        sys.stdout.write(f"{item}\n")


def path_test(runCommand: RunCommand, flag: str, path: str) -> bool:
    """Say what `test FLAG PATH` says, where `runCommand` runs programs."""
    answer = runCommand(["/bin/sh", "-c", f"if [ {flag} {shlex.quote(path)} ]; then echo 1; else echo 0; fi"])
    return answer.strip() == "1"
