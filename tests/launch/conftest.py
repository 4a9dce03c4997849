"""What the jobs of this directory ran, at the end of the session."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        str(value)
        for report in terminalreporter.getreports("passed")
        for key, value in report.user_properties
        if key == "job"
    ]
    if lines:
        terminalreporter.section("jobs")
        for line in lines:
            terminalreporter.write_line(line)
