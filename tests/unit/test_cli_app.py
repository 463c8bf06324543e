"""The end of every command: exit status, the one line of error, tables."""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import pytest

from tests.kit.cli import Cli
from walbd.cli import output
from walbd.cli.app import Late, LateGroup
from walbd.cli.output import error_lines, print_table
from walbd.cli.walbd import root
from walbd.errors import Busy, ConnectError, CorruptData, RemoteError, TimedOut, WalbError


def raising(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("x", callback=fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            CorruptData("bad bytes", path="/a", offset=3, hint="look"),
            1,
            "prog: /a: bad bytes (offset=3)\nhint: look\n",
        ),
        (WalbError("two\nlines", hint="a\nb"), 1, "prog: two lines\nhint: a b\n"),
        (Busy("in use", source="x"), 5, "prog: x: in use\n"),
        (ConnectError("gone", port=5), 3, "prog: gone (port=5)\n"),
        (TimedOut("late"), 4, "prog: late\n"),
        (RemoteError("busy", "later"), 5, "prog: later\n"),
        (OSError(5, "Input/output error", "/dev/x"), 1, "prog: /dev/x: Input/output error\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            ExceptionGroup("both", [Busy("one"), ExceptionGroup("in", [TimedOut("two")])]),
            5,
            "prog: one\nprog: two\n",
        ),
        (BaseExceptionGroup("stop", [KeyboardInterrupt()]), 130, ""),
        (click.UsageError("no such option"), 2, "prog: no such option\nhint: see `prog --help`\n"),
    ],
)
def test_errors_end_as_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    result = Cli(raising(error), "prog", capsys)()
    assert (result.code, result.out, result.err) == (code, "", said)


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: ExceptionGroup("group", [e, Busy("x")])])
def test_defects_say_so(capsys: pytest.CaptureFixture[str], wrap: Callable[[Exception], Exception]) -> None:
    result = Cli(raising(wrap(ZeroDivisionError("oh"))), "prog", capsys)()
    assert result.code == 70
    assert "ZeroDivisionError: oh" in result.err
    assert "defect" in result.err


def test_commands_may_return_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert Cli(click.Command("x", callback=lambda: 7), "prog", capsys)().code == 7
    assert Cli(click.Command("x", callback=lambda: None), "prog", capsys)().code == 0


def test_late_commands(capsys: pytest.CaptureFixture[str]) -> None:
    group = LateGroup(
        "g", late={"wlog": Late("walbd.cli.wlog:wlog", "late one"), "gone": Late("walbd.no:x", "gone")}
    )
    group.add_command(click.Command("own", help="own one"))
    cli = Cli(group, "prog", capsys)
    said = cli.good("--help")
    assert said.index("late one") < said.index("gone") < said.index("own one")
    assert "verify" in cli.good("wlog", "--help")
    cli.fails("nothing", code=2)


MADE = {"made": lambda: click.Command("made", callback=lambda: 9)}


def test_late_commands_may_be_made_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    group = LateGroup("g", late={"m": Late(f"{__name__}:MADE.made", "made")})
    assert Cli(group, "prog", capsys)("m").code == 9


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(root, "walbd", capsys)
    assert cli.good("--version").startswith("walbd ")
    assert "did you mean show? See `walbd wlog --help`" in cli.fails("wlog", "shw", code=2)
    assert "see `walbd wlog show --help`" in cli.fails("wlog", "show", code=2)
    assert "see `walbd --help`" in cli.fails("--what", code=2)


def test_error_lines_keep_all_facts() -> None:
    assert error_lines(CorruptData("m", path="p", source="s", a=1, b="x y"), "w") == [
        "w: p: m (source=s a=1 b=x y)"
    ]


def test_plain_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "n"], [["a", 1], ["bcdef", 23]], right=["n"])
    assert capsys.readouterr().out == "name    n\na       1\nbcdef  23\n"
    print_table(["name"], [])
    assert capsys.readouterr().out == "name\n"


def test_tables_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "use_colour", lambda: True)
    monkeypatch.setattr(output, "line_width", lambda: 80)
    print_table(["name", "n"], [["[red]a", 1]], right=["n"])
    assert "[red]a" in (told := capsys.readouterr().out)
    assert "\u2502" in told


@pytest.mark.parametrize("colour", [True, False])
def test_tables_on_a_narrow_terminal(
    colour: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values stay whole: no box, the last column broken at spaces, or below where that is too narrow."""
    monkeypatch.setattr(output, "use_colour", lambda: colour)
    monkeypatch.setattr(output, "line_width", lambda: 40)
    print_table(["TIME", "NOTE"], [["2026-11-23T05:36", "some words that go on and on"]])
    assert capsys.readouterr().out == (
        "TIME\n    NOTE\n"  # 22 columns are too few
        "2026-11-23T05:36\n    some words that go on and on\n"
    )
    print_table(["N", "NOTE"], [[1, "some words that go on and on and on and on"], [2, "short"]])
    assert capsys.readouterr().out == ("N  NOTE\n1  some words that go on and on and on\n   and on\n2  short\n")
    print_table(["A", "B"], [["x" * 30, 12345678901]], right=["B"])
    assert "12345678901" in capsys.readouterr().out


def test_lines_that_fit() -> None:
    assert output.fit("a" * 50, 2, 40) == "a" * 50  # what cannot be broken is not
    assert output.fit("    one two three four five six seven eight", 6, 40) == (
        "    one two three four five six seven\n      eight"
    )
    assert output.fit("one two three", 2, None) == "one two three"


@pytest.mark.parametrize("args", [[], ["device"], ["wlog"]])
def test_no_command_shows_what_there_is(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = Cli(root, "walbd", capsys)(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"Usage: {' '.join(['walbd', *args])} ")
    assert len(result.err.splitlines()) > 5


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not output.use_colour()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.use_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.use_colour()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not output.use_colour()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"name": "\udcff"})
    assert json.loads(capsys.readouterr().out) == {"name": "\udcff"}
