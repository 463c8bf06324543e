"""What `walbd` and `walbc` share: groups that load their commands late, and one way to end.

Starting has to be quick: a command's module, and all that it imports, is loaded only when that command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import click

from walbd.cli.output import print_error, print_json_error
from walbd.errors import InternalError, UsageError, WalbError, exit_code_of

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}  # of walbd and walbc


class Late(NamedTuple):
    """A command that is not imported yet."""

    target: str  # "package.module:name", or ":table.name"; a function there makes the command
    help: str  # one line for the list of commands


class LateGroup(click.Group):
    """A group whose commands are named in a table and imported when they are used."""

    json_errors = False  # with --json errors are JSON, too

    def __init__(self, *args: Any, late: Mapping[str, Late] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late = dict(late or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = super().list_commands(ctx)
        return [*self._late, *(name for name in own if name not in self._late)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        late = self._late.get(cmd_name)
        if late is None:
            return super().get_command(ctx, cmd_name)
        return _load(late.target)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in names:
            near = get_close_matches(args[0], names, n=1)
            see = f"`{ctx.command_path} --help`"
            hint = f"did you mean {near[0]}? See {see}" if near else f"see {see}"
            raise UsageError("no such command", hint=hint, command=args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            late = self._late.get(name)
            command = None if late else self.get_command(ctx, name)
            rows.append((name, late.help if late else command.get_short_help_str(90) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _load(target: str) -> click.Command:
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = found[name] if isinstance(found, Mapping) else getattr(found, name)
    command: click.Command = found if isinstance(found, click.Command) else found()
    return command


def run(command: click.Command, prog: str, args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status; every error ends here, as one line and a hint.

    0 success, 2 wrong usage, 130 interrupted, 141 nobody reads stdout, 70 a defect (with its traceback); other
    errors as their class says (docs/controller.md).
    """
    words = list(sys.argv[1:] if args is None else args)
    as_json = getattr(command, "json_errors", False) and "--json" in words

    def tell(error: WalbError) -> None:
        if as_json:
            print_json_error(error)
        else:
            print_error(error, prog)

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names on disk may hold any byte
    try:
        if f"_{prog.upper()}_COMPLETE" in os.environ:
            command.main(prog_name=prog)  # the shell asks for completions; never returns
        # Not through main(): it would answer Ctrl-C and a closed stdout in its own way.
        with command.make_context(prog, words) as ctx:
            result = command.invoke(ctx)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        print(exc.format_message(), file=sys.stderr)
        return UsageError.exit_code
    except click.ClickException as exc:
        path = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx else prog
        tell(UsageError(exc.format_message(), hint=f"see `{path} --help`"))
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read stdout has gone; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except WalbError as exc:
        tell(exc)
        return exit_code_of(exc)
    except BaseExceptionGroup as group:
        return _end_of_group(group, prog)
    except OSError as exc:
        print_error(WalbError(exc.strerror or str(exc), **({"path": exc.filename} if exc.filename else {})), prog)
        return WalbError.exit_code
    except Exception:  # noqa: BLE001 - the last resort, told as what it is
        return _defect(prog)


def _end_of_group(group: BaseExceptionGroup[BaseException], prog: str) -> int:
    """Report the errors of a task group: ours first, anything else as a defect."""
    known, other = group.split(WalbError)
    if other is not None:
        if other.split(KeyboardInterrupt)[1] is None:
            return 130
        return _defect(prog)
    assert known is not None
    errors = _leaves(known)
    for error in errors:
        print_error(error, prog)
    return max(map(exit_code_of, errors))


def _leaves(group: BaseExceptionGroup[WalbError]) -> list[WalbError]:
    found: list[WalbError] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found


def _defect(prog: str) -> int:
    import traceback

    traceback.print_exc()
    print_error(InternalError("this is a defect of walbd", hint="report it with the traceback above"), prog)
    return InternalError.exit_code
