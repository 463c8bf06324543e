"""Holding a daemon's thread at a failpoint until the test lets it go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from walbd.fs import failpoints


class Gate:
    """Holds threads at one place until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self._reached = threading.Event()

    def stand(self) -> None:
        """Wait here for the test."""
        self._reached.set()
        assert self.open.wait(120)

    async def wait(self) -> None:
        """Return when a thread stands at the gate."""
        assert await asyncio.to_thread(self._reached.wait, 120)


@contextmanager
def gated(monkeypatch: pytest.MonkeyPatch, failpoint: str) -> Iterator[Gate]:
    """Hold every thread that comes to a failpoint; the gate opens at the end of the block at the latest."""
    assert failpoint in failpoints.registered()
    gate = Gate()
    real = failpoints.hit

    def hit(name: str) -> None:
        if name == failpoint:
            gate.stand()
        real(name)

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "hit", hit)
        try:
            yield gate
        finally:
            gate.open.set()
