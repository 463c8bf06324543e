"""Which sends wait: the scheduler's keys of volumes, and the archives that are down."""

from __future__ import annotations

from collections.abc import Iterable

from walbd.daemon.scheduler import Scheduler
from walbd.proxy.probe import Prober
from walbd.proxy.send import SendKey
from walbd.proxy.volume import Hop, Volume


class SendQueue:
    """Queues the sends of volumes."""

    def __init__(self, scheduler: Scheduler[SendKey], prober: Prober) -> None:
        self._scheduler = scheduler
        self._prober = prober

    def push(self, volume: Volume) -> None:
        """Something new waits: send it after the delay of each archive; what waits already keeps its time."""
        for hop in volume.hops.values():
            self._scheduler.push(SendKey(volume.name, hop.archive), hop.entry.delay_s)

    def hurry(self, volume: Volume) -> None:
        """Send what waits now."""
        self.kick(volume, volume.hops.values())

    def kick(self, volume: Volume, hops: Iterable[Hop]) -> int:
        """Clear error flags and try now, also where an archive seems to be down; return how many are tried."""
        tasks = 0
        for hop in hops:
            hop.clear_flag()
            self._prober.let_try(hop.entry.address)
            if hop.diffs or volume.received:
                self._scheduler.hurry(SendKey(volume.name, hop.archive))
                tasks += 1
        return tasks

    def forget(self, volume: Volume) -> None:
        """Drop what waits for a volume."""
        self._scheduler.remove(lambda key: key.volume == volume.name)
