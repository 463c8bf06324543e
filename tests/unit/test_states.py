"""The state machine's form: steps, refusals, undoing, stop flags, actions."""

import asyncio
from enum import StrEnum

import pytest

from walbd.daemon.states import ALL, Machine, Rule, StateTable, Step, StopMode
from walbd.errors import BadState, Busy, DiskFailed, ForceStopped, InternalError, Stopping, TimedOut


class State(StrEnum):
    CLEAR = "Clear"
    READY = "Ready"


class Command(StrEnum):
    INIT = "init"
    CLEAR = "clear"
    LOOK = "look"
    WORK = "work"


TABLE = StateTable(
    name="test",
    meanings={State.CLEAR: "nothing", State.READY: "something"},
    steps={
        (State.CLEAR, Command.INIT): Step("Init", State.READY),
        (State.READY, Command.CLEAR): Step("Wipe", State.CLEAR),
    },
    rules={
        Command.LOOK: Rule(frozenset(State), while_stopping=True, while_moving=True),
        Command.WORK: Rule(frozenset({State.READY}), excludes=frozenset({"Work"})),
    },
    actions=("Work", "Other"),
)


class Disk:
    def __init__(self) -> None:
        self.saved: list[State] = []
        self.fail = False

    async def save(self, state: State) -> None:
        await asyncio.sleep(0)
        if self.fail:
            raise DiskFailed("no")
        self.saved.append(state)


async def test_a_step_is_saved_then_shown() -> None:
    machine, disk = Machine(TABLE, State.CLEAR), Disk()
    async with machine.transition(Command.INIT, disk.save) as step:
        assert (machine.shown, machine.state, step.to) == ("Init", State.CLEAR, State.READY)
        assert disk.saved == []
    assert (machine.shown, disk.saved) == ("Ready", [State.READY])


async def test_a_failed_step_is_undone() -> None:
    machine, disk = Machine(TABLE, State.CLEAR), Disk()
    with pytest.raises(KeyError):
        async with machine.transition(Command.INIT, disk.save):
            raise KeyError
    assert (machine.shown, disk.saved) == ("Clear", [])
    disk.fail = True
    with pytest.raises(DiskFailed):
        async with machine.transition(Command.INIT, disk.save):
            pass
    assert machine.shown == "Clear"


async def test_cancelled_while_saving_is_saved_and_shown() -> None:
    machine, disk = Machine(TABLE, State.CLEAR), Disk()
    saving, proceed = asyncio.Event(), asyncio.Event()

    async def save(state: State) -> None:
        saving.set()
        await proceed.wait()
        await disk.save(state)

    async def step() -> None:
        async with machine.transition(Command.INIT, save):
            pass

    task = asyncio.ensure_future(step())
    await saving.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (machine.state, machine.shown, disk.saved) == (State.READY, "Ready", [State.READY])


async def test_refusals() -> None:
    machine, disk = Machine(TABLE, State.CLEAR), Disk()
    for command in (Command.CLEAR, Command.WORK):
        with pytest.raises(BadState) as caught:
            machine.check(command)
        assert "allowed in: Ready" in caught.value.hint
    async with machine.transition(Command.INIT, disk.save):
        for command in (Command.INIT, Command.CLEAR, Command.WORK):
            with pytest.raises(Busy):
                machine.check(command)
        machine.check(Command.LOOK)
    with machine.action("Work", 5):
        with pytest.raises(Busy):
            machine.check(Command.WORK)
        with pytest.raises(Busy):  # a moving command excludes every action
            machine.check(Command.CLEAR)
    with machine.action("Other", 6):
        machine.check(Command.WORK)
    machine.check(Command.CLEAR)
    with pytest.raises(BadState):  # allowed by its rule, but no step leads anywhere
        machine.enter(Command.LOOK)
    with pytest.raises(InternalError), machine.action("Unknown", 0):
        pass
    assert TABLE.rule_of(Command.INIT) == Rule(frozenset({State.CLEAR}), excludes=ALL)


async def test_stop_flag() -> None:
    machine = Machine(TABLE, State.READY)
    with machine.stop_flag(StopMode.GRACEFUL):
        machine.check_force()
        with pytest.raises(Stopping):
            machine.check(Command.WORK)
        machine.check(Command.LOOK)
        with pytest.raises(Stopping), machine.stop_flag(StopMode.FORCE):
            pass
        assert machine.stopping is StopMode.GRACEFUL  # the refused second stop did not touch it
    machine.check(Command.WORK)
    with machine.stop_flag(StopMode.FORCE), pytest.raises(ForceStopped):
        machine.check_force()


async def test_actions_are_counted_and_waited_for() -> None:
    machine = Machine(TABLE, State.READY)
    with machine.action("Work", 7), machine.action("Work", 8):
        assert machine.running("Work") == 2
        assert not machine.at_rest
        waiting = asyncio.ensure_future(machine.wait_for(lambda: machine.at_rest, timeout_s=10, what="rest"))
        with pytest.raises(TimedOut):
            await machine.wait_for(lambda: machine.at_rest, timeout_s=0.01, what="rest")
        assert not waiting.done()
    await waiting
    assert machine.actions["Work"].began == 8
