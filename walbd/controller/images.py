"""Snapshots, and restoring them. Source: docs/controller.md, "Snapshots and images"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from walbd.controller import constants as k
from walbd.controller.backup import Backup
from walbd.controller.constants import K_ARCHIVE, K_STORAGE, SHORT_TIMEOUT_SEC, TIMEOUT_SEC
from walbd.controller.queries import require_state
from walbd.controller.servers import Server, ServerParams, verify_server_kind
from walbd.controller.verify import verify_timeout, verify_type, verify_u64
from walbd.errors import AlreadyExists, ConnectError, NotFound, Refused, TimedOut, WalbError
from walbd.protocol import control as c
from walbd.protocol.base import JobInfo, Ok
from walbd.protocol.codec import Request

_DEL_TRIES: Final = 3
_WHY_PATIENCE_S: Final = 2.0  # with servers that are asked only for what may be in the way


class Images(Backup):
    """Snapshots and images; see `Controller`."""

    def snapshot_nbk(self, sx: Server, vol: str) -> int:
        """Take a snapshot and return its generation. Needs Target or Stopped, and no overflow."""
        self._check(sx, vol, K_STORAGE)
        return self.ask(sx, c.TakeSnapshot(volume=vol)).gid

    def snapshot(self, sx: Server, vol: str, axL: Sequence[Server], timeoutS: float = TIMEOUT_SEC) -> int:
        """Take a snapshot, and return its generation when each of the archives can restore it.

        The volume must be Target and each archive active: checked before the snapshot is taken. `timeoutS`
        counts anew for each archive.
        """
        self._check(sx, vol, K_STORAGE)
        verify_type(axL, (list, tuple), ServerParams)
        verify_timeout(timeoutS)
        for ax in axL:
            verify_server_kind(ax, (K_ARCHIVE,))
        states = self._states([sx, *axL], vol)
        require_state(sx, vol, states[sx], [k.sTarget], f"start it first: walbc start {sx.name} {vol}")
        for ax in axL:
            require_state(ax, vol, states[ax], k.aActive)
        gid = self.snapshot_nbk(sx, vol)
        for ax in axL:
            self._wait_for_restorable(ax, vol, gid, timeoutS, sx)
        return gid

    def wait_for_restorable(self, ax: Server, vol: str, gid: int, timeoutS: float = TIMEOUT_SEC) -> None:
        """Wait until an explicit restore point has reached an archive."""
        self._wait_for_restorable(ax, vol, gid, timeoutS, None)

    def _wait_for_restorable(self, ax: Server, vol: str, gid: int, timeoutS: float, sx: Server | None) -> None:
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        self.wait_until(
            f"generation {gid} to be restorable at {ax.name}",
            lambda: True if gid in self.get_restorable_gid(ax, vol) else None,
            timeoutS,
            s=ax,
            vol=vol,
            why=lambda: self._in_the_way(vol, sx),
        )

    def verify_not_restorable(self, ax: Server, vol: str, gid: int, waitS: float, msg: str) -> None:
        """Raise Refused with `msg` if a generation becomes restorable within `waitS`.

        An archive that cannot be asked counts as one at which it is not restorable.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(waitS)
        verify_type(msg, str)
        try:
            self.wait_for_restorable(ax, vol, gid, waitS)
        except WalbError:
            return
        raise Refused(f"{msg}: the generation is restorable", server=ax.name, volume=vol, gid=gid)

    def restore(self, ax: Server, vol: str, gid: int, timeoutS: float = TIMEOUT_SEC) -> None:
        """Make a writable image of a generation, and return when it is there; `get_restored_path` says where.

        Raises AlreadyExists when there is one, or the archive's refusal.
        """
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        if gid in self.get_restored(ax, vol):
            raise AlreadyExists(
                "the generation is restored already",
                hint=f"use it, or remove it first: walbc del-restored {vol} {gid} --archive {ax.name}",
                server=ax.name,
                volume=vol,
                gid=gid,
            )
        self._restores[ax.name, vol, gid] = self.ask(ax, c.Restore(volume=vol, gid=gid)).job
        self.wait_for_restored(ax, vol, gid, timeoutS)

    def wait_for_restored(self, ax: Server, vol: str, gid: int, timeoutS: float = TIMEOUT_SEC) -> None:
        """Wait until a restore that was begun has ended; raises its error when it failed."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_timeout(timeoutS)
        job = self._restores.pop((ax.name, vol, gid), None)
        if job is not None:
            self._wait_for_action(ax, vol, job, k.aaRestore, "restore", timeoutS)
        else:
            self._wait_for_no_action(ax, vol, k.aaRestore, timeoutS)
        gids = self.wait_until("the list of images", lambda: self.get_restored(ax, vol), timeoutS, s=ax, vol=vol)
        if gid not in gids:
            raise NotFound(
                "the restore has ended without an image",
                hint="the log of the archive says why",
                server=ax.name,
                volume=vol,
                gid=gid,
            )

    def del_restored(self, ax: Server, vol: str, gid: int) -> None:
        """Remove a restored image; up to three tries, one second apart. One that is gone meanwhile is fine."""
        self._del_image(ax, vol, gid, c.DelRestored(volume=vol, gid=gid), self.get_restored)

    # Inner parts

    def _in_the_way(self, vol: str, sx: Server | None) -> str:
        """Say what may keep log from the archives, as the storage and the proxies tell it; or nothing."""
        found = []
        servers = [*([sx] if sx is not None else []), *self.sLayout.proxyL]
        replies = self.ask_each(servers, c.GetStatus(volume=vol), _WHY_PATIENCE_S)
        for s, reply in replies.items():
            if isinstance(reply, ConnectError | TimedOut):
                found.append(f"{s.name} does not answer")
            elif isinstance(reply, c.StatusReply):
                found += [f"{s.name}: {v.state}" for v in reply.volumes if v.state == k.pStopped]
                found += [
                    f"{s.name}: {hop.dest} {hop.error_text or 'refuses'}"
                    for v in reply.volumes
                    for hop in v.hops
                    if hop.error
                ]
                if reply.proxies and not any(proxy.available for proxy in reply.proxies):
                    found.append(f"{s.name} reaches no proxy")
        return "; ".join(found)

    def _wait_for_no_action(self, ax: Server, vol: str, action: str, timeoutS: float) -> None:
        self.wait_until(
            f"{action} to end at {ax.name}",
            lambda: True if self.get_num_action(ax, vol, action) == 0 else None,
            timeoutS,
            s=ax,
            vol=vol,
        )

    def _wait_for_action(
        self, ax: Server, vol: str, job: int, action: str, what: str, timeoutS: float
    ) -> JobInfo | None:
        """Wait for the end of a job; when the archive has forgotten it, until no such action runs."""
        ended = self.wait_for_job(ax, job, timeoutS, vol=vol, what=what)
        if ended is None:
            self._wait_for_no_action(ax, vol, action, timeoutS)
        return ended

    def _del_image(
        self,
        ax: Server,
        vol: str,
        gid: int,
        request: Request[Ok],
        list_images: Callable[[Server, str], list[int]],
    ) -> None:
        """Remove an image that `list_images` lists, and wait until it does so no more."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        if gid not in list_images(ax, vol):
            raise NotFound("there is no such image", server=ax.name, volume=vol, gid=gid)

        def is_gone() -> bool:
            try:
                return gid not in list_images(ax, vol)
            except (ConnectError, TimedOut):
                return False

        for tries in range(_DEL_TRIES):
            try:
                self.ask(ax, request)
                break
            except NotFound:
                break
            except WalbError:
                if is_gone():
                    break
                if tries + 1 == _DEL_TRIES:
                    raise
                self.calls.sleep(1)
        self.wait_until(
            f"image {gid} to be removed",
            lambda: True if gid not in list_images(ax, vol) else None,
            SHORT_TIMEOUT_SEC,
            s=ax,
            vol=vol,
        )
