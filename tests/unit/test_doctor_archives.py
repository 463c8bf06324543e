"""The doctor's judgement on archives: lost data, replicas, policies; observations made by hand."""

from __future__ import annotations

import msgspec

from tests.kit.doctor_scene import NOW, OTHER_LINEAGE, OTHER_UUID, Scene, calls, diff, group_file
from walbd.controller.doctor import Consent
from walbd.controller.doctor.mend import Allowed
from walbd.format.policy import Policy, Replication
from walbd.protocol.base import JobInfo, JobState
from walbd.protocol.policy import PolicyView, ReplicationView, Trouble

# Archives


def test_case_1() -> None:
    finding = Scene().forget("a1").only("secondary-data-lost")
    assert calls(finding) == ["stop_synchronizing(a1, 'vol0')", "replicate(a0, 'vol0', a1, True)"]
    given_up = Scene().dead("a1").look(lost=frozenset({"a1"}))
    assert calls(given_up[-1]) == ["stop_synchronizing(a1, 'vol0')"]


def test_case_2() -> None:
    finding = Scene().forget("a0").only("primary-data-lost")
    assert finding.evidence["good_copies"] == ["a1"]
    assert calls(finding) == [
        "stop_synchronizing(a0, 'vol0')", "retarget(s0, a1)", "retarget(s1, a1)", "promote_archive(a1)"
    ]  # fmt: skip
    assert finding.consent is Consent.YES
    assert finding.waits_for == ()
    found = {f.code: f for f in Scene().forget("a0").dead("p1").look()}
    assert found["primary-data-lost"].waits_for == ("p1",)


def test_case_2_of_an_archive_that_is_given_up() -> None:
    found = Scene().dead("a0").look(lost=frozenset({"a0"}))
    assert [f.code for f in found] == ["archive-down", "primary-data-lost"]
    assert "promote_archive(a1)" in calls(found[1])
    assert [f.code for f in Scene().dead("a0").look()] == ["archive-down"]


def test_case_2_of_one_volume_of_several() -> None:
    scene = Scene()
    for name, status in list(scene.status.items()):
        (v,) = status.volumes
        more = msgspec.structs.replace(v, volume="vol1")
        scene.server(name, volumes=[more] if name == "a0" else [v, more])
    finding = scene.only("primary-data-lost")
    assert calls(finding) == ["stop_synchronizing(a0, 'vol0')", "replicate(a1, 'vol0', a0, True)"]


def test_case_3() -> None:
    scene = Scene(group_file(archives=1)).forget("a0")
    assert calls(scene.only("primary-data-lost")) == ["stop(s0, 'vol0')", "full_backup(s0, 'vol0')"]


def test_case_3_with_a_dead_secondary_waits_for_it() -> None:
    found = {f.code: f for f in Scene().forget("a0").dead("a1").look()}
    assert found["primary-data-lost"].waits_for == ("a1",)


def test_case_3_with_an_old_copy() -> None:
    scene = Scene().forget("a0").part("a1", latest_gid=4)
    for p in ("p0", "p1"):
        (v,) = scene.status[p].volumes
        scene.part(p, hops=v.hops[:1])
    finding = scene.only("primary-data-lost")
    assert finding.evidence["old_copies"] == ["a1"]
    assert calls(finding)[-1] == "promote_archive(a1)"  # the next look finds the gap: a hash backup


def test_broken_files_are_destroyed_only_when_another_copy_is_good() -> None:
    finding = next(f for f in Scene().part("a0", state="Broken", error="x").look() if f.code == "archive-broken")
    assert finding.consent is Consent.YES
    assert finding.evidence["other_copies"] == ["a1"]
    unproved = Scene().part("a0", state="Broken", error="x").dead("s0")  # a1 may be far behind
    finding = next(f for f in unproved.look() if f.code == "archive-broken")
    assert finding.consent is Consent.LOSE
    alone = Scene(group_file(archives=1)).part("a0", state="Broken", error="x")
    finding = next(f for f in alone.look() if f.code == "archive-broken")
    assert finding.consent is Consent.LOSE
    assert not Allowed(yes=True).covers(finding)
    assert not Allowed(yes=True, lose=frozenset({"vol1"})).covers(finding)
    assert Allowed(lose=frozenset({"vol0"})).covers(finding)


def test_replicas() -> None:
    scene = Scene()
    for p in ("p0", "p1"):
        (v,) = scene.status[p].volumes
        scene.part(p, hops=v.hops[:1])
    finding = scene.only("replica-not-fed")
    assert calls(finding) == ["replicate(a0, 'vol0', a1, True)"]
    assert finding.consent is Consent.NONE
    scene.part("a1", latest_gid=2)  # the primary has applied what it needs: a comparing copy
    assert scene.only("replica-not-fed").consent is Consent.YES
    assert Scene().part("a1", latest_gid=7).only("replica-gap").evidence["missing"] == "7..10"
    assert Scene().part("a1", uuid=OTHER_UUID).only("replica-gap").steps
    other = Scene().part("a1", archive_uuid=OTHER_LINEAGE).only("replica-other-lineage")
    assert other.consent is Consent.LOSE
    assert other.steps[0].command == "walbc replicate vol0 a1 --from a0 --sync --resync"


def with_policy(*, last: int, troubles: list[Trouble] | None = None) -> Scene:
    """A group in which the policy of a0 replicates to a1 every hour, and proxies feed a0 only."""
    scene = Scene()
    for p in ("p0", "p1"):
        (v,) = scene.status[p].volumes
        scene.part(p, hops=v.hops[:1])
    scene.part("a1", latest_gid=7)
    row = ReplicationView(name="far", dest="127.0.0.1:301", enabled=True, last=last, next=NOW, running=False)
    policy = Policy(replications=(Replication(name="far", dest="127.0.0.1:301", interval_s=3600),))
    scene.policies["a0", "vol0"] = PolicyView(
        policy=policy, is_default=False, enabled=True, next="", applied=0, merged=0, replications=[row],
        troubles=troubles or [],
    )  # fmt: skip
    return scene


def test_a_replica_that_the_policy_keeps_up_to_date() -> None:
    assert with_policy(last=0).look() == []
    assert with_policy(last=NOW - 3 * 3600).look() == []
    finding = with_policy(last=NOW - 3 * 3600 - 1).only("replica-behind")
    assert calls(finding) == ["replicate(a0, 'vol0', a1, False)"]


def test_a_policy_in_trouble() -> None:
    trouble = Trouble(
        what="merge", error_code="disk-full", error="no space", failures=3, since=NOW - 50, retry=NOW
    )
    assert "no space" in with_policy(last=NOW, troubles=[trouble]).only("policy-trouble").text


def test_an_archive_that_lags() -> None:
    scene = Scene().part("a0", latest_gid=7).waits("p0", "a0", diff(7, 10)).hop("p0", "a0", oldest=NOW - 100)
    assert scene.only("lagging").evidence["oldest_waits_s"] == 100


def test_put_aside_and_failed() -> None:
    Scene().part("a0", error="2 wdiffs put aside").only("put-aside")
    scene = Scene()
    job = JobInfo(job=3, name="apply", volume="vol0", state=JobState.FAILED, started=NOW - 90, ended=NOW - 60)
    scene.jobs["a0"] = [job]
    scene.only("job-failed")
    again = JobInfo(job=4, name="apply", volume="vol0", state=JobState.DONE, started=NOW - 50, ended=NOW - 40)
    scene.jobs["a0"] = [job, again]
    assert scene.look() == []
