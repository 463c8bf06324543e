"""Everything that `walbc` can ask is served by the real daemons, and what they say can be shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kit.group import WAIT_S, Group, wait_until
from walbd.controller.commands import COMMANDS
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.errors import NotSupported, WalbError

# Arguments that are well-formed; most are refused for an unknown volume, which is an answer, too.
ARGS = {
    "VOL": "nothing", "[VOL]": "nothing", "GID": "1", "[GID]": "1", "[GIDB]": "0", "[GIDE]": "9", "SIZE": "0",
    "DEVICE": "/no/where", "ARCHIVE": "a0", "[ARCHIVE]": "a0", "HOST:PORT": "127.0.0.1:1", "ACTION": "Apply",
    "JOB": "1", "[BULK]": "64k", "[all]": "all", "0|1": "1", "[SECONDS]": "0", "[MODE]": "force",
    "[COMPRESS]": "lz4:1:1", "[DELAY]": "1", "LSID": "0", "[HOST:PORT,...]": "127.0.0.1:2", "GIDB": "1",
    "gid|size": "gid", "GIDE|MIB": "3", "GID|MIB": "3", "[RESYNC]": "0", "[DONTMERGE]": "1", "[MERGESIZE]": "2m",
    "[SLEEP%]": "1", "[zeroclear]": "zeroclear", "GID...": "1", "[SIZE]": "1m",
    "BB": "1", "BE": "1", "EB": "2", "EE": "2",
    "UUID": "0" * 32, "STATE": "Stopped", "METASTATE": "<|1|>-20270115080000", "ARG...": "true",
}  # fmt: skip
REFUSED_HERE = ("exec", "sleep", "shutdown", "virt-full-scan")  # the last two are tried on their own


def test_every_command_is_served(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        for cmd in COMMANDS:
            if cmd.name in REFUSED_HERE:
                continue
            for s in group.layout.get_all():
                if s.kind not in cmd.kinds:
                    continue
                role = {"[ROLE]": "target"} if s.kind == K_STORAGE else {}
                args = [(ARGS | role).get(word, "") for word in cmd.usage.split()]
                try:
                    cmd.text(s.kind, group.ctl.ask(s, cmd.request([arg for arg in args if arg])))
                except NotSupported as exc:
                    raise AssertionError(f"{s.name} does not serve `{cmd.name}`") from exc
                except WalbError as exc:
                    assert exc.facts["server"] == s.name  # noqa: PT017 - a refusal is as good as an answer here
        assert {kind for cmd in COMMANDS for kind in cmd.kinds} == {K_STORAGE, K_PROXY, K_ARCHIVE}
        for s in reversed(group.layout.get_all()):
            group.ctl.shutdown(s)
            process = group.processes[s.name]
            wait_until(lambda process=process: not process.running, f"{s.name} to end")  # type: ignore[misc]
            assert process.stop() == 0


def test_the_command_line_from_start_to_restore(tmp_path: Path) -> None:
    with Group(tmp_path) as group:
        volume = group.add_volume("vol0", init=False)
        volume.scribble()
        path = tmp_path / "group.toml"
        names = (("storage", group.s), ("proxy", group.p), ("archive", group.a))
        path.write_text(
            "".join(
                f'[[{kind}]]\nname = "{s.name}"\nhost = "{s.address}"\nport = {s.port}\n'
                for kind, sL in names
                for s in sL
            )
        )

        def walbc(*args: str, stdin: str = "") -> str:
            done = subprocess.run(
                [sys.executable, "-m", "walbd.cli.walbc", *args],
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=WAIT_S,
                env=os.environ | {"WALBD_GROUP": str(path)},
            )
            assert (done.returncode, done.stderr) == (0, ""), done
            return done.stdout

        walbc("init-storage", "vol0", str(volume.directory))
        assert int(walbc("full-backup", "vol0")) > 0
        volume.scribble()
        gid = walbc("snapshot", "vol0").strip()
        truth = bytes(volume.model)
        volume.scribble()
        image = Path(walbc("restore", "vol0", gid).strip())
        assert image.read_bytes() == truth
        assert walbc("restored", "vol0") == f"{gid} {image}\n"
        about = json.loads(walbc("info", "vol0", "--json"))
        assert int(gid) in [point["gid"] for point in about["archives"][0]["points"]]
        assert walbc("status", "--check").startswith("ok")
        lines = "walbc.is_overflow(s0, vol)\nwalbc.kick_all([s0])\nwalbc.is_wdiff_send_error(p0, vol, a0)\n"
        assert walbc("shell", stdin=lines) == "False\nFalse\n"
        walbc("del-restored", "vol0", gid)
        assert not image.exists()
