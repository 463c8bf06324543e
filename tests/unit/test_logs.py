"""Log lines: events with fields, and no harm when nobody reads them."""

import io
import json
import sys

import pytest
import structlog

from walbd.daemon.logs import configure, error_fields
from walbd.errors import BadState


@pytest.fixture(autouse=True)
def _restore() -> object:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def test_json_lines_have_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "json")
    log = structlog.get_logger()
    log.debug("thing.hidden")
    log.warning("thing.failed", volume="v", **error_fields(BadState("no", hint="h", event=3)))
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert (fields["event"], fields["level"], fields["volume"]) == ("thing.failed", "warning", "v")
    assert (fields["code"], fields["error"], fields["hint"], fields["facts"]) == (
        "bad-state",
        "no",
        "h",
        {"event": 3},
    )


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_closed_or_broken_stderr_harms_nobody(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    configure("info", log_format)  # type: ignore[arg-type]
    log = structlog.get_logger()
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("thing.done", volume="v")
        try:
            raise KeyError
        except KeyError:
            log.exception("thing.crashed")
