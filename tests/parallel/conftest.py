"""Settings of every test that runs inside the ranks of a Horovod job.

All ranks run the same tests in the same order. A rank that fails leaves the others waiting in a
collective, so the first failure ends the job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import helpers
import horovod.torch as hvd
import pytest
import torch

from gq_horovod.torch import nodes

# They run without Horovod, under several MPI libraries: tests/launch/test_mpi_libraries.py.
collect_ignore = ["test_mpi_allreduce.py", "test_mpi_large.py", "test_mpi_op.py"]
if os.environ.get("HOROVOD_CONTROLLER") == "gloo":
    # mpi4py cannot be imported there: the ranks are no MPI processes.
    collect_ignore.append("test_mpi_ops.py")

# Long enough for the other ranks to find and print the same failure.
_GRACE_SECONDS = 2.0


@pytest.fixture(scope="session", autouse=True)
def horovod() -> Iterator[None]:
    """Horovod, initialized once; tests may add process sets."""
    torch.set_num_threads(1)
    hvd.init(process_sets="dynamic")
    per_node = os.environ.get("GQ_TEST_RANKS_PER_NODE")
    if per_node is not None:  # as if the ranks of this host were on several
        nodes._node = lambda: hvd.rank() // int(per_node)
    if per_node is not None or hvd.cross_size() > 1:
        nodes.pays = lambda resident: True  # also in host memory
    helpers.place(nodes._node)
    yield
    hvd.shutdown()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of an operation: the same on every rank, another one in every test."""
    test: str = request.node.name
    return test


@pytest.fixture
def several_ranks() -> None:
    if hvd.size() == 1:
        pytest.skip("needs a second rank")


@pytest.fixture
def ends() -> Iterator[hvd.ProcessSet]:
    """The process set of the first and the last rank."""
    if hvd.size() < 3:
        pytest.skip("needs a third rank that is left out")
    process_set = hvd.add_process_set([0, hvd.size() - 1])
    yield process_set
    hvd.remove_process_set(process_set)


class _EndTheJob:
    """Prints the first failure and ends this rank, whereupon the launcher ends the others."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}) on rank {_rank()}")
        reporter.write_line(report.longreprtext)
        for title, text in report.sections:
            reporter.write_line(f"--- {title}\n{text}")
        reporter.flush()
        time.sleep(_GRACE_SECONDS)
        os._exit(1)


def _rank() -> str:
    return str(hvd.rank()) if hvd.is_initialized() else "?"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_EndTheJob(config))
