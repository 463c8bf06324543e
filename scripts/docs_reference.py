"""The two reference pages that are made from the code: all commands, and the Python library."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import click

import walbd.controller as library
from walbd.cli import walbc, walbd
from walbd.cli.walbc_app import WalbcCommand
from walbd.controller.commands import COMMANDS as ONE_SERVER
from walbd.controller.constants import serverKinds
from walbd.controller.servers import server_kind_to_str

_WIDTH = 110
_EVERYWHERE = {"help", "version"}  # options that are not told of each command
_WALBC_EVERYWHERE = {"json", "group"}
_HIDDEN = {"say", "put"}  # how the controller speaks to its user


# Commands


def cli_page() -> str:
    text = """# Commands

Generated from the commands themselves by `scripts/generate_docs.py`: what `--help` says of each.
[controller.md](controller.md) explains `walbc`, [configuration.md](configuration.md) has the settings of the
daemons, which are options of `walbd storage`, `walbd proxy` and `walbd archive`. Every command has `--help`; every
command of `walbc` also has `--json` (print the result, and errors, as JSON) and `--group FILE` (the group file).

Contents: [walbd](#walbd), [walbc](#walbc), [walbc -a HOST -p PORT](#walbc--a-host--p-port).
"""
    text += f"\n## walbd\n\n{_described(walbd.root, 'walbd')}"
    for name in walbd.COMMANDS:
        settings = name in ("storage", "proxy", "archive")
        text += _command(walbd.root, "walbd", name, with_options=not settings)
        if settings:
            text += "\nOptions: `--config FILE`, and one for every setting of docs/configuration.md.\n"
    text += f"\n## walbc\n\n{_described(walbc.root, 'walbc')}"
    for title, commands in walbc.SECTIONS.items():
        text += f"\n### {title}\n"
        for name in commands:
            text += _command(walbc.root, "walbc", name)
    text += """
## walbc -a HOST -p PORT

`walbc -a HOST -p PORT COMMAND ...`, or `walbc on NAME COMMAND ...`: one command at one server.

| command | servers | does |
|---|---|---|
"""
    for cmd in ONE_SERVER:
        kinds = (
            "all" if len(cmd.kinds) == len(serverKinds) else ", ".join(map(server_kind_to_str, sorted(cmd.kinds)))
        )
        usage = f"{cmd.name} {cmd.usage}".strip().replace("|", "\\|")
        text += f"| `{usage}` | {kinds} | {cmd.help} |\n"
    return text


def _command(group: click.Group, prog: str, name: str, *, with_options: bool = True) -> str:
    """Describe a command, and those below it."""
    ctx = click.Context(group, info_name=prog)
    command = group.get_command(ctx, name)
    assert command is not None
    text = f"\n#### {prog} {name}\n\n{_described(command, f'{prog} {name}', with_options=with_options)}"
    if isinstance(command, click.Group):
        for below in command.list_commands(click.Context(command, info_name=name)):
            text += _command(command, f"{prog} {name}", below)
    return text


def _described(command: click.Command, name: str, *, with_options: bool = True) -> str:
    ctx = click.Context(command, info_name=name, max_content_width=_WIDTH)
    usage = " ".join([name, *command.collect_usage_pieces(ctx)]) if with_options else f"{name} [OPTIONS]"
    text = f"```\n{usage}\n```\n\n{_help(command.help or '')}\n"
    hidden = _EVERYWHERE | (_WALBC_EVERYWHERE if isinstance(command, WalbcCommand) else set())
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option) and p.name not in hidden]
    rows = [row for option in options if with_options and (row := option.get_help_record(ctx))]
    if rows:
        text += "\n| option | meaning |\n|---|---|\n"
        text += "".join(f"| `{_cell(names)}` | {_cell(about)} |\n" for names, about in rows)
    return text


def _help(text: str) -> str:
    return inspect.cleandoc(text.replace("\b", ""))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


# The library


def python_api_page() -> str:
    text = """# Python library

Generated from the docstrings of `walbd.controller` by `scripts/generate_docs.py`.
[controller.md](controller.md) explains how the parts belong together: errors, waiting, names.

Contents: [Controller](#controller), [other classes](#other-classes), [functions](#functions),
[constants](#constants).

## Controller

"""
    text += f"{_doc(library.Controller)}\n"
    for cls, methods in _methods_by_class():
        title = (inspect.getdoc(cls) or cls.__name__).partition("; see")[0].partition(". See")[0]
        text += f"\n### {title}\n"
        for name, method in methods:
            text += f"\n#### {name}\n\n```python\n{_signature(name, method)}\n```\n\n{_doc(method)}\n"
    public = {name: getattr(library, name) for name in library.__all__}
    text += "\n## Other classes\n"
    for name, cls in public.items():
        if inspect.isclass(cls) and cls is not library.Controller:
            text += _class(name, cls)
    text += "\n## Functions\n"
    for name, function in public.items():
        if inspect.isfunction(function):
            text += f"\n#### {name}\n\n```python\n{_signature(name, function)}\n```\n\n{_doc(function)}\n"
    text += "\n## Constants\n\n| name | value |\n|---|---|\n"
    for name, value in public.items():
        if isinstance(value, str | int | tuple):
            many = isinstance(value, tuple)
            shown = _cell(", ".join(getattr(v, "__name__", str(v)) for v in value) if many else repr(value))
            text += f"| `{name}` | {shown} |\n"
    return text


def _methods_by_class() -> Iterator[tuple[type, list[tuple[str, Any]]]]:
    """Yield the classes that the Controller is made of, each with the public methods that it defines."""
    for cls in reversed(library.Controller.__mro__):
        methods = [
            (name, value)
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and not name.startswith("_") and name not in _HIDDEN
        ]
        if methods:
            yield cls, methods


def _class(name: str, cls: type) -> str:
    text = f"\n### {name}\n\n"
    if not issubclass(cls, str | int) and not getattr(cls, "_is_protocol", False):
        text += f"```python\n{_signature(name, cls)}\n```\n\n"
    text += f"{_doc(cls)}\n"
    for below, member in vars(cls).items():
        if below.startswith("_"):
            continue
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(member, property) and inspect.getdoc(member.fget):
            text += f"\n* `{below}`: {_inline(member.fget)}\n"
        elif inspect.isfunction(function) and inspect.getdoc(function):
            text += f"\n* `{_flat(_signature(below, function))}`: {_inline(function)}\n"
    return text


def _signature(name: str, function: Any) -> str:
    """Write a signature as in a definition, without `self`; a long one with one argument a line."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return name
    kinds = inspect.Parameter
    parts: list[str] = []
    named_only = False
    for i, param in enumerate(signature.parameters.values()):
        if not i and param.name in ("self", "cls"):
            continue
        if param.kind is kinds.KEYWORD_ONLY and not named_only:
            parts.append("*")
        named_only = named_only or param.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(param.kind, "")
        parts.append(stars + param.name + _annotated(param.annotation, ": ") + _default(param.default))
    end = "" if inspect.isclass(function) else _annotated(signature.return_annotation, " -> ")
    flat = f"{name}({', '.join(parts)}){end}"
    return flat if len(flat) <= _WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"


def _annotated(annotation: Any, before: str) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return before + re.sub(r"\b(walbd|datetime|typing|collections\.abc)\.([a-z_]+\.)*", "", text)


def _default(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return ""
    if default is dataclasses.MISSING or type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return " = ..."
    return f" = {default.__name__ if inspect.isfunction(default) else repr(default)}"


def _flat(text: str) -> str:
    return re.sub(r"\(\s+", "(", re.sub(r",\s*\)", ")", re.sub(r"\s+", " ", text)))


def _doc(thing: Any) -> str:
    return textwrap.dedent(inspect.getdoc(thing) or "").strip()


def _inline(thing: Any) -> str:
    return _cell(_doc(thing).replace("\\|", "|"))
