"""Mending what was found, in a safe order, and checking that it is mended. Source: docs/recovery.md, "--fix".

Pass after pass: look; of what can be mended and may be, take what comes first in the order (ways, what is
stopped, proxies, archives, storages, backups, replicas); do it; look again. A later pass sees what an earlier one
has brought about, so nothing rests on what was true a while ago. Every step is a Controller method that checks
everything it needs before it changes anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from walbd.controller import constants as k
from walbd.controller.controller import Controller
from walbd.controller.doctor.case import Case
from walbd.controller.doctor.diagnose import confirmed, diagnose, intents_of, needs_second_look, volumes
from walbd.controller.doctor.findings import Finding
from walbd.controller.doctor.observation import Intent, Observation
from walbd.controller.doctor.observe import observe, observe_again
from walbd.controller.doctor.steps import Arg, Consent, Ref, Step
from walbd.controller.layout import GroupLayout
from walbd.controller.overview import Word
from walbd.controller.servers import Server, get_server
from walbd.errors import NotFound, WalbError

PAUSE_S: Final = 2.0  # between two looks
STALE_S: Final = 30.0  # what was seen longer ago is looked at again before anything rests on it
PASSES_MAX: Final = 200
TRIES_MAX: Final = 2  # of one finding
_PAST: Final = ("job-failed", "put-aside")
VERIFY_S: Final = 600.0  # until a fresh snapshot can be restored


@dataclass(frozen=True)
class Allowed:
    """What a person has agreed to."""

    yes: bool = False  # reading whole volumes, dropping what is superseded
    lose: frozenset[str] = frozenset()  # volumes whose only good copy may be destroyed

    def covers(self, finding: Finding) -> bool:
        """Tell whether the steps of a finding may be taken."""
        if finding.consent is Consent.LOSE:
            return finding.volume in self.lose
        return finding.consent is Consent.NONE or self.yes


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A step that was taken."""

    step: Step
    code: str  # of the finding
    elapsed_s: float
    error: WalbError | None = None


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A fresh snapshot after mending: where it can be restored, or why not."""

    volume: str
    gid: int = 0
    archives: tuple[str, ...] = ()
    error: WalbError | None = None


@dataclass
class Outcome:
    """What mending has done."""

    found: list[Finding]  # at the beginning
    taken: list[Taken] = field(default_factory=list)
    verified: list[Verified] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)  # at the end
    group_changed: bool = False  # the group file must be changed

    @property
    def is_well(self) -> bool:
        """Nothing is left but what only tells of the past, and everything was verified."""
        return not without_notes(self.left) and all(v.error is None for v in self.verified)


class Doctor:
    """Looks at a group and mends it. `lost` names archives that are given up although they do not answer."""

    def __init__(
        self,
        ctl: Controller,
        group: GroupLayout,
        *,
        vol: str = "",
        lost: Sequence[str] = (),
        pause_s: float | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        for name in lost:
            get_server(name, group.servers.archiveL)
        self.ctl = ctl
        self.group = group
        self.vol = vol
        self.lost = frozenset(lost)
        self.intents: dict[str, Intent] = {}
        self.observation: Observation | None = None  # the last one
        self._pause_s = PAUSE_S if pause_s is None else pause_s
        self._wall = wall

    def look(self) -> list[Finding]:
        """Return what is wrong, in the order of mending. Looks twice where once does not tell.

        Raises NotFound when only one volume is to be looked at and nobody knows it.
        """
        self.observation = o = observe(self.ctl, self.group, self.vol, wall=self._wall)
        if self.vol and self.vol not in volumes(o, ""):
            raise NotFound("nobody who answers knows the volume", hint="see `walbc status`", volume=self.vol)
        self._learn(o)
        found = self._diagnose(o)
        if not needs_second_look(found):
            return found
        self.observation = again = observe_again(self.ctl, o, self.vol, self._pause_s, wall=self._wall)
        self._learn(again)
        return confirmed(self._diagnose(again), found)

    def plan(self, found: Sequence[Finding]) -> list[Finding]:
        """Return the findings that steps can mend now."""
        return [f for f in found if f.steps and not f.waits_for]

    def fix(
        self,
        allowed: Allowed,
        *,
        found: list[Finding] | None = None,
        tell: Callable[[str], None] = lambda _text: None,
        ask: Callable[[Sequence[Finding]], Allowed] | None = None,
    ) -> Outcome:
        """Mend what may be mended. `ask` is given what is not allowed yet, once for each new finding."""
        found = self.look() if found is None else found
        outcome = Outcome(found=found, left=found)
        tries: dict[tuple[str, str, str], int] = {}
        asked: set[tuple[str, str, str]] = set()
        for _ in range(PASSES_MAX):
            able = [f for f in self.plan(outcome.left) if tries.get(f.key, 0) < TRIES_MAX]
            unasked = [f for f in able if not allowed.covers(f) and f.key not in asked]
            if ask is not None and unasked:
                asked |= {f.key for f in unasked}
                more = ask(unasked)
                allowed = Allowed(allowed.yes or more.yes, allowed.lose | more.lose)
                if self._is_stale():  # an answer may take a person an hour
                    outcome.left = self.look()
                    continue
            able = [f for f in able if allowed.covers(f)]
            if not able:
                break
            first = min(f.rank for f in able)
            tell(f"{first.name}:")
            self._take([f for f in able if f.rank == first], outcome, tries, tell)
            outcome.left = self.look()
        self._verify(outcome, tell)
        return outcome

    # Inner parts

    def _is_stale(self) -> bool:
        return self.observation is not None and self.ctl.calls.now() - self.observation.taken_s > STALE_S

    def _learn(self, o: Observation) -> None:
        """Take over what is wanted of each volume. What was known stays known while nobody is seen to be target:
        mending itself makes that so for a while.
        """
        for name, intent in intents_of(o, lost=self.lost).items():
            known = self.intents.get(name)
            case = Case(o, name, intent, self.lost)
            if known is None or not known.target or (case.target is not None and case.target.state == k.sTarget):
                self.intents[name] = intent

    def _diagnose(self, o: Observation) -> list[Finding]:
        return diagnose(o, self.vol, intents=self.intents, lost=self.lost)

    def _take(
        self,
        batch: Sequence[Finding],
        outcome: Outcome,
        tries: dict[tuple[str, str, str], int],
        tell: Callable[[str], None],
    ) -> None:
        done: set[Step] = set()
        for i, f in enumerate(batch):
            if i and self._is_stale():
                return  # the one before took long: look first
            tries[f.key] = tries.get(f.key, 0) + 1
            for step in f.steps:
                if step in done:
                    continue
                tell(f"  {step.command}")
                taken = self._take_one(step, f.code, outcome)
                outcome.taken.append(taken)
                if taken.error is not None:
                    tell(f"    failed: {taken.error}" + (f" ({taken.error.hint})" if taken.error.hint else ""))
                    if not step.method.startswith("kick_"):
                        break
                else:
                    done.add(step)

    def _take_one(self, step: Step, code: str, outcome: Outcome) -> Taken:
        began = self.ctl.calls.now()
        error: WalbError | None = None
        try:
            if step.method == "promote_archive":
                self._promote(step, outcome)
            else:
                call: Callable[..., Any] = getattr(self.ctl, step.method)
                call(*map(self._resolve, step.args))
        except WalbError as exc:
            error = exc
        return Taken(step=step, code=code, elapsed_s=round(self.ctl.calls.now() - began, 3), error=error)

    def _resolve(self, arg: Arg) -> Any:
        if isinstance(arg, tuple):
            return [self._server(ref.name) for ref in arg]
        return self._server(arg.name) if isinstance(arg, Ref) else arg

    def _server(self, name: str) -> Server:
        return get_server(name, self.group.servers.get_all())

    def _promote(self, step: Step, outcome: Outcome) -> None:
        (arg,) = step.args
        assert isinstance(arg, Ref)
        new = self._server(arg.name)
        layout = self.group.servers
        archives = [new, *(a for a in layout.archiveL if a.name != new.name)]
        self.group = self.group.with_servers(layout.replace(archiveL=archives))
        self.ctl.set_server_layout(self.group.servers)
        outcome.group_changed = True

    def _verify(self, outcome: Outcome, tell: Callable[[str], None]) -> None:
        """Take a snapshot of each volume that was worked on, and wait until every archive that is fed has it."""
        o = self.observation
        touched = {taken.step.volume for taken in outcome.taken if taken.error is None} - {""}
        if o is None or not touched:
            return
        for vol in volumes(o, self.vol):
            case = Case(o, vol, self.intents.get(vol, Intent()), self.lost)
            target = case.target
            if vol not in touched or target is None or target.state != k.sTarget or target.overflow:
                continue
            fed = [a for a in case.intent.archives if case.holds(a) and case.feeders(a)]
            fed = [a for a in fed if case.archives[a].state != k.aStopped]
            if not fed:
                continue
            tell(f"check: a snapshot of {vol} must become restorable at {', '.join(fed)}")
            outcome.verified.append(self._snapshot(vol, case.intent.target, fed))
            last = outcome.verified[-1]
            tell(f"  it is: generation {last.gid}" if last.error is None else f"  failed: {last.error}")
        if outcome.left and any(v.error is None for v in outcome.verified):
            outcome.left = self.look()

    def _snapshot(self, vol: str, storage: str, archives: Sequence[str]) -> Verified:
        try:
            gid = self.ctl.snapshot(self._server(storage), vol, list(map(self._server, archives)), VERIFY_S)
        except WalbError as exc:
            return Verified(volume=vol, archives=tuple(archives), error=exc)
        return Verified(volume=vol, gid=gid, archives=tuple(archives))


def worst_word(found: Sequence[Finding]) -> Word:
    """Return the worst severity; ok for none."""
    order = list(Word)
    return max((f.word for f in found), key=order.index, default=Word.OK)


def without_notes(found: Sequence[Finding]) -> list[Finding]:
    """Leave out what only tells of the past: nothing has to be done about it."""
    return [f for f in found if f.code not in _PAST]


def intent_lines(intents: dict[str, Intent]) -> list[str]:
    """Say what was inferred, as the group file does not say it."""
    lines = []
    for name, intent in sorted(intents.items()):
        guessed = []
        if intent.target and not intent.target_said:
            guessed.append(f'target = "{intent.target}"')
        if intent.archives and not intent.archives_said:
            guessed.append(f"archives = [{', '.join(repr(a) for a in intent.archives)}]".replace("'", '"'))
        if guessed:
            lines.append(f"{name}: inferred, as the group file does not say it: {', '.join(guessed)}")
    return lines
