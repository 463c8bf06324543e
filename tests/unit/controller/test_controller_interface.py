"""Names of methods and arguments are an interface: scripts that were written for walb-tools use them."""

from __future__ import annotations

import inspect

import pytest

import walbd.controller as library
from walbd.controller import Controller, Device, ServerLayout, get_server_args, get_server_params
from walbd.controller.constants import TIMEOUT_SEC

METHODS = """
set_server_layout(sLayout)
run_ctl(s, cmdArgs, putMsg, timeoutS, quietErr)
run_remote_command(s, args, putMsg, timeoutS)
get_run_remote_command(s)
get_host_type(s, quietErr)
get_alive_server()
get_state(s, vol)
get_state_all(vol, sL)
verify_state(s, vol, state)
get_vol_list(s)
get_vol_size_lb(ax, vol)
get_progress_lb(ax, vol)
get_base(ax, vol)
get_diff_list(ax, vol, gid0, gid1)
print_diff_list(ax, vol, gid0, gid1)
get_applicable_diff_list(ax, vol, gid)
print_applicable_diff_list(ax, vol, gid)
get_num_diff(ax, vol, gid0, gid1)
get_total_diff_size(ax, vol, gid0, gid1)
exists_diff(ax, vol, gidB, gidE)
get_num_action(s, vol, action)
get_all_actions(ax)
get_vol_dict_without_running_actions(ax)
is_overflow(sx, vol)
verify_not_overflow(sx, vol)
is_wdiff_send_error(px, vol, ax)
get_uuid(s, vol)
get_archive_uuid(ax, vol)
status(sL, vol, timeoutS)
get_archive_info_list(px, vol)
get_archive_info(px, vol, ax)
is_synchronizing(ax, vol)
get_restorable(ax, vol, opt)
get_restorable_gid(ax, vol, opt)
print_restorable(ax, vol, opt)
get_restored(ax, vol)
get_cold(ax, vol)
get_restored_path(ax, vol, gid)
get_meta_snap(ax, vol, gid)
get_meta_state(ax, vol, isApplying, gid)
get_latest_clean_snapshot(ax, vol)
get_latest_snapshot_info(ax, vol)
get_block_hash(ax, vol, gid, bulkSizeU, scanSizeU)
monitor_progress(ax, vol, timeoutS)
init_storage(sx, vol, wdevPath)
clear(s, vol)
reset(s, vol, timeoutS)
start(s, vol)
stop_nbk(s, vol, mode)
wait_for_stopped(s, vol, prevSt)
stop(s, vol, mode)
go_standby(sx, vol)
shutdown(s, mode)
shutdown_list(sL, mode)
shutdown_all(mode)
set_full_scan_bps(sx, throughputU)
add_archive_to_proxy(px, vol, ax, doStart, syncOpt)
del_archive_from_proxy(px, vol, ax, stopEmpty)
update_archive_info(px, vol, ax, syncOpt)
copy_archive_info(pSrc, vol, pDst)
start_synchronizing(ax, vol, syncOpt)
stop_synchronizing(ax, vol)
synchronize(aSrc, vol, aDst, timeoutS, syncOpt)
kick_all(sL)
kick_storage_all()
kick_proxy(vol, ax)
full_backup(sx, vol, timeoutS, block, bulkSizeU, syncOpt)
hash_backup(sx, vol, timeoutS, block, bulkSizeU, syncOpt)
snapshot_nbk(sx, vol)
snapshot(sx, vol, axL, timeoutS)
wait_for_restorable(ax, vol, gid, timeoutS)
verify_not_restorable(ax, vol, gid, waitS, msg)
restore(ax, vol, gid, timeoutS)
wait_for_restored(ax, vol, gid, timeoutS)
del_restored(ax, vol, gid)
del_cold(ax, vol, gid)
disable_snapshot(ax, vol, gidL)
enable_snapshot(ax, vol, gidL)
apply(ax, vol, gid, timeoutS)
merge(ax, vol, gidB, gidE, timeoutS)
replicate_once_nbk(aSrc, vol, aDst, doResync, dontMerge, syncOpt, gid)
wait_for_replicated(aSrc, vol, aDst, gid, timeoutS)
replicate_once(aSrc, vol, aDst, timeoutS, doResync, dontMerge, syncOpt, gid)
replicate(aSrc, vol, aDst, synchronizing, timeoutS, doResync, dontMerge, syncOpt)
resize_archive(ax, vol, sizeMb, doZeroClear)
resize_storage(sx, vol, sizeMb)
resize(vol, sizeMb, doZeroClear)
gc_diff(ax, vol)
"""


def arguments(function: object) -> list[str]:
    """The names of a function's arguments, without self."""
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize("line", METHODS.strip().splitlines())
def test_methods_have_their_arguments(line: str) -> None:
    name, _, rest = line.removesuffix(")").partition("(")
    wanted = rest.split(", ") if rest else []
    method = getattr(Controller, name)
    found = arguments(method)
    assert found[: len(wanted)] == wanted
    more = list(inspect.signature(method).parameters.values())[1 + len(wanted) :]
    assert all(param.default is not param.empty for param in more), "what was added must not be needed"


def test_other_callables_have_their_arguments() -> None:
    options = ["useRepeater", "maxFgTasks", "maxBgTasks"]
    assert arguments(get_server_params) == ["s", "sLayout", "isDebug", *options, "maxConn", "timeoutS"]
    assert arguments(get_server_args) == ["s", "sLayout", "isDebug", *options]
    assert arguments(Device)[:5] == ["name", "ldev", "ddev", "wdevcPath", "runCommand"]
    assert arguments(Device.create)[:8] == ["maxl", "maxp", "minp", "qp", "fs", "fp", "bp", "bi"]
    assert arguments(ServerLayout.replace) == ["storageL", "proxyL", "archiveL"]
    assert TIMEOUT_SEC == 86400


def test_everything_that_is_named_is_there() -> None:
    assert [name for name in library.__all__ if not hasattr(library, name)] == []
    assert len(set(library.__all__)) == len(library.__all__)
