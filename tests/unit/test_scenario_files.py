"""The runner of scenario files: what is written without an answer is run as well, and wrong arguments are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.script import Script, difference, main, run_script


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No group: every command says its own words."""
    monkeypatch.setattr(Script, "run", lambda _, commands: [word.upper() for word in commands if word])


@pytest.mark.usefixtures("said")
def test_commands_without_an_answer_are_run(tmp_path: Path) -> None:
    text = "group\n----\nGROUP\n\ncheck vol0\n"
    got = run_script(text, tmp_path)
    assert got == "group\n----\nGROUP\n\ncheck vol0\n----\nCHECK VOL0\n"
    assert "+CHECK VOL0" in difference(text, got, "x")
    assert run_script(got, tmp_path) == got
    assert run_script(ends := got + "\n# nothing more\n", tmp_path) == ends


@pytest.mark.usefixtures("said")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("group\n")
    for args in ([], ["--help"], [str(file), "--rewrit"], [str(tmp_path / "none.txt")]):
        assert main(args) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([str(file)]) == 1
    assert file.read_text() == "group\n"
    assert main([str(file), "--rewrite"]) == 0
    assert main([str(file)]) == 0
