"""The doctor's codes, and what docs/recovery.md says of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.kit.doctor_scene import Scene, parse
from walbd.cli.walbc_doctor import found_lines
from walbd.controller.controller import Controller
from walbd.controller.doctor import CODES, Step
from walbd.controller.doctor.steps import METHODS, Ref

DOC = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()

# The codes and their documentation


def test_findings_are_in_the_order_of_mending() -> None:
    found = Scene().forget("p0").part("s0", overflow=True).part("a0", state="Stopped").look()
    assert [f.rank.number for f in found] == sorted(f.rank.number for f in found)


def documented() -> list[str]:
    return re.findall(r"^### `([a-z0-9-]+)`", DOC, re.MULTILINE)


def test_every_code_is_documented_once_and_nothing_else() -> None:
    assert sorted(documented()) == sorted(CODES)


@pytest.mark.parametrize("code", CODES)
def test_each_section_says_what_it_must(code: str) -> None:
    section = DOC.split(f"### `{code}`\n", 1)[1].split("\n#", 1)[0]
    for word in ("**Looks like**", "**At risk**", "**`--fix`**", "**By hand**"):
        assert word in section, word


@pytest.mark.parametrize(
    "step",
    [
        Step("synchronize", (Ref("a0"), "vol0", Ref("a1"))),
        Step("start_synchronizing", (Ref("a0"), "vol0")),
        Step("kick_all", ((Ref("s0"), Ref("p0")),)),
    ],
    ids=lambda step: step.method,
)
def test_steps_that_no_finding_of_these_tests_has(step: Step) -> None:
    assert step.method in METHODS
    parse(shlex.split(step.command))


def test_text_and_json_of_a_finding() -> None:
    finding = Scene().part("s0", overflow=True, state="Target").only("overflow")
    assert found_lines([finding]) == [
        "error  overflow  s0 vol0",
        "    the log of vol0 at s0 (3.9 MiB) has overflowed; the volume is Target",
        "    evidence: state=Target overflow=1 delivered_gid=10 delivered_time=0 log_usage_pb=10"
        " log_capacity_pb=1000",
        "    at risk: what is written since then is not backed up",
        "    mend: walbc stop s0 vol0",
        "    mend: walbc hash-backup vol0 --storage s0   # needs --yes",
    ]
    told = finding.to_json()
    assert (told["code"], told["word"], told["consent"]) == ("overflow", "error", "yes")
    assert told["steps"][1] == {
        "command": "walbc hash-backup vol0 --storage s0",
        "python": "walbc.hash_backup(s0, 'vol0')",
        "consent": "yes",
    }


def test_commands_of_the_documentation_exist() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    lines = [line.split("   ")[0].strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(walbc [^`]+)`", DOC)
    sizes = {"SIZE": "1g", "GID": "7", "VOL": "vol0"}
    checked = [line for line in lines if line.startswith("walbc ")]
    for line in checked:
        if line != "walbc shell":
            parse([sizes.get(word, word) for word in shlex.split(line)])
    assert len(checked) > 40


def test_methods_of_the_documentation_exist() -> None:
    called = set(re.findall(r"walbc\.([a-z_]+)\(", DOC))
    assert [name for name in called if not hasattr(Controller, name)] == []
    assert {"hash_backup", "init_storage", "retarget"} <= called
