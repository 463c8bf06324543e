"""`walbd` as it would be on another host: another clock, another version. For tests of groups of such hosts.

    python -m tests.kit.as_if [--clock FILE] [--version TEXT] -- storage --port ...

FILE holds how many seconds the clock is ahead, and is read at every look at the clock: so it can jump while the
process runs. Nothing else differs from the real `walbd`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.kit.process import Process


def other(process: Process, *, clock: Path | None = None, version: str = "") -> None:
    """Make a process run so from its next start on."""
    words = ["--clock", str(clock)] if clock is not None else []
    words += ["--version", version] if version else []
    process.program = ["-m", "tests.kit.as_if", *words, "--"]


def main() -> None:
    at = sys.argv.index("--")
    words = dict(zip(sys.argv[1:at:2], sys.argv[2:at:2], strict=True))
    sys.argv[1:] = sys.argv[at + 1 :]
    if version := words.get("--version"):
        import walbd

        walbd.__version__ = version
    if clock := words.get("--clock"):
        from walbd.daemon import env

        real = env.SystemClock.now
        env.SystemClock.now = lambda self: real(self) + int(Path(clock).read_text())  # type: ignore[method-assign]
    from walbd.cli import walbd as cli

    cli.main()


if __name__ == "__main__":
    main()
