"""What holds for every test."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator

import pytest
import structlog
import uvloop
from hypothesis import settings

from tests.kit import jitter
from walbd.fs import failpoints

# A deadline for single examples would make a busy machine fail tests.
settings.register_profile("walbd", deadline=None)
settings.load_profile("walbd")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write down what scenario files really say")
    parser.addoption("--jitter", metavar="SEED", help="delay steps by chance: see tests/kit/jitter.py")


def pytest_configure(config: pytest.Config) -> None:
    if (seed := config.getoption("--jitter")) is not None:
        jitter.ask(seed)


@pytest.hookimpl(optionalhook=True)  # of pytest-asyncio since 1.4
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of the daemons. That of Python 3.11 loses a socket that is accepted while its listener closes."""
    return {"uvloop": uvloop.new_event_loop}


LOG = pytest.StashKey[io.StringIO]()


@pytest.fixture(autouse=True)
def _log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what is logged in this process apart from what a command prints; a failed test shows it."""
    text = request.node.stash[LOG] = io.StringIO()
    structlog.reset_defaults()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(text),
        cache_logger_on_first_use=False,
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    """No failpoint that a test has armed is armed in the next."""
    yield
    failpoints.disarm()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the report passes through
    report: pytest.TestReport = yield  # type: ignore[assignment]
    text = item.stash.get(LOG, None)
    if report.failed and text is not None and text.getvalue():
        report.sections.append(("walbd log", text.getvalue()[-20000:]))
    return report  # type: ignore[return-value]
