"""`walbc doctor`: what is wrong with the group, and mending it. Source: docs/recovery.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from walbd.cli.output import fit, line_width, note, use_colour
from walbd.cli.walbc_app import App, checked, command
from walbd.controller.doctor import Allowed, Consent, Doctor, Finding, Outcome
from walbd.controller.doctor.mend import intent_lines, without_notes, worst_word
from walbd.controller.layout import GroupLayout
from walbd.controller.overview import Word
from walbd.controller.servers import get_server
from walbd.errors import WalbError
from walbd.fs import OsFileSystem
from walbd.protocol.base import error_reply
from walbd.protocol.codec import to_json_ready

FOUND = 6  # exit status when something is wrong, and after --fix when something is left
_COLOURS = {Word.OK: "green", Word.WARN: "yellow", Word.ERROR: "red", Word.DOWN: "red"}
_NEEDS = {Consent.NONE: "", Consent.YES: "   # needs --yes", Consent.LOSE: "   # needs --yes-lose {volume}"}


@command("doctor")
@click.argument("vol", metavar="[VOL]", default="")
@click.option("--fix", is_flag=True, help="Mend what can be mended, in a safe order, and check the result.")
@click.option("--yes", is_flag=True, help="With --fix: read whole volumes and drop what is superseded unasked.")
@click.option(
    "--yes-lose",
    "lose",
    metavar="VOL",
    multiple=True,
    help="With --fix: the only good copy of this volume may be destroyed. May be repeated.",
)
@click.option(
    "--lost",
    metavar="ARCHIVE",
    multiple=True,
    help="The data of this archive are lost for good, although it does not answer. May be repeated.",
)
@click.option("--write", is_flag=True, help="With --fix: replace the group file where it has to change.")
def doctor(
    app: App, vol: str, fix: bool, yes: bool, lose: tuple[str, ...], lost: tuple[str, ...], write: bool
) -> int:
    """Examine the whole group (or one volume), name what is wrong, and how to mend it.

    Each finding has a stable code, described in docs/recovery.md. Works when servers are down. Without --fix
    nothing is changed. Exit status: 0 nothing is wrong (any more), 6 something is; what only tells of the past
    (job-failed, put-aside) does not count.
    """
    for name in (vol, *lose):
        if name:
            checked(name)
    for name in lost:
        get_server(name, app.layout.servers.archiveL)
    it = Doctor(app.ctl, app.layout, vol=vol, lost=lost)
    found = it.look()
    if not fix:
        _tell_found(app, it, found)
        return FOUND if without_notes(found) else 0
    if not app.as_json:
        app.end_progress()
        _print_found(it, found)
    outcome = it.fix(
        Allowed(yes, frozenset(lose)),
        found=found,
        tell=lambda text: _tell(app, text),
        ask=_ask if not app.as_json and sys.stdin.isatty() else None,
    )
    _tell_outcome(app, it, outcome, write)
    return 0 if outcome.is_well else FOUND


def _tell(app: App, text: str) -> None:
    app.end_progress()
    (note if app.as_json else print)(text)
    sys.stdout.flush()


def _ask(findings: Sequence[Finding]) -> Allowed:
    """Ask a person at a terminal; what may be the only good copy is asked for volume by volume."""
    reading = [f for f in findings if f.consent is Consent.YES]
    yes = False
    if reading:
        lines = dict.fromkeys(step.command for f in reading for step in f.steps)
        yes = click.confirm("\n".join(["these read whole volumes, or drop what is superseded:", *lines, "go on?"]))
    lose = set()
    for f in findings:
        if f.consent is Consent.LOSE and f.volume not in lose:
            click.echo(f"{f.text}\nAt risk: {f.risk}")
            if click.prompt(f"type {f.volume} to destroy it, anything else to keep it", default="") == f.volume:
                lose.add(f.volume)
    return Allowed(yes, frozenset(lose))


# Text


def _print_found(it: Doctor, found: Sequence[Finding]) -> None:
    _print_lines(found)
    for line in intent_lines(it.intents):
        note(line)


def _print_lines(found: Sequence[Finding]) -> None:
    for line in found_lines(found, colour=use_colour()):
        # A command stays in one line, so that it can be copied.
        print(line if line.startswith("    mend: ") else fit(line, 8, line_width()))


def found_lines(found: Sequence[Finding], *, colour: bool = False) -> list[str]:
    """Write findings, the first line of each beginning with its severity and its code."""
    if not found:
        return [_coloured(Word.OK, colour) + "  nothing is wrong"]
    lines = []
    for f in found:
        where = " ".join(word for word in (f.server, f.volume) if word)
        lines.append(f"{_coloured(f.word, colour)}  {f.code}  {where}".rstrip())
        lines.append(f"    {f.text}")
        if f.evidence:
            facts = (f"{key}={_fact(value)}" for key, value in f.evidence.items() if value not in ("", []))
            lines.append(f"    evidence: {' '.join(facts)}")
        lines.append(f"    at risk: {f.risk}")
        if f.by_hand:
            lines.append(f"    by hand: {f.by_hand}")
        if f.waits_for:
            lines.append(f"    waits for: {', '.join(f.waits_for)}")
        for step in f.steps:
            lines.append(f"    mend: {step.command}{_NEEDS[step.consent].format(volume=f.volume)}")
    return lines


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    text = str(value)
    return f'"{text}"' if " " in text else text


def _coloured(word: Word, colour: bool) -> str:
    text = f"{word:<5}"
    return click.style(text, fg=_COLOURS[word], bold=True) if colour else text


def _tell_found(app: App, it: Doctor, found: Sequence[Finding]) -> None:
    if app.as_json:
        app.tell(_found_json(it, found))
    else:
        app.end_progress()
        _print_found(it, found)


def _found_json(it: Doctor, found: Sequence[Finding]) -> dict[str, Any]:
    return {
        "word": str(worst_word(found)),
        "findings": [f.to_json() for f in found],
        "intents": {name: to_json_ready(intent) for name, intent in it.intents.items()},
    }


# After mending


def _tell_outcome(app: App, it: Doctor, outcome: Outcome, write: bool) -> None:
    app.end_progress()
    written = outcome.group_changed and tell_group_file(app, it.group, write)
    if app.as_json:
        app.tell(
            _found_json(it, outcome.left)
            | {
                "found": [f.to_json() for f in outcome.found],
                "taken": [
                    {"command": t.step.command, "code": t.code, "elapsed_s": t.elapsed_s, "error": _error(t.error)}
                    for t in outcome.taken
                ],
                "verified": [
                    {"volume": v.volume, "gid": v.gid, "archives": list(v.archives), "error": _error(v.error)}
                    for v in outcome.verified
                ],
                "group_file": it.group.to_toml() if outcome.group_changed else "",
                "group_file_written": written,
            }
        )
        return
    if outcome.left and not outcome.taken and [f.key for f in outcome.left] == [f.key for f in outcome.found]:
        print("left: all of it, as nothing was done")
    else:
        print("left:" if outcome.left else "result:")
        _print_lines(outcome.left)
    refused = [f for f in it.plan(outcome.left) if f.consent is not Consent.NONE]
    if refused:
        note("some of it can be mended with --yes, or --yes-lose VOL where a line says so")


def _error(error: WalbError | None) -> Any:
    return to_json_ready(error_reply(error)) if error is not None else None


def tell_group_file(app: App, group: GroupLayout, write: bool) -> bool:
    """Replace the group file, or print what it must be. Returns whether it was written."""
    if write and group.path is not None:
        group.write(OsFileSystem())
        note(f"{group.path} is replaced; comments that were in it are gone")
        return True
    if not app.as_json:
        print("the group file must become this (--write does it; comments are not kept):\n")
        print(group.to_toml())
    return False
