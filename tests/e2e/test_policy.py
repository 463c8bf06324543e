"""`walbc policy` and `walbc hold` at real daemons, which do what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cli import Cli
from tests.kit.group import Group, wait_until
from walbd.cli.walbc import root


def test_policies_and_holds_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0")
        path = tmp_path / "group.toml"
        names = (("storage", group.s), ("proxy", group.p), ("archive", group.a))
        path.write_text(
            "".join(
                f'[[{kind}]]\nname = "{s.name}"\nhost = "{s.address}"\nport = {s.port}\n'
                for kind, sL in names
                for s in sL
            )
        )
        monkeypatch.setenv("WALBD_GROUP", str(path))
        run = Cli(root, "walbc", capsys)

        def walbc(*args: str, status: int = 0) -> str:
            return run.fails(*args, code=status) if status else run.good(*args)

        def ask(*args: str) -> Any:
            return json.loads(walbc(*args, "--json"))

        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0")
        gids = []
        for _ in range(12):
            volume.scribble()
            gids.append(group.snapshot(volume))

        # what there is
        shown = walbc("policy", "show", "vol0")
        assert "policy of vol0 at a0: on, default\n" in shown
        assert "all=48h hourly=72 daily=31 weekly=8 monthly=12 yearly=3" in shown
        timeline = walbc("policy", "explain", "vol0").splitlines()
        assert timeline[0].split() == ["GID", "TIME", "KIND", "VERDICT", "RULE", "UNTIL"]
        assert any(line.split()[0] == str(gids[0]) and " explicit " in line for line in timeline)
        assert " points at a0 stay by: all=48h" in timeline[-1]

        # what would be
        words = ["--keep", "last=3", "--level", "none", "--apply-interval", "0"]
        would = ask("policy", "simulate", "vol0", *words)
        assert [point["gid"] for point in would["points"] if point["kept"]][-3:] == gids[-3:]
        assert not would["points"][0]["kept"]
        assert "dropped" in walbc("policy", "simulate", "vol0", *words, "--dropped")
        assert ask("policy", "show", "vol0")["is_default"]

        # what is kept all the same
        assert walbc("hold", "add", "vol0", str(gids[5]), "--reason", "audit 2026", "--until", "30d").startswith(
            f"vol0 {gids[5]} is held at a0 until "
        )
        walbc("hold", "add", "vol0", str(gids[6]), "--reason", "demo")
        walbc("hold", "delete", "vol0", str(gids[6]))
        assert walbc("hold", "list", "vol0").splitlines()[1].split()[0] == str(gids[5])
        assert [row["reason"] for row in ask("hold", "list", "vol0")["holds"]] == ["audit 2026"]

        # and now in earnest
        truth = {gid: group.restored(volume, gid) for gid in (gids[5], *gids[-3:])}
        assert "keep last=3; levels none" in walbc("policy", "set", "vol0", *words)

        def points() -> list[int]:
            return [point["gid"] for point in ask("restorable", "vol0", "--all")["points"]]

        wait_until(lambda: points()[0] == gids[5], "the policy to have applied what is below the hold")
        for gid, image in truth.items():
            assert group.restored(volume, gid) == image
        walbc("hold", "delete", "vol0", str(gids[5]))
        wait_until(lambda: points() == gids[-3:], "the policy to have done the rest")
        for gid in gids[-3:]:
            assert group.restored(volume, gid) == truth[gid]

        def at_rest() -> Any:
            view = ask("policy", "show", "vol0")
            return view if view["next"] == "nothing is due" and view["applied"] else None

        view = wait_until(at_rest, "the policy to have noted what it did")
        assert (view["is_default"], view["troubles"]) == (False, [])
        assert "policy-apply" in walbc("jobs", "a0")

        # refused before anything changes
        assert "hint" in walbc("policy", "set", "vol0", "--keep", "daily", status=2)
        assert "nothing to change" in walbc("policy", "set", "vol0", status=2)
        assert "no such replication" in walbc("policy", "set", "vol0", "--no-replicate", "a9", status=2)
        assert "--default stands alone" in walbc("policy", "set", "vol0", "--default", "--off", status=2)
        assert "not a time" in walbc("hold", "add", "vol0", "1", "--reason", "x", "--until", "soon", status=2)
        walbc("policy", "set", "vol0", "--replicate", "a1=127.0.0.1:9,1h", "--off")
        assert ask("policy", "show", "vol0")["policy"]["replications"][0]["dest"] == "127.0.0.1:9"
        walbc("policy", "set", "vol0", "--default")
        assert ask("policy", "show", "vol0")["is_default"]
