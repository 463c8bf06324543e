"""The doctor's judgement on observations made by hand: every code, and silence where nothing is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from tests.kit.doctor_scene import NOW, OTHER_UUID, UUID, Scene, calls, diff, group_file
from walbd.controller.controller import Controller
from walbd.controller.doctor import Consent, Doctor, Observation, diagnose, mend
from walbd.controller.doctor.case import find_missing
from walbd.controller.doctor.diagnose import confirmed, intents_of
from walbd.controller.overview import Word
from walbd.errors import Refused
from walbd.protocol.base import JobInfo, JobState
from walbd.protocol.control import ProxyHealth

# Nothing is wrong


def test_a_healthy_group_gives_no_finding() -> None:
    assert Scene().look() == []


def test_what_is_on_its_way_is_no_finding() -> None:
    scene = Scene().part("a0", latest_gid=7).waits("p0", "a0", diff(6, 8)).waits("p1", "a0", diff(8, 10))
    assert scene.look() == []


def test_intents_are_inferred_and_said_to_be() -> None:
    scene = Scene(group_file(volume=""))
    intent = intents_of(scene.observe())["vol0"]
    assert (intent.target, intent.archives) == ("s0", ("a0", "a1"))
    assert not intent.target_said
    assert not intent.archives_said
    assert scene.look() == []


def test_an_unknown_volume_gives_nothing() -> None:
    assert Scene().look(vol="other") == []


# Servers


@pytest.mark.parametrize(
    ("server", "code"), [("s1", "storage-down"), ("p0", "proxy-down"), ("a1", "archive-down")]
)
def test_a_server_is_down(server: str, code: str) -> None:
    finding = Scene().dead(server).only(code)
    assert finding.word is Word.DOWN
    assert not finding.steps
    assert "systemctl restart" in finding.by_hand


def test_the_target_is_down() -> None:
    Scene().dead("s0").only("storage-down")


def test_all_proxies_are_down_and_how_long_that_may_last() -> None:
    scene = Scene().dead("p0", "p1")
    first = scene.observe()
    again = scene.part("s0", log_usage_pb=110).observe(first, taken_s=10.0)
    found = {f.code: f for f in diagnose(again)}
    assert "all-proxies-down" in found
    assert "overflows: 1 min 29 s" in found["all-proxies-down"].text  # 890 blocks left, 10 more each second


def test_an_archive_that_is_down_with_diffs_that_wait() -> None:
    scene = Scene().dead("a1").waits("p0", "a1", diff(8, 9), diff(9, 10))
    finding = scene.only("archive-down")
    assert finding.evidence["waiting_diffs"] == 2
    assert finding.evidence["oldest_waits_s"] == 5


def test_another_server_answers() -> None:
    Scene().dead("a1", error=Refused("another kind of server answers", hint="correct it")).only("wrong-server")
    Scene().server("a1", node="a7").only("wrong-server")


def test_versions_clocks_disks_errors() -> None:
    Scene().server("p0", version="0.2.0").only("version-mismatch")
    assert Scene().server("p0", now=NOW - 100).only("clock-skew").evidence["off_by_s"] == -100
    full = Scene().server("p0", server={"free_b": 5, "free_reserve_b": 10}).only("disk-full")
    assert full.word is Word.ERROR
    soon = Scene().server("a0", server={"free_b": 25, "free_reserve_b": 10}).only("disk-full")
    assert soon.word is Word.WARN
    assert Scene().server("a0", server={"disk_error": "no such directory"}).only("disk-full").word is Word.ERROR
    Scene().server("a0", errors=["something"]).only("server-error")


def test_a_disk_that_will_be_full_within_a_day() -> None:
    scene = Scene().server("p0", server={"free_b": 50, "free_reserve_b": 10})
    first = scene.observe()
    again = scene.server("p0", server={"free_b": 46, "free_reserve_b": 10}).observe(first, taken_s=2.0)
    (finding,) = diagnose(again)
    assert finding.evidence["full_in"] == "18 s"


# Who talks to whom


def test_a_storage_uses_another_primary_archive() -> None:
    finding = Scene().server("s0", server={"archive": "127.0.0.1:301"}).only("wrong-primary")
    assert calls(finding) == ["retarget(s0, a0)"]
    finding = Scene().server("s0", server={"archive": "elsewhere:1"}).only("wrong-primary")
    assert calls(finding) == ["retarget(s0, a0)"]


def test_the_group_file_is_behind_a_promotion() -> None:
    scene = Scene().forget("a0")
    for s in ("s0", "s1"):
        scene.server(s, server={"archive": "127.0.0.1:301"})
    found = {f.code: f for f in scene.look()}
    assert calls(found["wrong-primary"]) == ["promote_archive(a1)"]


def test_a_storage_is_never_told_to_use_an_archive_that_lacks_something() -> None:
    """So it is after a promotion, or a replacement, that was not written into the group file."""
    used = {"archive": "127.0.0.1:301"}
    scene = Scene(group_file(volume='target = "s0"', storages=1)).server("s0", server=used)
    for p in ("p0", "p1"):
        (v,) = scene.status[p].volumes
        scene.part(p, hops=[hop for hop in v.hops if hop.dest == "a1"])
    scene.part("a0", latest_gid=4)  # it is alive again, with what it had
    found = {f.code: f for f in scene.look()}
    assert calls(found["wrong-primary"]) == ["promote_archive(a1)"]
    scene.part("a1", state="Stopped")  # for the moment nobody has everything
    found = {f.code: f for f in scene.look()}
    assert not found["wrong-primary"].steps
    assert "first in the group file" in found["wrong-primary"].by_hand
    (v,) = Scene().status["a1"].volumes
    scene = Scene().server("s0", server=used)
    for name in ("a1", "p0", "p1", "s0"):
        (v,) = scene.status[name].volumes
        scene.server(name, volumes=[v, msgspec.structs.replace(v, volume="vol1")])
    found = {f.code: f for f in scene.look()}  # a0 has vol0 and lacks vol1
    assert calls(found["wrong-primary"]) == ["promote_archive(a1)"]
    unknown = Scene().server("s0", server={"archive": "new:1"}).dead("a0")
    found = {f.code: f for f in unknown.look()}
    assert not found["wrong-primary"].steps


def test_two_ways_to_write_one_address_are_one() -> None:
    scene = Scene().server("s0", server={"archive": "archive.example:300"})
    o = scene.observe()
    same = {a: frozenset({"10.0.0.3 300"}) for a in ("archive.example:300", "127.0.0.1:300")}
    o = Observation(group=o.group, seen=o.seen, now=NOW, same=same)
    assert diagnose(o) == []


def test_a_storage_uses_other_proxies() -> None:
    health = ProxyHealth(address="127.0.0.1:200", available=True, next_check_s=1)
    assert calls(Scene().server("s0", proxies=[health]).only("wrong-proxies")) == ["retarget(s0)"]
    extra = ProxyHealth(address="127.0.0.1:299", available=True, next_check_s=1)
    health1 = ProxyHealth(address="127.0.0.1:201", available=True, next_check_s=1)
    found = Scene().server("s0", proxies=[health, health1, extra]).only("wrong-proxies")
    assert "127.0.0.1:299" in found.text


def test_a_storage_is_not_told_to_use_a_proxy_that_was_replaced() -> None:
    """So it is after `replace-proxy` without --write: p0 has ended."""
    health = [
        ProxyHealth(address=address, available=True, next_check_s=1)
        for address in ("127.0.0.1:299", "127.0.0.1:201")
    ]
    scene = Scene().server("s0", proxies=health).dead("p0")
    assert {f.code: f for f in scene.look()}["wrong-proxies"].waits_for == ("p0",)
    other = {"archive": "elsewhere:1"}  # retargeting names the archive, too
    scene = Scene().server("s0", proxies=health, server=other)
    assert not {f.code: f for f in scene.look()}["wrong-proxies"].steps


def test_what_an_operator_is_doing_just_now_is_no_finding() -> None:
    """What commands bring about for a moment must be seen twice."""
    moments = [
        Scene().part("p0", state="Stopped"), Scene().part("a0", state="Stopped"), Scene().forget("p0"),
        Scene().part("s0", state="SyncReady"), Scene().part("s0", state="Stopped"), Scene().forget("a1"),
        Scene().forget("a0"), Scene().part("p0", hops=Scene().status["p0"].volumes[0].hops[:1]),
    ]  # fmt: skip
    for scene in moments:
        found = diagnose(scene.observe())
        assert found
        assert confirmed(found, []) == []


def test_a_storage_cannot_reach_a_proxy_that_lives() -> None:
    lost = ProxyHealth(address="127.0.0.1:200", available=False, next_check_s=1, error="no route")
    other = ProxyHealth(address="127.0.0.1:201", available=True, next_check_s=1)
    Scene().server("s0", proxies=[lost, other]).only("proxy-unreachable")


def test_a_proxy_sends_to_a_wrong_address() -> None:
    finding = Scene().hop("p0", "a1", address="127.0.0.1:999").only("wrong-archive-address")
    assert calls(finding) == ["add_archive_to_proxy(p0, 'vol0', a1)"]


# What is stopped


def test_stopped_parts_are_started() -> None:
    finding = Scene().part("p0", state="Stopped").only("proxy-stopped")
    assert calls(finding) == ["start(p0, 'vol0')", "kick_storage_all()"]
    assert finding.consent is Consent.NONE
    assert calls(Scene().part("a0", state="Stopped").only("archive-stopped"))[0] == "start(a0, 'vol0')"
    assert calls(Scene().part("s0", state="Stopped").only("storage-stopped")) == ["start(s0, 'vol0')"]


def test_an_image_that_is_smaller_than_the_volume_grows() -> None:
    scene = Scene().part("s0", size_lb=(1 << 15) + 1).hop("p0", "a0", error=True, error_text="smaller-lv-size")
    scene.part("a1", size_lb=1 << 16)
    finding = scene.only("archive-smaller")
    assert calls(finding)[0] == "resize_archive(a0, 'vol0', 17, True)"
    assert finding.steps[0].command == "walbc resize vol0 17m --at a0 --zero"


def test_an_apply_that_was_cut_off_is_done_again() -> None:
    finding = Scene().part("a1", base="<|3|-->|7|>-20260101000000").only("apply-interrupted")
    assert calls(finding) == ["apply(a1, 'vol0', 7)"]
    busy = Scene().part("a1", base="<|3|-->|7|>-20260101000000", actions={"Apply": 1})
    assert busy.look() == []


def test_an_archive_refuses_for_another_reason() -> None:
    finding = Scene().hop("p0", "a1", error=True, error_text="wrong-archive: x").only("send-error")
    assert calls(finding) == ["kick_proxy('vol0', a1)"]


@pytest.mark.parametrize(
    ("since_s", "error", "codes"),
    [(61, "no proxy takes the log", ["log-not-sent"]), (61, "", []), (30, "no proxy takes the log", [])],
)
def test_log_that_nobody_takes(since_s: int, error: str, codes: list[str]) -> None:
    scene = Scene().part("s0", lag_lb=8, waiting_since=NOW - since_s, error=error)
    found = scene.look()
    assert [f.code for f in found] == codes
    assert all(error in f.text and "61 s" in f.text and "hash-backup" in f.by_hand for f in found)
    scene.part("s0", state="Stopped")
    assert scene.codes() == ["storage-stopped"]


# Proxies


def test_diffs_that_were_damaged_at_a_proxy() -> None:
    flagged: dict[str, Any] = {"error": True, "error_text": "damaged here and put aside: |10|-->|11|"}
    scene = (
        Scene().part("s0", done_gid=12, latest_gid=12).waits("p0", "a0", diff(11, 12)).part("a1", latest_gid=12)
    )
    scene.hop("p0", "a0", damaged=[(10, 11)], **flagged)
    damaged, gap = scene.look()
    assert (damaged.code, damaged.server, damaged.word) == ("wdiff-damaged", "p0", Word.ERROR)
    assert damaged.evidence["damaged"] == gap.evidence["missing"] == "10..11"
    assert "walbc hash-backup vol0 --storage s0" in damaged.by_hand
    assert (gap.code, gap.evidence["filled_from"]) == ("gap", "a1")
    scene.part("a0", latest_gid=12).hop("p0", "a0", diffs=0)
    assert scene.look() == []  # the archive has it from elsewhere
    scene.hop("p0", "a0", diffs=1, error_text="another server answers")
    assert scene.codes() == ["send-error"]
    scene.hop("p0", "a0", diffs=0)
    scene.part("a1", latest_gid=10).waits("p0", "a1", diff(11, 12)).hop("p0", "a1", damaged=[(10, 11)], **flagged)
    found = {f.code: f for f in scene.look()}
    assert found.keys() == {"wdiff-damaged", "replica-gap"}
    assert found["wdiff-damaged"].word is Word.WARN
    assert "walbc replicate vol0 a1 --from a0" in found["wdiff-damaged"].by_hand


def test_a_proxy_has_lost_a_volume_and_nothing_is_missing() -> None:
    finding = Scene().forget("p0").only("proxy-data-lost")
    assert "no backup is needed" in finding.text
    assert finding.consent is Consent.NONE
    assert calls(finding) == ["copy_archive_info(p1, 'vol0', p0)"]


def test_the_only_proxy_has_lost_a_volume() -> None:
    scene = Scene(group_file(proxies=1, archives=1)).forget("p0")
    assert calls(scene.only("proxy-data-lost")) == ["add_archive_to_proxy(p0, 'vol0', a0)"]


def test_a_proxy_has_lost_diffs() -> None:
    found = {f.code: f for f in Scene().forget("p0").part("a0", latest_gid=7).part("a1", latest_gid=7).look()}
    assert set(found) == {"proxy-data-lost", "gap", "replica-gap"}
    assert "see gap" in found["proxy-data-lost"].text
    assert found["gap"].evidence["missing"] == "7..10"
    assert calls(found["gap"]) == ["stop(s0, 'vol0')", "hash_backup(s0, 'vol0')"]
    assert found["gap"].consent is Consent.YES


def test_a_proxy_cannot_read_a_volume() -> None:
    found = {f.code: f for f in Scene().part("p0", state="Broken", error="bad", hops=[], diffs=0).look()}
    assert calls(found["proxy-data-lost"]) == ["clear(p0, 'vol0')", "copy_archive_info(p1, 'vol0', p0)"]
    assert found["proxy-data-lost"].consent is Consent.YES


def test_a_proxy_does_not_send_to_an_archive() -> None:
    scene = Scene()
    (v,) = scene.status["p1"].volumes
    finding = scene.part("p1", hops=v.hops[1:]).only("archive-not-fed")
    assert calls(finding) == ["add_archive_to_proxy(p1, 'vol0', a0)"]


def test_an_archive_is_fed_that_is_not_wanted() -> None:
    volume = 'target = "s0"\narchives = ["a0"]'
    found = Scene(group_file(volume=volume)).look()
    assert [f.code for f in found] == ["unwanted-feed"] * 2
    assert calls(found[0]) == ["del_archive_from_proxy(p0, 'vol0', a1)"]
    assert found[0].consent is Consent.YES
    unknown = Scene()
    (v,) = unknown.status["p0"].volumes
    finding = unknown.part("p0", hops=[*v.hops, msgspec.structs.replace(v.hops[0], dest="a9")]).only(
        "unwanted-feed"
    )
    assert not finding.steps
    assert "a9" in finding.by_hand


# Gaps


@pytest.mark.parametrize(
    ("head", "done", "diffs", "missing"),
    [
        (10, 10, [], ()),
        (7, 10, [(7, 9), (9, 10)], ()),
        (7, 10, [(5, 10)], ()),  # overlaps: what the archive has is cut off
        (7, 10, [], ((7, 10),)),
        (7, 10, [(8, 10)], ((7, 8),)),
        (7, 12, [(7, 8), (9, 10)], ((8, 9), (10, 12))),
        (7, None, [(7, 8)], ()),
        (7, None, [(9, 10)], ((7, 9),)),
        (7, 9, [(7, 12)], ()),
        (12, 9, [], ()),
    ],
)
def test_what_is_missing(
    head: int, done: int | None, diffs: Iterable[tuple[int, int]], missing: tuple[tuple[int, int], ...]
) -> None:
    assert find_missing(head, done, [diff(b, e) for b, e in diffs]) == missing


def test_a_hole_in_a_chain() -> None:
    scene = Scene().part("a0", latest_gid=5).waits("p0", "a0", diff(7, 10)).part("a1", latest_gid=6)
    found = {f.code: f for f in scene.look()}
    assert found["gap"].evidence["missing"] == "5..7"
    assert calls(found["gap"])[-1] == "hash_backup(s0, 'vol0')"


def test_a_replica_fills_the_hole_of_the_primary() -> None:
    finding = Scene().part("a0", latest_gid=7).only("gap")
    assert calls(finding) == ["replicate(a1, 'vol0', a0, False)", "kick_proxy('vol0', a0)"]
    assert finding.consent is Consent.NONE


def test_a_hole_is_not_one_while_a_proxy_is_down() -> None:
    scene = Scene().part("a0", latest_gid=5).part("a1", latest_gid=5).dead("p1")
    found = scene.look()
    assert [f.code for f in found] == ["proxy-down", "possible-gap", "possible-gap"]
    assert not any(f.steps for f in found)


def test_a_hole_is_not_one_while_a_storage_uses_a_proxy_that_was_not_asked() -> None:
    scene = Scene().part("a0", latest_gid=5).part("a1", latest_gid=5)
    extra = ProxyHealth(address="127.0.0.1:299", available=True, next_check_s=1)
    scene.server("s0", proxies=[*scene.status["s0"].proxies, extra])
    assert set(scene.codes()) == {"wrong-proxies", "possible-gap"}


def test_a_hole_is_not_one_while_a_list_of_diffs_is_not_known() -> None:
    scene = Scene().part("a0", latest_gid=5).part("a1", latest_gid=5).part("p0", diffs=3)
    assert set(scene.codes()) == {"possible-gap"}


def test_a_hole_seen_once_is_not_believed() -> None:
    first = diagnose(Scene().part("a0", latest_gid=5).observe())
    assert "gap" in [f.code for f in first]
    assert confirmed(diagnose(Scene().observe()), first) == []
    assert confirmed(first, []) == []


def test_a_backup_waits_for_everybody() -> None:
    scene = Scene().part("s0", overflow=True, state="Stopped").dead("s1")
    found = {f.code: f for f in scene.look()}
    assert found["overflow"].waits_for == ("s1",)


# Storages


def test_overflow() -> None:
    finding = Scene().part("s0", overflow=True, state="Target").only("overflow")
    assert calls(finding) == ["stop(s0, 'vol0')", "hash_backup(s0, 'vol0')"]
    finding = Scene().part("s0", overflow=True, state="Stopped").only("overflow")
    assert calls(finding) == ["hash_backup(s0, 'vol0')"]
    finding = Scene().part("s1", overflow=True).only("overflow-standby")
    assert calls(finding) == ["stop(s1, 'vol0')", "go_standby(s1, 'vol0')"]


def test_a_log_that_fills() -> None:
    assert Scene().part("s0", log_usage_pb=750).only("log-filling").word is Word.WARN
    assert Scene().part("s0", log_usage_pb=950).only("log-filling").word is Word.ERROR


def test_a_device_is_down() -> None:
    assert "walbd-device@x" in Scene().part("s0", device_error="gone").only("device-down").by_hand


def test_metadata_lost_at_the_target() -> None:
    finding = Scene().forget("s0").only("storage-metadata-lost")
    assert calls(finding) == ["init_storage(s0, 'vol0', '/dev/x')", "hash_backup(s0, 'vol0')"]
    inferred = Scene(group_file(storages=1, volume="")).forget("s0").only("storage-metadata-lost")
    assert "as it seems" in inferred.text
    assert not inferred.steps
    assert "devices = { s0" in inferred.by_hand


def test_metadata_lost_at_a_storage_that_stands_by() -> None:
    group = group_file(volume='target = "s0"\ndevices = { s0 = "/dev/x", s1 = "/dev/y" }')
    finding = Scene(group).forget("s1").only("storage-metadata-lost")
    assert calls(finding) == ["init_storage(s1, 'vol0', '/dev/y')"]
    assert finding.consent is Consent.NONE


def test_a_broken_record_at_a_storage() -> None:
    finding = Scene().part("s0", state="Broken", error="torn").only("storage-broken")
    assert calls(finding) == ["clear(s0, 'vol0')", "init_storage(s0, 'vol0', '/dev/x')", "hash_backup(s0, 'vol0')"]


def test_two_targets() -> None:
    finding = Scene().part("s1", state="Target").only("two-targets")
    assert calls(finding) == ["stop(s1, 'vol0', 'force')", "reset(s1, 'vol0')", "go_standby(s1, 'vol0')"]
    unsaid = Scene(group_file(volume="")).part("s1", state="Target").only("two-targets")
    assert not unsaid.steps


def test_another_target_than_the_group_file_names() -> None:
    scene = Scene().part("s0", state="Standby").part("s1", state="Target")
    finding = scene.only("other-target")
    assert finding.evidence["target"] == "s1"
    assert not finding.steps
    scene.forget("a1")  # it goes by what is
    assert scene.codes() == ["other-target", "secondary-data-lost"]


def test_who_is_target_is_learned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody moves the volume back while the doctor is at work; and what mending itself stops stays known."""
    scene = Scene().part("s0", state="Standby").part("s1", state="Target")
    monkeypatch.setattr(mend, "observe", lambda *_args, **_more: scene.observe())
    monkeypatch.setattr(mend, "observe_again", lambda *_args, **_more: scene.observe())
    doctor = Doctor(Controller("", scene.group.servers), scene.group)
    assert [f.code for f in doctor.look()] == ["other-target"]
    scene.part("s1", state="SyncReady")
    assert calls(next(f for f in doctor.look() if f.code == "no-target")) == ["hash_backup(s1, 'vol0')"]
    scene.part("s0", state="Target").part("s1", state="Standby")
    assert doctor.look() == []


def test_a_former_target_is_not_taken_for_the_target() -> None:
    """s1 took over and was stopped, the group file still names s0: its log is not thrown away, s0 not copied."""
    scene = Scene().part("s0", state="Standby", uuid=OTHER_UUID).part("s1", state="Stopped")
    found = {f.code: f for f in scene.look()}
    assert sorted(found) == ["other-target", "storage-stopped"]
    assert calls(found["storage-stopped"]) == ["start(s1, 'vol0')"]
    assert not found["other-target"].steps
    unsaid = Scene(group_file(volume="")).dead("s0").part("s1", state="Stopped", uuid=OTHER_UUID)
    assert "storage-stopped" not in unsaid.codes()  # s0 may be target
    unsaid.part("s1", uuid=UUID)
    assert "storage-stopped" in unsaid.codes()


def test_a_volume_that_only_archives_know_was_given_up() -> None:
    scene = Scene(group_file(storages=1, volume="")).forget("s0", "p0", "p1")
    assert scene.look() == []


def test_a_log_that_was_reset() -> None:
    finding = Scene().part("s0", lost="history-broken", log_uuid=OTHER_UUID, state="Stopped").only("orphan")
    assert finding.evidence["device_log_uuid"] == OTHER_UUID
    assert calls(finding) == ["hash_backup(s0, 'vol0')"]


def test_an_archive_of_another_log() -> None:
    found = Scene().part("s0", uuid=OTHER_UUID).look()
    assert [f.code for f in found] == ["orphan"]
    assert calls(found[0]) == ["stop(s0, 'vol0')", "hash_backup(s0, 'vol0')"]


def test_no_target() -> None:
    finding = Scene().part("s0", state="SyncReady").only("no-target")
    assert calls(finding) == ["hash_backup(s0, 'vol0')"]
    fresh = Scene().part("s0", state="SyncReady").forget("a0", "a1").part("p0", hops=[]).part("p1", hops=[])
    assert "full_backup(s0, 'vol0')" in calls(fresh.only("no-target"))
    job = JobInfo(
        job=3, name="full-backup", volume="vol0", state=JobState.CANCELLED, started=NOW - 90, ended=NOW - 60
    )
    scene = Scene().part("s0", state="SyncReady")
    scene.jobs["s0"] = [job]
    assert "full-backup was given up" in scene.only("no-target").text


def test_no_target_and_nobody_knows_who_it_should_be() -> None:
    scene = Scene(group_file(volume="")).part("s0", state="SyncReady").part("s1", state="SyncReady")
    assert "group file" in scene.only("no-target").by_hand


# Work that is under way


def backup_at_work(age_s: int) -> Scene:
    scene = Scene().part("s0", state="HashSync").part("a0", state="HashSync", latest_gid=3)
    running = JobState.RUNNING
    scene.jobs["s0"] = [
        JobInfo(job=1, name="hash-backup", volume="vol0", state=running, started=NOW - age_s, done=5, total=9)
    ]
    return scene


def test_work_is_left_alone() -> None:
    assert backup_at_work(10).look() == []


def test_work_without_progress_is_stuck() -> None:
    assert set(backup_at_work(1000).codes()) == {"stuck"}
    scene = backup_at_work(1000)
    first = scene.observe()
    job = scene.jobs["s0"][0]
    scene.jobs["s0"] = [JobInfo(**{f: getattr(job, f) for f in JobInfo.__dataclass_fields__} | {"done": 6})]
    assert diagnose(scene.observe(first, taken_s=2.0)) == []


def test_a_passing_state_without_work_is_stuck() -> None:
    assert "systemctl restart walbd-archive" in Scene().part("a1", state="ReplSyncAsServer").only("stuck").by_hand
