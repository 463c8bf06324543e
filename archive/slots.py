"""A limit on work of one kind: who comes too late waits, in order."""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from walbd.daemon.tasks import Signal


class Slots:
    """Lets at most `n_max` pieces of work run at the same time.

    with slots.turn() as turn:
        await turn.comes()
        ...
    """

    def __init__(self, n_max: int) -> None:
        self.n_max = n_max
        self.running = 0
        self._queue: deque[Turn] = deque()
        self.changed = Signal()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @property
    def is_full(self) -> bool:
        """Whether the next one would have to wait."""
        return self.running + len(self._queue) >= self.n_max

    def turn(self) -> Turn:
        """Queue up; leaving the turn's `with` block gives the place to the next."""
        turn = Turn(self)
        self._queue.append(turn)
        self.changed.set()
        return turn


class Turn:
    """A place in the queue, and then one of the slots."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._has_slot = False

    async def comes(self) -> None:
        """Return when it is our turn; may be cancelled."""
        slots = self._slots
        await slots.changed.wait_for(lambda: slots._queue[0] is self and slots.running < slots.n_max)
        slots._queue.popleft()
        slots.running += 1
        self._has_slot = True
        slots.changed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._has_slot:
            self._slots.running -= 1
        else:
            self._slots._queue.remove(self)
        self._slots.changed.set()
