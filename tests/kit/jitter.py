"""Make every step that another may overtake late by chance, so that a test which counts on luck fails.

`pytest --jitter SEED` delays what is received, what has been sent, the results of threads and of conversations,
in the test's own process and (through the folder jittered/, as `sitecustomize`) in every process it starts.
A test that fails only then waits for too little: it must wait for the condition that it means.

On virtual time (`tests.kit.virtual`) the delays are a hundredth: such a test may say how long something takes, and
the order of steps changes by the shortest delay, too.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

VARIABLE = "WALBD_TEST_JITTER"
ROOT = Path(__file__).parents[2]
# (how often, how long at most [s]): mostly nothing, sometimes a slice of another task, seldom a busy machine.
LATE = ((0.02, 0.25), (0.15, 0.02))


def ask(seed: str) -> None:
    """Delay steps in this process, and in those that it starts."""
    os.environ[VARIABLE] = seed
    paths = [str(Path(__file__).with_name("jittered")), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    install(seed)


def install(seed: str) -> None:
    """Wrap the steps. The chance differs between processes, which start at different times anyway."""
    from walbd.daemon import conn, env, server

    rng = random.Random(f"{seed}:{os.getpid()}:{sys.argv}")
    # `SEED*N` makes delays N times as frequent: for one test, again and again.
    more = float(seed.partition("*")[2] or 1)

    async def pause() -> None:
        for often, most_s in LATE:
            if rng.random() < often * more:
                virtual = getattr(asyncio.get_running_loop(), "virtual", False)
                await asyncio.sleep(rng.random() * most_s / (100 if virtual else 1))
                break

    def late(step: Callable[..., Awaitable[Any]]) -> Any:
        async def delayed(*args: Any, **kwargs: Any) -> Any:
            result = await step(*args, **kwargs)
            await pause()
            return result

        return delayed

    def later(step: Callable[..., Awaitable[Any]]) -> Any:
        """Wait before the step: a message that was received must not be lost by a cancellation."""

        async def delayed(*args: Any, **kwargs: Any) -> Any:
            await pause()
            return await step(*args, **kwargs)

        return delayed

    conn.Connection.send = late(conn.Connection.send)  # type: ignore[method-assign]
    conn.Connection.receive_or_end = later(conn.Connection.receive_or_end)  # type: ignore[method-assign]
    env.ThreadPools.run = late(env.ThreadPools.run)  # type: ignore[method-assign]
    server.Server._conversation = late(server.Server._conversation)  # type: ignore[method-assign]
