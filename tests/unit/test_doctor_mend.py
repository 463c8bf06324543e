"""Mending: the order, what is asked for, what fails, and when it ends. Looks and calls are scripted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from tests.kit.doctor_scene import Scene
from walbd.cli import walbc_doctor
from walbd.controller.doctor import Allowed, Consent, Doctor, Finding, Observation, Outcome, Step
from walbd.controller.doctor.findings import finding
from walbd.controller.doctor.steps import Ref
from walbd.controller.layout import parse_layout
from walbd.errors import Refused, UsageError

GROUP = parse_layout(
    "".join(
        f'[[{kind}]]\nname = "{kind[0]}{i}"\nhost = "h"\nport = {port + i}\n'
        for kind, port in (("storage", 1), ("proxy", 11), ("archive", 21))
        for i in range(2)
    ),
    Path("x.toml"),
)
START = finding("proxy-stopped", "x", server="p0", volume="vol0", steps=(Step("start", (Ref("p0"), "vol0")),))
BACKUP = finding(
    "gap",
    "x",
    server="a0",
    volume="vol0",
    steps=(Step("stop", (Ref("s0"), "vol0")), Step("hash_backup", (Ref("s0"), "vol0"), Consent.YES)),
)
CLEAR = finding(
    "archive-broken", "x", server="a0", volume="vol0", steps=(Step("clear", (Ref("a0"), "vol0"), Consent.LOSE),)
)
PROMOTE = finding(
    "primary-data-lost",
    "x",
    server="a0",
    volume="vol0",
    steps=(Step("retarget", (Ref("s0"), Ref("a1"))), Step("promote_archive", (Ref("a1"),))),
)


class Calls:
    """The clock; each step takes `step_s`."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.step_s = 0.0

    def now(self) -> float:
        return self.time_s


class Ctl:
    """Notes what is called; `failing` methods fail so often."""

    def __init__(self, **failing: int) -> None:
        self.failing = failing
        self.called: list[str] = []
        self.calls = Calls()
        self.layouts: list[list[str]] = []

    def set_server_layout(self, layout: Any) -> None:
        self.layouts.append([a.name for a in layout.archiveL])

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> None:
            self.calls.time_s += self.calls.step_s
            self.called.append(f"{name} {' '.join(str(getattr(arg, 'name', arg)) for arg in args)}")
            if self.failing.get(name, 0):
                self.failing[name] -= 1
                raise Refused("not now", hint="later")

        return call


class Scripted(Doctor):
    """A doctor that sees what it is told to see."""

    def __init__(self, ctl: Ctl, *looks: list[Finding]) -> None:
        super().__init__(ctl, GROUP)  # type: ignore[arg-type]
        self.looks = list(looks)

    def look(self) -> list[Finding]:
        self.observation = Observation(group=GROUP, seen={}, taken_s=self.ctl.calls.now())
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def fix(
    ctl: Ctl, *looks: list[Finding], allowed: Allowed = Allowed(yes=True), ask: Any = None
) -> tuple[Outcome, list[str]]:
    told: list[str] = []
    outcome = Scripted(ctl, *looks).fix(allowed, tell=told.append, ask=ask)
    return outcome, told


def test_nothing_to_do() -> None:
    outcome, told = fix(Ctl(), [])
    assert outcome.is_well
    assert told == []


def test_the_first_in_the_order_comes_first_and_then_it_looks_again() -> None:
    ctl = Ctl()
    outcome, told = fix(ctl, [BACKUP, START], [BACKUP], [])
    assert ctl.called == ["start p0 vol0", "stop s0 vol0", "hash_backup s0 vol0"]
    assert told == [
        "what is stopped:", "  walbc start p0 vol0",
        "backups:", "  walbc stop s0 vol0", "  walbc hash-backup vol0 --storage s0",
    ]  # fmt: skip
    assert outcome.is_well
    assert [t.code for t in outcome.taken] == ["proxy-stopped", "gap", "gap"]


def test_what_an_earlier_step_has_mended_is_not_mended_again() -> None:
    ctl = Ctl()
    fix(ctl, [BACKUP, START], [])
    assert ctl.called == ["start p0 vol0"]


@pytest.mark.parametrize(
    ("allowed", "called"),
    [
        (Allowed(), ["start p0 vol0"]),
        (Allowed(yes=True), ["start p0 vol0", "stop s0 vol0", "hash_backup s0 vol0"]),
        (Allowed(yes=True, lose=frozenset({"vol1"})), ["start p0 vol0", "stop s0 vol0", "hash_backup s0 vol0"]),
        (Allowed(lose=frozenset({"vol0"})), ["start p0 vol0", "clear a0 vol0"]),
    ],
)
def test_only_what_is_allowed_is_done(allowed: Allowed, called: list[str]) -> None:
    ctl = Ctl()
    everything = [START, CLEAR, BACKUP]

    class Remembering(Scripted):
        def look(self) -> list[Finding]:
            done = {line.split()[0] for line in ctl.called}
            return [f for f in everything if f.steps[-1].method not in done]

    outcome = Remembering(ctl, []).fix(allowed)
    assert ctl.called == called
    assert not outcome.is_well


def test_a_person_is_asked_once_for_what_is_not_allowed() -> None:
    ctl, asked = Ctl(), []

    def ask(findings: Sequence[Finding]) -> Allowed:
        asked.append([f.code for f in findings])
        return Allowed(yes=True)

    fix(ctl, [CLEAR, BACKUP], [CLEAR, BACKUP], [CLEAR], allowed=Allowed(), ask=ask)
    assert asked == [["archive-broken", "gap"]]
    assert ctl.called[:2] == ["stop s0 vol0", "hash_backup s0 vol0"]


def test_nothing_rests_on_what_was_seen_long_ago() -> None:
    """After a step that took long, and after a question that was not answered at once, it looks again."""
    other = finding(
        "gap", "y", server="a0", volume="vol1", steps=(Step("stop", (Ref("s0"), "vol1")),)
    )  # fmt: skip
    ctl = Ctl()
    fix(ctl, [BACKUP, other], [])
    assert ctl.called == ["stop s0 vol0", "hash_backup s0 vol0", "stop s0 vol1"]
    ctl = Ctl()
    ctl.calls.step_s = 3600
    outcome, _ = fix(ctl, [BACKUP, other], [])
    assert ctl.called == ["stop s0 vol0", "hash_backup s0 vol0"]  # vol1 is well by then
    assert outcome.is_well

    def ask(found: Any) -> Allowed:
        ctl.calls.time_s += 3600
        return Allowed(yes=True)

    ctl = Ctl()
    fix(ctl, [BACKUP], [], allowed=Allowed(), ask=ask)
    assert ctl.called == []
    ctl = Ctl()
    fix(ctl, [BACKUP], [BACKUP], [], allowed=Allowed(), ask=ask)
    assert ctl.called == ["stop s0 vol0", "hash_backup s0 vol0"]


def test_a_step_that_fails_ends_its_finding_and_is_tried_twice() -> None:
    ctl = Ctl(stop=9)
    outcome, told = fix(ctl, [BACKUP])
    assert ctl.called == ["stop s0 vol0"] * 2
    assert told.count("    failed: not now (later)") == 2
    assert not outcome.is_well
    assert outcome.left == [BACKUP]


def test_a_second_try_helps() -> None:
    ctl = Ctl(hash_backup=1)
    outcome, _ = fix(ctl, [BACKUP], [BACKUP], [])
    assert ctl.called == ["stop s0 vol0", "hash_backup s0 vol0"] * 2
    assert outcome.is_well


def test_a_kick_that_fails_does_no_harm() -> None:
    steps = (Step("kick_storage_all", ()), *START.steps)
    kicked = finding("proxy-stopped", "x", server="p0", volume="vol0", steps=steps)
    ctl = Ctl(kick_storage_all=1)
    outcome, _ = fix(ctl, [kicked], [])
    assert ctl.called == ["kick_storage_all ", "start p0 vol0"]
    assert outcome.is_well


def test_what_waits_for_a_server_is_left() -> None:
    waiting = finding("gap", "x", server="a0", volume="vol0", steps=BACKUP.steps, waits_for=("p1",))
    ctl = Ctl()
    outcome, _ = fix(ctl, [waiting])
    assert ctl.called == []
    assert outcome.left == [waiting]


def test_what_only_tells_of_the_past_is_no_failure() -> None:
    past = finding("job-failed", "x", server="a0", volume="vol0")
    outcome, _ = fix(Ctl(), [START, past], [past])
    assert outcome.left == [past]
    assert outcome.is_well


def test_a_step_that_several_findings_share_is_taken_once() -> None:
    other = finding("primary-data-lost", "x", server="a0", volume="vol1", steps=PROMOTE.steps)
    ctl = Ctl()
    outcome, _ = fix(ctl, [PROMOTE, other], [])
    assert ctl.called == ["retarget s0 a1"]
    assert ctl.layouts == [["a1", "a0"]]
    assert outcome.group_changed


def test_what_a_person_at_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click, "confirm", lambda text: "walbc hash-backup vol0" in text)
    monkeypatch.setattr(click, "prompt", lambda text, default: "vol0" if "type vol0" in text else default)
    assert walbc_doctor._ask([BACKUP, CLEAR]) == Allowed(yes=True, lose=frozenset({"vol0"}))
    monkeypatch.setattr(click, "prompt", lambda text, default: "yes")
    assert walbc_doctor._ask([CLEAR]) == Allowed()


def test_an_archive_that_is_given_up_must_be_one_of_the_group() -> None:
    with pytest.raises(UsageError):
        Doctor(Ctl(), GROUP, lost=["a9"])  # type: ignore[arg-type]


# Checking that it is mended


class Snapshots(Ctl):
    """Takes snapshots: `gid` is the answer."""

    def __init__(self, gid: int = 11, **failing: int) -> None:
        super().__init__(**failing)
        self.gid = gid

    def snapshot(self, server: Any, vol: str, archives: list[Any], timeout_s: float) -> int:
        assert timeout_s >= 60
        self.called.append(f"snapshot {server.name} {vol} {' '.join(a.name for a in archives)}")
        if self.failing.get("snapshot", 0):
            raise Refused("not now", hint="later")
        return self.gid


class Verifying(Scripted):
    """Sees this scene, whatever it finds."""

    def __init__(self, ctl: Ctl, scene: Scene, *looks: list[Finding]) -> None:
        super().__init__(ctl, *looks)
        self.group = scene.group
        self.scene = scene
        self.n_looks = 0

    def look(self) -> list[Finding]:
        found = super().look()
        self.n_looks += 1
        self.observation = self.scene.observe(taken_s=self.ctl.calls.now())
        self._learn(self.observation)
        return found


def verified(scene: Scene, ctl: Ctl, *looks: list[Finding]) -> Outcome:
    return Verifying(ctl, scene, *looks).fix(Allowed(yes=True))


def test_what_was_mended_must_become_restorable_everywhere() -> None:
    ctl = Snapshots()
    outcome = verified(Scene(), ctl, [START], [])
    assert ctl.called == ["start p0 vol0", "snapshot s0 vol0 a0 a1"]
    assert [(v.volume, v.gid, v.archives, v.error) for v in outcome.verified] == [("vol0", 11, ("a0", "a1"), None)]
    assert outcome.is_well


def test_a_snapshot_that_does_not_arrive_is_no_success() -> None:
    ctl = Snapshots(snapshot=1)
    outcome = verified(Scene(), ctl, [START], [])
    (result,) = outcome.verified
    assert isinstance(result.error, Refused)
    assert not outcome.is_well
    assert outcome.left == []


@pytest.mark.parametrize("looks", [[[]], [[START]]], ids=["nothing to do", "nothing worked"])
def test_nothing_is_verified_where_nothing_was_done(looks: list[list[Finding]]) -> None:
    ctl = Snapshots(start=9)
    outcome = verified(Scene(), ctl, *looks)
    assert not [line for line in ctl.called if line.startswith("snapshot")]
    assert outcome.verified == []


@pytest.mark.parametrize(
    ("scene", "snapshot"),
    [
        (Scene().part("a1", state="Stopped"), "snapshot s0 vol0 a0"),
        (Scene().part("a1", state="SyncReady"), "snapshot s0 vol0 a0"),
        (Scene().dead("p1").part("p0", hops=Scene().status["p0"].volumes[0].hops[:1]), "snapshot s0 vol0 a0"),
        (Scene().part("s0", state="Stopped"), ""),
        (Scene().part("s0", overflow=True), ""),
        (Scene().part("a0", state="Stopped").part("a1", state="Stopped"), ""),
        (Scene().server("s0", volumes=[]), ""),
    ],
    ids=["stopped", "empty", "not fed", "target stopped", "overflow", "all stopped", "no target"],
)
def test_only_archives_that_can_get_it_are_waited_for(scene: Scene, snapshot: str) -> None:
    ctl = Snapshots()
    outcome = verified(scene, ctl, [START], [])
    assert ctl.called == ["start p0 vol0", *([snapshot] if snapshot else [])]
    assert len(outcome.verified) == bool(snapshot)


def test_only_volumes_that_were_worked_on_are_verified() -> None:
    scene = Scene()
    for name, status in list(scene.status.items()):
        (v,) = status.volumes
        scene.server(name, volumes=[v, msgspec.structs.replace(v, volume="vol1")])
    ctl = Snapshots()
    verified(scene, ctl, [START], [])
    assert ctl.called == ["start p0 vol0", "snapshot s0 vol0 a0 a1"]


def test_what_was_left_is_looked_at_again_after_a_snapshot() -> None:
    """A lag, or a failed transfer, has gone by then."""
    past = finding("lagging", "x", server="a0", volume="vol0")
    doctor = Verifying(Snapshots(), Scene(), [START, past], [past], [])
    outcome = doctor.fix(Allowed(yes=True))
    assert (doctor.n_looks, outcome.left, outcome.is_well) == (3, [], True)
    doctor = Verifying(Snapshots(snapshot=1), Scene(), [START, past], [past], [])
    assert doctor.fix(Allowed(yes=True)).left == [past]
    doctor = Verifying(Snapshots(), Scene(), [START], [], [past])
    assert doctor.fix(Allowed(yes=True)).left == []  # nothing was left: no need to look
    assert doctor.n_looks == 2


@pytest.mark.parametrize(("age_s", "looks"), [(30, 1), (30.5, 2)])
def test_how_old_what_was_seen_may_be(age_s: float, looks: int) -> None:
    ctl = Ctl()

    def ask(_found: Any) -> Allowed:
        ctl.calls.time_s += age_s
        return Allowed(yes=True)

    fix(ctl, [BACKUP], [], allowed=Allowed(), ask=ask)
    assert bool(ctl.called) is (looks == 1)
