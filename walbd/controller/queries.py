"""Questions that change nothing. Source: docs/controller.md, "Questions"."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections import defaultdict
from collections.abc import Sequence
from typing import cast

from walbd.controller.base import Base, check_all
from walbd.controller.constants import (
    K_ARCHIVE,
    K_PROXY,
    K_STORAGE,
    SHORT_TIMEOUT_SEC,
    TIMEOUT_SEC,
    UINT64_MAX,
    aActions,
)
from walbd.controller.data import (
    Diff,
    GidInfo,
    MetaState,
    Snapshot,
    SyncOpt,
    create_compress_opt_from_str,
    from_unix,
)
from walbd.controller.overview import Overview, make_overview
from walbd.controller.overview_text import overview_lines
from walbd.controller.replies import ts_delta_dict
from walbd.controller.servers import Server, ServerParams, server_kind_to_str, verify_server_kind
from walbd.controller.verify import verify_gid_range, verify_timeout, verify_type, verify_u64, verify_volume
from walbd.controller.waiting import list_waiting
from walbd.errors import BadState, NotFound, UsageError, WalbError, WlogOverflow
from walbd.format import meta
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobInfo

Action = tuple[int, dt.datetime | None]  # how many run, and when the last began


class Queries(Base):
    """Questions; see `Controller`."""

    # Servers

    def get_host_type(self, s: Server, quietErr: bool = False) -> str:
        """Return storage, proxy or archive: the question by which one sees whether a server lives."""
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        return str(self.ask(s, c.GetHostType()).kind)

    def get_alive_server(self) -> list[str]:
        """Return the names of the servers in the layout that answer."""
        replies = self.ask_each(self.sLayout.get_all(), c.GetHostType())
        return [s.name for s, reply in replies.items() if not isinstance(reply, WalbError)]

    def get_version(self, s: Server) -> c.VersionInfo:
        """Return what runs at a server."""
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        return self.ask(s, c.GetVersion())

    def overview(self, vol: str = "", timeoutS: float = 0) -> Overview:
        """Look at all servers of the layout at once and judge what is seen; servers may be down."""
        if vol:
            verify_volume(vol)
        replies = _only(vol, self.ask_each(self.sLayout.get_all(), c.GetStatus(), timeoutS))
        jobs = self.ask_each([s for s, r in replies.items() if not isinstance(r, WalbError)], GetJobs(volume=vol))
        return make_overview(replies, jobs, vol, self.sLayout)

    def status(
        self,
        sL: Server | Sequence[Server] | None = None,
        vol: str | None = None,
        timeoutS: float = SHORT_TIMEOUT_SEC,
    ) -> None:
        """Print the state of the given servers (one, several, or all), of one volume or all."""
        verify_timeout(timeoutS)
        if vol is not None:
            verify_volume(vol)
        servers = self._servers(sL)
        replies = _only(vol or "", self.ask_each(servers, c.GetStatus(), timeoutS))
        for line in overview_lines(make_overview(replies, {}, vol or "", self.sLayout)):
            self.put(line)

    def get_jobs(self, s: Server, vol: str = "") -> list[JobInfo]:
        """Return the jobs that run or ran at a server, newest last."""
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        if vol:
            verify_volume(vol)
        return self.ask(s, GetJobs(volume=vol)).jobs

    # Volumes at any server

    def get_state_all(self, vol: str, sL: Sequence[Server] | None = None) -> None:
        """Print `name address:port kind state` for each server; `err` where it cannot be asked."""
        verify_volume(vol)
        for s, reply in self.ask_each(self._servers(sL), c.GetState(volume=vol)).items():
            state = "err" if isinstance(reply, WalbError) else reply.value
            self.put(f"{s.name} {s.get_host_port()} {server_kind_to_str(s.kind)} {state}")

    def verify_state(self, s: Server, vol: str, state: str) -> None:
        """Raise BadState unless the volume is in that state."""
        verify_type(state, str)
        self._verify_state_in(s, vol, [state])

    def get_vol_list(self, s: Server) -> list[str]:
        """Return the volumes that a server knows."""
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        return self.ask(s, c.GetVolumes()).names

    def get_num_action(self, s: Server, vol: str, action: str) -> int:
        """Return how many actions of a name run for a volume."""
        self._check(s, vol)
        verify_type(action, str)
        return self.ask(s, c.GetNumAction(volume=vol, action=action)).value

    def get_all_actions(self, ax: Server) -> dict[str, dict[str, Action]]:
        """Return, by volume and action, how many run and when the last began; (0, None) for one that never ran."""
        verify_server_kind(ax, (K_STORAGE, K_PROXY, K_ARCHIVE))
        known: dict[str, dict[str, Action]] = {}
        for volume, action, count, began in self.ask(ax, c.GetActions()).rows:
            actions = known.setdefault(volume, defaultdict(_never))
            actions[action] = (count, from_unix(began))
        if ax.kind == K_ARCHIVE:
            for actions in known.values():
                for name in aActions:
                    actions.setdefault(name, _never())
        return known

    def get_vol_dict_without_running_actions(self, ax: Server) -> dict[str, dict[str, dt.datetime | None]]:
        """Return, for the volumes at which nothing runs, when each action last began."""
        return {
            vol: {name: began for name, (_, began) in actions.items()}
            for vol, actions in self.get_all_actions(ax).items()
            if not any(count for count, _ in actions.values())
        }

    def get_uuid(self, s: Server, vol: str) -> str:
        """Return the uuid of the log (storage), or of the log that the history continues (archive)."""
        self._check(s, vol, K_STORAGE, K_ARCHIVE)
        return self.ask(s, c.GetUuid(volume=vol)).value.hex()

    def get_latest_snapshot_info(self, ax: Server, vol: str | None = None) -> dict[str, int]:
        """Return the generation of the newest snapshot of one volume, or of all that have one."""
        verify_server_kind(ax, (K_STORAGE, K_ARCHIVE))
        if vol is not None:
            verify_volume(vol)
        return {row[0]: row[2] for row in self.ask(ax, c.GetLatestSnap(volume=vol or "")).rows}

    def get_ts_delta(self, s: Server) -> list[dict[str, str | int]]:
        """Return how far the primary archive is behind a storage, or replicas behind an archive, by volume.

        As it was last compared there.
        """
        verify_server_kind(s, (K_STORAGE, K_ARCHIVE))
        return [ts_delta_dict(s.kind, row) for row in self.ask(s, c.GetTsDelta()).rows]

    # Storage

    def is_overflow(self, sx: Server, vol: str) -> bool:
        """Say whether the log of a volume has overflowed: then only a backup can continue its history."""
        self._check(sx, vol, K_STORAGE)
        return self.ask(sx, c.GetIsOverflow(volume=vol)).value

    def verify_not_overflow(self, sx: Server, vol: str) -> None:
        """Raise WlogOverflow when the log has overflowed."""
        if self.is_overflow(sx, vol):
            raise WlogOverflow(
                "the log of the volume has overflowed",
                hint="stop the volume and take a full or hash backup",
                server=sx.name,
                volume=vol,
            )

    def get_log_usage(self, sx: Server, vol: str) -> c.LogUsage:
        """Return how full the log of a volume is [physical block]."""
        self._check(sx, vol, K_STORAGE)
        rows = self.ask(sx, c.GetLogUsage(volume=vol)).rows
        if not rows:
            raise NotFound("the server does not tell the log usage", server=sx.name, volume=vol)
        return rows[0]

    # Proxy

    def is_wdiff_send_error(self, px: Server, vol: str, ax: Server) -> bool:
        """Say whether an archive has refused the volume's diffs for a reason that needs a person."""
        self._check(px, vol, K_PROXY)
        verify_server_kind(ax, (K_ARCHIVE,))
        return self.ask(px, c.GetIsWdiffSendError(volume=vol, archive=ax.name)).value

    def get_archive_info_list(self, px: Server, vol: str) -> list[str]:
        """Return the names of the archives to which a proxy sends a volume."""
        self._check(px, vol, K_PROXY)
        return self.ask(px, c.ListArchiveInfo(volume=vol)).names

    def get_archive_info(self, px: Server, vol: str, ax: Server) -> tuple[str, SyncOpt]:
        """Return `host:port` and how the proxy sends there; sizes of merges and bulks are not known to it."""
        self._check(px, vol, K_PROXY)
        verify_server_kind(ax, (K_ARCHIVE,))
        info = self.ask(px, c.GetArchiveInfo(volume=vol, archive=ax.name))
        return info.address, SyncOpt(create_compress_opt_from_str(info.compress), info.delay_s)

    def is_synchronizing(self, ax: Server, vol: str) -> bool:
        """Say whether all proxies of the layout send the volume to an archive; False when none does.

        Raises BadState when only some do, ConnectError when a proxy does not answer.
        """
        feeding, others = self._feeding(ax, vol)
        if feeding and others:
            raise BadState(
                "only some proxies send the volume to the archive",
                hint="use start_synchronizing or stop_synchronizing",
                volume=vol,
                archive=ax.name,
                sending=", ".join(p.name for p in feeding),
                others=", ".join(p.name for p in others),
            )
        return bool(feeding)

    def get_proxy_diff_list(self, px: Server, vol: str, ax: Server | None = None) -> list[Diff]:
        """Return the diffs that wait at a proxy for an archive, or not yet for any."""
        self._check(px, vol, K_PROXY)
        name = ax.name if ax is not None else ""
        return [Diff.of(diff) for diff in self._list_waiting([px], vol, name)[px]]

    def _list_waiting(self, pxL: Sequence[Server], vol: str, archive: str) -> dict[Server, list[meta.Diff]]:
        """Return what waits at proxies for an archive ("": not yet for any). Raises when one cannot be asked."""
        found = list_waiting(self.calls, [(px, vol, archive) for px in pxL], self.timeoutS)
        replies = dict(zip(pxL, found, strict=True))
        check_all(replies)
        return cast("dict[Server, list[meta.Diff]]", replies)

    # Archive

    def get_vol_size_lb(self, ax: Server, vol: str) -> int:
        """Return the size of the base image [logical block]."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GetVolSize(volume=vol)).value

    def get_progress_lb(self, ax: Server, vol: str) -> int:
        """Return how far a running copy is [logical block]; 0: none runs."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GetProgress(volume=vol)).value

    def monitor_progress(self, ax: Server, vol: str, timeoutS: float = TIMEOUT_SEC) -> None:
        """Print each second which part of a copy is done, until none runs."""
        verify_timeout(timeoutS)
        deadline = self.calls.now() + timeoutS
        while (done_lb := self.get_progress_lb(ax, vol)) and self.calls.now() < deadline:
            size_lb = self.get_vol_size_lb(ax, vol)
            self.put(f"{done_lb / size_lb:.3f}" if size_lb else str(done_lb))
            self.calls.sleep(1)

    def get_archive_uuid(self, ax: Server, vol: str) -> str:
        """Return the uuid of the lineage of images: equal at replicas."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GetArchiveUuid(volume=vol)).value.hex()

    def exists_base_image(self, ax: Server, vol: str) -> bool:
        """Say whether there is a base image."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GetExistsBaseImage(volume=vol)).value

    def get_base(self, ax: Server, vol: str) -> MetaState:
        """Return the state of the base image."""
        self._check(ax, vol, K_ARCHIVE)
        return MetaState.of(self.ask(ax, c.GetBase(volume=vol)).base)

    def get_diff_list(self, ax: Server, vol: str, gid0: int = 0, gid1: int = UINT64_MAX) -> list[Diff]:
        """Return the diffs that begin at a generation from gid0 up to, but not including, gid1."""
        self._check(ax, vol, K_ARCHIVE)
        verify_gid_range(gid0, gid1, "bad range of diffs")
        return [Diff.of(diff) for diff in self.ask(ax, c.GetDiff(volume=vol, gid_b=gid0, gid_e=gid1)).diffs]

    def print_diff_list(self, ax: Server, vol: str, gid0: int = 0, gid1: int = UINT64_MAX) -> None:
        """Print what `get_diff_list` returns."""
        self._put_all(self.get_diff_list(ax, vol, gid0, gid1))

    def get_applicable_diff_list(self, ax: Server, vol: str, gid: int = UINT64_MAX) -> list[Diff]:
        """Return the diffs that lead from the base to a generation."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        return [Diff.of(diff) for diff in self.ask(ax, c.GetApplicableDiff(volume=vol, gid=gid)).diffs]

    def print_applicable_diff_list(self, ax: Server, vol: str, gid: int = UINT64_MAX) -> None:
        """Print what `get_applicable_diff_list` returns."""
        self._put_all(self.get_applicable_diff_list(ax, vol, gid))

    def get_num_diff(self, ax: Server, vol: str, gid0: int = 0, gid1: int = UINT64_MAX) -> int:
        """Return how many diffs `get_diff_list` would list."""
        self._check(ax, vol, K_ARCHIVE)
        verify_gid_range(gid0, gid1, "bad range of diffs")
        return self.ask(ax, m.GetNumDiff(volume=vol, gid_b=gid0, gid_e=gid1)).value

    def get_total_diff_size(self, ax: Server, vol: str, gid0: int = 0, gid1: int = UINT64_MAX) -> int:
        """Return the size of these diffs [byte]."""
        self._check(ax, vol, K_ARCHIVE)
        verify_gid_range(gid0, gid1, "bad range of diffs")
        return self.ask(ax, m.GetTotalDiffSize(volume=vol, gid_b=gid0, gid_e=gid1)).value

    def exists_diff(self, ax: Server, vol: str, gidB: int, gidE: int) -> bool:
        """Say whether there is a clean diff from exactly gidB to exactly gidE."""
        self._check(ax, vol, K_ARCHIVE)
        diff = Diff(Snapshot(gidB, gidB), Snapshot(gidE, gidE))
        return self.ask(ax, m.GetExistsDiff(volume=vol, diff=diff.to_meta())).value

    def get_restorable(self, ax: Server, vol: str, opt: str = "") -> list[GidInfo]:
        """Return the explicit restore points and the latest one, ascending; with opt 'all' every one.

        Empty while the volume is not active at the archive.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_type(opt, str)
        if opt not in ("", "all"):
            raise UsageError("unknown option", hint="use 'all' or nothing", opt=opt)
        reply = self.ask(ax, c.GetRestorable(volume=vol, all_points=opt == "all"))
        return [GidInfo.of(point) for point in reply.points]

    def get_restorable_gid(self, ax: Server, vol: str, opt: str = "") -> list[int]:
        """Return the generations of `get_restorable`."""
        return [info.gid for info in self.get_restorable(ax, vol, opt)]

    def print_restorable(self, ax: Server, vol: str, opt: str = "") -> None:
        """Print what `get_restorable` returns."""
        self._put_all(self.get_restorable(ax, vol, opt))

    def get_restored(self, ax: Server, vol: str) -> list[int]:
        """Return the generations of which there is a restored image."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, c.GetRestored(volume=vol)).gids

    def get_restored_path(self, ax: Server, vol: str, gid: int) -> str:
        """Return where a restored image is, on the archive's host."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        return self.ask(ax, c.GetRestoredPath(volume=vol, gid=gid)).value

    def get_meta_snap(self, ax: Server, vol: str, gid: int | None = None) -> Snapshot:
        """Return the snapshot that the diffs up to `gid` (None: all) lead to."""
        self._check(ax, vol, K_ARCHIVE)
        return Snapshot.of(self.ask(ax, c.GetMetaSnap(volume=vol, gid=_gid(gid))).snapshot)

    def get_meta_state(self, ax: Server, vol: str, isApplying: bool, gid: int | None = None) -> MetaState:
        """Return the state of the base after an apply up to `gid` (None: all), or while it would run."""
        self._check(ax, vol, K_ARCHIVE)
        verify_type(isApplying, bool)
        return MetaState.of(self.ask(ax, c.GetMetaState(volume=vol, applying=isApplying, gid=_gid(gid))).base)

    def get_latest_clean_snapshot(self, ax: Server, vol: str) -> int:
        """Return the last generation that can be restored; raises NotFound when there is none."""
        gids = self.get_restorable_gid(ax, vol)
        if not gids:
            raise NotFound(
                "nothing can be restored", hint="is the volume active there?", server=ax.name, volume=vol
            )
        return gids[-1]

    # Inner parts

    def _servers(self, sL: Server | Sequence[Server] | None) -> list[Server]:
        if sL is None:
            return self.sLayout.get_all()
        servers = [sL] if isinstance(sL, ServerParams) else list(sL)
        verify_type(servers, list, ServerParams)
        return servers

    def _verify_state_in(self, s: Server, vol: str, states: Sequence[str], hint: str = "") -> str:
        """Return the state if it is one of `states`; raises BadState."""
        state = self.get_state(s, vol)
        require_state(s, vol, state, states, hint)
        return state

    def _feeding(self, ax: Server, vol: str) -> tuple[list[Server], list[Server]]:
        """Return the proxies that send a volume to an archive, and the others."""
        self._check(ax, vol, K_ARCHIVE)
        self.sLayout.verify(0, 1, 0)
        replies = self.ask_all(self.sLayout.proxyL, c.ListArchiveInfo(volume=vol))
        feeding = [p for p, reply in replies.items() if ax.name in reply.names]
        return feeding, [p for p in replies if p not in feeding]

    def _states(self, sL: Sequence[Server], vol: str) -> dict[Server, str]:
        """Return the state of a volume at several servers; raises when one does not answer."""
        replies = self.ask_each(sL, c.GetState(volume=vol))
        check_all(replies)
        return {s: reply.value for s, reply in replies.items() if not isinstance(reply, WalbError)}

    def _put_all(self, rows: Sequence[object]) -> None:
        for row in rows:
            self.put(str(row))


def require_state(s: Server, vol: str, state: str, states: Sequence[str], hint: str = "") -> None:
    """Raise BadState unless `state` is one of `states`."""
    if state not in states:
        raise BadState(
            "the volume is not in a state in which this can be done",
            hint=hint,
            server=s.name,
            volume=vol,
            state=state,
            expected=" or ".join(states),
        )


def _only(vol: str, replies: dict[Server, c.StatusReply | WalbError]) -> dict[Server, c.StatusReply | WalbError]:
    """Leave out other volumes than `vol`, unless it is empty."""
    if not vol:
        return replies
    return {
        s: r
        if isinstance(r, WalbError)
        else dataclasses.replace(r, volumes=[v for v in r.volumes if v.volume == vol])
        for s, r in replies.items()
    }


def _gid(gid: int | None) -> int:
    if gid is None:
        return UINT64_MAX
    verify_u64(gid)
    return gid


def _never() -> Action:
    return 0, None
