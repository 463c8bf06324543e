"""The archive's state table: what is allowed when, written a second time, and every refusal over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import PROXY, STORAGE, ArchiveRig, Feed
from walbd.archive.states import ACTIONS, TABLE, Command, State
from walbd.archive.volume import Volume
from walbd.daemon.states import Machine, Step, StopMode
from walbd.errors import BadState, Busy, CorruptData, RemoteError, Stopping
from walbd.format.meta import BaseState, Snapshot
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.codec import Request
from walbd.protocol.transfer import FullBackupOffer

# command | states (active: Archived and the ADDING ones) | excluded actions | refused while stopping
RULES = """
init-vol            | Clear                              | all                                             | yes
clear-vol           | SyncReady Stopped Broken           | all                                             | yes
reset-vol           | SyncReady Stopped                  | all                                             | yes
start               | Stopped                            | all                                             | yes
stop                | active                             |                                                 | no
restore             | active                             | Restore Resize Apply                            | yes
del-restored        | active Stopped                     | Restore Resize                                  | yes
del-cold            | active Stopped                     | Restore Resize                                  | yes
replicate           | active                             | Restore ReplSyncAsClient Apply Merge Resize     | yes
apply               | active                             | Restore ReplSyncAsClient Apply Merge Resize Scan | yes
merge               | active                             | Apply Merge Resize                              | yes
resize              | active SyncReady Stopped           | Restore ReplSyncAsClient Apply Resize           | yes
enable-snapshot     | active                             | Apply Merge                                     | no
disable-snapshot    | active                             | Apply Merge                                     | no
gc-diff             | active Stopped                     | all                                             | no
bhash               | active                             | Apply                                           | yes
virt-full-scan      | active                             | Apply                                           | yes
scrub               | active Stopped                     | Scrub                                           | yes
dbg-reload-metadata | Stopped                            | all                                             | yes
dbg-set-uuid        | Stopped                            | all                                             | yes
dbg-set-state       | Stopped                            | all                                             | yes
dbg-set-base        | Stopped                            | all                                             | yes
full-backup         | SyncReady                          | all                                             | yes
hash-backup         | Archived                           | Merge Apply Restore ReplSyncAsClient Resize     | yes
wdiff-transfer      | Archived                           |                                                 | yes
replicate-full      | SyncReady                          | all                                             | yes
replicate-resync    | SyncReady Archived                 | all                                             | yes
replicate-round     | Archived                           |                                                 | yes
get-num-action      | SyncReady Archived Stopped passing |                                                 | no
get-restored        | active Stopped                     |                                                 | no
get-restorable      | active                             |                                                 | yes
get-uuid            | active                             |                                                 | no
get-base            | active                             |                                                 | no
get-latest-snap     | active Stopped                     |                                                 | no
"""
ADDING = {"HashSync", "WdiffRecv", "ReplSyncAsServer"}
TRANSITIONS = """
Clear InitVol SyncReady; SyncReady ClearVol Clear; Stopped ClearVol Clear; Broken ClearVol Clear;
SyncReady ResetVol SyncReady; Stopped ResetVol SyncReady; SyncReady FullSync Archived; SyncReady Resync Archived;
Archived HashSync Archived; Archived WdiffRecv Archived; Archived ReplSyncAsServer Archived; Archived Stop Stopped;
Stopped Start Archived; Stopped Repair Stopped; Archived Resync Archived
"""


@dataclass(frozen=True)
class Situation:
    """Where a volume can be."""

    state: State
    during: str | None = None
    action: str = ""
    stopping: StopMode | None = None

    @property
    def shown(self) -> str:
        return self.during or str(self.state)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.shown, self.action, self.stopping and f"stop-{self.stopping}"]))


def situations() -> list[Situation]:
    """Every state, passing state, and in the states with data every action and a stop."""
    steady = [Situation(state) for state in State]
    passing = {(state, step.during): Situation(state, step.during) for (state, _), step in TABLE.steps.items()}
    found = [*steady, *passing.values()]
    for state in (State.SYNC_READY, State.ARCHIVED, State.STOPPED):
        found += [Situation(state, action=action) for action in ACTIONS]
    found += [Situation(State.ARCHIVED, stopping=mode) for mode in (StopMode.GRACEFUL, StopMode.FORCE)]
    found += [Situation(State.ARCHIVED, "WdiffRecv", stopping=StopMode.GRACEFUL)]
    return found


def rules() -> dict[Command, tuple[set[str], set[str], bool]]:
    found = {}
    for line in RULES.strip().splitlines():
        command, states, actions, stopping = (cell.strip() for cell in line.split("|"))
        found[Command(command)] = (set(states.split()), set(actions.split()), stopping == "yes")
    return found


def is_allowed(command: Command, at: Situation) -> bool:
    """The rule as the document says it."""
    states, actions, refused_while_stopping = rules()[command]
    if at.stopping and refused_while_stopping:
        return False
    if at.action and (at.action in actions or "all" in actions):
        return False
    if at.during is None:
        return str(at.state) in states or (at.state is State.ARCHIVED and "active" in states)
    if "passing" in states:
        return str(at.state) in states  # Clear and Broken: there is nothing to count
    return at.during in ADDING and "active" in states


@contextmanager
def placed(machine: Machine[State, Command], at: Situation) -> Iterator[None]:
    """Put a machine into a situation for a while."""
    before = machine.state
    with ExitStack() as stack:
        machine.state = at.state
        if at.action:
            stack.enter_context(machine.action(at.action, 5))
        if at.stopping:
            stack.enter_context(machine.stop_flag(at.stopping))
        machine.during = at.during
        try:
            yield
        finally:
            machine.during = None
            machine.state = before


def test_every_command_has_a_rule_here_and_there() -> None:
    assert rules().keys() == set(Command)


def test_transitions() -> None:
    wanted = {tuple(line.split()) for line in TRANSITIONS.replace("\n", " ").split(";")}
    assert {(str(state), step.during, str(step.to)) for (state, _), step in TABLE.steps.items()} == wanted


@pytest.mark.parametrize("at", situations(), ids=str)
def test_table_against_the_document(at: Situation) -> None:
    machine = Machine(TABLE, State.CLEAR)
    for command in Command:
        with placed(machine, at):
            allowed = True
            try:
                machine.check(command)
            except (BadState, Busy, Stopping):
                allowed = False
            assert allowed is is_allowed(command, at), command
            step = TABLE.steps.get((at.state, command))
            if allowed and at.during is None and step is not None:
                assert machine.enter(command) == Step(step.during, step.to)
                machine.leave()


def requests(volume: str) -> dict[Command, Request[Any]]:
    """One request for each command that is served, with arguments that are otherwise right."""
    return {
        Command.INIT_VOL: c.ArchiveInitVol(volume=volume),
        Command.CLEAR_VOL: c.ClearVol(volume=volume),
        Command.RESET_VOL: c.ResetVol(volume=volume),
        Command.START: c.Start(volume=volume),
        Command.STOP: c.Stop(volume=volume),
        Command.RESTORE: c.Restore(volume=volume, gid=2),
        Command.DEL_RESTORED: c.DelRestored(volume=volume, gid=1),
        Command.APPLY: c.Apply(volume=volume, gid=2),
        Command.MERGE: m.Merge(volume=volume, gid_b=0, gid_e=2),
        Command.RESIZE: c.Resize(volume=volume, size_b=1 << 20),
        Command.ENABLE_SNAPSHOT: m.EnableSnapshot(volume=volume, gids=[1]),
        Command.DISABLE_SNAPSHOT: m.DisableSnapshot(volume=volume, gids=[1]),
        Command.DEL_COLD: m.DelCold(volume=volume, gid=1),
        Command.BHASH: m.BlockHash(volume=volume, gid=2),
        Command.VIRT_FULL_SCAN: m.VirtFullScan(volume=volume, gid=2),
        Command.SCRUB: m.Scrub(volume=volume),
        Command.DBG_RELOAD_METADATA: m.DbgReloadMetadata(volume=volume),
        Command.DBG_SET_UUID: m.DbgSetUuid(volume=volume, uuid=b"u" * 16),
        Command.DBG_SET_STATE: m.DbgSetState(volume=volume, state="Stopped"),
        Command.DBG_SET_BASE: m.DbgSetBase(volume=volume, base=BaseState(Snapshot.clean(1))),
        Command.GC_DIFF: c.GcDiff(volume=volume),
        Command.FULL_BACKUP: FullBackupOffer(volume=volume, size_lb=64, started=1, bulk_b=4096),
        Command.GET_ACTIONS: c.GetNumAction(volume=volume, action="Apply"),
        Command.GET_RESTORED: c.GetRestored(volume=volume),
        Command.GET_UUID: c.GetUuid(volume=volume),
        Command.GET_BASE: c.GetBase(volume=volume),
        Command.GET_LATEST_SNAP: c.GetLatestSnap(volume=volume),
    }


def contents(base: Path) -> dict[str, bytes]:
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


async def refusal(rig: ArchiveRig, request: Request[Any]) -> str:
    """Return the code with which a request is refused, with a hint; empty if it is not."""
    me = STORAGE if isinstance(request, FullBackupOffer) else PROXY
    try:
        await rig.call(request, me)
    except RemoteError as exc:
        return exc.remote_code
    return ""


async def test_every_refusal_over_the_wire_changes_nothing(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(2)
        await rig.done(c.Restore(volume="vol0", gid=1))
        before = contents(tmp_path)
        volume = rig.volume("vol0")
        count = 0
        for command, request in requests("vol0").items():
            for at in situations():
                if is_allowed(command, at):
                    continue
                with placed(volume.machine, at):
                    volume.error = (
                        CorruptData("damaged", hint="h", path="p", offset=0) if at.state is State.BROKEN else None
                    )
                    code = await refusal(rig, request)
                volume.error = None
                expected = {"stopping"} if at.stopping else {"bad-state", "busy"}
                assert code in expected, f"{command} at {at}: {code!r}"
                count += 1
        assert count > 300
        assert contents(tmp_path) == before


async def test_unknown_volumes_are_refused_and_stay_unknown(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        for command, request in requests("nobody").items():
            if command is not Command.INIT_VOL:
                assert await refusal(rig, request) == "bad-state", command
        assert rig.server.volumes == {}
        assert contents(tmp_path) == {".lock": b""}


async def test_refusals_have_a_hint(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        await rig.call(c.ArchiveInitVol(volume="vol0"))
        with pytest.raises(RemoteError) as caught:
            await rig.call(c.Restore(volume="vol0", gid=1))
        assert caught.value.hint == "allowed in: Archived"
        rig.volume("vol0").set_broken(CorruptData("the record is damaged", hint="mend it", path="x", offset=0))
        with pytest.raises(RemoteError, match="the volume is broken: the record is damaged") as caught:
            await rig.call(c.Restore(volume="vol0", gid=1))
        assert caught.value.hint == "mend it"


async def test_second_stop_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        volume: Volume = rig.volume("vol0")
        with volume.machine.action("Restore", 1):
            first = (await rig.call(c.Stop(volume="vol0"))).job
            with pytest.raises(RemoteError, match="already going on"):
                await rig.call(c.Stop(volume="vol0", how=c.StopHow.FORCE))
            assert volume.machine.stopping is StopMode.GRACEFUL
            assert (await rig.status("vol0")).stopping == "graceful"
        assert (await rig.ended(first)).state == "done"
        assert await rig.state("vol0") == "Stopped"


@pytest.mark.parametrize(
    "request_",
    [
        c.Stop(volume="vol0", how=c.StopHow.EMPTY),
        c.Start(volume="vol0", role=c.Role.TARGET),
        c.ResetVol(volume="vol0", gid=7),
        c.GetNumAction(volume="vol0", action="Frobnicate"),
        c.GetDiff(volume="vol0", gid_b=3, gid_e=3),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_arguments_that_archives_do_not_take(tmp_path: Path, request_: Request[Any]) -> None:
    async with ArchiveRig(tmp_path) as rig:
        await rig.call(c.ArchiveInitVol(volume="vol0"))
        with pytest.raises(RemoteError) as caught:
            await rig.call(request_)
        assert caught.value.remote_code == "usage"
        assert caught.value.hint or request_.TAG == "get-diff"
