"""The states of a volume at an archive, as one table (docs/archive.md, "States").

Four steady states are on disk; a passing one is shown while its step is at work, and a crash then leads back to
the steady state it began in. `Broken` is found at start-up only and never stored.

*Active* means Archived, also while data is being added to the end of the chain (ADDING): what reads the image or
the chain is allowed then. Everything else waits for the step to end.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from walbd.daemon.states import ALL, Rule, StateTable, Step


class State(StrEnum):
    """The steady states."""

    CLEAR = "Clear"
    SYNC_READY = "SyncReady"
    ARCHIVED = "Archived"
    STOPPED = "Stopped"
    BROKEN = "Broken"


class Command(StrEnum):
    """What can be asked of a volume."""

    INIT_VOL = "init-vol"
    CLEAR_VOL = "clear-vol"
    RESET_VOL = "reset-vol"
    START = "start"
    STOP = "stop"
    RESTORE = "restore"
    DEL_RESTORED = "del-restored"
    DEL_COLD = "del-cold"
    REPLICATE = "replicate"  # as the source
    APPLY = "apply"
    MERGE = "merge"
    RESIZE = "resize"
    ENABLE_SNAPSHOT = "enable-snapshot"
    DISABLE_SNAPSHOT = "disable-snapshot"
    GC_DIFF = "gc-diff"
    BHASH = "bhash"
    VIRT_FULL_SCAN = "virt-full-scan"
    SCRUB = "scrub"
    DBG_RELOAD_METADATA = "dbg-reload-metadata"
    DBG_SET_UUID = "dbg-set-uuid"
    DBG_SET_STATE = "dbg-set-state"
    DBG_SET_BASE = "dbg-set-base"
    FULL_BACKUP = "full-backup"
    HASH_BACKUP = "hash-backup"
    WDIFF_TRANSFER = "wdiff-transfer"
    REPL_FULL = "replicate-full"  # as the destination, as the next two
    REPL_RESYNC = "replicate-resync"
    REPL_ROUND = "replicate-round"
    GET_ACTIONS = "get-num-action"
    GET_RESTORED = "get-restored"
    GET_RESTORABLE = "get-restorable"
    GET_UUID = "get-uuid"
    GET_BASE = "get-base"
    GET_LATEST_SNAP = "get-latest-snap"


APPLY: Final = "Apply"
MERGE: Final = "Merge"
RESTORE: Final = "Restore"
REPLICATE: Final = "ReplSyncAsClient"
RESIZE: Final = "Resize"
SCAN: Final = "Scan"  # bhash and virt-full-scan: they read the base image
SCRUB: Final = "Scrub"  # reads everything, and bears that anything changes meanwhile
ACTIONS: Final = (MERGE, APPLY, RESTORE, REPLICATE, RESIZE, SCAN, SCRUB)
READING: Final = frozenset({SCAN, SCRUB})  # they do not mind that data is added

# Passing states by name, where code asks for them.
FULL_SYNC: Final = "FullSync"
HASH_SYNC: Final = "HashSync"
WDIFF_RECV: Final = "WdiffRecv"
REPL_SYNC: Final = "ReplSyncAsServer"
START: Final = "Start"
ADDING: Final = frozenset({HASH_SYNC, WDIFF_RECV, REPL_SYNC})
REPAIR: Final = "Repair"

_ARCHIVED: Final = frozenset({State.ARCHIVED})
_HOLDING: Final = frozenset({State.ARCHIVED, State.STOPPED})
_KNOWN: Final = frozenset({State.SYNC_READY, State.ARCHIVED, State.STOPPED})


def _active(*excludes: str, while_stopping: bool = False) -> Rule:
    """Allowed in Archived, and while data is being added."""
    return Rule(
        frozenset(_ARCHIVED),
        excludes=frozenset(excludes),
        while_stopping=while_stopping,
        while_moving=True,
        during=ADDING,
    )


def _holding(*excludes: str, while_stopping: bool = False) -> Rule:
    """The same, and in Stopped."""
    return Rule(
        frozenset(_HOLDING),
        excludes=frozenset(excludes),
        while_stopping=while_stopping,
        while_moving=True,
        during=ADDING,
    )


TABLE: Final[StateTable[State, Command]] = StateTable(
    name="archive",
    meanings={
        State.CLEAR: "nothing is known of the volume; it has no directory",
        State.SYNC_READY: "initialised: a full backup or a full replication may begin. There are no diffs; a base "
        "image may be there, but nothing is known of its contents",
        State.ARCHIVED: "base image and diffs can be restored, and diffs are taken",
        State.STOPPED: "the same data, and nothing is added to it or changed",
        State.BROKEN: "found at start-up: the record or the files contradict each other. Nothing on disk is "
        "touched; everything but clear-vol is refused with the reason",
    },
    steps={
        (State.CLEAR, Command.INIT_VOL): Step("InitVol", State.SYNC_READY),
        (State.SYNC_READY, Command.CLEAR_VOL): Step("ClearVol", State.CLEAR),
        (State.STOPPED, Command.CLEAR_VOL): Step("ClearVol", State.CLEAR),
        (State.BROKEN, Command.CLEAR_VOL): Step("ClearVol", State.CLEAR),
        (State.SYNC_READY, Command.RESET_VOL): Step("ResetVol", State.SYNC_READY),
        (State.STOPPED, Command.RESET_VOL): Step("ResetVol", State.SYNC_READY),
        (State.SYNC_READY, Command.FULL_BACKUP): Step(FULL_SYNC, State.ARCHIVED),
        (State.SYNC_READY, Command.REPL_FULL): Step(FULL_SYNC, State.ARCHIVED),
        (State.SYNC_READY, Command.REPL_RESYNC): Step("Resync", State.ARCHIVED),
        # First the record says SyncReady: a resync that fails leaves that.
        (State.ARCHIVED, Command.REPL_RESYNC): Step("Resync", State.ARCHIVED),
        (State.ARCHIVED, Command.HASH_BACKUP): Step(HASH_SYNC, State.ARCHIVED),
        (State.ARCHIVED, Command.WDIFF_TRANSFER): Step(WDIFF_RECV, State.ARCHIVED),
        (State.ARCHIVED, Command.REPL_ROUND): Step(REPL_SYNC, State.ARCHIVED),
        (State.ARCHIVED, Command.STOP): Step("Stop", State.STOPPED),
        (State.STOPPED, Command.START): Step(START, State.ARCHIVED),
        (State.STOPPED, Command.DBG_RELOAD_METADATA): Step(REPAIR, State.STOPPED),
        (State.STOPPED, Command.DBG_SET_UUID): Step(REPAIR, State.STOPPED),
        (State.STOPPED, Command.DBG_SET_BASE): Step(REPAIR, State.STOPPED),
        # Which state it ends in is what the command says.
        (State.STOPPED, Command.DBG_SET_STATE): Step(REPAIR, State.STOPPED),
    },
    rules={
        # A second stop is refused by the flag of the first; the step itself comes while the flag is set.
        Command.STOP: _active(while_stopping=True),
        Command.RESTORE: _active(RESTORE, RESIZE, APPLY),
        Command.DEL_RESTORED: _holding(RESTORE, RESIZE),
        Command.DEL_COLD: _holding(RESTORE, RESIZE),
        Command.REPLICATE: _active(RESTORE, REPLICATE, APPLY, MERGE, RESIZE),
        Command.APPLY: _active(RESTORE, REPLICATE, APPLY, MERGE, RESIZE, SCAN),
        Command.MERGE: _active(APPLY, MERGE, RESIZE),
        Command.RESIZE: Rule(
            frozenset(_KNOWN),
            excludes=frozenset({RESTORE, REPLICATE, APPLY, RESIZE}),
            while_moving=True,
            during=ADDING,
        ),
        Command.ENABLE_SNAPSHOT: _active(APPLY, MERGE, while_stopping=True),
        Command.DISABLE_SNAPSHOT: _active(APPLY, MERGE, while_stopping=True),
        Command.GC_DIFF: Rule(
            frozenset(_HOLDING), excludes=ALL, while_stopping=True, while_moving=True, during=ADDING
        ),
        Command.BHASH: _active(APPLY),
        Command.VIRT_FULL_SCAN: _active(APPLY),
        Command.SCRUB: _holding(SCRUB),
        Command.HASH_BACKUP: Rule(frozenset(_ARCHIVED), excludes=frozenset(ACTIONS) - READING),
        Command.REPL_ROUND: Rule(frozenset(_ARCHIVED)),  # a round that compares keeps applies out by a Scan
        Command.WDIFF_TRANSFER: Rule(frozenset(_ARCHIVED)),
        Command.GET_ACTIONS: Rule(frozenset(_KNOWN), while_stopping=True, while_moving=True),
        Command.GET_RESTORED: _holding(while_stopping=True),
        Command.GET_RESTORABLE: _active(),
        Command.GET_UUID: _active(while_stopping=True),
        Command.GET_BASE: _active(while_stopping=True),
        Command.GET_LATEST_SNAP: _holding(while_stopping=True),
    },
    actions=ACTIONS,
)
