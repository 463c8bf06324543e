"""Looking for archives that are down, so that their return is noticed at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Final

import structlog

from walbd.daemon.conn import Me, call
from walbd.daemon.env import Env
from walbd.daemon.net import parse_address
from walbd.daemon.tasks import Signal
from walbd.errors import ConnectError, TimedOut, WalbError, code_of
from walbd.protocol.control import GetHostType
from walbd.proxy.config import ProxyConfig

log = structlog.get_logger()

_TIMEOUT_S: Final = 3.0


class Prober:
    """Addresses that did not answer, asked again and again until they do, or nobody wants them any more.

    While an address is down no transfer tries to connect to it: one dead archive must not occupy the workers
    with its time limits.
    """

    def __init__(
        self,
        env: Env,
        me: Me,
        config: Callable[[], ProxyConfig],
        wanted: Callable[[str], bool],
        back: Callable[[str], object],
    ) -> None:
        """`config()` is what counts now; `wanted(address)`: something waits for it; `back(address)` is called
        when it has answered."""
        self._env = env
        self._me = me
        self._config = config
        self._wanted = wanted
        self._back = back
        self._down: set[str] = set()
        self._tried: set[str] = set()  # of these: transfers may try all the same
        self._changed = Signal()

    def watch(self, address: str) -> None:
        """An attempt to connect has failed."""
        self._tried.discard(address)
        if address not in self._down:
            log.warning("archive.down", address=address)
            self._down.add(address)
            self._changed.set()

    def let_try(self, address: str) -> None:
        """Let the next transfer try for itself; the address is looked for all the same, for the others' sake."""
        if address in self._down:
            self._tried.add(address)

    def is_down(self, address: str) -> bool:
        """Say whether the address is being looked for, and transfers had better wait."""
        return address in self._down and address not in self._tried

    async def run(self) -> None:
        """Look for what is down until cancelled."""
        while True:
            await self._changed.wait_for(lambda: bool(self._down))
            await asyncio.sleep(self._config().probe_interval_s)
            self._down = {address for address in self._down if self._wanted(address)}
            self._tried &= self._down
            async with asyncio.TaskGroup() as tasks:
                for address in self._down:
                    tasks.create_task(self._probe(address), name=f"probe:{address}")

    async def _probe(self, address: str) -> None:
        try:
            me = dataclasses.replace(
                self._me,
                io_timeout_s=min(self._me.io_timeout_s, _TIMEOUT_S),
                connect_timeout_s=min(self._me.connect_timeout_s, _TIMEOUT_S),
            )
            await call(self._env, me, parse_address(address), GetHostType())
        except (ConnectError, TimedOut):
            return
        except WalbError as exc:
            # It answers, if only to refuse: the transfers will see for themselves.
            log.info("archive.refuses", address=address, code=code_of(exc), error=str(exc))
        if address in self._down:
            self._down.discard(address)
            log.info("archive.back", address=address)
            self._back(address)
