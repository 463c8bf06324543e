"""Volumes stopped and started, and daemons killed and started, in every order, while the volume is written."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.kit.group import WAIT_S, Group

ORDERS = list(itertools.permutations(["s0", "p0", "a0"]))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with Group(tmp_path_factory.mktemp("group")) as group:
        volume = group.add_volume("vol0", size_b=4 << 20, log_b=64 << 20)
        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        yield group


def test_volumes_stopped_and_started(group: Group) -> None:
    """Every order of stopping with every order of starting; modes vary."""
    volume, ctl = group.volumes["vol0"], group.ctl
    rng = random.Random(1)
    with volume.load(bytes_per_s=1e6):
        for stops, starts in itertools.product(ORDERS, ORDERS):
            for name in stops:
                ctl.stop(group.server(name), "vol0", rng.choice(["graceful", "force"]))
            for name in starts:
                ctl.start(group.server(name), "vol0")
        group.snapshot(volume)
    group.wait_fresh(volume)
    group.check_all(volume, implicit_max=20)


def test_an_empty_proxy_has_sent_everything(group: Group) -> None:
    volume, ctl = group.volumes["vol0"], group.ctl
    s0, p0, a0 = group.s[0], group.p[0], group.a[0]
    with volume.load(bytes_per_s=1e6):
        gid = group.mark(volume)
        ctl.stop(s0, "vol0")
        ctl.stop(p0, "vol0", "empty")
        assert ctl.get_proxy_diff_list(p0, "vol0") == []
        assert ctl.get_latest_snapshot_info(a0, "vol0")["vol0"] == group.status(s0, "vol0").done_gid
        for server in (p0, s0):
            ctl.start(server, "vol0")
        ctl.wait_for_restorable(a0, "vol0", gid, timeoutS=WAIT_S)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_daemons_killed_and_started(group: Group, order: tuple[str, ...]) -> None:
    volume = group.volumes["vol0"]
    with volume.load(bytes_per_s=1e6):
        group.kill(*order)
        for name in reversed(order):
            group.start(name)
        group.snapshot(volume)
    group.wait_fresh(volume)
    group.check_all(volume, implicit_max=5)
