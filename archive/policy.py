"""The policy at work: merges, applies and replications that nobody has to ask for (docs/policy.md).

What is done next is chosen by `walbd.format.planning`, one step at a time; this decides when. A volume is looked
at when something has come for it and an interval is complete, and once an hour. A step goes through the same doors
as a request: the table of states, the action, the job. Merges have a lane of their own, applies another: so an
apply that takes hours holds up no other volume's merges. After each step its lane rests for a share of the time.

A failure of one step, or of one destination, holds up nothing else: that step is tried again later and later, and
the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from walbd.archive.apply import plan_apply, run_apply
from walbd.archive.merge import plan_merge, run_merge
from walbd.archive.slots import Slots
from walbd.archive.snapshots import change_snapshots
from walbd.archive.states import APPLY, MERGE, Command
from walbd.archive.volume import Place, Volume
from walbd.daemon.jobs import Jobs
from walbd.daemon.logs import error_fields
from walbd.daemon.scheduler import Again, RetryPolicy, Scheduler
from walbd.daemon.tasks import Signal
from walbd.errors import BadState, Busy, ForceStopped, Stopping, WalbError, code_of
from walbd.format.meta import NotMergeable, NotReachable
from walbd.format.planning import LOOK_S, Action, Apply, Facts, Merge, Planner, is_right
from walbd.format.policy import Grid, Policy, Replication, parse_levels
from walbd.format.retention import reference_time
from walbd.protocol.base import JobAccepted
from walbd.protocol.maintenance import Replicate
from walbd.protocol.policy import PolicyView, ReplicationView, Trouble

log = structlog.get_logger()

_VOLUMES_MAX: Final = 1000  # looked at, at the same time
_LATER_S: Final = 3.0  # to wait when something excludes the step
_ASIDE_S: Final = 3.0  # nothing new is begun so long after an operator's request
_ASIDE_MAX_S: Final = 30.0  # but requests that never cease hold up no step for longer than this
_STALE_MAX: Final = 10  # so often in a row a step may turn out not to fit what is there; then it fails
_PATIENCE_S: Final = 5.0  # an operator's request waits so long for a step that has begun
_REST_MAX_S: Final = 60.0
_REPLICATE_TO: Final = "replicate to "
_RETRY: Final = RetryPolicy(10.0, 3600.0)  # of a step that fails
_EXCLUDED: Final = (Busy, BadState, Stopping, ForceStopped)  # something else is at work: no failures
_STALE: Final = (
    NotMergeable,
    NotReachable,
)  # the world has moved on: no failures, unless it does so again and again

Begin = Callable[[Replicate], Awaitable[JobAccepted]]


@dataclass
class _Trouble:
    """A step that failed."""

    error: WalbError
    since: int  # [unix s]
    failures: int = 0
    until: float = 0.0  # loop time

    def failed(self, error: WalbError, retry: RetryPolicy) -> bool:
        """Count one more; say whether the error is another one than before."""
        is_new = not self.failures or (code_of(error), error.message) != (code_of(self.error), self.error.message)
        self.error = error
        self.failures += 1
        self.until = asyncio.get_running_loop().time() + retry.delay(self.failures)
        return is_new


@dataclass
class _Watch:
    """What is remembered of one volume."""

    volume: Volume
    planner: Planner = field(default_factory=Planner)
    troubles: dict[str, _Trouble] = field(default_factory=dict)  # by the words for the step
    aside: float = 0.0  # nothing is begun before this, in loop time
    aside_since: float = 0.0  # when it began to be put off without a break
    stale: tuple[str, int] = ("", 0)  # the last step that did not fit what is there, and how often in a row

    def stand_aside(self, now: float) -> None:
        """Begin nothing for a while; after a long row of requests the policy has a few seconds for its turn."""
        if now > self.aside + _ASIDE_S:
            self.aside_since = now
        self.aside = max(self.aside, min(now + _ASIDE_S, self.aside_since + _ASIDE_MAX_S))

    def is_stale(self, what: str) -> bool:
        """Count that a step does not fit what is there; say whether that may pass."""
        last, count = self.stale
        self.stale = (what, count + 1 if what == last else 1)
        return self.stale[1] < _STALE_MAX and what not in self.troubles


class PolicyRunner:
    """Does what the policies of all volumes want, while `run` runs."""

    def __init__(
        self,
        volumes: dict[str, Volume],
        place: Place,
        jobs: Jobs,
        replicate: Begin,
        must_wait: Callable[[], bool] = lambda: False,
    ) -> None:
        """`replicate` begins a replication; while `must_wait()`, jobs of operators wait for their turn."""
        self._volumes = volumes
        self._place = place
        self._jobs = jobs
        self._begin_replication = replicate
        self._must_wait = must_wait
        self._watches: dict[str, _Watch] = {}
        self._lanes = {Merge: Slots(place.config.policy_max), Apply: Slots(place.config.policy_max)}
        self._acting: dict[str, Action] = {}  # by volume
        self._draining = False
        self._changed = Signal()
        retry = RetryPolicy(1.0, 1.0)  # failures are counted here, not by the schedulers
        self._local: Scheduler[str] = Scheduler(self._work, workers=_VOLUMES_MAX, retry=retry, name="policy")
        self._remote: Scheduler[tuple[str, str]] = Scheduler(
            self._replicate, workers=place.config.policy_max, retry=retry, name="policy-replicate"
        )

    # --- from outside

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin, as tasks of `tasks`."""
        tasks.create_task(self._local.run(), name="policy")
        tasks.create_task(self._remote.run(), name="policy-replicate")
        for name in self._volumes:
            self.reset(name)

    def drain(self) -> None:
        """Begin nothing more; what runs goes on."""
        self._draining = True
        self._local.drain()
        self._remote.drain()

    def follow(self) -> None:
        """The settings have changed."""
        config = self._place.config
        for lane in self._lanes.values():
            lane.n_max = config.policy_max
            lane.changed.set()
        self._remote.adjust(workers=config.policy_max, retry=RetryPolicy(1.0, 1.0))
        for name in self._volumes:
            self.reset(name)

    def wake(self, name: str) -> None:
        """Something has come for a volume: look at it if that may matter. Cheap."""
        volume = self._volumes.get(name)
        if volume is None:
            return
        watch = self._watch(volume)
        clock = self._place.env.clock
        if watch.planner.is_due(_newest(volume), clock.now(), len(volume.diffs)):
            self._local.hurry(name)
        for replication in self.policy_of(volume).replications:
            self._remote.push((name, replication.name))

    def reset(self, name: str) -> None:
        """Look at everything of a volume again: its policy, its holds, or its diffs were changed by hand."""
        volume = self._volumes.get(name)
        if volume is not None:
            self._watch(volume).planner.reset()
            self._local.hurry(name)
            for replication in self.policy_of(volume).replications:
                self._remote.hurry((name, replication.name))

    async def stand_aside(self, name: str, minds: tuple[type[Action], ...] = (Merge, Apply)) -> None:
        """Begin nothing for a volume for a while, as somebody wants something of it that `minds` such steps.

        Returns when none runs, or one that runs takes too long: then the request is refused, and says why.
        """
        volume = self._volumes.get(name)
        if volume is None:
            return
        self._watch(volume).stand_aside(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._changed.wait_for(lambda: not isinstance(self._acting.get(name), minds))
        except TimeoutError:
            pass

    @property
    def acting(self) -> int:
        """How many steps are at work."""
        return len(self._acting)

    @property
    def failing(self) -> int:
        """How many steps and destinations fail."""
        return sum(len(watch.troubles) for watch in self._watches.values())

    def default(self) -> Policy:
        """Return the policy of volumes that have none of their own."""
        config = self._place.config
        return Policy(
            levels=parse_levels(config.levels),
            keep=Grid.parse(config.keep),
            apply_interval_s=config.apply_interval_s,
        )

    def policy_of(self, volume: Volume) -> Policy:
        """Return the policy that counts for a volume."""
        return volume.record.policy or self.default()

    def facts(self, volume: Volume, policy: Policy | None = None) -> Facts:
        """Return what a step is chosen from, with the volume's policy or another one."""
        record, now = volume.record, self._place.env.clock.now()
        reference = reference_time(_newest(volume), now)  # a clock that jumps ahead makes no replica unneeded
        policy = policy or self.policy_of(volume)
        listed = {replication.dest for replication in policy.replications if replication.enabled}
        needed = [
            row.gid
            for row in record.replicas
            if row.address in listed or reference - row.seen < policy.replica_keep_s
        ]
        return Facts(
            base=record.base,
            diffs=volume.diffs,
            policy=policy,
            now=now,
            holds=record.holds,
            replicas=record.replicas,
            needed=needed,
            applied=record.began.get(APPLY, 0),
            newest=_newest(volume),
            merge_max=self._merge_max(),
        )

    def _merge_max(self) -> int:
        """Return how many diffs a merge may read; more would be refused."""
        config = self._place.config
        return max(min(config.open_files_max or 1000, config.scan_files_max or 1000), 2)

    def next_step(self, volume: Volume, policy: Policy | None = None) -> str:
        """Say what would be done next, or why nothing would."""
        policy = policy or self.policy_of(volume)
        if not self._place.config.policy:
            return "nothing: policies are switched off at this archive"
        if not policy.enabled:
            return "nothing: the policy is off"
        if not volume.is_active:
            return f"nothing: the volume is {volume.machine.shown}"
        acting = self._acting.get(volume.name)
        if acting is not None:
            return f"at work: {acting}"
        action = Planner().next(self.facts(volume, policy))
        return str(action) if action is not None else "nothing is due"

    def view(self, volume: Volume) -> PolicyView:
        """Return what is told of a volume's policy."""
        policy, record = self.policy_of(volume), volume.record
        now, loop_now = self._place.env.clock.now(), asyncio.get_running_loop().time()
        rows = []
        for replication in policy.replications:
            last = _last_seen(volume, replication)
            rows.append(
                ReplicationView(
                    name=replication.name,
                    dest=replication.dest,
                    enabled=replication.enabled,
                    last=last,
                    next=max(last + replication.interval_s, now) if replication.enabled else 0,
                    running=replication.dest in volume.replicating,
                )
            )
        troubles = [
            Trouble(
                what=what,
                error_code=code_of(trouble.error),
                error=str(trouble.error),
                failures=trouble.failures,
                since=trouble.since,
                retry=max(now, round(now + trouble.until - loop_now)),
            )
            for what, trouble in self._watch(volume).troubles.items()
        ]
        return PolicyView(
            policy=policy,
            is_default=record.policy is None,
            enabled=policy.enabled and self._place.config.policy,
            next=self.next_step(volume),
            applied=record.began.get(APPLY, 0),
            merged=record.began.get(MERGE, 0),
            replications=rows,
            troubles=troubles,
        )

    # --- merges and applies

    async def _work(self, name: str) -> Again | None:
        """Do one step for a volume, if there is one; say when to look again."""
        volume = self._volumes.get(name)
        if volume is None or not self._place.config.policy:
            return None
        watch = self._watch(volume)
        loop = asyncio.get_running_loop()
        if watch.aside > loop.time():
            return Again(watch.aside - loop.time())
        if not volume.is_active or volume.machine.stopping is not None or volume.base.begin.is_none:
            return Again(LOOK_S)
        if self._must_wait():
            return Again(_LATER_S)
        action = self._choose(watch)
        if action is None:
            return Again(self._until_next(watch))
        with self._lanes[type(action)].turn() as turn:
            await turn.comes()
            if self._draining:
                return None
            # Whatever happened while it waited: what is done now is chosen now.
            again = self._choose(watch)
            if again is None or type(again) is not type(action) or watch.aside > loop.time():
                return Again(0.1)
            began = loop.time()
            delay_s = await self._try(watch, again)
            percent = self._place.config.policy_rest_percent
            await asyncio.sleep(min((loop.time() - began) * percent / (100 - percent), _REST_MAX_S))
        return Again(delay_s)

    def _choose(self, watch: _Watch) -> Action | None:
        now = asyncio.get_running_loop().time()
        over = [what for what, trouble in watch.troubles.items() if trouble.until <= now and not _is_remote(what)]
        if over:
            watch.planner.reset()  # it has looked past them
        bad = {what for what, trouble in watch.troubles.items() if trouble.until > now}
        action = watch.planner.next(self.facts(watch.volume), avoid=lambda action: str(action) in bad)
        if action is None:
            for what in over:  # not wanted any more
                del watch.troubles[what]
        return action

    def _until_next(self, watch: _Watch) -> float:
        now = asyncio.get_running_loop().time()
        ends = [trouble.until - now for what, trouble in watch.troubles.items() if not _is_remote(what)]
        return max(1.0, min([float(LOOK_S), *ends]))

    async def _try(self, watch: _Watch, action: Action) -> float:
        """Do a step; return after how long the volume is to be looked at again [s]."""
        volume, what = watch.volume, str(action)
        self._acting[volume.name] = action
        try:
            match action:
                case Merge():
                    await self._merge(volume, action)
                case Apply():
                    await self._apply(volume, action)
        except WalbError as exc:
            if isinstance(exc, _EXCLUDED) or (isinstance(exc, _STALE) and watch.is_stale(what)):
                log.debug("policy.postponed", volume=volume.name, step=what, **error_fields(exc))
                return _LATER_S
            trouble = watch.troubles.setdefault(what, _Trouble(exc, self._place.env.clock.now()))
            if trouble.failed(exc, _RETRY):
                log.warning("policy.failed", volume=volume.name, step=what, **error_fields(exc))
            return 0.0
        finally:
            del self._acting[volume.name]
            self._changed.set()
        watch.troubles.pop(what, None)
        watch.stale = ("", 0)
        return 0.0

    async def _merge(self, volume: Volume, action: Merge) -> None:
        if action.release:
            await change_snapshots(volume, action.release, Command.DISABLE_SNAPSHOT)
        # A hold may have come meanwhile. From here on nothing is awaited until the action keeps others out.
        if not is_right(action, self.facts(volume)):
            raise NotMergeable("the volume has changed meanwhile", volume=volume.name)
        volume.check(Command.MERGE)
        plan = plan_merge(volume, action.gid_b, action.gid_e)[: len(action.diffs)]
        if plan != list(action.diffs):
            raise NotMergeable(
                "other diffs lie here", volume=volume.name, plan=len(plan), wanted=len(action.diffs)
            )
        with volume.machine.action(MERGE, self._place.env.clock.now()):
            await self._jobs.within(
                "policy-merge", volume.name, lambda job: run_merge(volume, plan, job), routine=True
            )

    async def _apply(self, volume: Volume, action: Apply) -> None:
        volume.check(Command.APPLY)
        plan_apply(volume, action.gid)
        with volume.machine.action(APPLY, self._place.env.clock.now()):
            await self._jobs.within(
                "policy-apply", volume.name, lambda job: run_apply(volume, action.gid, job), routine=True
            )

    # --- replications

    async def _replicate(self, key: tuple[str, str]) -> Again | None:
        """Replicate a volume to one destination when that is due; say when it is due next."""
        volume = self._volumes.get(key[0])
        if volume is None or not self._place.config.policy:
            return None
        policy = self.policy_of(volume)
        replication = next((r for r in policy.replications if r.name == key[1]), None)
        watch, what = self._watch(volume), _REPLICATE_TO + key[1]
        if replication is None or not (replication.enabled and policy.enabled):
            watch.troubles.pop(what, None)
            return None
        now, loop = self._place.env.clock.now(), asyncio.get_running_loop()
        trouble = watch.troubles.get(what)
        if trouble is not None and trouble.until > loop.time():
            return Again(trouble.until - loop.time())
        wait_s = _last_seen(volume, replication) + replication.interval_s - now
        if trouble is None and 0 < wait_s <= replication.interval_s:  # more: the clock was set back
            return Again(wait_s)
        if not volume.is_active or volume.machine.stopping is not None or self._is_level(volume, replication):
            return Again(min(replication.interval_s, LOOK_S))
        if watch.aside > loop.time() or replication.dest in volume.replicating:
            return Again(_LATER_S)
        return await self._send(watch, replication, what)

    async def _send(self, watch: _Watch, replication: Replication, what: str) -> Again:
        volume = watch.volume
        request = Replicate(volume=volume.name, dest=replication.dest, compress=replication.compress)
        try:
            volume.check(Command.REPLICATE)
            job = self._jobs.get((await self._begin_replication(request)).job)
            await job.ended()
            if isinstance(job.error, WalbError):
                raise job.error
        except _EXCLUDED as exc:
            log.debug("policy.postponed", volume=volume.name, step=what, **error_fields(exc))
            return Again(_LATER_S)
        except WalbError as exc:
            config = self._place.config
            retry = RetryPolicy(config.retry_delay_min_s, config.retry_delay_max_s)
            trouble = watch.troubles.setdefault(what, _Trouble(exc, self._place.env.clock.now()))
            if trouble.failed(exc, retry):
                log.warning("policy.failed", volume=volume.name, step=what, **error_fields(exc))
            return Again(retry.delay(trouble.failures))
        watch.troubles.pop(what, None)
        self._local.hurry(volume.name)  # the destination has moved on: what it needed may be merged, or applied
        return Again(replication.interval_s)

    def _is_level(self, volume: Volume, replication: Replication) -> bool:
        latest = volume.latest.begin.gid_b
        return any(row.gid >= latest for row in volume.record.replicas if row.address == replication.dest)

    def _watch(self, volume: Volume) -> _Watch:
        watch = self._watches.get(volume.name)
        if watch is None or watch.volume is not volume:  # a cleared volume may be made anew
            watch = self._watches[volume.name] = _Watch(volume)
        return watch


def _newest(volume: Volume) -> int:
    return volume.latest.timestamp


def _last_seen(volume: Volume, replication: Replication) -> int:
    return max((row.seen for row in volume.record.replicas if row.address == replication.dest), default=0)


def _is_remote(what: str) -> bool:
    return what.startswith(_REPLICATE_TO)
