"""How the command line speaks: errors, tables and JSON look the same in every command.

Results go to stdout, everything else to stderr. Colour and boxes only where a terminal is at the other end and
NO_COLOR is not set; scripts get plain columns, or JSON with `--json`.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence

from walbd.errors import WalbError, exit_code_of

_PLACES = ("path", "source")  # facts that say where; they come first
_NARROW = 24  # a last column with less room goes to lines of its own


def use_colour() -> bool:
    """Say whether stdout is a terminal that wants colour."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def line_width() -> int | None:
    """Return how wide the terminal at stdout is; None where lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fit(line: str, indent: int, width: int | None) -> str:
    """Break a line at spaces so that it fits into `width` columns, further lines indented; None: as it is."""
    if width is None or len(line) <= width or width < indent + _NARROW:
        return line
    parts = textwrap.wrap(
        line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts)


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


def print_json_error(error: WalbError) -> None:
    """Print an error as one line of JSON on stderr, as servers tell of theirs."""
    import json

    from walbd.protocol.base import error_reply
    from walbd.protocol.codec import to_json_ready

    sys.stdout.flush()
    body = to_json_ready(error_reply(error)) | {"exit_code": exit_code_of(error)}
    print(json.dumps({"error": body}), file=sys.stderr)


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
    """Print a table: boxed on a terminal where it fits, otherwise plain aligned columns; a last column that is too
    wide for the terminal is broken. Columns in `right` align right.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    width = line_width()
    if use_colour() and width is not None and sum(widths) + 3 * len(widths) + 1 <= width:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(header_style="bold")
        for name in columns:
            table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    indent = sum(widths[:-1]) + 2 * len(widths[:-1])
    longest = max((len(word) for row in cells for word in row[-1].split()), default=0)
    below = width is not None and indent + widths[-1] > width and width - indent < max(_NARROW, longest)
    for row in [list(columns), *cells]:
        parts = [
            f"{cell:>{size}}" if name in right else f"{cell:<{size}}"
            for name, cell, size in zip(columns, row, widths, strict=True)
        ]
        if below:
            print("  ".join(parts[:-1]).rstrip())
            if parts[-1].strip():
                print(fit(f"    {row[-1]}", 4, width))
        else:
            print(fit("  ".join(parts).rstrip(), indent, width))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
