"""Commands in the docs and in help texts: each must be one that walbd and walbc take as it is written."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from walbd.cli import walbc, walbd

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOTS = {"walbc": walbc.root, "walbd": walbd.root}


def commands_of(page: Path) -> Iterator[str]:
    """Yield the command lines for walbc and walbd in the shell blocks of a page."""
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|-- )(wal(?:bc|bd) .*)", line.strip())
            if found:
                yield found[1]


def parse(line: str) -> None:
    """Take a command line as far as its arguments; raise click.ClickException or WalbError when it is wrong."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if word and word[0] in "|>&;":
            break
        words.append(word)
    prog, *args = words
    try:
        _parse(prog, args)
    except click.exceptions.Exit:
        pass  # --help
    except click.BadParameter as exc:
        if "does not exist" not in exc.format_message():  # a file of the example
            raise


def _parse(prog: str, args: list[str]) -> None:
    ctx = ROOTS[prog].make_context(prog, args)
    while isinstance(ctx.command, click.Group):
        name, command, rest = ctx.command.resolve_command(ctx, [*ctx._protected_args, *ctx.args])
        assert command is not None
        ctx = command.make_context(name, rest, parent=ctx)


def examples(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path of the command, example in its help), of a command and those below."""
    for found in re.findall(r"^\s*Example: (.*)$", command.help or "", re.M):
        yield path, found
    if isinstance(command, click.Group):
        ctx = click.Context(command, info_name=path)
        for name in command.list_commands(ctx):
            below = command.get_command(ctx, name)
            assert below is not None
            yield from examples(below, f"{path} {name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_exist(page: Path) -> None:
    for line in commands_of(page):
        parse(line)


@pytest.mark.parametrize("prog", ["walbc", "walbd"])
def test_examples_in_help_texts(prog: str) -> None:
    found = list(examples(ROOTS[prog], prog))
    assert len(found) >= 8
    for path, line in found:
        assert line.startswith(path), line
        parse(line)


def test_a_wrong_command_would_be_noticed() -> None:
    for line in ("walbc restore vol0", "walbc nothing", "walbc status --frob", "walbd wlog frob x"):
        with pytest.raises(Exception, match=r"(?i)missing|no such"):
            parse(line)
