"""Names and numbers that scripts use: kinds of servers, states, actions, sets of states, limits of waiting.

Source: docs/controller.md, "Names". A state is what `get_state` returns; passing states mean that a command is
at work.
"""

from __future__ import annotations

from typing import Final

from walbd import units
from walbd.protocol.base import Kind

TIMEOUT_SEC: Final = 86400  # of waits, where nothing else is said [s]
SHORT_TIMEOUT_SEC: Final = 100  # of waits for things that are quick [s]
STEP_TIMEOUT_SEC: Final = 10  # of a change of state that follows a command [s]

Mebi: Final = 1 << 20
Lbs: Final = units.LB  # bytes in a logical block
UINT64_MAX: Final = units.UINT64_MAX

BASE_VOLUME_PREFIX: Final = "wb_"
RESTORED_VOLUME_PREFIX: Final = "wr_"
COLD_VOLUME_PREFIX: Final = "wc_"

DatetimeFormatPretty: Final = "%Y-%m-%dT%H:%M:%S"
DatetimeFormatDigits: Final = "%Y%m%d%H%M%S"

# Kinds of servers

K_STORAGE: Final = 0
K_PROXY: Final = 1
K_ARCHIVE: Final = 2
serverKinds: Final = (K_STORAGE, K_PROXY, K_ARCHIVE)
KIND_OF: Final = {K_STORAGE: Kind.STORAGE, K_PROXY: Kind.PROXY, K_ARCHIVE: Kind.ARCHIVE}

# Compression of wdiffs

CMPR_NONE: Final = 0
CMPR_SNAPPY: Final = 1
CMPR_GZIP: Final = 2
CMPR_LZMA: Final = 3
CMPR_LZ4: Final = 4
CMPR_ZSTD: Final = 5
COMPRESS_NAMES: Final = {
    CMPR_NONE: "none",
    CMPR_SNAPPY: "snappy",
    CMPR_GZIP: "gzip",
    CMPR_LZMA: "lzma",
    CMPR_LZ4: "lz4",
    CMPR_ZSTD: "zstd",
}

# A volume whose record cannot be read; its commands are refused with the reason
BROKEN: Final = "Broken"

# Storage: steady states, passing states, actions

sClear: Final = "Clear"
sSyncReady: Final = "SyncReady"
sStopped: Final = "Stopped"
sTarget: Final = "Target"
sStandby: Final = "Standby"

stInitVol: Final = "InitVol"
stClearVol: Final = "ClearVol"
stStartStandby: Final = "StartStandby"
stStopStandby: Final = "StopStandby"
stFullSync: Final = "FullSync"
stHashSync: Final = "HashSync"
stStartTarget: Final = "StartTarget"
stStopTarget: Final = "StopTarget"
stReset: Final = "Reset"

saWlogSend: Final = "WlogSend"
saWlogRemove: Final = "WlogRemove"

# Proxy

pClear: Final = "Clear"
pStopped: Final = "Stopped"
pStarted: Final = "Started"

ptStart: Final = "Start"
ptStop: Final = "Stop"
ptClearVol: Final = "ClearVol"
ptAddArchiveInfo: Final = "AddArchiveInfo"
ptDeleteArchiveInfo: Final = "DeleteArchiveInfo"
ptWlogRecv: Final = "WlogRecv"
ptWaitForEmpty: Final = "WaitForEmpty"

# Archive

aClear: Final = "Clear"
aSyncReady: Final = "SyncReady"
aArchived: Final = "Archived"
aStopped: Final = "Stopped"

atInitVol: Final = "InitVol"
atClearVol: Final = "ClearVol"
atResetVol: Final = "ResetVol"
atResync: Final = "Resync"
atFullSync: Final = "FullSync"
atHashSync: Final = "HashSync"
atWdiffRecv: Final = "WdiffRecv"
atReplSync: Final = "ReplSyncAsServer"
atStop: Final = "Stop"
atStart: Final = "Start"

aaMerge: Final = "Merge"
aaApply: Final = "Apply"
aaRestore: Final = "Restore"
aaReplSync: Final = "ReplSyncAsClient"
aaResize: Final = "Resize"
aaScan: Final = "Scan"  # bhash and virt-full-scan
aaScrub: Final = "Scrub"
aActions: Final = (aaMerge, aaApply, aaRestore, aaReplSync, aaResize, aaScan, aaScrub)

# Sets of states

pActive: Final = (pStarted, ptWlogRecv)
pDuringStop: Final = (pStarted, ptWlogRecv, ptStop, ptWaitForEmpty)
aActive: Final = (aArchived, atWdiffRecv, atHashSync, atReplSync)
aDuringStop: Final = (*aActive, atStop)
aDuringReplicate: Final = (atReplSync, atFullSync, atResync)
aDuringFullSync: Final = (atFullSync,)
aDuringHashSync: Final = (atHashSync,)
aAcceptForResize: Final = (*aActive, aStopped, aSyncReady)
aAcceptForClearVol: Final = (aStopped, aSyncReady)
sDuringFullSync: Final = (stFullSync, sStopped, stStartTarget)
sDuringHashSync: Final = (stHashSync, sStopped, stStartTarget)
sDuringStopForTarget: Final = (sTarget, stStopTarget)
sDuringStopForStandby: Final = (sStandby, stStopStandby)
