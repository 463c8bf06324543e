"""A group of real processes that `walbc` itself operates: no relays in between, and a group file.

with Doctored(tmp_path, archives=2) as group:
    vol = group.protect("vol0")
    group.wipe("p0")
    group.start("p0")
    assert group.codes() == {"proxy-data-lost"}        # walbc doctor --json
    group.mend(vol)                                    # walbc doctor --fix --yes, then every point exact
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.kit.group import WAIT_S, Group, Volume, wait_until
from walbd.cli.app import run
from walbd.cli.walbc import root
from walbd.controller.layout import GroupLayout, load_layout
from walbd.errors import WalbError


@dataclass(frozen=True)
class _Direct:
    """A link that is none."""

    address: str

    def heal(self) -> None:
        """Nothing can be wrong with it."""


class Doctored(Group):
    """See the module."""

    def link(self, client: str, server: str) -> Any:
        """Return where a daemon connects to another: directly."""
        return _Direct(self.server(server).get_host_port())

    @property
    def file(self) -> Path:
        return self.root / "group.toml"

    @property
    def group(self) -> GroupLayout:
        """The group as its file says."""
        return load_layout(self.file)

    def write_file(self, *, archives: list[str] | None = None, target: str = "s0") -> None:
        """Write the group file: the servers in their order, and where each volume's device is."""
        lines = [f"timeout_s = {WAIT_S}"]
        for kind, servers in (("storage", self.s), ("proxy", self.p), ("archive", self.a)):
            for s in servers:
                lines += [f"[[{kind}]]", f'name = "{s.name}"', f'host = "{s.address}"', f"port = {s.port}"]
        for name, volume in self.volumes.items():
            devices = ", ".join(f'{leg.storage} = "{leg.directory}"' for leg in volume.legs)
            lines += [f"[volumes.{name}]", f"devices = {{ {devices} }}"]
            if target:
                lines.append(f'target = "{target}"')
            if archives is not None:
                lines.append(f"archives = {json.dumps(archives)}")
        self.file.write_text("\n".join(lines) + "\n")

    def protect(self, name: str = "vol0", *, replicas: bool = False, **options: Any) -> Volume:
        """Make a volume, write to it and back it up; with `replicas` all archives are fed. Writes the file."""
        volume = self.add_volume(name, **options)
        volume.scribble()
        self.ctl.full_backup(self.s[0], name, timeoutS=WAIT_S)
        archives = [a.name for a in self.a] if replicas else [self.a[0].name]
        for a in self.a[1:] if replicas else []:
            self.ctl.replicate(self.a[0], name, a, True, WAIT_S)
        self.write_file(archives=archives)
        volume.scribble()
        self.snapshot(volume, archives=list(range(len(archives))))
        return volume

    def walbc(self, *args: str) -> tuple[int, str]:
        """Run `walbc` with the group file in this process; return its exit status and what it said."""
        code, out, err = self._run(*args)
        return code, out + err

    def json(self, *args: str) -> dict[str, Any]:
        """Run `walbc`, require success, and return the document that it printed."""
        code, out, err = self._run(*args)
        assert code == 0, out + err
        document: dict[str, Any] = json.loads(out)
        return document

    def findings(self, *args: str) -> list[dict[str, Any]]:
        """Run `walbc doctor --json`."""
        code, out, _ = self._run("doctor", "--json", *args)
        found: list[dict[str, Any]] = json.loads(out)["findings"]
        assert code == (6 if {f["code"] for f in found} - {"job-failed", "put-aside"} else 0), out
        return found

    def _run(self, *args: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        shorter = patch("walbd.controller.doctor.mend.PAUSE_S", 0.2)  # between two looks
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), shorter:
            code = run(root, "walbc", ["--group", str(self.file), *args])
        return code, out.getvalue(), err.getvalue()

    def codes(self, *args: str) -> set[str]:
        """Return the codes of what the doctor finds."""
        return {finding["code"] for finding in self.findings(*args)}

    def wait_for_code(self, *codes: str) -> dict[str, Any]:
        """Run the doctor until it finds one of these; return that finding."""

        def look() -> dict[str, Any] | None:
            return next((f for f in self.findings() if f["code"] in codes), None)

        found: dict[str, Any] = wait_until(look, f"the doctor to find {' or '.join(codes)}")
        return found

    def mend(self, volume: Volume, *args: str, archives: list[int] | None = None) -> str:
        """Run `walbc doctor --fix --yes`; it ends well, and every restore point of every archive is exact."""
        code, text = self.walbc("doctor", "--fix", "--yes", *args)
        assert code == 0, text
        assert self.codes() <= set(), text
        volume.scribble()
        self.snapshot(volume, archives=archives)
        for server in self.a:
            if self.processes[server.name].running:
                self.check_all_at(volume, server.name)
        return text

    def check_all_at(self, volume: Volume, name: str) -> None:
        """Check the newest restorable gid of an archive, and all explicit ones, byte for byte."""
        server = self.server(name)
        try:
            points = self.ctl.get_restorable(server, volume.name, "")
        except WalbError:
            points = []
        for point in points:
            self.check(volume, point.gid, server)
