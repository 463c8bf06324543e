"""How far long work is, as its callers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One look at work that goes on. `done` and `total` are in `unit`; total 0: the end is not known."""

    what: str  # "full-backup", "restore", "wait": constant during one piece of work
    volume: str
    server: str = ""
    job: int = 0  # 0: not a job of a server
    phase: str = ""
    unit: str = "B"
    done: int = 0
    total: int = 0
    elapsed_s: float = 0.0  # since the waiting began
    note: str = ""  # something in the way, such as a server that does not answer now
    ended: bool = False


ShowProgress = Callable[[Progress], None]


def ignore_progress(_progress: Progress) -> None:
    """Show nothing."""
