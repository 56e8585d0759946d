"""A pytest plugin: each test is a case of the ledger, and one that is done is not run again.

What a test gives to pytest's `record_property` becomes details of its line.
"""

from __future__ import annotations

import os
import signal
import textwrap
from collections.abc import Generator

import pytest

from tests.faults.ledger import Ledger

_LONGEST = 500  # characters of a test's message


class Recorder:
    """The plugin; only for a process that ends at SIGINT and SIGTERM."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._phases: list[pytest.TestReport] = []
        # A driver that a test runs in this process takes a signal for itself, and the test fails.
        self._signals, writing = os.pipe()
        for end in (self._signals, writing):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writing)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        todo = set(self._ledger.plan(item.nodeid for item in items))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in todo])
        items[:] = [item for item in items if item.nodeid in todo]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._ledger.note_broken(f"{report.nodeid}: {_message(report)}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        phases, self._phases = self._phases, []
        if _has_data(self._signals):
            raise KeyboardInterrupt
        problems = [_message(phase) for phase in phases if not phase.passed]
        seconds = sum(phase.duration for phase in phases)
        self._ledger.write(nodeid, seconds, problems, **dict(phases[-1].user_properties))

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, tuple, tuple]:
        category, _, _ = yield
        return category, "", ""  # the ledger says it


def _has_data(pipe: int) -> bool:
    try:
        return bool(os.read(pipe, 1))
    except BlockingIOError:
        return False


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{report.when}: {crash.message if crash else report.longrepr}"
    return textwrap.shorten(text, _LONGEST)
