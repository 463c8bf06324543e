"""The states of a volume at a storage daemon, as one table. Source: docs/storage.md, "States"."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from walbd.daemon.states import ALL, Rule, StateTable, Step


class State(StrEnum):
    """Where a volume rests."""

    CLEAR = "Clear"
    SYNC_READY = "SyncReady"
    STOPPED = "Stopped"
    TARGET = "Target"
    STANDBY = "Standby"
    BROKEN = "Broken"


class Command(StrEnum):
    """What moves a volume, or asks something of it."""

    INIT_VOL = "init-vol"
    CLEAR_VOL = "clear-vol"
    RESET_VOL = "reset-vol"
    START_TARGET = "start target"
    START_STANDBY = "start standby"
    STOP = "stop"
    STOP_BEGINNING = "stop (while it starts or is backed up)"
    GIVE_UP = "give up (the log is lost)"
    FULL_BACKUP = "full-backup"
    HASH_BACKUP = "hash-backup"
    RESIZE = "resize"
    SNAPSHOT = "snapshot"
    GET_DEVICE = "get is-overflow, log-usage"
    GET_UUID = "get uuid"
    GET_LATEST_SNAP = "get latest-snap"
    DUMP_HEADER = "dbg-dump-logpack-header"


WLOG_SEND: Final = "WlogSend"  # log is being sent to a proxy
WLOG_REMOVE: Final = "WlogRemove"  # log of a Standby volume is being erased

FULL_SYNC: Final = "FullSync"
HASH_SYNC: Final = "HashSync"
SYNCS: Final = frozenset({FULL_SYNC, HASH_SYNC})  # passing states in which the log is sent
BEGINNINGS: Final = SYNCS | {"StartTarget", "StartStandby"}  # passing states that a stop may wait for

_KNOWN: Final = frozenset({State.SYNC_READY, State.STOPPED, State.TARGET, State.STANDBY})

TABLE: Final = StateTable[State, Command](
    name="storage",
    meanings={
        State.CLEAR: "not known here; nothing is on disk",
        State.SYNC_READY: "initialised; the log does not matter; a backup or standby may begin",
        State.STOPPED: "the history goes on, the log piles up in the ring, nothing is sent",
        State.TARGET: "log is sent to a proxy and then erased",
        State.STANDBY: "log is erased unsent: another storage is the target",
        State.BROKEN: "the record on disk cannot be used; never written to disk",
    },
    steps={
        (State.CLEAR, Command.INIT_VOL): Step("InitVol", State.SYNC_READY),
        (State.SYNC_READY, Command.CLEAR_VOL): Step("ClearVol", State.CLEAR),
        (State.BROKEN, Command.CLEAR_VOL): Step("ClearVol", State.CLEAR),
        (State.STOPPED, Command.RESET_VOL): Step("Reset", State.SYNC_READY),
        (State.SYNC_READY, Command.START_STANDBY): Step("StartStandby", State.STANDBY),
        (State.STOPPED, Command.START_TARGET): Step("StartTarget", State.TARGET),
        (State.STANDBY, Command.STOP): Step("StopStandby", State.SYNC_READY),
        (State.TARGET, Command.STOP): Step("StopTarget", State.STOPPED),
        (State.TARGET, Command.GIVE_UP): Step("StopTarget", State.STOPPED),
        (State.SYNC_READY, Command.FULL_BACKUP): Step(FULL_SYNC, State.TARGET),
        (State.SYNC_READY, Command.HASH_BACKUP): Step(HASH_SYNC, State.TARGET),
    },
    rules={
        # A stop is checked when it is asked for, and enters its step later under its own stop flag. A second one
        # is refused by the flag, but for a forced one after a graceful one.
        Command.STOP: Rule(frozenset({State.TARGET, State.STANDBY}), while_stopping=True),
        # A stop during a step that leads to Target or Standby waits for it, or (force) ends the backup.
        Command.STOP_BEGINNING: Rule(
            frozenset({State.SYNC_READY, State.STOPPED}),
            while_stopping=True,
            while_moving=True,
            during=BEGINNINGS,
        ),
        Command.GIVE_UP: Rule(frozenset({State.TARGET}), excludes=ALL),
        Command.RESIZE: Rule(_KNOWN),
        Command.SNAPSHOT: Rule(frozenset({State.STOPPED, State.TARGET})),
        Command.GET_DEVICE: Rule(_KNOWN, while_stopping=True, while_moving=True),
        Command.GET_UUID: Rule(_KNOWN, while_stopping=True, while_moving=True),
        Command.DUMP_HEADER: Rule(_KNOWN, while_stopping=True, while_moving=True),
        Command.GET_LATEST_SNAP: Rule(frozenset({State.TARGET}), while_stopping=True),
    },
    actions=(WLOG_SEND, WLOG_REMOVE),
)
