"""Waiting: connections that are lost for a while, servers that restart, jobs that are given up, deadlines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.controller import Controller, Progress
from walbd.controller.client import Client, Take, identity, local_error
from walbd.controller.servers import Server
from walbd.errors import (
    BadState,
    Busy,
    ConnectError,
    ForceStopped,
    HistoryBroken,
    NotFound,
    NotSupported,
    Refused,
    RemoteError,
    TimedOut,
    UsageError,
    WalbError,
    exit_code_of,
)
from walbd.protocol import control as c
from walbd.protocol.base import JobInfo, JobState, Kind, WaitJob
from walbd.protocol.codec import Message, Request

Event = Callable[[Server, Request[Any]], Message]


class ScriptedCalls:
    """Calls on virtual time: replies come from a function, sleeping costs nothing."""

    def __init__(self, reply: Event) -> None:
        self.reply = reply
        self.time = 100.0
        self.asked: list[Request[Any]] = []

    def call(self, s: Server, request: Any, timeoutS: float = 0) -> Any:
        self.asked.append(request)
        if isinstance(request, WaitJob):
            self.time += request.wait_s
        return self.reply(s, request)

    def call_each(self, calls: Sequence[tuple[Server, Request[Any]]], timeoutS: float = 0) -> list[Any]:
        replies: list[Any] = []
        for s, request in calls:
            try:
                replies.append(self.call(s, request))
            except WalbError as exc:
                replies.append(exc)
        return replies

    def stream(self, s: Server, request: Request[Any], take: Take, timeoutS: float = 0) -> Any:
        reply = self.call(s, request, timeoutS)
        take(reply, memoryview(b""))
        return reply

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        pass


@pytest.fixture
def group() -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        yield made


def job(state: JobState = JobState.RUNNING, **more: Any) -> JobInfo:
    fields: dict[str, Any] = {"job": 3, "name": "full-backup", "volume": "vol0", "started": 50} | more
    return JobInfo(state=state, **fields)


def scripted(
    group: FakeGroup, replies: list[Message | WalbError]
) -> tuple[Controller, ScriptedCalls, list[Progress]]:
    """A controller whose servers give these answers, the last one for ever."""
    left = list(replies)
    seen: list[Progress] = []

    def reply(_s: Server, _request: Request[Any]) -> Message:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, WalbError):
            raise answer
        return answer

    calls = ScriptedCalls(reply)
    return Controller("", group.layout, calls=calls, progress=seen.append), calls, seen


# Jobs


def test_job_is_followed_to_its_end(group: FakeGroup) -> None:
    ctl, calls, seen = scripted(
        group, [job(done=1, total=9), job(done=5, total=9), job(JobState.DONE, done=9, total=9, result={"gid": 4})]
    )
    info = ctl.wait_for_job(group.s[0], 3, 60, vol="vol0")
    assert info is not None
    assert info.result == {"gid": 4}
    assert [(p.done, p.ended) for p in seen] == [(1, False), (5, False), (9, True)]
    assert all(isinstance(request, WaitJob) and request.wait_s <= 1 for request in calls.asked)


def test_lost_connections_do_not_end_a_wait(group: FakeGroup) -> None:
    away: list[Message | WalbError] = [ConnectError("gone"), TimedOut("silent"), Busy("too many connections")]
    ctl, _, seen = scripted(group, [job(), *away, job(), *away, job(JobState.DONE)])
    assert ctl.wait_for_job(group.s[0], 3, 60, vol="vol0") is not None
    assert [p.note for p in seen] == ["", "gone", "silent", "too many connections"] * 2 + [""]
    assert seen[-1].ended
    assert not any(p.ended for p in seen[:-1])


def test_waiting_for_a_snapshot_tells_what_is_in_the_way(group: FakeGroup) -> None:
    away = c.ProxyHealth(address="p0:1", available=False, next_check_s=1)

    def reply(s: Server, request: Request[Any]) -> Message:
        if isinstance(request, c.GetStatus):
            if s.name == "p0":
                raise ConnectError("cannot connect")
            return c.StatusReply(node="s0", kind=Kind.STORAGE, version="1", pid=1, now=1, proxies=[away])
        if isinstance(request, c.GetState):
            return c.TextValue(value={"s0": "Target", "a0": "Archived"}[s.name])
        if isinstance(request, c.TakeSnapshot):
            return c.GidValue(gid=7)
        return c.RestorePoints(points=[])

    calls = ScriptedCalls(reply)
    seen: list[tuple[float, str]] = []

    def show(progress: Progress) -> None:
        if not progress.ended:
            seen.append((calls.time - 100.0, progress.note))

    ctl = Controller("", group.layout, calls=calls, progress=show)
    with pytest.raises(TimedOut):
        ctl.snapshot(group.s[0], "vol0", group.a, timeoutS=300)
    assert {note for after_s, note in seen if after_s < 3} == {""}
    assert {note for after_s, note in seen if after_s > 3.5} == {"s0 reaches no proxy; p0 does not answer"}
    looks = sum(isinstance(request, c.GetStatus) for request in calls.asked) // 2
    assert 8 <= looks <= 16  # soon at first, then ever more seldom


def test_connection_lost_for_too_long_is_a_timeout(group: FakeGroup) -> None:
    ctl, calls, _ = scripted(group, [job(), ConnectError("gone", port=1)])
    with pytest.raises(TimedOut) as caught:
        ctl.wait_for_job(group.s[0], 3, 60, vol="vol0")
    assert caught.value.facts["last_error"] == "gone (port=1)"
    assert "walbc wait s0 3" in caught.value.hint
    assert 160 <= calls.time < 162


def test_job_that_takes_too_long(group: FakeGroup) -> None:
    ctl, calls, seen = scripted(group, [job()])
    with pytest.raises(TimedOut) as caught:
        ctl.wait_for_job(group.s[0], 3, 10, vol="vol0")
    assert [p.ended for p in seen[-2:]] == [False, True]
    assert caught.value.facts == {"timeout_s": 10, "server": "s0", "volume": "vol0", "job": 3}
    assert 110 <= calls.time < 112


def test_job_of_a_daemon_that_restarted(group: FakeGroup) -> None:
    restarts: list[list[Message | WalbError]] = [
        [job(), NotFound("no such job")],
        [job(), job(started=51)],  # it counts anew
        [job(volume="vol1")],
    ]
    for replies in restarts:
        ctl, _, _ = scripted(group, replies)
        assert ctl.wait_for_job(group.s[0], 3, 60, vol="vol0") is None


def test_job_that_failed_raises_its_error(group: FakeGroup) -> None:
    failed = job(JobState.FAILED, error_code="history-broken", error="no (a=1)", hint="do")
    ctl, _, _ = scripted(group, [failed])
    with pytest.raises(HistoryBroken) as caught:
        ctl.wait_for_job(group.s[0], 3, 60)
    assert (caught.value.message, caught.value.hint, caught.value.facts["job"]) == ("no (a=1)", "do", 3)
    ctl, _, _ = scripted(group, [job(JobState.CANCELLED)])
    with pytest.raises(ForceStopped):
        ctl.wait_for_job(group.s[0], 3, 60)
    ctl, _, _ = scripted(group, [job(JobState.FAILED)])
    with pytest.raises(RemoteError, match="the job failed"):
        ctl.wait_for_job(group.s[0], 3, 60)


# Conditions


def test_state_is_waited_for(group: FakeGroup) -> None:
    states = [c.TextValue(value=value) for value in ("StartTarget", "StartTarget", "Target")]
    ctl, calls, seen = scripted(group, [states[0], ConnectError("gone"), states[1], states[2]])
    assert ctl.wait_for_state(group.s[0], "vol0", ["StartTarget"], ["Target"]) == "Target"
    assert 100.89 < calls.time < 100.91
    assert [(p.note, p.ended) for p in seen] == [("", False), ("gone", False), ("", False), ("", True)]
    assert {p.what for p in seen} == {"wait"}


def test_state_that_goes_elsewhere_ends_the_wait_at_once(group: FakeGroup) -> None:
    ctl, calls, _ = scripted(group, [c.TextValue(value="StartTarget"), c.TextValue(value="Stopped")])
    with pytest.raises(BadState) as caught:
        ctl.wait_for_state(group.s[0], "vol0", ["StartTarget"], ["Target", "Standby"])
    assert caught.value.facts == {
        "server": "s0",
        "volume": "vol0",
        "state": "Stopped",
        "expected": "Target or Standby",
    }
    assert calls.time < 101


def test_state_that_never_comes(group: FakeGroup) -> None:
    ctl, calls, _ = scripted(group, [c.TextValue(value="StartTarget")])
    with pytest.raises(TimedOut, match="state Target at s0"):
        ctl.wait_for_state(group.s[0], "vol0", ["StartTarget"], ["Target"])
    assert 110 <= calls.time < 110.5


def test_refusals_end_a_wait(group: FakeGroup) -> None:
    ctl, _, _ = scripted(group, [c.RestorePoints(points=[]), Refused("never")])
    with pytest.raises(Refused, match="never"):
        ctl.wait_for_restorable(group.a[0], "vol0", 3, 60)


# Over the real network


def test_backup_goes_on_while_the_storage_is_out_of_reach(group: FakeGroup) -> None:
    """The connection is cut in the middle of the wait; the job, and the wait, go on."""
    ctl, s0 = group.ctl, group.s[0]
    ctl.init_storage(s0, "vol0", "/dev/x")
    group.hold("full-backup")
    cut = threading.Event()

    def watch(progress: Progress) -> None:
        if progress.what == "full-backup" and not cut.is_set():
            cut.set()
            group.fail("s0", WaitJob, None, times=2)  # dropped without an answer
            group.release("full-backup")

    ctl.progress = watch
    assert ctl.full_backup(s0, "vol0") == 1
    assert cut.is_set()


def test_snapshot_waits_for_an_archive_that_restarts(group: FakeGroup) -> None:
    ctl, s0, a0 = group.ctl, group.s[0], group.a[0]
    ctl.init_storage(s0, "vol0", "/dev/x")
    ctl.full_backup(s0, "vol0")
    group.frozen = True
    notes: list[str] = []

    def watch(progress: Progress) -> None:
        notes.append(progress.note)
        if len(notes) == 1:
            group.kill("a0")
        elif "cannot connect" in progress.note:
            group.revive("a0")
            group.frozen = False
            group.run(settled(group))

    ctl.progress = watch
    assert ctl.snapshot(s0, "vol0", [a0]) == 2
    assert any("cannot connect" in note for note in notes)


async def settled(group: FakeGroup) -> None:
    group.settle()


def test_daemon_that_restarts_during_a_restore(group: FakeGroup) -> None:
    """The job is forgotten; the effect decides."""
    ctl, s0, a0 = group.ctl, group.s[0], group.a[0]
    ctl.init_storage(s0, "vol0", "/dev/x")
    ctl.full_backup(s0, "vol0")
    group.hold("restore")
    restarted = False

    def watch(progress: Progress) -> None:
        nonlocal restarted
        if progress.what == "restore" and not restarted:
            restarted = True
            group.kill("a0")
            group.revive("a0")

    ctl.progress = watch
    with pytest.raises((NotFound, ForceStopped)):
        ctl.restore(a0, "vol0", 1)
    assert restarted


def test_interrupt_cancels_the_call(group: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(identity())
    entered = threading.Event()

    async def forever() -> None:
        entered.set()
        await asyncio.Event().wait()

    real = asyncio.run_coroutine_threadsafe

    class Interrupted:
        def __init__(self, future: Any) -> None:
            self.future = future

        def result(self) -> None:
            assert entered.wait(10)
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.future.cancel()

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "run_coroutine_threadsafe", lambda step, loop: Interrupted(real(step, loop)))
        with pytest.raises(KeyboardInterrupt):
            client._run(forever())
    assert client.call(group.s[0], c.GetHostType()).kind == "storage"
    client.close()


# Errors of servers as classes


@pytest.mark.parametrize(
    ("code", "cls", "exit_code"),
    [
        ("bad-state", BadState, 5),
        ("not-found", NotFound, 5),
        ("history-broken", HistoryBroken, 5),
        ("usage", UsageError, 2),
        ("bad-label", UsageError, 2),
        ("connect", RemoteError, 3),  # the server could not reach its peer: not our connection
        ("timed-out", RemoteError, 4),
        ("disk-full", RemoteError, 1),
        ("internal", RemoteError, 70),
        ("from-the-future", RemoteError, 1),
    ],
)
def test_codes_become_classes(code: str, cls: type[WalbError], exit_code: int) -> None:
    error = local_error(RemoteError(code, "message", hint="hint", volume="v"), "s0")
    assert isinstance(error, cls)
    assert (error.message, error.hint, error.facts) == ("message", "hint", {"server": "s0", "volume": "v"})
    assert exit_code_of(error) == exit_code


def test_request_that_a_server_does_not_know() -> None:
    error = local_error(
        RemoteError("remote-protocol", "this daemon does not serve that request", request="x"), "s0"
    )
    assert isinstance(error, NotSupported)
    other = local_error(RemoteError("remote-protocol", "nonsense"), "s0")
    assert isinstance(other, RemoteError)


def test_facts_with_any_name_survive() -> None:
    facts: dict[str, Any] = {"server": "s9", "odd name": 1}
    error = local_error(RemoteError("bad-state", "message", **facts), "s0")
    assert error.facts == {"server": "s9", "odd name": 1}
