"""Every process is killed -9 in random order, every few seconds, while a volume is written: no command is given.

What is killed starts again after a moment, as under a supervisor. When the killing has ended, the archive
must be less than ten seconds behind within a minute, and every restore point must be exact.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.kit.group import Group, Volume, wait_until
from walbd.errors import WalbError

LAG_MAX_S = 10
RECOVER_S = 60
# What a daemon has when nobody sets anything; a Group sets shorter times.
AS_SHIPPED = ["--retry-delay-max-s", "30"]


def run_kills(root: Path, *, seed: int, seconds: float, implicit_max: int | None = None) -> None:
    """Run for so long; print what is done."""
    rng = random.Random(seed)
    options = dict.fromkeys(["storage", "proxy", "archive"], AS_SHIPPED)
    with Group(root, proxies=2, options=options) as group:
        volume = group.add_volume("vol0", size_b=8 << 20, log_b=64 << 20)
        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=60)
        began = time.monotonic()
        with volume.load(bytes_per_s=1e6) as load:
            kills = _kill(group, rng, began + seconds)
            last = time.monotonic()
            wait_until(lambda: _lag_s(group, volume) < LAG_MAX_S, "the lag to be small", timeout_s=RECOVER_S)
            print(f"{kills} kills; lag {_lag_s(group, volume)} s, {time.monotonic() - last:.1f} s after the last")
        print(f"{load.written_b >> 20} MiB written in {volume.seq} requests")
        group.snapshot(volume)
        group.wait_fresh(volume)
        gids = group.check_all(volume, implicit_max=implicit_max)
        print(f"exact: {', '.join(f'{len(points)} restore points at {name}' for name, points in gids.items())}")


def _kill(group: Group, rng: random.Random, end: float) -> int:
    """Kill one process after the other, each about every few seconds, and start it a moment later."""
    kills = 0
    while time.monotonic() < end:
        names = list(group.processes)
        rng.shuffle(names)
        for name in names:
            kills += 1
            group.kill(name)
            pause_s = rng.choice([0.0, 0.2, 1.0])
            time.sleep(pause_s)
            group.start(name)
            print(f"killed {name}, away for {pause_s} s", flush=True)
            time.sleep(rng.uniform(0.1, 2.0))
            if time.monotonic() > end:
                break
    return kills


def _lag_s(group: Group, volume: Volume) -> float:
    """Return how old the newest restore point is."""
    try:
        (view,) = group.ctl.overview(volume.name).volumes
    except (WalbError, ValueError):
        return float("inf")
    return view.lag_s if view.lag_s is not None else float("inf")
