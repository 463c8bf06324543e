"""Requests about policies and holds (docs/policy.md), and how other requests get on with the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from walbd.archive.policy import PolicyRunner
from walbd.archive.queries import known
from walbd.archive.record import VolumeRecord
from walbd.archive.states import APPLY, Command
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection
from walbd.daemon.env import Clock, Pool, Pools
from walbd.daemon.server import Handler
from walbd.errors import Busy, NotFound, UsageError
from walbd.format.planning import Apply, Merge, verdicts_on
from walbd.format.policy import Policy
from walbd.format.retention import is_holding, reference_time
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import Ok
from walbd.protocol.codec import Message, Request
from walbd.protocol.policy import Explained, ExplainPolicy, GetPolicy, PolicyView, SetPolicy
from walbd.protocol.sync import HashBackupOffer, ReplicateOffer
from walbd.protocol.transfer import FullBackupOffer, WdiffOffer

HOLDS_MAX: Final = 10_000

# What a merge, or only an apply, of the policy is in the way of: it is waited for, and nothing new is begun.
MINDS_MERGES: Final[frozenset[type[Request[Any]]]] = frozenset(
    {
        c.Apply,
        c.GcDiff,
        c.Resize,
        m.AddHold,
        m.DisableSnapshot,
        m.EnableSnapshot,
        m.Merge,
        m.Replicate,
        HashBackupOffer,
    }
)
MINDS_APPLIES: Final[frozenset[type[Request[Any]]]] = frozenset(
    {c.Restore, m.BlockHash, m.VirtFullScan, ReplicateOffer}
)
# After these the policy looks at the whole volume again.
CHANGING: Final[frozenset[type[Request[Any]]]] = frozenset(
    {
        c.Apply,
        c.GcDiff,
        c.Start,
        m.AddHold,
        m.DbgReloadMetadata,
        m.DbgSetBase,
        m.DeleteHold,
        m.DisableSnapshot,
        m.EnableSnapshot,
        m.ForgetReplica,
        m.Merge,
        SetPolicy,
    }
)
# With these something comes.
COMING: Final[frozenset[type[Request[Any]]]] = frozenset(
    {FullBackupOffer, HashBackupOffer, ReplicateOffer, WdiffOffer}
)


class PolicyRequests:
    """The handlers."""

    def __init__(self, volumes: dict[str, Volume], runner: PolicyRunner, clock: Clock, pools: Pools) -> None:
        self._volumes = volumes
        self._runner = runner
        self._clock = clock
        self._pools = pools

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            GetPolicy: self._get,
            SetPolicy: self._set,
            ExplainPolicy: self._explain,
            m.GetHolds: self._holds,
            m.AddHold: self._add_hold,
            m.DeleteHold: self._delete_hold,
        }

    def around(self, handlers: Mapping[type[Request[Any]], Handler]) -> dict[type[Request[Any]], Handler]:
        """Return handlers before which the policy stands aside, and after which it looks again."""
        return {kind: self._wrapped(kind, handler) for kind, handler in handlers.items()}

    def _wrapped(self, kind: type[Request[Any]], handler: Handler) -> Handler:
        minds = (Merge, Apply) if kind in MINDS_MERGES else (Apply,) if kind in MINDS_APPLIES else ()
        changing = kind in CHANGING
        if not (minds or changing or kind in COMING):
            return handler

        async def serve(conn: Connection, request: Any) -> Message | None:
            if minds:
                await self._runner.stand_aside(request.volume, minds)
            try:
                return await handler(conn, request)
            finally:
                (self._runner.reset if changing else self._runner.wake)(request.volume)

        return serve

    async def _get(self, _conn: Connection, request: GetPolicy) -> PolicyView:
        return self._runner.view(known(self._volumes, request.volume, Command.GET_ACTIONS))

    async def _set(self, _conn: Connection, request: SetPolicy) -> Ok:
        volume = known(self._volumes, request.volume, Command.GET_ACTIONS)
        if request.policy is not None:
            request.policy.check()
        await volume.save(policy=request.policy)
        return Ok()

    async def _explain(self, _conn: Connection, request: ExplainPolicy) -> Explained:
        volume = known(self._volumes, request.volume, Command.GET_RESTORABLE)
        policy: Policy = request.policy or self._runner.policy_of(volume)
        policy.check()
        facts = self._runner.facts(volume, policy)
        points = list(volume.restorable(all_points=True))
        step = self._runner.next_step(volume, policy)
        verdicts = await self._pools.run(Pool.QUERY, verdicts_on, points, facts)
        return Explained(points=verdicts, policy=policy, next=step)

    # --- holds

    async def _holds(self, _conn: Connection, request: m.GetHolds) -> m.Holds:
        return m.Holds(holds=list(known(self._volumes, request.volume, Command.GET_ACTIONS).record.holds))

    async def _add_hold(self, _conn: Connection, request: m.AddHold) -> Ok:
        # As enable-snapshot: a merge or an apply that runs could have the snapshot go.
        volume = known(self._volumes, request.volume, Command.ENABLE_SNAPSHOT)
        now = self._clock.now()
        if request.until and request.until <= now:
            raise UsageError(
                "the hold would be over already", hint="give a time to come, or none", until=request.until, now=now
            )
        if request.gid not in {point.gid for point in volume.restorable(all_points=True)}:
            raise NotFound(
                "this generation cannot be restored, so it cannot be held",
                hint=f"`walbc restorable {volume.name} --all` lists those that can",
                gid=request.gid,
            )
        hold = m.Hold(gid=request.gid, reason=request.reason, created=now, until=request.until)
        if len(volume.record.holds) >= HOLDS_MAX:
            raise UsageError("too many holds", hint="delete some", holds=len(volume.record.holds))

        before = [other for other in volume.record.holds if other.gid == request.gid]
        reference = reference_time(volume.latest.timestamp, now)

        def change(record: VolumeRecord) -> dict[str, Any]:
            others = [other for other in record.holds if other.gid != request.gid and is_holding(other, reference)]
            return {"holds": tuple(sorted([*others, hold], key=lambda other: other.gid))}

        await volume.update(change)
        if volume.machine.running(APPLY):  # it began before the hold was saved, and looks at holds no more
            await volume.update(_without(request.gid, before))
            raise Busy("an apply has just begun", hint="hold the snapshot when it has ended", gid=request.gid)
        if request.gid not in {point.gid for point in volume.restorable(all_points=True)}:
            await volume.update(_without(request.gid, before))
            raise NotFound(
                "this generation has gone just now", hint="hold one that can be restored", gid=request.gid
            )
        return Ok()

    async def _delete_hold(self, _conn: Connection, request: m.DeleteHold) -> Ok:
        volume = known(self._volumes, request.volume, Command.GET_ACTIONS)
        holds = volume.record.holds
        if request.gid not in {hold.gid for hold in holds}:
            raise NotFound(
                "there is no hold of this generation",
                hint="held: " + (", ".join(str(hold.gid) for hold in holds) or "none"),
                gid=request.gid,
            )
        await volume.update(_without(request.gid))
        return Ok()


def _without(gid: int, instead: Sequence[m.Hold] = ()) -> Callable[[VolumeRecord], dict[str, Any]]:
    def change(record: VolumeRecord) -> dict[str, Any]:
        others = [hold for hold in record.holds if hold.gid != gid]
        return {"holds": tuple(sorted([*others, *instead], key=lambda hold: hold.gid))}

    return change
