"""How the command line speaks: errors, tables and JSON look the same in every command.

Results go to stdout, everything else to stderr. Colour and boxes only where a terminal is at the other end and
NO_COLOR is not set; scripts get plain columns, or JSON with `--json`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from walbd.errors import WalbError

_PLACES = ("path", "source")  # facts that say where; they come first


def use_colour() -> bool:
    """Say whether stdout is a terminal that wants colour."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error_lines(error: WalbError, prog: str) -> list[str]:
    """Return an error as it is printed: one line, `PROG: PLACE: what is wrong (fact=...)`, then the hint."""
    facts = dict(error.facts)
    place = next((str(facts.pop(key)) for key in _PLACES if key in facts), "")
    text = " ".join(f"{key}={value}" for key, value in facts.items())
    line = f"{prog}: {place}: {error.message}" if place else f"{prog}: {error.message}"
    lines = [_one_line(f"{line} ({text})" if text else line)]
    if error.hint:
        lines.append(_one_line(f"hint: {error.hint}"))
    return lines


def print_error(error: WalbError, prog: str) -> None:
    """Print an error on stderr."""
    sys.stdout.flush()
    for line in error_lines(error, prog):
        print(line, file=sys.stderr)


def note(text: str) -> None:
    """Print a remark on stderr: something worth knowing that is neither result nor error."""
    print(text, file=sys.stderr)


def print_json(value: object) -> None:
    """Print one JSON document."""
    import json

    print(json.dumps(value, indent=2))


def print_facts(facts: Mapping[str, object]) -> None:
    """Print names and values, one pair a line, values aligned."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table: boxed on a terminal, plain aligned columns otherwise. Columns in `right` align right."""
    cells = [[str(cell) for cell in row] for row in rows]
    if use_colour():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold")
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        parts = [
            f"{cell:>{width}}" if name in right else f"{cell:<{width}}"
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        print("  ".join(parts).rstrip())


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
