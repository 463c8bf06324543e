"""The reference page of all messages on the wire, made from the dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from typing import Any

import msgspec

from walbd.protocol.codec import MESSAGES, Message

_MODULES = {
    "base": "Every conversation",
    "control": "Operating daemons",
    "maintenance": "Maintenance and settings",
    "policy": "Policy",
    "transfer": "Transfers",
    "sync": "Comparing and replicating",
    "device": "The control socket of a device",
}


def messages_page() -> str:
    for name in _MODULES:
        importlib.import_module(f"walbd.protocol.{name}")
    text = """# Messages

Generated from the message classes in `protocol/` by `scripts/generate_docs.py`. [protocol.md](protocol.md)
explains frames, conversations and the order of messages in transfers.

A message with a reply is a request; `job-accepted` as its reply means that the work goes on as a job. Bounds of
fields stand in the classes. A field with `*` may be left out.

Contents: """
    text += ", ".join(f"[{t.lower()}](#{t.lower().replace(' ', '-')})" for t in _MODULES.values()) + ".\n"
    left = set(MESSAGES)
    for name, title in _MODULES.items():
        module = sys.modules[f"walbd.protocol.{name}"]
        mine = {tag: cls for tag, cls in MESSAGES.items() if cls.__module__ == module.__name__}
        left -= mine.keys()
        text += f"\n## {title}\n\n`protocol/{name}.py`\n\n"
        text += "| message | fields | reply | meaning |\n|---|---|---|---|\n"
        for tag, cls in mine.items():
            reply: Any = getattr(cls, "REPLY", None)
            text += f"| `{tag}` | {_fields(cls)} | {f'`{reply.TAG}`' if reply else '-'} | {_about(cls)} |\n"
        parts = [
            cls
            for cls in vars(module).values()
            if inspect.isclass(cls) and issubclass(cls, msgspec.Struct) and cls.__module__ == module.__name__
        ]
        if parts:
            text += "\n| part of a message | fields | meaning |\n|---|---|---|\n"
            text += "".join(f"| `{cls.__name__}` | {_fields(cls)} | {_about(cls)} |\n" for cls in parts)
    assert not left, f"messages of a module that is not listed: {sorted(left)}"
    return text


def _about(cls: type[Any]) -> str:
    """Return the first paragraph of the docstring."""
    return _cell(" ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split()))


def _fields(cls: type[Any]) -> str:
    if issubclass(cls, Message):
        required = {
            f.name: f.default is f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        }
    else:
        required = {f.name: f.required for f in msgspec.structs.fields(cls)}
    types = {
        name: re.sub(r"^Annotated\[(\w+), .*\]$", r"\1", text)
        for name, text in inspect.get_annotations(cls).items()
    }
    shown = [f"`{name}: {_cell(types.get(name, '?'))}`{'' if must else '*'}" for name, must in required.items()]
    return ", ".join(shown) or "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
