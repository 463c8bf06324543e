"""The doctor's judgement, each condition by itself: what makes a finding, and what keeps one away."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from tests.kit.doctor_scene import NOW, OTHER_LINEAGE, OTHER_UUID, Scene, calls, diff, group_file
from tests.unit.test_doctor_archives import with_policy
from walbd.controller.doctor import Consent, Finding, Observation, diagnose
from walbd.controller.doctor.case import Case
from walbd.controller.doctor.check_servers import time_left_s
from walbd.controller.doctor.diagnose import confirmed, intents_of
from walbd.controller.overview import Word
from walbd.protocol.base import JobInfo, JobState
from walbd.protocol.control import ProxyHealth

BOTH = 'target = "s0"\ndevices = { s0 = "/dev/x", s1 = "/dev/y" }'


def by_code(scene: Scene, **more: object) -> dict[str, Finding]:
    return {f.code: f for f in scene.look(**more)}


def case_of(o: Observation) -> Case:
    return Case(o, "vol0", intents_of(o)["vol0"])


def only_fed(scene: Scene, *archives: str) -> Scene:
    """Let the proxies send only to these archives."""
    for p in ("p0", "p1"):
        (v,) = scene.status[p].volumes
        scene.part(p, hops=[hop for hop in v.hops if hop.dest in archives])
    return scene


def two_volumes(scene: Scene) -> Scene:
    """Let vol1 be all that vol0 is."""
    for name, status in list(scene.status.items()):
        (v,) = status.volumes
        scene.server(name, volumes=[v, msgspec.structs.replace(v, volume="vol1")])
    return scene


def health(port: int, *, available: bool = True) -> ProxyHealth:
    return ProxyHealth(address=f"127.0.0.1:{port}", available=available, next_check_s=1)


# The proof that nothing is missing


def test_a_whole_chain_in_words_and_numbers() -> None:
    scene = (
        Scene().part("a0", latest_gid=7).waits("p0", "a0", diff(5, 7), diff(6, 8)).waits("p1", "a0", diff(8, 10))
    )
    chain = case_of(scene.observe()).chain("a0")
    assert chain.is_whole
    assert chain.text == (
        "the archive has generation 7, delivered is 10, 2 diffs wait at proxies; nothing is missing"
    )  # what the archive has already does not wait
    assert chain.evidence == {"archive_gid": 7, "waiting_diffs": 2, "delivered_gid": 10}


def test_a_broken_chain_in_words_and_numbers() -> None:
    scene = Scene().part("a0", latest_gid=7).waits("p0", "a0", diff(8, 9)).dead("p1")
    chain = case_of(scene.observe()).chain("a0")
    assert not chain.is_whole
    assert chain.text.endswith("; nobody has 7 to 8, 9 to 10")
    assert chain.evidence == {
        "archive_gid": 7, "waiting_diffs": 1, "delivered_gid": 10, "missing": "7..8, 9..10", "not_asked": "p1"
    }  # fmt: skip


def test_what_was_delivered_of_another_log_proves_nothing() -> None:
    chain = case_of(Scene().part("s0", uuid=OTHER_UUID).observe()).chain("a0")
    assert not chain.is_whole
    assert chain.text == "the archive has generation 10, delivered is not known"
    assert chain.evidence == {"archive_gid": 10, "waiting_diffs": 0}


def test_what_is_said_of_a_proxy_that_lost_a_volume() -> None:
    """Lost is only what nobody can have any more."""
    proved = Scene().forget("p0").only("proxy-data-lost")
    assert str(proved.evidence["proof"]).startswith("a0: proved: ")
    assert "; a1: proved: " in str(proved.evidence["proof"])
    lost = by_code(Scene().forget("p0").part("a0", latest_gid=7))["proxy-data-lost"]
    assert str(lost.evidence["proof"]).startswith("a0: lost: ")
    assert "diffs are lost with it, see gap" in lost.text
    # Another proxy does not answer; or its directory is there, and its record cannot be read.
    for scene in (Scene().forget("p0").dead("p1"), Scene().part("p0", state="Broken", error="bad", hops=[])):
        found = by_code(scene.part("a0", latest_gid=7).part("a1", latest_gid=7))
        assert "possible-gap" in found
        assert "gap" not in found
        assert str(found["proxy-data-lost"].evidence["proof"]).startswith("a0: not proved: ")
        assert "is not known yet" in found["proxy-data-lost"].text
    unknown = by_code(Scene(group_file(archives=1)).forget("p0", "a0"))["proxy-data-lost"]
    assert unknown.evidence["proof"] == ""
    assert "is not known yet" in unknown.text


# Copies


def test_an_archive_that_was_only_initialised_holds_nothing() -> None:
    finding = Scene().forget("a0").part("a1", state="SyncReady").only("primary-data-lost")
    assert (finding.evidence["good_copies"], finding.evidence["old_copies"]) == ([], [])
    assert "no archive has a copy" in finding.text
    assert by_code(Scene().part("a0", state="SyncReady"))["primary-data-lost"].evidence["state"] == "SyncReady"
    assert by_code(Scene().part("a1", state="SyncReady")).keys() == {"secondary-data-lost"}


def test_a_copy_with_a_hole_is_no_good_copy() -> None:
    finding = Scene().forget("a0").part("a1", latest_gid=7).only("primary-data-lost")
    assert (finding.evidence["good_copies"], finding.evidence["old_copies"]) == ([], ["a1"])
    assert "then a hash backup" in finding.text
    broken = by_code(Scene().part("a0", state="Broken", error="x").part("a1", latest_gid=7))["archive-broken"]
    assert broken.consent is Consent.LOSE


def test_an_old_copy_of_one_volume_of_several_is_copied_back() -> None:
    scene = two_volumes(Scene())
    (v, w) = scene.status["a0"].volumes
    scene.server("a0", volumes=[w])
    old = msgspec.structs.replace(scene.status["a1"].volumes[0], latest_gid=4)
    scene.server("a1", volumes=[old, scene.status["a1"].volumes[1]])
    finding = by_code(scene)["primary-data-lost"]
    assert calls(finding) == [
        "stop_synchronizing(a0, 'vol0')",
        "replicate(a1, 'vol0', a0, False)",
        "stop(s0, 'vol0')",
        "hash_backup(s0, 'vol0')",
    ]
    assert finding.consent is Consent.YES
    assert finding.waits_for == ()
    assert by_code(scene.dead("s1"))["primary-data-lost"].waits_for == ("s1",)
    assert v.volume == finding.volume


def test_every_step_that_drops_something_asks_first() -> None:
    promoted = Scene().forget("a0").only("primary-data-lost")
    assert {step.consent for step in promoted.steps} == {Consent.YES}
    full = by_code(Scene(group_file(archives=1)).forget("a0").part("s0", state="Stopped"))["primary-data-lost"]
    assert [(step.method, step.consent) for step in full.steps] == [("full_backup", Consent.YES)]
    two = Scene().part("s1", state="Target").only("two-targets")
    assert [step.consent for step in two.steps] == [Consent.YES, Consent.YES, Consent.NONE]
    other = Scene().server("s0", server={"archive": "elsewhere:1"}).only("wrong-primary")
    assert other.consent is Consent.YES


def test_a_backup_makes_other_storages_stand_by() -> None:
    scene = Scene().part("s0", overflow=True).part("s1", state="Stopped")
    steps = scene.only("overflow").steps
    assert [step.python for step in steps] == [
        "walbc.stop(s0, 'vol0')", "walbc.reset(s1, 'vol0')", "walbc.go_standby(s1, 'vol0')",
        "walbc.hash_backup(s0, 'vol0')",
    ]  # fmt: skip
    assert steps[1].consent is Consent.YES


# Which findings stay away


def test_a_volume_on_which_somebody_is_at_work_is_left_alone() -> None:
    """The hole may be what a stop of the proxy is just filling."""
    scene = Scene().part("p0", state="WaitForEmpty").part("a0", latest_gid=7)
    running = JobInfo(job=1, name="stop", volume="vol0", state=JobState.RUNNING, started=NOW - 5, done=0, total=1)
    scene.jobs["p0"] = [running]
    assert scene.look() == []


def test_behind_a_stopped_archive_nothing_is_missing() -> None:
    assert Scene().part("a0", state="Stopped").part("a1", latest_gid=7).codes() == ["archive-stopped"]
    assert Scene().part("a1", state="Stopped", latest_gid=7).codes() == ["archive-stopped"]
    assert Scene().part("a0", state="Stopped", latest_gid=7).codes() == ["archive-stopped"]


def test_a_replica_that_is_fed_or_has_everything_is_not_behind() -> None:
    late = NOW - 100 * 3600
    assert with_policy(last=late).codes() == ["replica-behind"]
    assert with_policy(last=late).part("a1", latest_gid=10).look() == []
    fed = with_policy(last=late)
    for p in ("p0", "p1"):
        fed.part(p, hops=Scene().status[p].volumes[0].hops)
    assert fed.part("a1", latest_gid=10).look() == []
    assert fed.part("a1", latest_gid=7).codes() == ["replica-gap"]


def test_when_an_archive_lags() -> None:
    scene = Scene().part("a0", latest_gid=7).waits("p0", "a0", diff(7, 10))
    assert scene.hop("p0", "a0", oldest=NOW - 60).look() == []
    assert calls(scene.hop("p0", "a0", oldest=NOW - 61).only("lagging")) == ["kick_proxy('vol0', a0)"]


def test_what_must_be_seen_twice() -> None:
    """Commands bring these about for a moment; and a restart of the proxies is no loss."""
    for scene in (only_fed(Scene(), "a0"), Scene().dead("p0", "p1"), Scene().part("a1", latest_gid=7)):
        found = diagnose(scene.observe())
        assert [f.code for f in confirmed(found, []) if not f.code.endswith("-down") or f.server == ""] == []


def test_what_need_not_be_seen_twice() -> None:
    found = diagnose(Scene().dead("s0").observe())
    assert found
    assert confirmed(found, []) == found


def test_only_the_volume_that_was_asked_for_is_judged() -> None:
    scene = two_volumes(Scene())
    for name in ("p0", "p1"):
        scene.server(
            name, volumes=[msgspec.structs.replace(v, state="Stopped") for v in scene.status[name].volumes]
        )
    assert {f.volume for f in scene.look()} == {"vol0", "vol1"}
    assert {f.volume for f in scene.look(vol="vol1")} == {"vol1"}


# What is waited for


def test_what_a_new_replica_waits_for() -> None:
    """Proxies are told of another archive after they have delivered everything."""
    three = group_file(archives=3, volume='target = "s0"\narchives = ["a0", "a1", "a2"]')
    assert by_code(Scene(three).forget("a1").dead("a2"))["secondary-data-lost"].waits_for == ("a2",)
    not_fed = only_fed(Scene(three).forget("a1").dead("a2"), "a0", "a1")
    assert by_code(not_fed)["secondary-data-lost"].waits_for == ()
    other = by_code(Scene().part("a1", archive_uuid=OTHER_LINEAGE).dead("p1"))["replica-other-lineage"]
    assert other.waits_for == ("p1",)
    assert by_code(only_fed(Scene(), "a0").dead("p1"))["replica-not-fed"].waits_for == ("p1",)


def test_what_a_broken_record_waits_for() -> None:
    found = by_code(Scene().part("s0", state="Broken", error="torn").dead("s1"))
    assert found["storage-broken"].waits_for == ("s1",)
    unknown = Scene(group_file(volume='target = "s0"')).part("s0", state="Broken", error="torn", device="")
    finding = by_code(unknown)["storage-broken"]
    assert finding.steps == ()
    assert "devices = { s0" in finding.by_hand


# Servers


def test_an_archive_that_is_down_and_what_waits_for_others() -> None:
    scene = Scene().dead("a1").waits("p0", "a0", diff(8, 10)).waits("p0", "a1", diff(9, 10))
    scene.hop("p0", "a0", oldest=NOW - 50).waits("p1", "a1", diff(8, 9)).hop("p1", "a1", oldest=0)
    finding = scene.only("archive-down")
    assert (finding.evidence["waiting_diffs"], finding.evidence["oldest_waits_s"]) == (2, 5)
    assert "walbc doctor --fix --lost a1" in finding.by_hand


def test_nobody_answers() -> None:
    found = Scene().dead("s0", "s1", "p0", "p1", "a0", "a1").look()
    assert sorted({f.code for f in found}) == ["all-proxies-down", "archive-down", "proxy-down", "storage-down"]


def test_only_logs_that_are_kept_overflow() -> None:
    scene = Scene().dead("p0", "p1").part("s1", log_usage_pb=900)
    assert by_code(scene)["all-proxies-down"].evidence.keys() == {"s0 vol0"}


def test_no_rate_without_time_between_two_looks() -> None:
    scene = Scene()
    first = scene.observe()
    scene.part("s0", log_usage_pb=110)
    (v,) = scene.status["s0"].volumes
    assert time_left_s(scene.observe(first, taken_s=0.0), "s0", v) is None
    assert time_left_s(scene.observe(first, taken_s=1.0), "s0", v) == 8
    assert time_left_s(scene.observe(), "s0", v) is None


@pytest.mark.parametrize(("free_b", "word"), [(9, Word.ERROR), (10, Word.WARN), (29, Word.WARN), (30, None)])
def test_how_full_a_disk_is(free_b: int, word: Word | None) -> None:
    scene = Scene().server("p0", server={"free_b": free_b, "free_reserve_b": 10})
    assert [f.word for f in scene.look()] == ([word] if word is not None else [])


@pytest.mark.parametrize(("free_b", "codes"), [(1000, ["disk-full"]), (1001, [])])
def test_a_large_disk_that_fills_fast_is_large(free_b: int, codes: list[str]) -> None:
    scene = Scene().server("p0", server={"free_b": free_b + 100, "free_reserve_b": 10})
    first = scene.observe()
    again = scene.server("p0", server={"free_b": free_b, "free_reserve_b": 10}).observe(first, taken_s=2.0)
    assert [f.code for f in diagnose(again)] == codes


@pytest.mark.parametrize(("by", "says"), [(30, ""), (31, "31 s ahead"), (-30, ""), (-31, "31 s behind")])
def test_clocks(by: int, says: str) -> None:
    found = Scene().server("p0", now=NOW + by).look()
    assert [f.text for f in found] == ([f"the clock of p0 is {says}"] if says else [])


def test_a_missing_proxy_is_no_error_of_the_server() -> None:
    assert Scene().server("s0", errors=["no proxy is available"]).look() == []


def test_a_storage_that_names_no_archive_may_be_told_of_proxies() -> None:
    finding = Scene().server("s0", server={}, proxies=[health(200)]).only("wrong-proxies")
    assert calls(finding) == ["retarget(s0)"]


def test_a_proxy_that_is_not_in_the_group_file_and_does_not_answer() -> None:
    proxies = [health(200), health(201), health(299, available=False)]
    assert Scene().server("s0", proxies=proxies).codes() == ["wrong-proxies"]


def test_a_promotion_waits_for_the_former_primary_unless_that_is_given_up() -> None:
    scene = only_fed(Scene().dead("a0"), "a1")
    for s in ("s0", "s1"):
        scene.server(s, server={"archive": "127.0.0.1:301"})
    finding = by_code(scene)["wrong-primary"]
    assert calls(finding) == ["promote_archive(a1)"]
    assert finding.waits_for == ("a0",)
    assert "which does not have everything" in finding.text
    given_up = by_code(scene, lost=frozenset({"a0"}))["wrong-primary"]
    assert given_up.waits_for == ()


# Storages


def test_a_log_that_fills_where_the_volume_stands_by() -> None:
    finding = Scene().part("s1", log_usage_pb=950).only("log-filling")
    assert (finding.server, calls(finding)) == ("s1", ["kick_storage_all()"])
    assert Scene().part("s1", state="SyncReady", overflow=True, log_usage_pb=1000).look() == []


def test_a_device_that_is_down_comes_first() -> None:
    assert Scene().part("s0", device_error="gone", state="Stopped").codes() == ["device-down"]


def test_an_overflow_that_the_device_has_forgotten() -> None:
    """The record still says it, after the log was emptied."""
    assert "overflowed" in Scene().part("s0", lost="wlog-overflow", state="Stopped").only("overflow").text


def test_which_storages_ought_to_know_a_volume() -> None:
    assert Scene().forget("s1").look() == []  # nobody has said that it has a device
    finding = Scene(group_file(volume=BOTH)).forget("s1").only("storage-metadata-lost")
    assert finding.word is Word.WARN
    assert finding.risk == "nothing; it is not the target"
    assert "back it up" not in finding.text
    target = Scene().forget("s0").only("storage-metadata-lost")
    assert target.word is not Word.WARN
    assert target.risk != finding.risk
    assert "though it is to back it up" in target.text
    assert "storage-metadata-lost" in Scene().forget("s0", "p0", "p1").codes()  # the group file wants it


def test_the_last_backup_is_one_of_this_volume() -> None:
    scene = Scene().part("s0", state="SyncReady")
    of = {"state": JobState.FAILED, "started": NOW - 9000, "ended": NOW - 8000, "error": "cut"}
    scene.jobs["s0"] = [
        JobInfo(job=1, name="full-backup", volume="vol0", **of),  # type: ignore[arg-type]
        JobInfo(job=2, name="hash-backup", volume="vol1", **of),  # type: ignore[arg-type]
        JobInfo(job=3, name="stop", volume="vol0", **of),  # type: ignore[arg-type]
    ]
    assert "the last full-backup has failed: cut" in scene.only("no-target").text


# Who is target


def target_of(scene: Scene) -> str:
    return intents_of(scene.observe())["vol0"].target


def test_a_named_target_that_does_not_answer_stays_the_target() -> None:
    scene = Scene().dead("s0").part("s1", state="Target")
    assert target_of(scene) == "s0"
    both = Scene().part("s0", state="Stopped").part("s1", state="Stopped")
    assert target_of(both) == "s0"
    moved = intents_of(Scene().part("s0", state="Standby").part("s1", state="Target").observe())["vol0"]
    assert (moved.target, moved.named, moved.target_said) == ("s1", "s0", False)


def test_who_is_target_where_nothing_is_said() -> None:
    devices = 'devices = { s0 = "/dev/x", s1 = "/dev/y" }'
    assert target_of(Scene(group_file(volume=devices)).forget("s0")) == "s0"  # it has a device, and lost the rest
    two = Scene(group_file(volume=devices)).part("s0", state="SyncReady").part("s1", state="SyncReady")
    assert target_of(two) == ""
    everywhere = ("s0", "s1", "p0", "p1", "a0", "a1")
    one = group_file(storages=1, volume="")
    for knows in ("s0", "p0", "a0", ""):
        scene = Scene(one).forget(*(name for name in everywhere if name not in (knows, "s1")))
        assert target_of(scene) == ("s0" if knows else ""), knows


# Work that does not go on


@pytest.mark.parametrize("changes", [{"volume": "vol1"}, {"state": JobState.DONE, "ended": NOW}])
def test_only_work_on_the_volume_explains_a_passing_state(changes: dict[str, object]) -> None:
    scene = Scene().part("a1", state="ReplSyncAsServer")
    fields = {"job": 1, "name": "replicate", "volume": "vol0", "state": JobState.RUNNING, "started": NOW - 5}
    scene.jobs["a1"] = [JobInfo(**(fields | changes))]  # type: ignore[arg-type]
    assert "no job is at work" in scene.only("stuck").text
    scene.jobs["a1"] = [JobInfo(**fields)]  # type: ignore[arg-type]
    assert scene.look() == []


def test_how_old_work_is_tells_the_clock_of_its_server() -> None:
    """Not that of the one who looks, who may be an hour ahead."""
    scene = Scene().part("a1", state="ReplSyncAsServer")
    fields = {"job": 1, "name": "replicate", "volume": "vol0", "state": JobState.RUNNING, "started": NOW - 5}
    scene.jobs["a1"] = [JobInfo(**fields)]  # type: ignore[arg-type]
    ahead = dataclasses.replace(scene.observe(), now=NOW + 3600)
    assert "stuck" not in [f.code for f in diagnose(dataclasses.replace(ahead, before=ahead))]
    scene.jobs["a1"] = [JobInfo(**fields | {"started": NOW - 3600})]  # type: ignore[arg-type]
    behind = dataclasses.replace(scene.observe(), now=NOW - 3600)
    assert "stuck" in [f.code for f in diagnose(dataclasses.replace(behind, before=behind))]


@pytest.mark.parametrize(
    "changes",
    [
        {"volume": "vol1"},
        {"name": "stop"},
        {"ended": NOW - 3600},
        {"name": "virt-full-scan", "error_code": "connect"},  # its reader was interrupted
    ],
)
def test_failed_jobs_that_tell_nothing(changes: dict[str, object]) -> None:
    fields = {
        "job": 1,
        "name": "apply",
        "volume": "vol0",
        "state": JobState.FAILED,
        "started": 1,
        "ended": NOW - 9,
    }
    scene = Scene()
    scene.jobs["a0"] = [JobInfo(**(fields | changes))]  # type: ignore[arg-type]
    assert scene.look() == []
    scene.jobs["a0"] = [JobInfo(**fields)]  # type: ignore[arg-type]
    assert scene.codes() == ["job-failed"]


# What a backup waits for, and says


def test_a_backup_waits_for_the_primary_and_for_proxies() -> None:
    scene = Scene().part("s0", overflow=True)
    assert by_code(scene)["overflow"].waits_for == ()
    finding = by_code(scene.dead("p0"))["overflow"]
    assert finding.waits_for == ("p0",)
    assert "p0 may hold diffs that the archive still wants" in finding.by_hand
    assert by_code(scene.dead("a0"))["overflow"].waits_for == ("p0", "a0")
    assert by_code(Scene().part("s0", overflow=True).dead("a1"))["overflow"].waits_for == ()  # it has a base


def test_an_only_archive_that_is_given_up() -> None:
    scene = Scene(group_file(archives=1)).dead("a0")
    finding = by_code(scene, lost=frozenset({"a0"}))["primary-data-lost"]
    assert finding.evidence["state"] == "given up"
    assert "set up a new archive under the name a0" in finding.by_hand
    assert calls(finding)[-1] == "full_backup(s0, 'vol0')"


def test_a_stopped_target_is_not_started_beside_others() -> None:
    scene = Scene(group_file(storages=3, volume='target = "s0"')).part("s0", state="Stopped")
    for s in ("s1", "s2"):
        scene.part(s, state="Target")
    assert scene.codes() == ["two-targets"]


# What copies are taken from, and what must be agreed to


def test_what_copies_back_asks_first() -> None:
    scene = two_volumes(Scene())
    scene.server("a0", volumes=[scene.status["a0"].volumes[1]])
    steps = by_code(scene)["primary-data-lost"].steps
    assert [(step.method, step.consent) for step in steps] == [
        ("stop_synchronizing", Consent.YES),
        ("replicate", Consent.YES),
    ]
    broken = by_code(Scene().part("s0", state="Broken", error="torn").part("s1", state="Stopped"))[
        "storage-broken"
    ]
    assert [(step.method, step.consent) for step in broken.steps] == [
        ("clear", Consent.YES),
        ("init_storage", Consent.NONE),
        ("hash_backup", Consent.YES),
    ]


def test_the_newest_old_copy_is_copied_back() -> None:
    three = group_file(archives=3, volume='target = "s0"\narchives = ["a0", "a1", "a2"]')
    scene = two_volumes(Scene(three))
    scene.server("a0", volumes=[scene.status["a0"].volumes[1]])
    for name, gid in (("a1", 4), ("a2", 6)):
        old = msgspec.structs.replace(scene.status[name].volumes[0], latest_gid=gid)
        scene.server(name, volumes=[old, scene.status[name].volumes[1]])
    finding = by_code(scene)["primary-data-lost"]
    assert finding.evidence["old_copies"] == ["a1", "a2"]
    assert "replicate(a2, 'vol0', a0, False)" in calls(finding)


@pytest.mark.parametrize("changes", [{"archive_uuid": OTHER_LINEAGE}, {"uuid": OTHER_UUID}, {"latest_gid": 9}])
def test_a_hole_is_filled_only_from_the_same_history(changes: dict[str, object]) -> None:
    scene = Scene().part("a0", latest_gid=7).part("a1", **changes)
    assert calls(by_code(scene)["gap"])[-1] == "hash_backup(s0, 'vol0')"


def test_a_history_without_a_name_is_no_common_one() -> None:
    scene = Scene().part("a0", latest_gid=7, archive_uuid="0" * 32).part("a1", archive_uuid="0" * 32)
    assert calls(by_code(scene)["gap"])[-1] == "hash_backup(s0, 'vol0')"


def test_nothing_is_copied_from_a_primary_that_holds_nothing() -> None:
    found = by_code(Scene().forget("a1").part("a0", state="Broken", error="x"))
    assert calls(found["secondary-data-lost"]) == ["stop_synchronizing(a1, 'vol0')"]


@pytest.mark.parametrize(("gid", "consent"), [(2, Consent.YES), (3, Consent.NONE)])
def test_copying_diffs_needs_no_consent(gid: int, consent: Consent) -> None:
    """The base of the primary is generation 3: from there on it still has the diffs."""
    assert only_fed(Scene(), "a0").part("a1", latest_gid=gid).only("replica-not-fed").consent is consent


def test_a_replica_is_no_concern_while_the_log_is_lost() -> None:
    """The backup that the target needs brings it what is missing, too."""
    scene = Scene().part("a1", latest_gid=7)
    assert scene.part("s0", lost="history-broken").codes() == ["orphan"]
    assert scene.part("s0", lost="", overflow=True).codes() == ["overflow"]


def test_what_only_a_backup_mends_waits_for_everybody() -> None:
    scene = Scene().part("a0", latest_gid=7).part("a1", latest_gid=7).dead("s1")
    assert by_code(scene)["gap"].waits_for == ("s1",)


def test_a_broken_storage_does_not_stand_by() -> None:
    scene = Scene().part("s0", overflow=True).part("s1", state="Broken", error="torn")
    assert calls(by_code(scene)["overflow"]) == ["stop(s0, 'vol0')", "hash_backup(s0, 'vol0')"]


def test_nobody_is_target_as_far_as_can_be_seen() -> None:
    scene = Scene(group_file(storages=3, volume=""))
    scene.part("s0", state="SyncReady").part("s1", state="SyncReady").forget("s2")
    assert "no-target" in scene.codes()
    assert "no-target" not in scene.dead("s2").codes()  # that may be it


# Who is fed


def test_the_primary_must_be_fed_by_all() -> None:
    found = only_fed(Scene(), "a1").look()
    assert [(f.code, f.server) for f in found if f.code == "archive-not-fed"] == [
        ("archive-not-fed", "p0"),
        ("archive-not-fed", "p1"),
    ]
    assert calls(found[0]) == ["add_archive_to_proxy(p0, 'vol0', a0)"]


def test_an_archive_without_data_is_fed_later() -> None:
    """First it gets a copy: what proxies keep for it before is kept for nothing."""
    scene = Scene().part("a1", state="SyncReady")
    scene.part("p1", hops=scene.status["p1"].volumes[0].hops[:1])
    assert scene.codes() == ["secondary-data-lost"]


def test_a_proxy_that_knows_a_volume_and_sends_it_nowhere() -> None:
    assert calls(Scene().part("p0", hops=[]).only("proxy-data-lost")) == ["copy_archive_info(p1, 'vol0', p0)"]


def test_proxies_are_not_told_anything_while_somebody_is_at_work() -> None:
    scene = Scene().forget("p0").part("p1", state="WaitForEmpty")
    job = JobInfo(job=1, name="stop", volume="vol0", state=JobState.RUNNING, started=NOW - 5)
    scene.jobs["p1"] = [job]
    assert scene.look() == []
