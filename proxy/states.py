"""The states of a volume at a proxy, as one table (docs/proxy.md, States).

Nothing about the state is written to disk. A volume without a directory is Clear; one with a directory is
Stopped when the daemon has read it, and is then started (unless `start_stopped`). What is on disk is the same
in Stopped and Started: the record, the wdiffs just received, and those that each archive has still to get.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from walbd.daemon.states import Rule, StateTable, Step

WDIFF_SEND: Final = "WdiffSend"  # the one action: wdiffs are being sent, counted over all archives

# Names of the passing states
ADDING: Final = "AddArchiveInfo"
DELETING: Final = "DeleteArchiveInfo"
CLEARING: Final = "ClearVol"
STARTING: Final = "Start"
STOPPING: Final = "Stop"
EMPTYING: Final = "WaitForEmpty"
RECEIVING: Final = "WlogRecv"


class State(StrEnum):
    """The steady states."""

    CLEAR = "Clear"
    STOPPED = "Stopped"
    STARTED = "Started"
    BROKEN = "Broken"


class Command(StrEnum):
    """Everything that can be asked of a volume, by the name that operators know."""

    ADD_ARCHIVE = "archive-info add"
    UPDATE_ARCHIVE = "archive-info update"
    DELETE_ARCHIVE = "archive-info delete"
    DELETE_LAST_ARCHIVE = "archive-info delete (the last one)"
    CLEAR_VOL = "clear-vol"
    START = "start"
    STOP = "stop"
    STOP_EMPTY = "stop empty"
    RECEIVE = "wlog-transfer"
    SEND = "wdiff-transfer"
    RESIZE = "resize"
    KICK = "kick"
    GET_LATEST_SNAP = "get latest-snap"
    GET_SEND_ERROR = "get is-wdiff-send-error"


_KNOWN: Final = frozenset({State.STOPPED, State.STARTED})
_STARTED: Final = frozenset({State.STARTED})
_AT_WORK: Final = frozenset({RECEIVING, EMPTYING})  # steps beside which sending goes on

TABLE: Final = StateTable[State, Command](
    name="proxy",
    meanings={
        State.CLEAR: "not known here; nothing is on disk",
        State.STOPPED: "has archives; wlogs are refused, wdiffs wait",
        State.STARTED: "wlogs are taken in, wdiffs are sent",
        State.BROKEN: "its directory cannot be read; everything but clear-vol is refused with the reason",
    },
    steps={
        (State.CLEAR, Command.ADD_ARCHIVE): Step(ADDING, State.STOPPED),
        (State.STOPPED, Command.ADD_ARCHIVE): Step(ADDING, State.STOPPED),
        (State.STOPPED, Command.UPDATE_ARCHIVE): Step(ADDING, State.STOPPED),
        (State.STOPPED, Command.DELETE_ARCHIVE): Step(DELETING, State.STOPPED),
        (State.STOPPED, Command.DELETE_LAST_ARCHIVE): Step(DELETING, State.CLEAR),
        (State.STOPPED, Command.CLEAR_VOL): Step(CLEARING, State.CLEAR),
        (State.BROKEN, Command.CLEAR_VOL): Step(CLEARING, State.CLEAR),
        (State.STOPPED, Command.START): Step(STARTING, State.STARTED),
        (State.STARTED, Command.STOP): Step(STOPPING, State.STOPPED),
        (State.STARTED, Command.STOP_EMPTY): Step(EMPTYING, State.STOPPED),
        (State.STARTED, Command.RECEIVE): Step(RECEIVING, State.STARTED),
    },
    rules={
        # A stop is accepted while a wlog comes in, and waits for its end. The stop flag is set by then, so that
        # nothing new begins; a second stop is refused by the flag itself.
        Command.STOP: Rule(_STARTED, while_stopping=True, while_moving=True, during=_AT_WORK),
        Command.STOP_EMPTY: Rule(_STARTED, while_stopping=True, while_moving=True, during=_AT_WORK),
        Command.RECEIVE: Rule(_STARTED),  # sending goes on meanwhile
        Command.SEND: Rule(_STARTED, while_stopping=True, while_moving=True, during=_AT_WORK),
        Command.RESIZE: Rule(frozenset({State.STOPPED}), excludes=frozenset({WDIFF_SEND})),
        Command.KICK: Rule(_STARTED, while_stopping=True, while_moving=True),
        Command.GET_LATEST_SNAP: Rule(_KNOWN, while_stopping=True, while_moving=True),
        Command.GET_SEND_ERROR: Rule(_KNOWN, while_stopping=True, while_moving=True),
    },
    actions=(WDIFF_SEND,),
)


async def nothing_to_save(_: State) -> None:
    """States of a proxy are not written to disk."""
