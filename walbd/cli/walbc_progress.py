"""Progress of long work: a bar with rate and time left on a terminal, else a line at most every 2 s."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TextIO

from walbd.controller.progress import Progress
from walbd.units import format_duration, format_size

LINE_EVERY_S: Final = 2.0
_WINDOW_S: Final = 10.0  # over which a rate is taken


class Meter:
    """Rate and remaining time from successive looks at the same work."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._seen: deque[tuple[float, int]] = deque()  # (when, done)

    def feed(self, progress: Progress, now: float) -> None:
        """Take note of how far the work is at `now` [s]; another job or phase starts anew."""
        key = (progress.server, progress.job, progress.phase)
        if key != self._key or (self._seen and progress.done < self._seen[-1][1]):
            self._key = key
            self._seen.clear()
        self._seen.append((now, progress.done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_S:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Amount per second over the last seconds; 0: not known."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return 0.0
        (began, before), (ended, after) = self._seen[0], self._seen[-1]
        return (after - before) / (ended - began)

    def left_s(self, progress: Progress) -> float | None:
        """Return how long the rest will take at this rate [s]; None: not known."""
        if not progress.total or self.rate <= 0:
            return None
        return max(0, progress.total - progress.done) / self.rate


def title(progress: Progress) -> str:
    """Write what is being waited for."""
    if progress.what == "wait":
        return f"{progress.volume}: waiting for {progress.phase}".removeprefix(": ")
    where = f" at {progress.server}" if progress.server else ""
    phase = f": {progress.phase}" if progress.phase else ""
    return f"{progress.what} {progress.volume}{where}{phase}"


def amounts(progress: Progress, meter: Meter) -> str:
    """Write how far it is, how fast, and how long it will take."""
    parts = []
    if progress.total:
        parts.append(f"{min(100, 100 * progress.done // progress.total)}%")
        parts.append(f"{_amount(progress.done, progress.unit)} of {_amount(progress.total, progress.unit)}")
    elif progress.done:
        parts.append(_amount(progress.done, progress.unit))
    if meter.rate > 0:
        parts.append(f"{_amount(meter.rate, progress.unit)}/s")
    if (left_s := meter.left_s(progress)) is not None:
        parts.append(f"{format_duration(left_s)} left")
    if not parts:
        parts.append(f"{format_duration(progress.elapsed_s)} so far")
    if progress.note:
        parts.append(progress.note)
    return ", ".join(parts)


def _amount(value: float, unit: str) -> str:
    return format_size(int(value)) if unit == "B" else f"{value:.0f} {unit}".rstrip()


class ProgressView:
    """Shows progress: call it with each `Progress`; one that says `ended` takes a bar away, as `close` does."""

    def __init__(
        self, stream: TextIO, *, bar: bool, clock: Callable[[], float] = time.monotonic, quiet: bool = False
    ) -> None:
        self._stream = stream
        self._bar = bar
        self._clock = clock
        self._quiet = quiet
        self.last: Progress | None = None
        self._meter = Meter()
        self._last_line = clock()
        self._rich: Any = None
        self._task: Any = None

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        if self._quiet:
            return
        now = self._clock()
        self._meter.feed(progress, now)
        if self._bar:
            if progress.ended:
                self.close()
            else:
                self._draw(progress)
        elif not progress.ended and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._stream.write(f"{title(progress)}: {amounts(progress, self._meter)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def _draw(self, progress: Progress) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars

            self._rich = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[amounts]}", markup=False),
                console=Console(file=self._stream),
                transient=True,
            )
            self._task = self._rich.add_task("", total=None, amounts="")
            self._rich.start()
        self._rich.update(
            self._task,
            description=title(progress),
            total=progress.total or None,
            completed=progress.done,
            amounts=amounts(progress, self._meter),
        )


def progress_view(*, quiet: bool = False) -> ProgressView:
    """Make the view for this process: a bar where a terminal is, lines on stderr otherwise."""
    dumb = os.environ.get("TERM") == "dumb"
    for stream in (sys.stderr, sys.stdout):
        if stream.isatty() and sys.stdout.isatty() and not dumb:
            return ProgressView(stream, bar=True, quiet=quiet)
    return ProgressView(sys.stderr, bar=False, quiet=quiet)
