"""State machines: the form that all three daemons share.

A daemon writes its machine as one table (`StateTable`); `Machine` holds a volume's place in it, its stop flag
and its running actions. Steady states are what is on disk; while a step is at work, `shown` is the name of
the passing state and the disk still says the old one. Source: docs/states.md (generated from the tables).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, NamedTuple, TypeVar

from walbd.daemon.tasks import Signal, uninterrupted
from walbd.errors import BadState, Busy, ForceStopped, InternalError, Stopping, TimedOut

S = TypeVar("S", bound=StrEnum)
C = TypeVar("C", bound=StrEnum)

ALL: Final = frozenset({"*"})  # every action excludes the command


class StopMode(StrEnum):
    """How to stop: let running work end, end it early, or (proxies) first send everything."""

    GRACEFUL = "graceful"
    FORCE = "force"
    EMPTY = "empty"


class Step(NamedTuple):
    """One legal move from a steady state."""

    during: str  # shown while the work runs; never written to disk
    to: StrEnum  # written durably when the work has succeeded


@dataclass(frozen=True, slots=True)
class Rule:
    """When a command is allowed."""

    states: frozenset[StrEnum]
    excludes: frozenset[str] = frozenset()  # actions that must not be running; ALL: none at all
    while_stopping: bool = False  # allowed although a stop is going on
    while_moving: bool = False  # allowed although a step is at work
    during: frozenset[str] | None = None  # if so: only while one of these is shown; None: any

    def allows_during(self, during: str) -> bool:
        """Tell whether the command is allowed while the step shown as `during` is at work."""
        return self.while_moving and (self.during is None or during in self.during)


@dataclass(frozen=True)
class StateTable(Generic[S, C]):
    """Everything about a daemon's states, as data: docs and tests read it."""

    name: str
    meanings: Mapping[S, str]  # what each steady state means, and what is on disk then
    steps: Mapping[tuple[S, C], Step]
    rules: Mapping[C, Rule]  # commands that move nothing, and extra conditions of those that do
    actions: tuple[str, ...] = ()

    def rule_of(self, command: C) -> Rule:
        """Return when `command` is allowed; for a moving command without a rule of its own: its steps."""
        rule = self.rules.get(command)
        if rule is not None:
            return rule
        return Rule(frozenset(state for state, cmd in self.steps if cmd is command), excludes=ALL)


@dataclass(slots=True)
class ActionInfo:
    """How often an action runs now, and when it last began [unix s]."""

    count: int = 0
    began: int = 0


@dataclass
class Machine(Generic[S, C]):
    """One volume's place in its table. Lives on one loop; every method that is not async is one step of it."""

    table: StateTable[S, C]
    state: S
    during: str | None = None
    stopping: StopMode | None = None
    actions: dict[str, ActionInfo] = field(default_factory=dict)
    changed: Signal = field(default_factory=Signal)

    @property
    def shown(self) -> str:
        """The state as operators see it."""
        return self.during or str(self.state)

    @property
    def at_rest(self) -> bool:
        """True when no step is at work and no action runs."""
        return self.during is None and not any(info.count for info in self.actions.values())

    def check(self, command: C) -> None:
        """Raise BadState, Stopping or Busy unless `command` is allowed now."""
        rule = self.table.rule_of(command)
        if self.stopping is not None and not rule.while_stopping:
            raise Stopping("the volume is being stopped", command=str(command), mode=str(self.stopping))
        if self.during is not None and not rule.allows_during(self.during):
            raise Busy(
                "the volume is busy", hint="wait until it has finished", command=str(command), state=self.during
            )
        if self.state not in rule.states:
            allowed = ", ".join(sorted(str(state) for state in rule.states)) or "no state"
            raise BadState(
                "not allowed in this state",
                hint=f"allowed in: {allowed}",
                command=str(command),
                state=self.shown,
            )
        for name, info in self.actions.items():
            if info.count and (rule.excludes is ALL or name in rule.excludes):
                raise Busy(
                    "another action excludes this",
                    hint="wait until it has finished",
                    command=str(command),
                    action=name,
                )

    @asynccontextmanager
    async def transition(self, command: C, commit: Callable[[S], Awaitable[None]]) -> AsyncIterator[Step]:
        """Run the body as one step: committed if it succeeds, undone on any error or cancellation.

        `commit(to)` makes the new state durable; it is not interrupted by a cancellation.
        """
        step = self.enter(command)
        try:
            yield step
            await self.commit_step(step, commit)
        finally:
            self.leave()

    def enter(self, command: C) -> Step:
        """Begin a step (raises as `check` does, or BadState when the table has none); end it with `leave`."""
        self.check(command)
        step = self.table.steps.get((self.state, command))
        if step is None:
            raise BadState("not allowed in this state", command=str(command), state=self.shown)
        self.during = step.during
        self.changed.set()
        return step

    async def commit_step(self, step: Step, commit: Callable[[S], Awaitable[None]]) -> None:
        """Make the step's target durable, and then visible: never one without the other."""

        async def both() -> None:
            to: S = step.to  # type: ignore[assignment]
            await commit(to)
            self.state = to
            self.changed.set()

        await uninterrupted(both())

    def leave(self) -> None:
        """End a step: the state is whatever was committed last."""
        self.during = None
        self.changed.set()

    @contextmanager
    def action(self, name: str, now: int) -> Iterator[None]:
        """Count the body as a running action; `now` [unix s] is remembered as its beginning."""
        if name not in self.table.actions:
            raise InternalError("unknown action", action=name)
        info = self.actions.setdefault(name, ActionInfo())
        info.count += 1
        info.began = now
        self.changed.set()
        try:
            yield
        finally:
            info.count -= 1
            self.changed.set()

    def running(self, name: str) -> int:
        """Return how often an action runs now."""
        info = self.actions.get(name)
        return info.count if info is not None else 0

    @contextmanager
    def stop_flag(self, mode: StopMode) -> Iterator[None]:
        """Refuse new work during the body. A second stop is refused and does not touch the first's flag."""
        if self.stopping is not None:
            raise Stopping("a stop is already going on", mode=str(self.stopping))
        self.stopping = mode
        self.changed.set()
        try:
            yield
        finally:
            self.stopping = None
            self.changed.set()

    def check_force(self) -> None:
        """Raise ForceStopped when running work has to give up; long loops call this at every batch."""
        if self.stopping is StopMode.FORCE:
            raise ForceStopped("given up because of a forced stop")

    async def wait_for(self, condition: Callable[[], bool], *, timeout_s: float | None, what: str) -> None:
        """Wait for a condition on this machine. Raises TimedOut."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.changed.wait_for(condition)
        except TimeoutError as exc:
            raise TimedOut(f"waited too long for {what}", state=self.shown, timeout_s=timeout_s) from exc
