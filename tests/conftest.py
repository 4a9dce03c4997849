"""Which tests a session collects, and what the jobs that it starts ran."""

from __future__ import annotations

import os
import signal

import pytest

# tests/parallel and parallel_tf run inside the ranks of a Horovod job, which tests/launch starts
# (Open MPI and horovodrun set these). To run some of it by hand:
#     .venv/bin/mpirun -np 2 .venv/bin/python -m pytest tests/parallel -k name
IN_A_RANK = "OMPI_COMM_WORLD_RANK" in os.environ or "HOROVOD_RANK" in os.environ

collect_ignore = [] if IN_A_RANK else ["parallel", "parallel_tf"]


# What `make check` runs of tests/single: the path of a gradient and its guards.
THE_PATH = {
    *("auto", "config", "hops", "imports", "log", "memory", "overflow", "packing", "philox"),
    *("pipeline", "quantizers", "repelling", "replicas", "special_values", "two_hop", "watchdog"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "single" and item.path.stem.removeprefix("test_") in THE_PATH:
            item.add_marker("check")


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


# A shell lets what it starts in the background ignore SIGINT, and all children inherit that. Some
# tests send it to programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
