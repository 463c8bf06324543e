"""What all parts of the controller stand on: asking servers, and waiting for what they do.

Waits end when their condition holds, with the error of the work they wait for, or with TimedOut. A server
that does not answer for a while does not end them. Source: docs/controller.md, "Waiting".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

from walbd.controller.client import DEFAULT_TIMEOUT_S, Calls, Client, Take, ended_job, identity, patience_s
from walbd.controller.commands import run_command
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE, STEP_TIMEOUT_SEC
from walbd.controller.progress import Progress, ShowProgress, ignore_progress
from walbd.controller.servers import Server, ServerLayout, verify_server_kind
from walbd.controller.verify import verify_timeout, verify_type, verify_volume
from walbd.daemon.net import TLS_HINT
from walbd.errors import (
    BadState,
    Busy,
    ConnectError,
    NotFound,
    TimedOut,
    WalbError,
)
from walbd.protocol.base import JobInfo, JobState, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.protocol.control import GetState

T = TypeVar("T")
R = TypeVar("R", bound=Message)

POLL_S: Final = 0.3
_WHY_FIRST_S: Final = 3.0  # a wait that is longer asks what is in the way,
_WHY_EVERY_S: Final = 30.0  # and asks again ever later, at last so often
_JOB_WAIT_S: Final = 1.0  # of one request that waits for a job: progress is seen this often
_PASSING: Final = (ConnectError, TimedOut, Busy)  # errors that a wait survives


class Base:
    """Asking and waiting. See `Controller`."""

    def __init__(
        self,
        controllerPath: str,
        sLayout: ServerLayout,
        isDebug: bool = False,
        timeoutS: float = 0,
        *,
        calls: Calls | None = None,
        group: str = "default",
        tls: tuple[str, str, str] | None = None,
        progress: ShowProgress = ignore_progress,
    ) -> None:
        verify_type(controllerPath, str)
        verify_type(sLayout, ServerLayout)
        verify_type(isDebug, bool)
        verify_timeout(timeoutS)
        self.sLayout = sLayout
        self.isDebug = isDebug
        self.timeoutS = timeoutS
        self.progress = progress
        self.calls: Calls = (
            calls if calls is not None else Client(identity(group=group, timeoutS=timeoutS, tls=tls))
        )
        self._stops: dict[tuple[str, str], int] = {}  # (server, volume): the job of the last stop
        self._restores: dict[tuple[str, str, int], int] = {}  # (server, volume, gid): the job of a restore
        self._replications: dict[tuple[str, str, str], int] = {}  # (source, volume, destination): its job

    def set_server_layout(self, sLayout: ServerLayout) -> None:
        """Use another layout from now on. It changes whom the controller asks, nothing at servers."""
        verify_type(sLayout, ServerLayout)
        self.sLayout = sLayout

    def close(self) -> None:
        """End the controller's thread."""
        self.calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # Asking

    def run_ctl(
        self, s: Server, cmdArgs: Sequence[str], putMsg: bool = False, timeoutS: float = 0, quietErr: bool = False
    ) -> str:
        """Run one command of `walbc -a HOST -p PORT` at a server and return its text.

        With `putMsg` the command and its text are written to stderr; so is an error unless `quietErr`.
        """
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        verify_type(cmdArgs, (list, tuple), str)
        verify_timeout(timeoutS)
        if putMsg or self.isDebug:
            self.say(f"{s.name}: {' '.join(cmdArgs)}")
        try:
            text = run_command(lambda to, request: self.ask(to, request, timeoutS), s, cmdArgs)
        except WalbError as exc:
            if putMsg and not quietErr:
                self.say(f"{s.name}: {exc}")
            raise
        if putMsg and text:
            self.say(text)
        return text

    def ask(self, s: Server, request: Request[R], timeoutS: float = 0) -> R:
        """Make one request at a server. `timeoutS` bounds its silence; 0: what is usual for such a request."""
        if self.isDebug:
            self.say(f"{s.name} <- {request}")
        return self.calls.call(s, request, timeoutS or self._patience(request))

    def follow(self, s: Server, request: Request[R], take: Take) -> R:
        """Make a request that a stream follows: `take` gets the reply, then each message and its payload."""
        if self.isDebug:
            self.say(f"{s.name} <- {request}")
        return self.calls.stream(s, request, take, self._patience(request))

    def ask_each(
        self, sL: Iterable[Server], request: Request[R], timeoutS: float = 0
    ) -> dict[Server, R | WalbError]:
        """Make the same request at several servers at the same time; each gives its reply or its error."""
        servers = list(sL)
        if self.isDebug:
            self.say(f"{', '.join(s.name for s in servers)} <- {request}")
        replies = self.calls.call_each([(s, request) for s in servers], timeoutS or self._patience(request))
        return dict(zip(servers, cast("list[R | WalbError]", replies), strict=True))

    def ask_all(self, sL: Iterable[Server], request: Request[R]) -> dict[Server, R]:
        """Like `ask_each`, but raise when not all have answered: unreachable ones first, all in one error."""
        replies = self.ask_each(sL, request)
        check_all(replies)
        return cast("dict[Server, R]", replies)

    def get_state(self, s: Server, vol: str) -> str:
        """Return the state of a volume at a server; `Clear` where it is not known."""
        self._check(s, vol)
        return self.ask(s, GetState(volume=vol)).value

    # Waiting

    def wait_until(
        self,
        what: str,
        probe: Callable[[], T | None],
        timeoutS: float,
        *,
        s: Server | None = None,
        vol: str = "",
        why: Callable[[], str] | None = None,
    ) -> T:
        """Call `probe` every 0.3 s until it returns something other than None, and return that.

        Errors of connections are tolerated until the end of the time, every other error ends the wait. `why` is
        asked now and then for what may be in the way, to be shown. Raises TimedOut.
        """
        began = self.calls.now()
        ask_why_s, in_the_way = _WHY_FIRST_S, ""
        last: WalbError | None = None
        shown: Progress | None = None
        try:
            while True:
                try:
                    value = probe()
                    last = None
                    if value is not None:
                        return value
                except _PASSING as exc:
                    last = exc
                elapsed = self.calls.now() - began
                if elapsed >= timeoutS:
                    raise self._timed_out(what, timeoutS, s, vol, last)
                if why is not None and elapsed >= ask_why_s:
                    ask_why_s = min(2 * elapsed, elapsed + _WHY_EVERY_S)
                    in_the_way = why()
                shown = Progress(
                    what="wait",
                    volume=vol,
                    server=s.name if s is not None else "",
                    phase=what,
                    unit="",
                    elapsed_s=elapsed,
                    note=str(last) if last is not None else in_the_way,
                )
                self.progress(shown)
                self.calls.sleep(min(POLL_S, timeoutS - elapsed))
        finally:
            self._end_progress(shown)

    def wait_for_state(
        self,
        s: Server,
        vol: str,
        during: Sequence[str],
        goal: Sequence[str],
        timeoutS: float = STEP_TIMEOUT_SEC,
    ) -> str:
        """Wait while the state is one of `during`; then it must be one of `goal`, which is returned.

        Raises BadState at once when it is neither.
        """

        def look() -> str | None:
            state = self.get_state(s, vol)
            if state in goal:
                return state
            if state not in during:
                raise BadState(
                    "the volume did not come to the expected state",
                    hint="the log of the daemon says why",
                    server=s.name,
                    volume=vol,
                    state=state,
                    expected=" or ".join(goal),
                )
            return None

        return self.wait_until(f"state {' or '.join(goal)} at {s.name}", look, timeoutS, s=s, vol=vol)

    def wait_for_job(
        self, s: Server, job: int, timeoutS: float, *, vol: str = "", what: str = ""
    ) -> JobInfo | None:
        """Wait for the end of a job and return it; None when the server does not know it any more.

        That is so after a restart of the daemon: then look at the effect. Raises the error of a job that failed,
        ForceStopped for one that was given up, TimedOut.
        """
        began = self.calls.now()
        seen: JobInfo | None = None
        shown: Progress | None = None
        try:
            while True:
                left = max(0.0, timeoutS - (self.calls.now() - began))
                note = ""
                try:
                    info = self._look_at_job(s, job, min(_JOB_WAIT_S, left))
                except NotFound:
                    return None
                except _PASSING as exc:
                    if left <= 0:
                        raise self._timed_out(f"job {job}", timeoutS, s, vol, exc, job=job) from exc
                    note = str(exc)
                    self.calls.sleep(min(POLL_S, left))
                else:
                    if (vol and info.volume != vol) or (seen is not None and seen.started != info.started):
                        return None  # the daemon has restarted and counts anew: this is another job
                    seen = info
                shown = self._progress_of(s, seen, job, what, vol, self.calls.now() - began, note)
                self.progress(shown)
                if seen is not None and not note and seen.state is not JobState.RUNNING:
                    return ended_job(s, seen)
                if left <= 0:
                    raise self._timed_out(f"job {job}", timeoutS, s, vol, None, job=job)
        finally:
            self._end_progress(shown)

    def say(self, text: str) -> None:
        """Write a remark to stderr."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def put(self, text: str) -> None:
        """Write a result to stdout."""
        sys.stdout.write(text + "\n")

    # Inner parts

    def _look_at_job(self, s: Server, job: int, wait_s: float) -> JobInfo:
        """Return a job when it has ended, or after `wait_s`."""
        return self.ask(s, WaitJob(job=job, wait_s=wait_s))

    def _patience(self, request: Request[Any]) -> float:
        return patience_s(request, self.timeoutS or DEFAULT_TIMEOUT_S)

    def _end_progress(self, shown: Progress | None) -> None:
        """Say that nothing is waited for any more, if something was shown and did not say so itself.

        Not after an interrupt: then the work goes on, and the last thing shown says which.
        """
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if shown is not None and not shown.ended and not interrupted:
            self.progress(dataclasses.replace(shown, ended=True, note=""))

    def _check(self, s: Server, vol: str, *kinds: int) -> None:
        """Check the arguments that nearly every method has."""
        verify_server_kind(s, kinds or (K_STORAGE, K_PROXY, K_ARCHIVE))
        verify_volume(vol)

    @staticmethod
    def _progress_of(
        s: Server, job: JobInfo | None, number: int, what: str, vol: str, elapsed_s: float, note: str
    ) -> Progress:
        if job is None:
            return Progress(
                what=what or "job", volume=vol, server=s.name, job=number, elapsed_s=elapsed_s, note=note
            )
        return Progress(
            what=what or job.name,
            volume=job.volume,
            server=s.name,
            job=number,
            phase=job.phase,
            unit=job.unit,
            done=job.done,
            total=job.total,
            elapsed_s=elapsed_s,
            note=note,
            ended=job.state is not JobState.RUNNING and not note,
        )

    @staticmethod
    def _timed_out(
        what: str, timeoutS: float, s: Server | None, vol: str, last: WalbError | None, *, job: int = 0
    ) -> TimedOut:
        facts: dict[str, Any] = {"timeout_s": timeoutS}
        if s is not None:
            facts["server"] = s.name
        if vol:
            facts["volume"] = vol
        if last is not None:
            facts["last_error"] = str(last)
        hint = "see `walbc status` for what is in the way"
        if job and s is not None:
            facts["job"] = job
            hint = f"the work goes on: wait for it with `walbc wait {s.name} {job}`"
        return TimedOut(f"waited too long for {what}", hint=hint, **facts)


def check_all(replies: dict[Server, Any]) -> None:
    """Raise when a reply is an error: one ConnectError for all servers out of reach, else the first error."""
    failed = {s: reply for s, reply in replies.items() if isinstance(reply, WalbError)}
    away = [s for s, exc in failed.items() if isinstance(exc, ConnectError | TimedOut)]
    if away:
        first = failed[away[0]]
        raise ConnectError(
            "servers that are needed do not answer",
            hint=first.hint if first.hint == TLS_HINT else "start them, or take them out of the group file",
            servers=", ".join(s.name for s in away),
            reason=str(first.facts.get("reason", first.message)),
        )
    for exc in failed.values():
        raise exc
