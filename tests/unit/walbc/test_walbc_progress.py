"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from walbd.cli.walbc_progress import Meter, ProgressView, amounts, progress_view, title
from walbd.controller import Progress
from walbd.units import format_duration


def at(done: int = 0, **more: Any) -> Progress:
    fields: dict[str, Any] = {"what": "full-backup", "volume": "vol0", "server": "s0", "job": 3, "phase": "copy"}
    return Progress(**(fields | {"done": done, "total": 1000 << 20} | more))


def test_rate_and_time_left() -> None:
    meter = Meter()
    assert (meter.rate, meter.left_s(at())) == (0, None)
    for second in range(5):
        meter.feed(at(second * 100 << 20), float(second))
    assert meter.rate == 100 << 20
    assert meter.left_s(at(400 << 20)) == 6
    assert amounts(at(400 << 20), meter) == "40%, 400.0 MiB of 1000.0 MiB, 100.0 MiB/s, 6 s left"


def test_rate_forgets_what_is_long_ago() -> None:
    meter = Meter()
    for second in range(100):
        meter.feed(at((second << 20) if second < 50 else (50 << 20) + (second - 50) * (10 << 20)), float(second))
    assert meter.rate == 10 << 20


def test_another_phase_begins_anew() -> None:
    meter = Meter()
    meter.feed(at(10), 0.0)
    meter.feed(at(20), 1.0)
    assert meter.rate == 10
    meter.feed(at(0, phase="check"), 2.0)
    assert meter.rate == 0
    meter.feed(at(5, phase="check"), 3.0)
    meter.feed(at(1, phase="check"), 4.0)  # backwards: it was restarted
    assert meter.rate == 0


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (at(), "full-backup vol0 at s0: copy"),
        (at(phase=""), "full-backup vol0 at s0"),
        (Progress(what="wait", volume="vol0", server="a0", phase="gid 3"), "vol0: waiting for gid 3"),
        (Progress(what="wait", volume="", phase="gid 3"), "waiting for gid 3"),
    ],
)
def test_titles(progress: Progress, text: str) -> None:
    assert title(progress) == text


def test_amounts_without_an_end() -> None:
    assert amounts(at(0, total=0, elapsed_s=3), Meter()) == "3 s so far"
    assert amounts(at(5, total=0, unit="diffs"), Meter()) == "5 diffs"
    assert amounts(at(0, total=0, note="gone"), Meter()) == "0 s so far, gone"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_at_most_every_two_seconds() -> None:
    out, now = io.StringIO(), [0.0]
    view = ProgressView(out, bar=False, clock=lambda: now[0])
    for tick in range(41):
        now[0] = tick * 0.25
        view(at(tick << 20))
    view.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "full-backup vol0 at s0: copy: 0%, 8.0 MiB of 1000.0 MiB, 4.0 MiB/s, 4 min 8 s left"


def test_quiet() -> None:
    out = io.StringIO()
    view = ProgressView(out, bar=False, clock=iter([0.0, 9.0, 99.0]).__next__, quiet=True)
    view(at())
    assert out.getvalue() == ""
    assert view.last == at()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    view = ProgressView(out, bar=True, clock=iter(float(i) for i in range(99)).__next__)
    for i in range(5):
        view(at(i * 200 << 20))
    view(at(1000 << 20, ended=True))
    assert out.getvalue().endswith("\x1b[2K")  # the bar is gone
    view.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "full-backup vol0 at s0: copy" in plain
    assert "80%, 800.0 MiB of 1000.0 MiB, 200.0 MiB/s, 1 s left" in plain


@pytest.mark.parametrize(
    ("out", "err", "term", "bar", "where"),
    [
        (Terminal(), Terminal(), "xterm", True, "stderr"),
        (Terminal(), io.StringIO(), "xterm", True, "stdout"),
        (io.StringIO(), Terminal(), "xterm", False, "stderr"),
        (Terminal(), Terminal(), "dumb", False, "stderr"),
    ],
)
def test_where_progress_goes(
    out: io.StringIO, err: io.StringIO, term: str, bar: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", term)
    view = progress_view()
    assert (view._bar, view._stream) == (bar, out if where == "stdout" else err)
