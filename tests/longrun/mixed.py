"""A seeded mix of all operations and faults against two storages, proxies and archives.

Each step takes its choices from a random sequence of its own, made of the seed and the number of the step, so
the sequence of operations does not depend on how long anything took. A step may fail, as commands do in the
middle of faults; what must never happen is that something is restored which the volume never was. Now and then,
and at the end, everything is repaired as an operator would, the archives must get everything, and every restore
point at every archive is compared.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from tests.kit.group import Group, Inexact, Volume, wait_until
from tests.kit.nbd import NbdError
from tests.kit.script import found_by
from walbd.controller import ServerConnectionParam as Server
from walbd.controller.doctor.mend import Allowed
from walbd.errors import WalbError
from walbd.units import LB, MIB

STEP_S: Final = 10.0  # of one command
MEND_S: Final = 300.0
# What may be missing for an operation; any other assertion that fails is a defect.
EXPECTED: Final = ("nothing is restorable", "waited ", "reconcile first", "a device is away")
STEPS_PER_ROUND: Final = 15

Failure = (WalbError, NbdError, OSError, AssertionError, StopIteration)
_OWN_OPTIONS: Final = {"storage": ["--proxy-check-interval-s", "1"], "archive": ["--free-reserve-b", "1m"]}


class MixedRun:
    """One long run."""

    def __init__(self, root: Path, seed: int, *, by_doctor: bool = False) -> None:
        self.group = Group(root, storages=2, proxies=2, archives=2, options=_OWN_OPTIONS)
        self.group.show_logs = False  # they stay in the directory
        self.seed = seed
        self.by_doctor = by_doctor
        self.step = 0
        self.done: dict[str, list[int]] = {}  # operation: [succeeded, failed]
        self._began = time.monotonic()
        self._last = ""  # trouble of mending

    def run(self, seconds: float) -> None:
        """Run for about so long, and check everything at the end."""
        self._began = time.monotonic()
        with self.group as group:
            for number, mirror in ((0, 1), (1, None)):
                volume = group.add_volume(f"vol{number}", size_b=4 * MIB, log_b=12 * MIB, mirror=mirror)
                volume.scribble()
                group.ctl.full_backup(group.s[0], volume.name, timeoutS=60)
                volume.start_load(bytes_per_s=3e5)
            while time.monotonic() - self._began < seconds:
                for _ in range(STEPS_PER_ROUND):
                    self._step()
                    if time.monotonic() - self._began > seconds:
                        break
                self.mend()
            for volume in group.volumes.values():
                volume.stop_load()
            self.mend(implicit_max=40)
        for name, (good, bad) in sorted(self.done.items()):
            self._say(f"{name}: {good} done, {bad} failed")

    # Steps

    def _step(self) -> None:
        self.step += 1
        rng = random.Random(f"{self.seed} {self.step}")
        weights = [weight for weight, _ in OPERATIONS]
        _, operation = rng.choices(OPERATIONS, weights)[0]
        volume = rng.choice(list(self.group.volumes.values()))
        name, began, outcome = operation.__name__, time.monotonic(), "ok"
        counts = self.done.setdefault(name, [0, 0])
        try:
            operation(self, volume, rng)
            counts[0] += 1
        except Inexact:
            raise
        except Failure as exc:
            if type(exc) is AssertionError and not str(exc).startswith(EXPECTED):
                raise
            outcome = f"{type(exc).__name__}: {str(exc).splitlines()[0][:100] if str(exc) else ''}"
            counts[1] += 1
        self._say(f"step {self.step} {name} {volume.name}: {outcome} ({time.monotonic() - began:.1f} s)")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} {text}", flush=True)

    # Repair

    def mend(self, implicit_max: int = 5) -> None:
        """Bring everything up again, as an operator does; then all archives get everything, and all is exact."""
        group = self.group
        group.heal()
        for process in group.processes.values():
            if process.paused:
                process.resume()
        group.start()
        for volume in group.volumes.values():
            self._rejoin(volume)
        if self.by_doctor:
            self._call_doctor()
        for volume in group.volumes.values():
            wait_until(partial(self._mend, volume), f"{volume.name} to be mended", timeout_s=MEND_S)
        for volume in group.volumes.values():
            found = group.check_all(volume, implicit_max=implicit_max)
            self._say(f"exact: {volume.name} " + ", ".join(f"{len(g)} at {name}" for name, g in found.items()))

    def _call_doctor(self) -> None:
        """Nobody but the doctor repairs anything; then nothing may be left for us to do."""
        allowed = Allowed(yes=True, lose=frozenset(self.group.volumes))
        for _ in range(3):
            outcome = self.group.doctor().fix(allowed, tell=lambda text: self._say(f"doctor {text}"))
            self.group.follow()
            if outcome.is_well:
                return
        left = "; ".join(found_by(outcome.left)) + "; ".join(str(v.error) for v in outcome.verified if v.error)
        raise AssertionError(f"the doctor leaves: {left}")

    def _mend(self, volume: Volume) -> bool:
        """Do what is missing next; true when nothing is, and the archives have everything."""
        try:
            if self._repair(volume):
                return self._is_fresh(volume)
        except Inexact:
            raise
        except Failure as exc:
            if str(exc) != self._last:
                self._last = str(exc)
                self._say(f"mend {volume.name}: {exc!r:.300}")
        return False

    def _is_fresh(self, volume: Volume) -> bool:
        """Tell whether what is written now comes to the archives; a gap never closes by itself."""
        group = self.group
        gid = group.mark(volume)
        for server in group.fed(volume):
            try:
                group.ctl.wait_for_restorable(server, volume.name, gid, timeoutS=STEP_S)
            except WalbError as exc:
                self._say(f"mend {volume.name}: {gid} does not come to {server.name}: {exc}")
                if server is group.a[0]:
                    self._backup(volume, group.target(volume))
                else:
                    group.ctl.stop_synchronizing(server, volume.name)
                return False
        return True

    def _repair(self, volume: Volume) -> bool:
        group, ctl, vol = self.group, self.group.ctl, volume.name
        for server in group.servers[: len(group.a) + len(group.p)]:
            if ctl.get_state(server, vol) == "Stopped":
                ctl.start(server, vol)
        for a in group.a:
            if ctl.get_state(a, vol) == "Archived" and group.status(a, vol).size_lb * LB < len(volume.model):
                ctl.resize_archive(a, vol, len(volume.model) // MIB, True)
                ctl.resize(vol, len(volume.model) // MIB, True)
        for leg in volume.legs:
            if ctl.get_state(group.server(leg.storage), vol) == "Clear":
                ctl.init_storage(group.server(leg.storage), vol, str(leg.directory))
        storages = self._storages(volume)
        states = {s: ctl.get_state(s, vol) for s in storages}
        targets = [s for s, state in states.items() if state == "Target"]
        assert len(targets) <= 1, f"several targets: {states}"
        if targets and not ctl.is_overflow(targets[0], vol) and group.a[0] in group.fed(volume):
            if not all(group.a[0].name in ctl.get_archive_info_list(p, vol) for p in group.p):
                ctl.start_synchronizing(group.a[0], vol)
            return True
        stopped = [s for s, state in states.items() if state == "Stopped"]
        if stopped and not targets and not ctl.is_overflow(stopped[0], vol) and group.a[0] in group.fed(volume):
            ctl.start(stopped[0], vol)
            return True
        self._backup(volume, (targets or stopped or storages)[0])
        return True

    def _backup(self, volume: Volume, source: Server) -> None:
        """Continue with a hash backup where there is a base, else begin anew."""
        ctl, vol, primary = self.group.ctl, volume.name, self.group.a[0]
        for s in self._storages(volume):
            state = ctl.get_state(s, vol)
            if s is source and state == "Target":
                ctl.stop(s, vol, "force")
            elif s is not source and state != "Standby":
                if state == "Stopped":
                    ctl.reset(s, vol)
                ctl.go_standby(s, vol)
        if ctl.get_state(primary, vol) == "Archived":
            ctl.hash_backup(source, vol, timeoutS=60)
        else:
            ctl.full_backup(source, vol, timeoutS=60)

    def _storages(self, volume: Volume) -> list[Server]:
        return [self.group.server(leg.storage) for leg in volume.legs]

    def _rejoin(self, volume: Volume) -> None:
        for index in range(len(volume.legs)):
            volume.rejoin(index)
        volume.reconcile()

    # Operations: the application

    def write(self, volume: Volume, rng: random.Random) -> None:
        volume.scribble(rng.randrange(5, 60))

    def flood(self, volume: Volume, rng: random.Random) -> None:
        for _ in range(rng.randrange(4, 24)):
            size = rng.randrange(1, 257) * 512
            volume.write(rng.randrange((len(volume.model) - size) // 512) * 512, rng.randbytes(size))
        volume.flush()

    def overflow(self, volume: Volume, rng: random.Random) -> None:
        names = [p.name for p in self.group.p]
        self.group.kill(*names)
        try:
            for at in range(0, 14 * MIB, 256 << 10):
                volume.write(at % (3 * MIB), rng.randbytes(256 << 10))
            volume.flush()
        finally:
            self.group.start(*names)

    # Operations: commands

    def snapshot(self, volume: Volume, rng: random.Random) -> None:
        self.group.snapshot(volume, timeout_s=STEP_S)

    def mark(self, volume: Volume, rng: random.Random) -> None:
        self.group.mark(volume)

    def restore(self, volume: Volume, rng: random.Random) -> None:
        archive = rng.choice(self.group.a)
        self.group.check(volume, self._some_gid(volume, archive, rng), archive)

    def apply(self, volume: Volume, rng: random.Random) -> None:
        archive = rng.choice(self.group.a)
        self.group.ctl.apply(archive, volume.name, self._some_gid(volume, archive, rng), timeoutS=STEP_S)

    def merge(self, volume: Volume, rng: random.Random) -> None:
        archive = rng.choice(self.group.a)
        first, last = sorted(self._some_gid(volume, archive, rng) for _ in range(2))
        self.group.ctl.merge(archive, volume.name, first, last, timeoutS=STEP_S)

    def merge_hidden(self, volume: Volume, rng: random.Random) -> None:
        """Give up explicit snapshots, merge over them, as retention does."""
        archive, ctl = rng.choice(self.group.a), self.group.ctl
        gids, share = self._gids(volume, archive), sorted((rng.random(), rng.random()))
        assert gids, "nothing is restorable"
        first, last = (int(part * len(gids)) for part in share)
        ctl.disable_snapshot(archive, volume.name, gids[first + 1 : last])
        ctl.merge(archive, volume.name, gids[first], gids[last], timeoutS=STEP_S)

    def enable_snapshot(self, volume: Volume, rng: random.Random) -> None:
        archive = rng.choice(self.group.a)
        self.group.ctl.enable_snapshot(archive, volume.name, [self._some_gid(volume, archive, rng)])

    def gc_diff(self, volume: Volume, rng: random.Random) -> None:
        self.group.ctl.gc_diff(rng.choice(self.group.a), volume.name)

    def replicate(self, volume: Volume, rng: random.Random) -> None:
        resync, dont_merge = rng.random() < 0.3, rng.random() < 0.3
        src, dst = self.group.a
        self.group.ctl.replicate_once(
            src, volume.name, dst, timeoutS=STEP_S, doResync=resync, dontMerge=dont_merge
        )

    def synchronize(self, volume: Volume, rng: random.Random) -> None:
        src, dst = self.group.a
        self.group.ctl.replicate(src, volume.name, dst, True, timeoutS=STEP_S, doResync=rng.random() < 0.5)

    def stop_synchronizing(self, volume: Volume, rng: random.Random) -> None:
        self.group.ctl.stop_synchronizing(self.group.a[1], volume.name)

    def clear_replica(self, volume: Volume, rng: random.Random) -> None:
        self.group.ctl.stop_synchronizing(self.group.a[1], volume.name)
        self.group.ctl.clear(self.group.a[1], volume.name)

    def hash_backup(self, volume: Volume, rng: random.Random) -> None:
        self._backup(volume, rng.choice(self._storages(volume)))

    def full_backup(self, volume: Volume, rng: random.Random) -> None:
        primary, ctl = self.group.a[0], self.group.ctl
        source = rng.choice(self._storages(volume))
        if ctl.get_state(source, volume.name) == "Target":
            ctl.stop(source, volume.name)
        ctl.clear(primary, volume.name)
        self._backup(volume, source)

    def stop_start(self, volume: Volume, rng: random.Random) -> None:
        server = rng.choice([*self.group.p, *self.group.a, self._storages(volume)[0]])
        mode = rng.choice(["graceful", "force"])
        self.group.ctl.stop(server, volume.name, mode)
        self.group.ctl.start(server, volume.name)

    def resize(self, volume: Volume, rng: random.Random) -> None:
        if len(volume.model) < 8 * MIB:
            self.group.grow_device(volume, len(volume.model) + MIB)
        self.group.ctl.resize(volume.name, len(volume.model) // MIB, rng.random() < 0.5)

    def kick(self, volume: Volume, rng: random.Random) -> None:
        self.group.ctl.kick_all([*self.group.s, *self.group.p])

    # Operations: faults

    def kill(self, volume: Volume, rng: random.Random) -> None:
        names = rng.sample(list(self.group.processes), rng.choice([1, 1, 2]))
        self._say(f"  kill {' '.join(names)}")
        self.group.kill(*names)
        time.sleep(rng.random())

    def wipe(self, volume: Volume, rng: random.Random) -> None:
        name = rng.choice([s.name for s in self.group.servers])
        self._say(f"  wipe {name} {volume.name}")
        self.group.wipe(name, volume.name)
        self.group.start(name)

    def restart(self, volume: Volume, rng: random.Random) -> None:
        name = rng.choice(list(self.group.processes))
        self._say(f"  restart {name}")
        self.group.processes[name].restart()
        self._rejoin(next((v for v in self.group.volumes.values() if f"dev-{v.name}" in name), volume))

    def start(self, volume: Volume, rng: random.Random) -> None:
        self.group.start()
        for each in self.group.volumes.values():
            self._rejoin(each)

    def pause(self, volume: Volume, rng: random.Random) -> None:
        process = self.group.processes[rng.choice([s.name for s in self.group.servers])]
        process.pause()
        try:
            time.sleep(rng.uniform(0.1, 2.0))
        finally:
            process.resume()

    def break_link(self, volume: Volume, rng: random.Random) -> None:
        link = rng.choice(list(self.group.links.values()))
        how = rng.randrange(6)
        self._say(f"  {link.name} {('reset', 'cut', 'cut after', 'blackhole', 'delay', 'rate')[how]}")
        (
            link.reset,
            link.cut,
            lambda: link.cut_after(rng.randrange(1, 1 << 20)),
            link.blackhole,
            lambda: link.delay(0.05),
            lambda: link.rate(500_000),
        )[how]()

    def heal(self, volume: Volume, rng: random.Random) -> None:
        self.group.heal()

    # Inner parts

    def _gids(self, volume: Volume, archive: Server) -> list[int]:
        return self.group.ctl.get_restorable_gid(archive, volume.name, "all")

    def _some_gid(self, volume: Volume, archive: Server, rng: random.Random) -> int:
        gids = self._gids(volume, archive)
        assert gids, "nothing is restorable"
        return gids[int(rng.random() * len(gids))]


OPERATIONS: Final[list[tuple[int, Callable[[MixedRun, Volume, random.Random], None]]]] = [
    (8, MixedRun.write),
    (6, MixedRun.flood),
    (1, MixedRun.overflow),
    (8, MixedRun.snapshot),
    (4, MixedRun.mark),
    (4, MixedRun.restore),
    (4, MixedRun.apply),
    (4, MixedRun.merge),
    (3, MixedRun.merge_hidden),
    (1, MixedRun.enable_snapshot),
    (1, MixedRun.gc_diff),
    (4, MixedRun.replicate),
    (3, MixedRun.synchronize),
    (1, MixedRun.stop_synchronizing),
    (1, MixedRun.clear_replica),
    (3, MixedRun.hash_backup),
    (1, MixedRun.full_backup),
    (3, MixedRun.stop_start),
    (2, MixedRun.resize),
    (1, MixedRun.kick),
    (6, MixedRun.kill),
    (2, MixedRun.wipe),
    (6, MixedRun.restart),
    (6, MixedRun.start),
    (2, MixedRun.pause),
    (8, MixedRun.break_link),
    (5, MixedRun.heal),
]
