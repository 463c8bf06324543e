"""The state table of a storage: every command in every state, as the documentation has it, over the wire too."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.storage_rig import DEVICE, VOL, Rig
from walbd.daemon.states import Machine, StopMode
from walbd.errors import BadState, Busy, Refused, RemoteError, Stopping
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    ClearVol,
    FullBackup,
    GetIsOverflow,
    GetLatestSnap,
    GetLogUsage,
    GetUuid,
    ResetVol,
    Resize,
    Role,
    Start,
    Stop,
    StopHow,
    StorageInitVol,
    TakeSnapshot,
)
from walbd.protocol.maintenance import DumpLogHeader
from walbd.storage.states import TABLE, WLOG_REMOVE, WLOG_SEND, Command, State

# docs/storage.md, "States": in which steady states a command is allowed.
ALLOWED = {
    Command.INIT_VOL: "Clear",
    Command.CLEAR_VOL: "SyncReady Broken",
    Command.RESET_VOL: "Stopped",
    Command.START_TARGET: "Stopped",
    Command.START_STANDBY: "SyncReady",
    Command.STOP: "Target Standby",
    Command.STOP_BEGINNING: "SyncReady Stopped",
    Command.GIVE_UP: "Target",
    Command.FULL_BACKUP: "SyncReady",
    Command.HASH_BACKUP: "SyncReady",
    Command.RESIZE: "SyncReady Stopped Target Standby",
    Command.SNAPSHOT: "Stopped Target",
    Command.GET_DEVICE: "SyncReady Stopped Target Standby",
    Command.GET_UUID: "SyncReady Stopped Target Standby",
    Command.GET_LATEST_SNAP: "Target",
    Command.DUMP_HEADER: "SyncReady Stopped Target Standby",
}
WHILE_MOVING = {Command.STOP_BEGINNING, Command.GET_DEVICE, Command.GET_UUID, Command.DUMP_HEADER}
WHILE_STOPPING = {
    Command.STOP,
    Command.STOP_BEGINNING,
    Command.GET_DEVICE,
    Command.GET_UUID,
    Command.GET_LATEST_SNAP,
    Command.DUMP_HEADER,
}
NOT_DURING = {("Reset", Command.STOP_BEGINNING), ("StopTarget", Command.STOP_BEGINNING)}
BESIDE_A_TRANSFER = {
    Command.STOP,
    Command.STOP_BEGINNING,
    Command.RESIZE,
    Command.SNAPSHOT,
    Command.GET_DEVICE,
    Command.GET_UUID,
    Command.GET_LATEST_SNAP,
    Command.DUMP_HEADER,
}
LEADS_TO = {
    ("Clear", Command.INIT_VOL): ("InitVol", "SyncReady"),
    ("SyncReady", Command.CLEAR_VOL): ("ClearVol", "Clear"),
    ("Broken", Command.CLEAR_VOL): ("ClearVol", "Clear"),
    ("SyncReady", Command.START_STANDBY): ("StartStandby", "Standby"),
    ("Standby", Command.STOP): ("StopStandby", "SyncReady"),
    ("SyncReady", Command.FULL_BACKUP): ("FullSync", "Target"),
    ("SyncReady", Command.HASH_BACKUP): ("HashSync", "Target"),
    ("Stopped", Command.RESET_VOL): ("Reset", "SyncReady"),
    ("Stopped", Command.START_TARGET): ("StartTarget", "Target"),
    ("Target", Command.STOP): ("StopTarget", "Stopped"),
    ("Target", Command.GIVE_UP): ("StopTarget", "Stopped"),
}


def allows(command: Command, machine: Machine[State, Command]) -> bool:
    try:
        machine.check(command)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", State)
def test_every_pair(state: State, command: Command) -> None:
    allowed = str(state) in ALLOWED[command].split()
    assert allows(command, Machine(TABLE, state)) is allowed

    for during in ("FullSync", "StartTarget", "StopTarget", "Reset"):
        moving = Machine(TABLE, state, during=during)
        passes = command in WHILE_MOVING and (during, command) not in NOT_DURING
        assert allows(command, moving) is (allowed and passes)

    stopping = Machine(TABLE, state, stopping=StopMode.GRACEFUL)
    assert allows(command, stopping) is (allowed and command in WHILE_STOPPING)

    for action in (WLOG_SEND, WLOG_REMOVE):
        busy = Machine(TABLE, state)
        with busy.action(action, 0):
            assert allows(command, busy) is (allowed and command in BESIDE_A_TRANSFER)

    step = TABLE.steps.get((state, command))
    assert (step and (step.during, str(step.to))) == LEADS_TO.get((str(state), command))


def test_every_state_has_a_meaning_and_every_step_its_rule() -> None:
    assert set(TABLE.meanings) == set(State)
    for state, command in TABLE.steps:
        assert state in TABLE.rule_of(command).states


REQUESTS: dict[Command, Request[Any]] = {
    Command.INIT_VOL: StorageInitVol(volume=VOL, device=DEVICE),
    Command.CLEAR_VOL: ClearVol(volume=VOL),
    Command.RESET_VOL: ResetVol(volume=VOL),
    Command.START_TARGET: Start(volume=VOL, role=Role.TARGET),
    Command.START_STANDBY: Start(volume=VOL, role=Role.STANDBY),
    Command.STOP: Stop(volume=VOL),
    Command.FULL_BACKUP: FullBackup(volume=VOL),
    Command.RESIZE: Resize(volume=VOL, size_b=0),
    Command.SNAPSHOT: TakeSnapshot(volume=VOL),
    Command.GET_DEVICE: GetIsOverflow(volume=VOL),
    Command.DUMP_HEADER: DumpLogHeader(volume=VOL, lsid=0),
    Command.GET_UUID: GetUuid(volume=VOL),
    Command.GET_LATEST_SNAP: GetLatestSnap(volume=VOL),
}


async def bring_to(rig: Rig, state: State) -> None:
    """Bring the volume to a state as an operator would."""
    if state is State.CLEAR:
        return
    await rig.init()
    if state is State.STANDBY:
        await rig.start_volume(Role.STANDBY)
    if state in (State.TARGET, State.STOPPED):
        await rig.full_backup()
        await rig.until_delivered()
    if state is State.STOPPED:
        await rig.stop_volume()
    if state is State.BROKEN:
        (rig.base_dir / VOL / "volume.json").write_text("{}")
        await rig.restart()


def snapshot_of_disk(rig: Rig) -> dict[str, bytes]:
    return {
        str(path.relative_to(rig.base_dir)): path.read_bytes()
        for path in sorted(rig.base_dir.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("state", State)
async def test_refused_requests_change_nothing(tmp_path: Path, state: State) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await bring_to(rig, state)
        assert await rig.state() == state
        before, uuid = snapshot_of_disk(rig), rig.device.uuid
        for command, request in REQUESTS.items():
            if str(state) in ALLOWED[command].split():
                continue
            with pytest.raises(RemoteError) as caught:
                await rig.call(request)
            assert caught.value.remote_code == BadState.code, command
            assert caught.value.hint, command
            assert await rig.state() == state
        assert snapshot_of_disk(rig) == before
        assert rig.device.uuid == uuid
        assert not rig.archive.offers or state in (State.TARGET, State.STOPPED)


@pytest.mark.parametrize("state", [State.SYNC_READY, State.STOPPED, State.TARGET, State.STANDBY])
@pytest.mark.parametrize("how", ["moving", "stopping"])
async def test_busy_volumes_refuse(tmp_path: Path, state: State, how: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await bring_to(rig, state)
        before = snapshot_of_disk(rig)
        machine = rig.server.volumes[VOL].machine
        with ExitStack() as stack:
            if how == "moving":
                machine.during = "Something"
                stack.callback(machine.leave)
            else:
                stack.enter_context(machine.stop_flag(StopMode.GRACEFUL))
            for command, request in REQUESTS.items():
                passes = WHILE_MOVING if how == "moving" else WHILE_STOPPING - {Command.STOP}
                if command in passes:
                    continue
                with pytest.raises(RemoteError) as caught:
                    await rig.call(request)
                assert caught.value.remote_code in (Busy.code, Stopping.code, BadState.code), command
            await asyncio.sleep(0)
        assert snapshot_of_disk(rig) == before


async def test_stop_modes(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        with pytest.raises(RemoteError) as caught:
            await rig.call(Stop(volume=VOL, how=StopHow.EMPTY))
        assert caught.value.remote_code == "usage"
        with pytest.raises(RemoteError) as caught:
            await rig.call(Start(volume=VOL))
        assert caught.value.remote_code == "usage"


async def test_log_usage_of_one_and_of_all(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        assert (await rig.call(GetLogUsage())).rows == []
        with pytest.raises(RemoteError):
            await rig.call(GetLogUsage(volume=VOL))
        await rig.init()
        rig.device.write(0, bytes(512))
        rows = (await rig.call(GetLogUsage())).rows
        assert [(row.volume, row.usage_pb, row.capacity_pb) for row in rows] == [(VOL, 2, 4096)]
        rig.device.go_down()
        assert (await rig.call(GetLogUsage())).rows == []
        with pytest.raises(RemoteError) as caught:
            await rig.call(GetLogUsage(volume=VOL))
        assert caught.value.remote_code == "connect"
