"""Sending wdiffs to archives: one keyed task per volume and archive, and what each answer leads to.

Nothing is deleted before the archive has acknowledged it, or has said that it never needs it. Attempts never
end: their delay grows up to a cap. The error flag says that waiting alone does not help; it is tried slowly all
the same, as the cause may be removed at the archive. Source: docs/proxy.md, Sending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import structlog

from walbd.daemon.conn import Connection, Me, dial
from walbd.daemon.env import Env
from walbd.daemon.logs import error_fields
from walbd.daemon.net import parse_address
from walbd.daemon.scheduler import ASK_AGAIN_S, Again
from walbd.daemon.wdiff_send import send_wdiff
from walbd.errors import (
    ConnectError,
    CorruptData,
    DiskFailed,
    ForceStopped,
    Refused,
    RemoteError,
    TimedOut,
    WalbError,
)
from walbd.format.compress import CompressOpt
from walbd.format.wdiff_merge import merge
from walbd.protocol.base import Kind
from walbd.protocol.transfer import Verdict, WdiffOffer, WdiffVerdict
from walbd.proxy.config import ProxyConfig
from walbd.proxy.probe import Prober
from walbd.proxy.states import WDIFF_SEND
from walbd.proxy.volume import MENDS, Hop, Selection, Volume

log = structlog.get_logger()

NEVER_NEEDED: Final = frozenset({Verdict.DIFFERENT_UUID, Verdict.TOO_OLD})
NEEDS_PERSON: Final = {
    Verdict.SMALLER: "the image at the archive is smaller than the volume: grow it there (resize)",
    Verdict.NOT_FOUND: "the archive does not know the volume: make it known there, or delete the archive here",
}
NOT_YET: Final = {
    Verdict.STOPPED: "the volume is stopped at the archive",
    Verdict.SYNCING: "a backup to the archive is running",
    Verdict.BUSY: "the archive is receiving another wdiff of the volume",
    Verdict.NOT_READY: "the archive has no complete image of the volume, or a replication writes it",
    Verdict.TOO_NEW: "a wdiff before it has not reached the archive: another proxy may have it",
    Verdict.NOT_APPLICABLE: "the wdiff compares with another image than the archive has",
}


class SendKey(NamedTuple):
    """What a send task is for."""

    volume: str
    archive: str

    def __str__(self) -> str:
        return f"{self.volume} to {self.archive}"


class NotTaken(Refused):
    """The archive does not take the wdiff now; it will, or somebody is told by the state of the archive."""

    code = "wdiff-not-taken"
    retryable = True
    retry_max_s = ASK_AGAIN_S  # it is there: the end of a backup, or what another proxy has, is noticed soon


class WrongArchive(Refused):
    """Another server answers at the archive's address: what it says of a wdiff must not be believed."""

    code = "wrong-archive"


class Sender:
    """The work behind each key of the send scheduler."""

    def __init__(
        self,
        env: Env,
        me: Me,
        config: Callable[[], ProxyConfig],
        volumes: Mapping[str, Volume],
        prober: Prober,
        *,
        n_max: int,
    ) -> None:
        """`config()` is what counts now; `n_max`: see there."""
        self._env = env
        self._me = me
        self._config = config
        self._volumes = volumes
        self._prober = prober
        self.n_max = n_max  # files of one transfer: by the settings, and by what the system lets us open

    async def run(self, key: SendKey) -> Again | None:
        """Send what can go as one wdiff. Raises what the scheduler should try again after."""
        volume = self._volumes.get(key.volume)
        hop = volume.hops.get(key.archive) if volume is not None else None
        if volume is None or hop is None or not volume.may_send:
            return None
        with (
            structlog.contextvars.bound_contextvars(volume=volume.name, archive=hop.archive),
            volume.machine.action(WDIFF_SEND, self._env.clock.now()),
        ):
            hop.sending = True
            try:
                return await volume.unless_forced(self._attempt(volume, hop))
            except ForceStopped:
                return None
            except CorruptData as exc:
                return await self._damaged(volume, hop, exc)
            except WrongArchive as exc:
                return self._flag(hop, str(exc), exc)
            except DiskFailed as exc:
                hop.flag(str(exc))  # our disk does not heal by waiting; it is tried again all the same
                raise
            except WalbError as exc:
                hop.error_text = str(exc)
                raise
            finally:
                hop.sending = False
                volume.machine.changed.set()

    async def _attempt(self, volume: Volume, hop: Hop) -> Again | None:
        try:
            await volume.link_received()  # what an error has left there
        except DiskFailed as exc:
            if not hop.diffs:
                raise
            # Sending goes on: it is what makes room. Nothing is lost, the next attempt links again.
            log.error("volume.link_failed", code=exc.code, error=str(exc))
        if not hop.diffs:
            return None
        address = hop.entry.address
        if self._prober.is_down(address):
            raise ConnectError("the archive is down", hint="it is looked for all the time", address=address)
        connected = False
        try:
            async with dial(self._env, self._me, parse_address(address)) as conn:
                connected = True
                self._check_peer(conn, hop)
                return await self._offer(conn, volume, hop)
        except (ConnectError, TimedOut):
            if not connected:
                self._prober.watch(address)
            raise

    def _check_peer(self, conn: Connection, hop: Hop) -> None:
        """Raise WrongArchive: a wrong address must not make us delete what the right archive needs."""
        if conn.peer.kind is not Kind.ARCHIVE or conn.peer.node != hop.archive:
            raise WrongArchive(
                "another server answers at the address of the archive",
                hint="give the right address with archive-info update, or the archive its right node_id",
                address=hop.entry.address,
                wanted=hop.archive,
                got=f"{conn.peer.kind} {conn.peer.node}",
            )

    async def _offer(self, conn: Connection, volume: Volume, hop: Hop) -> Again | None:
        size_max_b = self._config().wdiff_send_size_max
        n_max = 1 if hop.refused else self.n_max  # to ask again and again must not open all that waits
        async with volume.select(hop, size_max_b=size_max_b, n_max=n_max) as chosen:
            if chosen is None:
                return None
            offer = WdiffOffer(
                volume=volume.name,
                sender=Kind.PROXY,
                uuid=chosen.uuid,
                size_lb=chosen.size_lb,
                diff=chosen.merged,
            )
            try:
                answer = await conn.call(offer)
            except RemoteError as exc:
                exc.retry_max_s = ASK_AGAIN_S  # nothing was sent yet
                raise
            return await self._obey(answer, conn, volume, hop, chosen)

    async def _obey(
        self, answer: WdiffVerdict, conn: Connection, volume: Volume, hop: Hop, chosen: Selection
    ) -> Again | None:
        verdict = answer.verdict
        hop.learn(answer.latest)
        if verdict is Verdict.ACCEPT:
            await self._stream(conn, hop, chosen)
            hop.last_sent = self._env.clock.now()
            hop.learn(chosen.merged.end)
        elif verdict in NEVER_NEEDED:
            log.warning(
                "wdiff.not_needed",
                reason=str(verdict),
                diff=str(chosen.merged),
                wdiffs=len(chosen.taken),
                uuid=chosen.uuid.hex(),
                latest=str(answer.latest),
            )
        elif verdict in NEEDS_PERSON:
            text = answer.hint or NEEDS_PERSON[verdict]
            return self._flag(hop, f"{verdict}: {text}", None)
        else:
            hop.refused = True
            raise NotTaken(
                "the archive does not take the wdiff now",
                hint=answer.hint or NOT_YET[verdict],
                verdict=str(verdict),
                diff=str(chosen.merged),
                latest=str(answer.latest),
            )
        hop.clear_flag()
        await volume.drop(hop, chosen.taken, other_history=verdict is Verdict.DIFFERENT_UUID)
        return Again() if hop.diffs or volume.received else None

    async def _stream(self, conn: Connection, hop: Hop, chosen: Selection) -> None:
        """Send the merged wdiff and wait until the archive has it durably."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        pieces = merge(chosen.readers, CompressOpt.parse(hop.entry.compress), uuid=chosen.uuid)
        size_b = await send_wdiff(conn, self._env.pools, pieces)
        log.info(
            "wdiff.sent",
            diff=str(chosen.merged),
            wdiffs=len(chosen.taken),
            size_b=size_b,
            elapsed_s=round(loop.time() - started, 3),
        )

    async def _damaged(self, volume: Volume, hop: Hop, error: CorruptData) -> Again:
        """Put a damaged wdiff aside, so that the archive can say of what follows that it is too new.

        It would never come right here. But another proxy may have the same, and so may another archive; a hash
        backup makes it needless. Until one of that happens what follows waits.
        """
        try:
            diff = await volume.put_aside(hop, error)
        except WalbError as exc:
            return self._flag(hop, f"{error}; and it cannot be put aside: {exc}", exc)
        if diff is None:
            return self._flag(hop, str(error), error)
        log.error(
            "wdiff.damaged",
            diff=str(diff),
            hint=f"unless another proxy or archive has it, {MENDS}: see docs/recovery.md, wdiff-damaged",
            **{key: value for key, value in error_fields(error).items() if key != "hint"},
        )
        return Again()

    def _flag(self, hop: Hop, text: str, error: WalbError | None) -> Again:
        """Raise the error flag and try again slowly."""
        if hop.error_text != text:  # not again and again
            log.error("wdiff.send_error_raised", error=text, hint=error.hint if error else "")
        hop.flag(text)
        return Again(self._config().retry_delay_max_s)
