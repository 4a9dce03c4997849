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


# What takes longest, in seconds of a core, by the beginning of its place in tests/; the first that
# fits counts. It comes first, so that workers that share the tests end at about the same time.
LONGEST = {
    "launch/test_tensorflow.py::test_in_every_rank[mpirun-2": 220,
    "launch/test_parallel.py::test_in_every_rank[mpirun-2": 165,
    "launch/test_parallel.py::test_in_every_rank[mpirun-3": 115,
    "launch/test_parallel.py::test_in_every_rank[horovodrun-2": 100,
    "launch/test_tensorflow.py::test_in_every_rank[horovodrun-2": 100,
    "launch/test_tensorflow.py::test_keras_3": 95,
    "launch/test_tensorflow.py::test_in_every_rank[mpirun-3": 85,
    "launch/test_parallel.py::test_with_transport_mpi": 70,
    "launch/test_tensorflow.py::test_in_every_rank": 60,
    "launch/test_parallel.py": 55,
    "launch/test_tensorflow_saved.py": 50,
    "launch/test_by_nodes.py": 50,
    "launch/test_elastic.py": 50,
    "launch/test_mpi_libraries.py::test_open_mpi": 45,
    "launch/test_gpu_check.py::test_operations": 30,
    "launch/test_tensorflow_join.py": 25,
    "launch/test_workloads.py": 25,
    "launch/test_benchmarks_run.py": 20,
    # One worker builds the wheel, for all tests that want one, and the programs that are fuzzed.
    "single/test_packaging.py": 60,
    "single/test_fuzz.py": 40,
}


def seconds(item: pytest.Item) -> int:
    """Of a core, as far as LONGEST knows them."""
    place = item.nodeid.removeprefix("tests/")
    return next((own for begin, own in LONGEST.items() if place.startswith(begin)), 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=seconds, reverse=True)  # the others stay in their order
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
