"""The one scheduler: keyed tasks with delays, growing and capped retries, and bounded workers.

A key (a volume and a purpose) waits at most once and never runs twice at the same time. A run that fails is
tried again after a delay that doubles up to a cap, for ever; `push` never shortens that delay, `hurry` does. The
cap is a lower one after an error with a `retry_max_s`: a peer that is there and refuses costs little to ask, and
cannot tell when it would not refuse any more.
Source: docs/architecture.md, "Scheduling".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

import structlog

from walbd.daemon.logs import error_fields
from walbd.daemon.tasks import Signal
from walbd.errors import WalbError

log = structlog.get_logger()

K = TypeVar("K")

ASK_AGAIN_S: Final = 3.0  # `retry_max_s` for a peer that is there and refuses
_QUIET_S: Final = 10.0  # of failures that come more often, only the first, second, fourth, eighth ... are logged


@dataclass(frozen=True, slots=True)
class Again:
    """What a run returns to be run again: not before `delay_s` from now (unless hurried)."""

    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays after failures: doubling from min to max [s]."""

    delay_min_s: float = 1.0
    delay_max_s: float = 30.0

    def delay(self, failures: int, max_s: float | None = None) -> float:
        """Return the delay after the given number of failures in a row (at least 1); `max_s`: a lower cap."""
        cap_s = self.delay_max_s if max_s is None else min(self.delay_max_s, max_s)
        return min(self.delay_min_s * 2.0 ** min(failures - 1, 30), max(cap_s, self.delay_min_s))


class Waiting(NamedTuple, Generic[K]):
    """A waiting task, for status."""

    key: K
    due_in_s: float  # negative: overdue, all workers are busy
    failures: int


@dataclass(slots=True)
class _Entry:
    due: float
    failures: int = 0
    hurried: bool = False


@dataclass(frozen=True, slots=True)
class Lanes(Generic[K]):
    """Whom the work is for. One that hangs cannot take the last workers from the others."""

    of: Callable[[K], str]
    all: Callable[[], Collection[str]]  # who may come at any time


class Scheduler(Generic[K]):
    """Run `work(key)` for pushed keys.

    `work` returns None when there is nothing more to do (a later push brings the key back) or Again. Errors
    are logged and retried. Cancelling `run` cancels the running work. With `lanes` a worker is kept free for each
    lane for which none works, as far as there are enough of them.
    """

    def __init__(
        self,
        work: Callable[[K], Awaitable[Again | None]],
        *,
        workers: int,
        retry: RetryPolicy,
        name: str,
        lanes: Lanes[K] | None = None,
    ) -> None:
        self._work = work
        self._workers = workers
        self._retry = retry
        self._name = name
        self._lanes = lanes
        self._waiting: dict[K, _Entry] = {}
        self._running: set[K] = set()
        self._failures: dict[K, int] = {}
        self._again_if_failed: set[K] = set()  # running, and what they may fail for has just changed
        self._changed = Signal()
        self._draining = False

    def adjust(self, *, workers: int, retry: RetryPolicy) -> None:
        """Use other limits from now on. Delays that have begun and work that runs are not touched."""
        self._workers, self._retry = workers, retry
        self._changed.set()

    def push(self, key: K, delay_s: float = 0.0) -> None:
        """Make `key` due in `delay_s`, unless it waits already: then its due time stays."""
        if key not in self._waiting and not self._draining:
            self._waiting[key] = _Entry(self._now() + delay_s, self._failures.get(key, 0))
            self._changed.set()

    def hurry(self, key: K) -> None:
        """Make `key` due now and forget its failures, whether it waits or not."""
        self._failures.pop(key, None)
        if not self._draining:
            self._waiting[key] = _Entry(self._now(), hurried=True)
            self._changed.set()

    def hurry_waiting(self, which: Callable[[K], bool] = lambda _: True) -> int:
        """Make all waiting keys that match due now; return how many. One that runs is tried again if it fails."""
        self._again_if_failed |= {key for key in self._running if which(key)}
        keys = [key for key in self._waiting if which(key)]
        for key in keys:
            self.hurry(key)
        return len(keys)

    def remove(self, which: Callable[[K], bool]) -> None:
        """Forget waiting keys that match; a running one is not touched."""
        for key in [key for key in self._waiting if which(key)]:
            del self._waiting[key]
        for key in [key for key in self._failures if which(key)]:
            del self._failures[key]

    def is_running(self, key: K) -> bool:
        """Say whether work for the key is going on."""
        return key in self._running

    def failures(self, key: K) -> int:
        """Return how often in a row the key has failed."""
        return self._failures.get(key, 0)

    def waiting(self) -> list[Waiting[K]]:
        """Return the waiting tasks by due time."""
        now = self._now()
        rows = [Waiting(key, entry.due - now, entry.failures) for key, entry in self._waiting.items()]
        return sorted(rows, key=lambda row: row.due_in_s)

    def drain(self) -> None:
        """Take no more keys and drop the waiting ones; running work goes on."""
        self._draining = True
        self._waiting.clear()
        self._changed.set()

    async def idle(self) -> None:
        """Return when no work is running."""
        await self._changed.wait_for(lambda: not self._running)

    async def run(self) -> None:
        """Run due keys until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                now = self._now()
                key = self._next(now)
                if key is None:
                    await self._sleep(now)
                    continue
                del self._waiting[key]
                self._running.add(key)
                tasks.create_task(self._one(key), name=f"{self._name}:{key}")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _next(self, now: float) -> K | None:
        """Return the earliest key that is due and does not run now, when a worker is free for it."""
        if len(self._running) >= self._workers:
            return None
        due = [(e.due, i, key) for i, (key, e) in enumerate(self._waiting.items()) if e.due <= now]
        ready = [item for item in due if item[2] not in self._running]
        if self._lanes is not None and ready:
            busy = {self._lanes.of(key) for key in self._running}
            kept = sum(lane not in busy for lane in self._lanes.all())
            if self._workers - len(self._running) <= kept:
                ready = [item for item in ready if self._lanes.of(item[2]) not in busy]
        return min(ready, key=lambda item: item[:2])[2] if ready else None

    async def _sleep(self, now: float) -> None:
        """Sleep until something changes or the next key becomes due; what is due already waits for a worker."""
        due = [entry.due for key, entry in self._waiting.items() if key not in self._running and entry.due > now]
        if len(self._running) >= self._workers or not due:
            await self._changed.next()
            return
        try:
            async with asyncio.timeout(max(0.0, min(due) - self._now())):
                await self._changed.next()
        except TimeoutError:
            pass

    async def _one(self, key: K) -> None:
        again: Again | None = None
        try:
            again = await self._work(key)
            self._failures.pop(key, None)
        except Exception as exc:  # noqa: BLE001 - whatever failed is logged and tried again
            failures = self._failures.get(key, 0) + 1
            self._failures[key] = failures
            again = Again(self._retry.delay(failures, exc.retry_max_s if isinstance(exc, WalbError) else None))
            tell = log.warning if failures & (failures - 1) == 0 or again.delay_s > _QUIET_S else log.debug
            tell(
                "task.failed",
                task=self._name,
                key=str(key),
                failures=failures,
                retry_s=again.delay_s,
                **error_fields(exc),
            )
        finally:
            self._running.discard(key)
            if again is not None:
                self._come_again(key, again.delay_s)
            self._again_if_failed.discard(key)
            self._changed.set()

    def _come_again(self, key: K, delay_s: float) -> None:
        """Have a key that has run wait, which may have been pushed meanwhile."""
        failures = self._failures.get(key, 0)
        if failures and key in self._again_if_failed:
            self.hurry(key)
        self.push(key, delay_s)
        waiting = self._waiting.get(key)
        if waiting is None or waiting.hurried:
            return
        due = self._now() + delay_s
        # An event does not shorten the delay after a failure, only a hurry does; nor does it hold up what goes on.
        waiting.due = max(waiting.due, due) if failures else min(waiting.due, due)
        waiting.failures = failures
