"""Links cut, silenced and falsified in the middle of transfers; the relays count what is sent again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from tests.kit.group import WAIT_S, Group, Volume, wait_until
from tests.kit.relay import Link
from walbd.controller.constants import sStopped, sSyncReady
from walbd.errors import WalbError

MIB = 1 << 20
PIECE = 2 * MIB  # of one transfer of log or diffs
SLACK = MIB // 4  # offers, headers, and what lies in sockets when a link is cut
OPTIONS = {
    "storage": ["--wlog-send-size-max", "2m", "--proxy-check-interval-s", "1"],
    "proxy": ["--wdiff-send-size-max", "2m"],
    "archive": ["--fsync-interval-b", "1m"],  # where a full copy can go on
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with Group(tmp_path_factory.mktemp("group"), archives=2, options=OPTIONS) as group:
        volume = group.add_volume("vol0", size_b=8 * MIB, log_b=64 * MIB)
        fill(volume, 8 * MIB)
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        yield group


@pytest.fixture
def volume(group: Group) -> Iterator[Volume]:
    """The volume, backed up; at the end all is healed, and everything that can be restored is compared."""
    volume = group.volumes["vol0"]
    group.wait_fresh(volume)
    yield volume
    group.heal()
    group.wait_fresh(volume)
    group.check_all(volume, implicit_max=5)


def fill(volume: Volume, size_b: int) -> None:
    """Write so much that cannot be compressed."""
    for at in range(0, size_b, 64 << 10):
        volume.write(at % len(volume.model), volume.rng.randbytes(64 << 10))
    volume.flush()


@contextmanager
def impatient(group: Group, *names: str) -> Iterator[None]:
    """Let daemons give a silent link up soon. Otherwise a busy machine must not look like one."""
    for name in names:
        group.processes[name].restart(more_args=["--io-timeout-s", "2"])
    try:
        yield
    finally:
        for name in names:
            group.processes[name].restart()


class Sent:
    """What has passed a link since the beginning, in the direction of the data."""

    def __init__(self, link: Link) -> None:
        self._link, self._began = link, link.sent_b

    @property
    def b(self) -> int:
        return self._link.sent_b - self._began


def test_log_transfer_is_cut_and_goes_on(group: Group, volume: Volume) -> None:
    """The transfers that were acknowledged are not repeated: less than one more than the data is sent."""
    link = group.link("s0", "p0")
    sent = Sent(link)
    link.blackhole()
    fill(volume, 8 * MIB)
    link.cut_after(5 * MIB)
    link.resume()
    wait_until(lambda: link.is_cut, "the cut")
    link.heal()
    group.wait_fresh(volume)
    assert 8 * MIB < sent.b < 8 * MIB + PIECE + SLACK


def test_diff_transfer_is_cut_and_goes_on(group: Group, volume: Volume) -> None:
    link = group.link("p0", "a0")
    sent = Sent(link)
    link.cut()
    fill(volume, 8 * MIB)
    wait_until(lambda: group.status(group.s[0], "vol0").lag_lb == 0, "the proxy to have the log")
    link.cut_after(5 * MIB)
    link.resume()
    wait_until(lambda: link.is_cut, "the cut")
    link.heal()
    group.wait_fresh(volume)
    assert 8 * MIB < sent.b < 8 * MIB + 2 * PIECE + SLACK  # a diff goes whole, and may be larger than the limit


def test_diff_is_not_sent_again_when_only_the_answer_was_lost(group: Group, volume: Volume) -> None:
    link, proxy = group.link("p0", "a0"), group.p[0]
    link.cut()
    fill(volume, MIB)
    wait_until(lambda: group.status(group.s[0], "vol0").lag_lb == 0, "the proxy to have the log")
    received = group.status(group.a[0], "vol0").latest_gid
    sent = Sent(link)
    link.heal()
    wait_until(lambda: sent.b > MIB // 2, "the diff to be on its way")
    link.cut()  # most of the time before the answer
    link.heal()
    group.wait_fresh(volume)
    assert group.status(group.a[0], "vol0").latest_gid > received
    wait_until(lambda: group.status(proxy, "vol0").hops[0].diffs == 0, "the proxy to hear that it is there")
    assert sent.b < 2 * MIB + SLACK


@pytest.mark.parametrize(("client", "server"), [("s0", "p0"), ("p0", "a0")])
def test_a_flipped_bit_is_noticed(group: Group, volume: Volume, client: str, server: str) -> None:
    link = group.link(client, server)
    sent = Sent(link)
    link.blackhole()  # so that it comes in few pieces
    fill(volume, MIB)
    for at in (300_000, 900_000):
        link.corrupt(at)
    link.resume()
    group.wait_fresh(volume)
    assert sent.b > MIB + 200_000  # something had to be sent again
    assert group.restored(volume, group.snapshot(volume)) == volume.model


@pytest.mark.parametrize(("client", "server"), [("s0", "p0"), ("p0", "a0")])
def test_a_silent_link_is_given_up(group: Group, volume: Volume, client: str, server: str) -> None:
    link = group.link(client, server)
    with impatient(group, client, server):
        link.stall_after(MIB // 2)
        fill(volume, MIB)
        wait_until(lambda: link.is_silent, "the link to fall silent")
        connections = link.connections
        wait_until(lambda: link.connections > connections, "another attempt")
        link.heal()
        group.wait_fresh(volume)


def test_slow_and_far_away(group: Group, volume: Volume) -> None:
    for client, server in (("s0", "p0"), ("p0", "a0")):
        group.link(client, server).delay(0.05)
        group.link(client, server).rate(2e6)
    fill(volume, 2 * MIB)
    group.wait_fresh(volume)


def full_again(group: Group) -> None:
    """Prepare for another full backup."""
    ctl = group.ctl
    if ctl.get_state(group.s[0], "vol0") not in (sSyncReady, sStopped):
        ctl.stop(group.s[0], "vol0", "force")
    ctl.clear(group.a[0], "vol0")


@pytest.mark.parametrize("fault", ["cut", "corrupt", "blackhole"])
def test_full_backup_is_cut(group: Group, volume: Volume, fault: str) -> None:
    """It fails, says so, and leaves both sides as they were; given again it succeeds."""
    s0, a0, link = group.s[0], group.a[0], group.link("s0", "a0")
    full_again(group)
    with impatient(group, "s0", "a0") if fault == "blackhole" else nullcontext():
        spoil: dict[str, Callable[[int], None]] = {
            "cut": link.cut_after,
            "corrupt": link.corrupt,
            "blackhole": link.stall_after,
        }
        spoil[fault](3 * MIB)
        with pytest.raises(WalbError):
            group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
        wait_until(lambda: group.ctl.get_state(a0, "vol0") == sSyncReady, "the archive to give it up")
        assert group.ctl.get_state(s0, "vol0") == sSyncReady
        link.heal()
    gid = group.ctl.full_backup(s0, "vol0", timeoutS=WAIT_S)
    assert gid is not None
    assert group.restored(volume, gid) == volume.model


def test_hash_backup_is_cut(group: Group, volume: Volume) -> None:
    """It fails and costs no restore point; given again, the whole volume is compared, and what differs is sent."""
    s0, a0, link = group.s[0], group.a[0], group.link("s0", "a0")
    group.ctl.stop(s0, "vol0")
    group.ctl.stop(group.p[0], "vol0", "empty")  # so that no further point comes
    group.ctl.start(group.p[0], "vol0")
    points = group.ctl.get_restorable_gid(a0, "vol0", "all")
    fill(volume, 6 * MIB)
    link.cut_after(3 * MIB)
    with pytest.raises(WalbError):
        group.ctl.hash_backup(s0, "vol0", timeoutS=WAIT_S)
    wait_until(lambda: group.ctl.get_state(a0, "vol0") == "Archived", "the archive to give it up")
    assert group.ctl.get_state(s0, "vol0") == sSyncReady
    assert group.ctl.get_restorable_gid(a0, "vol0", "all") == points
    link.heal()
    sent = Sent(link)
    gid = group.ctl.hash_backup(s0, "vol0", timeoutS=WAIT_S)
    assert gid is not None
    assert sent.b < 6 * MIB + SLACK
    assert group.restored(volume, gid) == volume.model
    assert set(points) <= set(group.ctl.get_restorable_gid(a0, "vol0", "all"))


def test_full_replication_is_cut_and_goes_on(group: Group, volume: Volume) -> None:
    """What the destination has made durable is not sent again."""
    a0, a1, link = *group.a, group.link("a0", "a1")
    group.ctl.clear(a1, "vol0")
    fill(volume, 8 * MIB)
    gid = group.snapshot(volume)
    group.ctl.apply(a0, "vol0", gid, timeoutS=WAIT_S)
    link.stall_after(6 * MIB)
    group.ctl.replicate_once_nbk(a0, "vol0", a1)
    wait_until(lambda: link.is_silent and durable(group, "a1") >= 3 * MIB, "what was sent to be durable")
    link.cut()
    with pytest.raises(WalbError):
        group.ctl.wait_for_replicated(a0, "vol0", a1, gid, timeoutS=WAIT_S)
    wait_until(lambda: group.ctl.get_state(a1, "vol0") == sSyncReady, "the destination to give it up")
    link.heal()
    again = Sent(link)
    group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S)
    assert again.b < 6 * MIB
    assert group.restored(volume, gid, archive=1) == volume.model


def test_diff_replication_is_cut_and_goes_on(group: Group, volume: Volume) -> None:
    a0, a1, link = *group.a, group.link("a0", "a1")
    replica(group)
    for _ in range(4):
        fill(volume, 2 * MIB)
        group.snapshot(volume)
    sent = Sent(link)
    link.cut_after(5 * MIB)
    with pytest.raises(WalbError):
        group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S, dontMerge=True)
    reached = group.ctl.get_latest_snapshot_info(a1, "vol0")["vol0"]
    link.heal()
    gid = group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S, dontMerge=True)
    assert reached < gid
    assert sent.b < 8 * MIB + PIECE + SLACK
    assert group.restored(volume, gid, archive=1) == volume.model


@pytest.mark.parametrize("resync", [False, True], ids=["hash", "resync"])
def test_comparing_replication_is_cut_and_goes_on(group: Group, volume: Volume, resync: bool) -> None:
    """Only what differs is sent, and a resync does not send again what was written already."""
    a0, a1, link = *group.a, group.link("a0", "a1")
    replica(group)
    fill(volume, 6 * MIB)
    gid = group.snapshot(volume)
    group.ctl.apply(a0, "vol0", gid, timeoutS=WAIT_S)  # the diffs from there on are gone
    sent = Sent(link)
    link.cut_after(3 * MIB)
    with pytest.raises(WalbError):
        group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S, doResync=resync)
    link.heal()
    again = Sent(link)
    group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S, doResync=resync)
    assert again.b < 6 * MIB + SLACK
    assert sent.b < 9 * MIB + SLACK
    assert group.restored(volume, gid, archive=1) == volume.model


def durable(group: Group, archive: str) -> int:
    """Return how much of a full copy an archive has noted as durable [byte]."""
    record = json.loads((group.root / archive / "vol0" / "volume.json").read_text())
    return int((record["record"]["full_progress"] or {"offset_b": 0})["offset_b"])


def replica(group: Group) -> None:
    """Bring the second archive up to the first, whatever it has."""
    a0, a1 = group.a
    if group.ctl.get_state(a1, "vol0") not in ("Clear", sSyncReady):
        group.ctl.clear(a1, "vol0")
    group.ctl.replicate_once(a0, "vol0", a1, timeoutS=WAIT_S)
