"""Scenario files: commands for a group of real processes and what they say, as text (docs/testing.md).

    group archives=2
    volume vol0
    full-backup s0 vol0 as F
    kill p0
    states vol0
    ----
    s0 Target, p0 down, a0 Archived, a1 Clear

    start p0
    snapshot vol0 A
    check vol0
    ----
    a0: F A

A block is commands, a line `----`, and what they say, up to an empty line. `run_script` gives the text back
with what was really said, so a scenario is right when its text does not change.

    python -m tests.kit.script [--rewrite] [--times] FILE...
"""

from __future__ import annotations

import difflib
import inspect
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.kit.group import WAIT_S, Group, Volume, wait_until
from tests.kit.relay import Link
from walbd.controller.doctor.findings import Finding
from walbd.controller.doctor.mend import Allowed
from walbd.errors import TimedOut, WalbError, code_of
from walbd.units import LB, parse_size

_END: Final = "----"


def run_script(text: str, root: Path, *, times: bool = False) -> str:
    """Run a scenario and return its text with what was really said. `times`: tell on stderr what takes long."""
    with Script(root, times=times) as script:
        lines: list[str] = []
        for commands, is_block in _blocks(text):
            lines += commands
            if is_block:
                lines += [_END, *script.run(commands), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def difference(expected: str, got: str, name: str) -> str:
    """Return a diff of two texts of a scenario; empty if they are equal."""
    lines = (expected.splitlines(), got.splitlines())
    return "\n".join(difflib.unified_diff(*lines, f"{name}, as written", f"{name}, as it was", lineterm=""))


def _blocks(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield commands (with comments and empty lines between) and whether a block ends there."""
    commands: list[str] = []
    in_output = False
    for line in text.splitlines():
        if in_output:
            in_output = bool(line)
        elif line == _END:
            yield commands, True
            commands, in_output = [], True
        else:
            commands.append(line)
    if commands:
        # Commands at the end are run, though nobody has written down yet what they say.
        yield commands, any(shlex.split(command, comments=True) for command in commands)


class Script:
    """The commands. Each writes lines about what is, none about when or how fast."""

    def __init__(self, root: Path, *, times: bool = False) -> None:
        self._root = root
        self._times = times
        self._made: Group | None = None
        self._gids: dict[str, tuple[str, int]] = {}  # label: (volume, gid)
        self._lineages: dict[str, int] = {}  # label: that of the volume then
        self._counts: dict[Link, int] = {}
        self._out: list[str] = []

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._made is not None:
            self._made.close()

    def run(self, commands: list[str]) -> list[str]:
        """Run the commands of a block and return what they say."""
        self._out = []
        for command in commands:
            words = shlex.split(command, comments=True)
            if words:
                began = time.monotonic()
                try:
                    self._run(words)
                except (AssertionError, TimedOut) as exc:  # a wait that does not end is no answer to a command
                    raise AssertionError(f"{command}: {exc}\n" + self._logs()) from exc
                except WalbError as exc:
                    self._out.append(f"{code_of(exc)}: {exc.message}")
                if self._times:
                    print(f"{time.monotonic() - began:6.2f} {command}", file=sys.stderr)
        return self._out

    def _run(self, words: list[str]) -> None:
        name, label = words[0].replace("-", "_"), ""
        if len(words) > 2 and words[-2] == "as":
            words, label = words[:-2], words[-1]
        args = [word for word in words[1:] if "=" not in word]
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        own: Callable[..., None] | None = getattr(self, f"do_{name}", None)
        if own is not None:
            own(*args, **options)
        elif callable(method := getattr(self.group.ctl, name, None)) and not name.startswith("_"):
            self._call(method, args, options, label)
        else:
            raise AssertionError(f"unknown command {words[0]!r}")

    def _call(self, method: Callable[..., Any], args: list[str], options: dict[str, str], label: str) -> None:
        """Call a method of the controller: servers by name, generations by @label."""
        known = inspect.signature(method).parameters
        kinds = [str(parameter.annotation) for parameter in known.values()]
        values = {name: self._value(text) for name, text in options.items()}
        if "timeoutS" in known:
            values.setdefault("timeoutS", WAIT_S)
        positional: list[Any] = []
        for number, text in enumerate(args):
            if kinds[number].startswith("Sequence"):
                positional.append([self._value(each) for each in args[number:]])
                break
            positional.append(text if kinds[number] == "str" else self._value(text))
        result = method(*positional, **values)
        if label:
            self._name(label, next(arg for arg in args if arg in self.group.volumes), result)
        elif isinstance(result, bool | str):
            self._out.append(str(result))
        elif isinstance(result, list) and all(isinstance(item, str) for item in result):
            self._out.append(" ".join(result) or "none")

    def _name(self, label: str, volume: str, gid: int) -> None:
        self._gids[label] = (volume, gid)
        vol = self._volume(volume)
        vol.points.setdefault((vol.lineage, gid), (0, vol.seq))
        self._lineages[label] = vol.lineage

    def _value(self, text: str) -> Any:
        if text.startswith("@"):
            return self._gids[text[1:]][1]
        if text in ("true", "false"):
            return text == "true"
        names = {server.name: server for server in self.group.servers}
        if text in names:
            return names[text]
        return int(text) if text.isdigit() else text

    @property
    def group(self) -> Group:
        assert self._made is not None, "the first command must be `group`"
        return self._made

    def _logs(self) -> str:
        if self._made is None:
            return ""
        return "\n".join(f"--- {p.name}\n{p.tail(30)}" for p in self._made.processes.values() if p.log.exists())

    def _volume(self, name: str) -> Volume:
        return self.group.volumes[name]

    # The group

    def do_group(self, storages: str = "1", proxies: str = "1", archives: str = "1", **options: str) -> None:
        """group [storages=N] [proxies=N] [archives=N] [NAME=OPTIONS]: start daemons s0.., p0.., a0.."""
        self._made = Group(
            self._root,
            storages=int(storages),
            proxies=int(proxies),
            archives=int(archives),
            options={name: text.split() for name, text in options.items()},
        )
        self._made.__enter__()

    def do_volume(
        self,
        name: str,
        size: str = "4m",
        log: str = "16m",
        storage: str = "0",
        mirror: str = "",
        init: str = "true",
    ) -> None:
        """volume VOL [size=4m] [log=16m] [storage=0] [mirror=1]: make a device (or two with equal contents)."""
        self.group.add_volume(
            name,
            size_b=parse_size(size),
            log_b=parse_size(log),
            storage=int(storage),
            mirror=int(mirror) if mirror else None,
            init=init == "true",
        )

    # Writing

    def do_write(self, volume: str, where: str, fill: str) -> None:
        """write VOL B..E FILL: fill logical blocks with a letter."""
        begin, end = (int(number) * LB for number in where.split(".."))
        self._volume(volume).write(begin, fill.encode()[:1] * (end - begin))
        self._volume(volume).flush()

    def do_trim(self, volume: str, where: str) -> None:
        """trim VOL B..E: discard logical blocks."""
        begin, end = (int(number) * LB for number in where.split(".."))
        self._volume(volume).trim(begin, end - begin)

    def do_scribble(self, volume: str, count: str = "20") -> None:
        """scribble VOL [N]: random writes, trims and zero writes."""
        self._volume(volume).scribble(int(count))

    def do_flood(self, volume: str, size: str) -> None:
        """flood VOL SIZE: write so much."""
        vol = self._volume(volume)
        for at in range(0, parse_size(size), 64 << 10):
            vol.write(at % (len(vol.model) - (64 << 10)) // LB * LB, vol.rng.randbytes(64 << 10))
        vol.flush()

    def do_load(self, volume: str, what: str, rate: str = "2m") -> None:
        """load VOL start|stop: write all the time."""
        if what == "start":
            self._volume(volume).start_load(bytes_per_s=parse_size(rate))
        else:
            self._volume(volume).stop_load()

    def do_init(self, volume: str, storage: str) -> None:
        """init VOL STORAGE: make the device known again to a storage that has lost its data."""
        leg = next(leg for leg in self._volume(volume).legs if leg.storage == storage)
        self.group.ctl.init_storage(self.group.server(storage), volume, str(leg.directory))

    def do_grow_device(self, volume: str, size: str) -> None:
        """grow-device VOL SIZE: grow the devices; nobody is told."""
        self.group.grow_device(self._volume(volume), parse_size(size))

    def do_rejoin(self, volume: str, leg: str) -> None:
        """rejoin VOL 0|1: bring a device that was away up to its mirror."""
        self._volume(volume).rejoin(int(leg))

    # Points

    def do_snapshot(self, volume: str, label: str, at: str = "a0") -> None:
        """snapshot VOL LABEL [at=a0,a1]: take a snapshot; it must become restorable there."""
        archives = [int(name[1:]) for name in at.split(",")]
        self._name(label, volume, self.group.snapshot(self._volume(volume), archives=archives))

    def do_mark(self, volume: str, label: str) -> None:
        """mark VOL LABEL: take a snapshot, and do not wait for it."""
        self._name(label, volume, self.group.mark(self._volume(volume)))

    def do_arrives(self, label: str, at: str = "a0") -> None:
        """arrives LABEL [at=a0,a1]: wait until a snapshot is restorable there."""
        volume, gid = self._gids[label]
        for name in at.split(","):
            self.group.ctl.wait_for_restorable(self.group.server(name), volume, gid, timeoutS=WAIT_S)

    def do_handed_over(self, volume: str) -> None:
        """handed-over VOL: wait until a proxy has all of the log."""
        vol = self._volume(volume)

        def done() -> bool:
            row = self.group.status(self.group.target(vol), volume)
            return row.lag_lb == 0 and row.done_gid == row.latest_gid

        wait_until(done, "a proxy to have the log")

    def do_fresh(self, volume: str) -> None:
        """fresh VOL: the archives that are fed get everything, with no command given."""
        self.group.wait_fresh(self._volume(volume))

    def do_check(self, volume: str) -> None:
        """check VOL: compare every restorable gid at every archive; say which labels are among them."""
        vol = self._volume(volume)
        for archive, gids in self.group.check_all(vol).items():
            lineage = self.group.lineage(vol, self.group.server(archive)) if gids else -1
            labels = [
                label
                for label, (name, gid) in self._gids.items()
                if name == volume
                and gid in gids
                and self._lineages[label] == lineage
                and (lineage, gid) in vol.points
            ]
            self._out.append(f"{archive}: {' '.join(labels) or ('no point' if not gids else 'none of ours')}")

    # Processes and links

    def do_kill(self, *names: str) -> None:
        """kill NAME...: kill -9."""
        self.group.kill(*names)

    def do_start_process(self, *names: str) -> None:
        """start-process NAME...: start what was killed, at the same time."""
        self.group.start(*names)

    def do_restart(self, *names: str) -> None:
        """restart NAME...: kill -9 and start, one after the other."""
        for name in names:
            self.group.processes[name].restart()
        for volume in self.group.volumes.values():
            if volume.process.name in names:
                volume.reconcile()

    def do_end(self, *names: str) -> None:
        """end NAME...: SIGTERM; the process must end well."""
        for name in names:
            process = self.group.processes[name]
            assert process.stop() == 0, process.tail()

    def do_pause(self, *names: str) -> None:
        """pause NAME...: SIGSTOP."""
        for name in names:
            self.group.processes[name].pause()

    def do_resume(self, *names: str) -> None:
        """resume NAME...: SIGCONT."""
        for name in names:
            self.group.processes[name].resume()

    def do_wipe(self, name: str, volume: str = "") -> None:
        """wipe NAME [VOL]: kill a daemon and remove its data."""
        self.group.wipe(name, volume)

    def do_fill(self, name: str) -> None:
        """fill NAME: fill the disk of a daemon."""
        self.group.fill(name)

    def do_unfill(self, name: str) -> None:
        """unfill NAME: give the space back."""
        self.group.unfill(name)

    def do_cut(self, client: str, server: str) -> None:
        """cut CLIENT SERVER: reset the connections from one daemon to the other, also new ones."""
        self.group.link(client, server).cut()

    def do_cut_after(self, client: str, server: str, size: str) -> None:
        """cut-after CLIENT SERVER SIZE: when so much more has been sent."""
        self.group.link(client, server).cut_after(parse_size(size))

    def do_wait_cut(self, client: str, server: str) -> None:
        """wait-cut CLIENT SERVER: wait until `cut-after` has happened."""
        wait_until(lambda: self.group.link(client, server).is_cut, f"{client}>{server} to be cut")

    def do_blackhole(self, client: str, server: str) -> None:
        """blackhole CLIENT SERVER: nothing passes, nothing is reset."""
        self.group.link(client, server).blackhole()

    def do_heal(self, *ends: str) -> None:
        """heal [CLIENT SERVER]: end what was done to a link, or to all."""
        if ends:
            self.group.link(*ends).heal()
        else:
            self.group.heal()

    def do_count(self, client: str, server: str) -> None:
        """count CLIENT SERVER: begin to count what is sent."""
        link = self.group.link(client, server)
        self._counts[link] = link.sent_b

    def do_sent(self, client: str, server: str, relation: str, size: str) -> None:
        """sent CLIENT SERVER under|over SIZE: compare what was sent since `count`."""
        link = self.group.link(client, server)
        sent = link.sent_b - self._counts[link]
        right = sent < parse_size(size) if relation == "under" else sent > parse_size(size)
        self._out.append("yes" if right else f"no: {sent}")

    # Looking

    def do_states(self, volume: str) -> None:
        """states VOL: the state at every daemon."""
        words = []
        for server in [*self.group.s, *self.group.p, *self.group.a]:
            running = self.group.processes[server.name].running
            state = self.group.ctl.get_state(server, volume) if running else "down"
            words.append(f"{server.name} {'Archived' if state == 'WdiffRecv' else state}")
        self._out.append(", ".join(words).replace("WlogRecv", "Started"))

    def do_wait_state(self, name: str, volume: str, state: str) -> None:
        """wait-state NAME VOL STATE"""
        server = self.group.server(name)
        wait_until(lambda: self.group.ctl.get_state(server, volume) == state, f"{name} to be {state}")

    def do_doctor(self, volume: str = "") -> None:
        """doctor [VOL]: what `walbc doctor` finds."""
        self._out += found_by(self.group.doctor(volume).look()) or ["nothing"]

    def do_mend(self, volume: str = "") -> None:
        """mend [VOL]: `walbc doctor --fix --yes`; says what is left."""
        outcome = self.group.doctor(volume).fix(Allowed(yes=True))
        self._out += found_by(outcome.left) or ["mended" if outcome.is_well else "not verified"]

    def do_wait_alarm(self, code: str, volume: str = "") -> None:
        """wait-alarm CODE [VOL]"""
        ctl = self.group.ctl
        wait_until(lambda: code in [alarm.code for alarm in ctl.overview(volume).alarms], f"alarm {code}")

    def do_wait_alarms(self, *alarms: str) -> None:
        """wait-alarms CODE@SERVER...: wait until `walbc status` has exactly these alarms."""
        seen: list[str] = []

        def look() -> bool:
            seen[:] = sorted(f"{alarm.code}@{alarm.server}" for alarm in self.group.ctl.overview("").alarms)
            return seen == sorted(alarms)

        try:
            wait_until(look, f"the alarms {' '.join(alarms) or 'to end'}")
        except AssertionError as exc:
            raise AssertionError(f"{exc}; there are {' '.join(seen) or 'none'}") from None

    def do_wait_quiet(self) -> None:
        """wait-quiet: wait until there are no alarms."""
        self.do_wait_alarms()


def found_by(findings: Sequence[Finding]) -> list[str]:
    """Write findings of the doctor: code, server, volume."""
    return sorted(" ".join(word for word in (f.code, f.server, f.volume) if word) for f in findings)


def main(args: list[str]) -> int:
    """Run files; with --rewrite, write down what was really said."""
    paths = [Path(arg) for arg in args if not arg.startswith("--")]
    if not paths or not {arg for arg in args if arg.startswith("--")} <= {"--rewrite", "--times"}:
        print("usage: python -m tests.kit.script [--rewrite] [--times] FILE...", file=sys.stderr)
        return 2
    if missing := [str(path) for path in paths if not path.is_file()]:
        print(f"no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        with tempfile.TemporaryDirectory(prefix="walbd-scenario-") as root:
            got = run_script(path.read_text(), Path(root), times="--times" in args)
        diff = difference(path.read_text(), got, path.name)
        print(diff or f"{path.name}: ok")
        failed += bool(diff)
        if diff and "--rewrite" in args:
            path.write_text(got)
    return 1 if failed and "--rewrite" not in args else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
