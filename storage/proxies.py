"""The proxies of a storage: which are there, and in which order to try them.

One task watches each proxy by asking it what kind of server it is. The order of the settings is the order of
preference at every transfer: there is no staying with the last one, so a better proxy that comes back is used
again at once. The list may be replaced at any time: running transfers go on, the next ones choose from the new
list. Source: docs/storage.md, "Choosing a proxy".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final

import structlog

from walbd.daemon.conn import Me, call
from walbd.daemon.env import Env
from walbd.daemon.flow import cancel_all
from walbd.daemon.logs import error_fields
from walbd.daemon.net import Address
from walbd.daemon.tasks import Signal
from walbd.errors import WalbError
from walbd.protocol.base import Kind
from walbd.protocol.control import GetHostType, ProxyHealth
from walbd.storage.config import StorageConfig

log = structlog.get_logger()

AVOID_S: Final = 60.0


@dataclass(slots=True, eq=False)
class Proxy:
    """One proxy as we see it."""

    address: Address
    available: bool = True  # until a check says otherwise
    due: float = 0.0  # of the next check, on the loop's clock
    checks: int = 0  # how many have ended
    error: str = ""  # why it is not available
    avoided_until: float = 0.0  # others are tried first until then, on the loop's clock


class Proxies:
    """All proxies, best first."""

    def __init__(
        self,
        env: Env,
        me: Me,
        config: Callable[[], StorageConfig],
        on_return: Callable[[], None],
    ) -> None:
        """`config()` is what counts now; `on_return` is called when a proxy is there that was not."""
        self._env = env
        self._me = me
        self._config = config
        self._proxies = [Proxy(address) for address in config().proxy_addresses()]
        self._on_return = on_return
        self._changed = Signal()

    def follow(self) -> None:
        """Take over changed settings. A proxy that stays is what it was; a new one counts as available."""
        known = {proxy.address: proxy for proxy in self._proxies}
        addresses = self._config().proxy_addresses()
        self._proxies = [known.get(address) or Proxy(address) for address in addresses]
        now = asyncio.get_running_loop().time()
        for proxy in self._proxies:  # the intervals may have become shorter
            if proxy.due != float("inf"):
                proxy.due = min(proxy.due, now + self._config().proxy_check_interval_s)
        self._changed.set()
        if not known.keys() >= set(addresses):
            self._on_return()

    def available(self) -> list[Address]:
        """Return where to try, best first; what is avoided comes last."""
        now = asyncio.get_running_loop().time()
        there = [proxy for proxy in self._proxies if proxy.available]
        return [proxy.address for proxy in sorted(there, key=lambda proxy: proxy.avoided_until > now)]

    def has_others(self, tried: Collection[Address]) -> bool:
        """Say whether a proxy is there that was not tried now, and is not avoided."""
        now = asyncio.get_running_loop().time()
        return any(p.available and p.avoided_until <= now for p in self._proxies if p.address not in tried)

    def avoid(self, address: Address) -> None:
        """Prefer all others for a while: it answers, and does not come to an end."""
        for proxy in self._proxies:
            if proxy.address == address:
                proxy.avoided_until = asyncio.get_running_loop().time() + AVOID_S
                log.warning("proxy.avoided", proxy=str(address), for_s=AVOID_S)

    def suspect(self, address: Address) -> None:
        """Have a proxy checked now, since something went wrong with it. It counts as before until then."""
        for proxy in self._proxies:
            if proxy.address == address:
                proxy.due = 0.0
        self._changed.set()

    async def check_now(self) -> None:
        """Make every check due now; if no proxy counts as available, wait for the outcome of one round."""
        seen = {proxy: proxy.checks for proxy in self._proxies}
        for proxy in self._proxies:
            proxy.due = 0.0
        self._changed.set()
        if not self.available():
            await self._changed.wait_for(
                lambda: bool(self.available()) or all(p.checks > seen.get(p, 0) for p in self._proxies)
            )

    def health(self) -> list[ProxyHealth]:
        """Return what status shows."""
        now = asyncio.get_running_loop().time()
        return [
            ProxyHealth(
                address=str(proxy.address),
                available=proxy.available,
                next_check_s=max(0.0, proxy.due - now),
                error=proxy.error,
            )
            for proxy in self._proxies
        ]

    async def run(self) -> None:
        """Watch all proxies until cancelled."""
        watches: dict[Proxy, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                for proxy in self._proxies:
                    if proxy not in watches:
                        watches[proxy] = tasks.create_task(self._watch(proxy), name=f"proxy:{proxy.address}")
                gone = [proxy for proxy in watches if proxy not in self._proxies]
                await cancel_all([watches.pop(proxy) for proxy in gone])
                await self._changed.wait_for(lambda: set(self._proxies) != watches.keys())

    async def _watch(self, proxy: Proxy) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while (wait_s := self._due(proxy) - loop.time()) > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.next()
                except TimeoutError:
                    pass
            await self._check(proxy)

    def _due(self, proxy: Proxy) -> float:
        """Return when to check a proxy; one that is away is looked for often, so that its return is noticed."""
        if proxy.available:
            return proxy.due
        interval_s = self._config().proxy_check_interval_s
        return proxy.due - interval_s + min(self._config().probe_interval_s, interval_s)

    async def _check(self, proxy: Proxy) -> None:
        was, error = proxy.available, ""
        proxy.due = float("inf")  # a suspicion during the check asks for another one
        limit_s = self._config().proxy_check_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                me = replace(self._me, connect_timeout_s=limit_s, io_timeout_s=limit_s)
                answer = await call(self._env, me, proxy.address, GetHostType())
            if answer.kind is not Kind.PROXY:
                error = f"it is no proxy but {answer.kind}"
        except TimeoutError:
            error = f"no answer within {limit_s} s"
        except WalbError as exc:
            error = str(exc)
            log.debug("proxy.check_failed", proxy=str(proxy.address), **error_fields(exc))
        proxy.available, proxy.error = not error, error
        proxy.due = min(proxy.due, asyncio.get_running_loop().time() + self._config().proxy_check_interval_s)
        proxy.checks += 1
        self._changed.set()
        if was and error:
            log.warning("proxy.lost", proxy=str(proxy.address), error=error)
        if not was and not error:
            log.info("proxy.returned", proxy=str(proxy.address))
            self._on_return()
