"""Copies at other archives: what is checked first, what is asked, and what holds after a failure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.fake_group import NOW, FakeGroup, FakeVolume
from walbd.controller import CMPR_LZ4, CompressOpt, SyncOpt, replication
from walbd.errors import BadState, ConnectError, NotFound, Refused, TimedOut, UsageError
from walbd.protocol import control as c
from walbd.protocol import maintenance as m


@pytest.fixture
def copied(big: FakeGroup) -> FakeGroup:
    """vol0 is backed up to a0, fed by both proxies, and replicated to a1, up to generation 3."""
    big.ctl.init_storage(big.s[0], "vol0", "/dev/x")
    big.ctl.full_backup(big.s[0], "vol0")
    for _ in range(2):
        big.ctl.snapshot(big.s[0], "vol0", big.a[:1])
    big.ctl.replicate_once(big.a[0], "vol0", big.a[1])
    big.requests.clear()
    return big


def sent(group: FakeGroup) -> list[m.Replicate]:
    return [request for _, request in group.requests if isinstance(request, m.Replicate)]


def test_replicate_to_an_archive_that_knows_nothing(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.clear(a1, "vol0")
    copied.requests.clear()
    opt = SyncOpt(CompressOpt(CMPR_LZ4, 2), maxWdiffMergeSizeU="5m", bulkSizeU="32k")
    assert ctl.replicate_once(a0, "vol0", a1, dontMerge=True, syncOpt=opt) == 3
    assert copied.changes() == ["a1 archive-init-vol vol0", "a0 replicate vol0"]
    assert sent(copied) == [
        m.Replicate(
            volume="vol0",
            dest=a1.get_host_port(),
            gid=3,
            dont_merge=True,
            compress="lz4:2",
            merge_size_max_b=5 << 20,
            bulk_b=32 << 10,
        )
    ]
    assert ctl.get_restorable_gid(a1, "vol0") == [1, 2, 3]


def test_replicate_up_to_a_generation(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.clear(a1, "vol0")
    ctl.run_ctl(a1, ["init-vol", "vol0"])
    assert ctl.replicate_once(a0, "vol0", a1, gid=2) == 2
    assert ctl.get_restorable_gid(a1, "vol0") == [1, 2]


def test_replicate_in_two_halves(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.snapshot(copied.s[0], "vol0", copied.a[:1])
    copied.hold("replicate")
    gid = ctl.replicate_once_nbk(a0, "vol0", a1)
    assert gid == 4
    assert gid not in ctl.get_restorable_gid(a1, "vol0")
    copied.release("replicate")
    ctl.wait_for_replicated(a0, "vol0", a1, gid)
    assert gid in ctl.get_restorable_gid(a1, "vol0")
    ctl.wait_for_replicated(a0, "vol0", a1, gid)  # it holds still


def test_another_lineage_needs_resync(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    copied.volume("a1").archive_uuid = bytes(16)
    with pytest.raises(BadState, match="different lineages") as caught:
        ctl.replicate_once(a0, "vol0", a1)
    assert "--resync" in caught.value.hint
    assert copied.changes() == []
    assert ctl.replicate_once(a0, "vol0", a1, doResync=True) == 3
    assert sent(copied)[0].resync
    assert ctl.get_archive_uuid(a1, "vol0") == ctl.get_archive_uuid(a0, "vol0")


@pytest.mark.parametrize("source_lb", [1 << 16, (1 << 16) + 3])
def test_a_smaller_copy_grows_first(copied: FakeGroup, source_lb: int) -> None:
    copied.volume("a0").size_lb = source_lb
    copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1])
    assert ("a1", c.Resize(volume="vol0", size_b=source_lb * 512)) in copied.requests
    assert copied.changes() == ["a1 resize vol0", "a0 replicate vol0"]


def test_a_larger_copy_is_refused(copied: FakeGroup) -> None:
    copied.volume("a1").size_lb = 1 << 16
    with pytest.raises(BadState, match="larger"):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1])
    assert copied.changes() == []


@pytest.mark.parametrize(
    ("at", "state", "hint"),
    [
        ("a0", "Stopped", "walbc start a0 vol0"),
        ("a0", "SyncReady", ""),
        ("a1", "Stopped", "walbc start a1 vol0"),
        ("a1", "FullSync", ""),
    ],
)
def test_states_in_which_nothing_is_replicated(copied: FakeGroup, at: str, state: str, hint: str) -> None:
    copied.volume(at).state = state
    with pytest.raises(BadState) as caught:
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1])
    assert (caught.value.hint, caught.value.facts["server"]) == (hint, at)
    assert copied.changes() == []


def test_both_archives_must_answer(copied: FakeGroup) -> None:
    copied.kill("a1")
    with pytest.raises(ConnectError):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1])
    assert copied.changes() == []


def test_an_archive_is_not_replicated_to_itself(copied: FakeGroup) -> None:
    with pytest.raises(UsageError, match="itself"):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[0])
    with pytest.raises(UsageError):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.p[0])
    with pytest.raises(TypeError):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1], doResync=1)  # type: ignore[arg-type]


def test_a_copy_whose_base_is_the_goal_is_complete(copied: FakeGroup) -> None:
    copied.volume("a1").base = 3
    copied.volume("a1").points = [3]  # no diffs any more
    copied.ctl.wait_for_replicated(copied.a[0], "vol0", copied.a[1], 3)
    with pytest.raises(Refused, match="before its goal") as caught:
        copied.ctl.wait_for_replicated(copied.a[0], "vol0", copied.a[1], 4)
    assert caught.value.facts["reached"] == 3


def test_the_error_of_a_replication(copied: FakeGroup) -> None:
    copied.fail_job("replicate", Refused("no room there", hint="make room"))
    with pytest.raises(Refused, match="no room there"):
        copied.ctl.replicate_once(copied.a[0], "vol0", copied.a[1])


# Synchronising


def test_synchronize(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.synchronize(a0, "vol0", a1, syncOpt=SyncOpt(delayS=4))
    changes = copied.changes()
    assert changes[:2] == ["p0 stop vol0", "p1 stop vol0"]
    assert ("p0", c.Stop(volume="vol0", how=c.StopHow.EMPTY)) in copied.requests
    assert changes.index("p1 archive-info-add vol0") < changes.index("a0 replicate vol0")
    assert changes[-5:] == ["p0 start vol0", "p1 start vol0", "s0 kick", "s1 kick", "a0 forget-replica vol0"]
    assert ctl.is_synchronizing(a1, "vol0")
    assert ctl.get_archive_info(copied.p[1], "vol0", a1)[1].delayS == 4
    gid = ctl.snapshot(copied.s[0], "vol0", copied.a)
    assert gid in ctl.get_restorable_gid(a1, "vol0")
    copied.volume("a0").replicas = [
        m.ReplicaPosition(node="a1", address=a1.get_host_port(), gid=2, timestamp=NOW, seen=NOW)
    ]
    ctl.synchronize(a0, "vol0", a1)  # again: nothing is lost
    assert ctl.is_synchronizing(a1, "vol0")
    assert ctl.get_replica_positions(a0, "vol0") == []  # it is fed now, and needs nothing of a0


def test_replicate_and_synchronize(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    assert ctl.replicate(a0, "vol0", a1, False) == 3
    assert not ctl.is_synchronizing(a1, "vol0")
    assert ctl.replicate(a0, "vol0", a1, True) == 3
    assert ctl.is_synchronizing(a1, "vol0")
    assert len(sent(copied)) == 3


def test_synchronize_that_fails_leaves_things_as_they_were(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    copied.fail_job("replicate", Refused("no"))
    with pytest.raises(Refused, match="no"):
        ctl.synchronize(a0, "vol0", a1)
    assert not ctl.is_synchronizing(a1, "vol0")
    assert ctl.is_synchronizing(a0, "vol0")
    assert [ctl.get_state(p, "vol0") for p in copied.p] == ["Started", "Started"]


def test_synchronize_keeps_a_destination_that_was_fed_before(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.synchronize(a0, "vol0", a1)
    copied.fail_job("replicate", Refused("no"))
    with pytest.raises(Refused):
        ctl.synchronize(a0, "vol0", a1)
    assert ctl.is_synchronizing(a1, "vol0")


def test_synchronize_when_a_proxy_cannot_send_everything(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    copied.frozen = True
    copied.volume("p1").waiting["a0"] = [9]
    with pytest.raises(Refused, match="not empty"):
        ctl.synchronize(a0, "vol0", a1)
    assert [ctl.get_state(p, "vol0") for p in copied.p] == ["Started", "Started"]
    assert copied.volume("p1").waiting["a0"] == [9]
    assert not ctl.is_synchronizing(a1, "vol0")


def test_synchronize_waits_for_nothing_that_cannot_come(
    copied: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the proxies deliver everything, logs fill: an archive that takes nothing must not hold that up."""
    ctl, (a0, a1) = copied.ctl, copied.a
    ctl.synchronize(a0, "vol0", a1)
    copied.requests.clear()
    copied.volume("a1").state = "Stopped"
    with pytest.raises(BadState) as caught:
        ctl._verify_feeding(a0, "vol0")
    assert "walbc stop-synchronizing a1 vol0" in caught.value.hint
    with pytest.raises(BadState):
        ctl.synchronize(a0, "vol0", a1)
    assert copied.changes() == []
    copied.volume("a1").state = "Archived"
    monkeypatch.setattr(replication, "_HANGS_S", 0.1)
    copied.hold("stop")
    undo = ctl._undo_synchronize

    def release_and_undo(*args: Any) -> None:
        copied.release_all()
        undo(*args)

    monkeypatch.setattr(ctl, "_undo_synchronize", release_and_undo)
    with pytest.raises(TimedOut) as late:
        ctl.synchronize(a0, "vol0", a1)
    assert "walbc status vol0" in late.value.hint
    assert [ctl.get_state(p, "vol0") for p in copied.p] == ["Started", "Started"]
    assert ctl.get_archive_info_list(copied.p[0], "vol0") == ["a0", "a1"]


def test_synchronize_when_a_proxy_dies_meanwhile(copied: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    copied.fail("p1", c.AddArchiveInfo, None)
    with pytest.raises(ConnectError):
        ctl.synchronize(a0, "vol0", a1)
    assert ctl.get_archive_info_list(copied.p[0], "vol0") == ["a0"]
    copied.fail("p1", c.AddArchiveInfo, None)
    copied.fail("p1", c.Start, Refused("never"))
    with pytest.raises(ConnectError):
        ctl.synchronize(a0, "vol0", a1)
    assert "p1 vol0 is not as before: never" in capsys.readouterr().err
    assert ctl.get_state(copied.p[0], "vol0") == "Started"


def test_synchronize_starts_the_other_proxies_when_one_cannot(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    copied.fail("p0", c.Start, Refused("never"))
    with pytest.raises(Refused, match="never"):
        ctl.synchronize(a0, "vol0", a1)
    assert [ctl.get_state(p, "vol0") for p in copied.p] == ["Stopped", "Started"]


def test_synchronize_from_an_archive_that_is_not_fed(copied: FakeGroup) -> None:
    ctl, (a0, a1) = copied.ctl, copied.a
    for call in (lambda: ctl.synchronize(a1, "vol0", a0), lambda: ctl.replicate(a1, "vol0", a0, True)):
        with pytest.raises(BadState, match="not fed") as caught:
            call()
        assert caught.value.facts["feeds"] == "a0"
    assert copied.changes() == []


def test_synchronize_changes_nothing_unless_all_proxies_answer(copied: FakeGroup) -> None:
    copied.kill("p1")
    with pytest.raises(ConnectError):
        copied.ctl.synchronize(copied.a[0], "vol0", copied.a[1])
    assert copied.changes() == []
    copied.revive("p1")
    copied.volume("p1").state = "WaitForEmpty"
    with pytest.raises(BadState):
        copied.ctl.synchronize(copied.a[0], "vol0", copied.a[1])
    assert copied.changes() == []


def test_synchronize_while_nothing_is_backed_up(big: FakeGroup) -> None:
    volume = FakeVolume("Archived", points=[5], archive_uuid=bytes(16))
    big.servers["a0"].volumes["vol0"] = volume
    big.ctl.synchronize(big.a[0], "vol0", big.a[1])
    assert big.ctl.is_synchronizing(big.a[1], "vol0")
    assert big.ctl.get_restorable_gid(big.a[1], "vol0") == [5]


# Positions


def test_replica_positions(ready: FakeGroup) -> None:
    row = m.ReplicaPosition(node="b0", address="h:1", gid=2, timestamp=NOW, seen=NOW, failures=1, error="away")
    ready.volume("a0").replicas = [row]
    assert ready.ctl.get_replica_positions(ready.a[0], "vol0") == [row]
    assert ready.ctl.run_ctl(ready.a[0], ["get", "replicas", "vol0"]).startswith("name:b0\taddress:h:1\tgid:2\t")
    ready.ctl.forget_replica(ready.a[0], "vol0", "b0")
    assert ready.ctl.get_replica_positions(ready.a[0], "vol0") == []
    with pytest.raises(NotFound):
        ready.ctl.forget_replica(ready.a[0], "vol0", "b0")
    with pytest.raises(UsageError):
        ready.ctl.forget_replica(ready.a[0], "vol0", "no name")
