"""Settings of the tests of TensorFlow and Keras that run inside the ranks of a Horovod job."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from horovod.common import process_sets

PARALLEL = Path(__file__).parents[1] / "parallel"

# The first failure ends the job, as there.
_spec = importlib.util.spec_from_file_location("parallel_conftest", PARALLEL / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_parallel = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_parallel)
pytest_configure = _parallel.pytest_configure

# Without these, each rank has threads for all cores.
tf.config.threading.set_inter_op_parallelism_threads(4)
tf.config.threading.set_intra_op_parallelism_threads(1)


@pytest.fixture(scope="session", autouse=True)
def horovod() -> Iterator[None]:
    """Horovod, initialized once; tests may add process sets."""
    # They ask the Horovod of the framework that was imported last; init() changes that too late.
    process_sets._setup(hvd.mpi_ops._basics)
    hvd.init(process_sets="dynamic")
    yield
    hvd.shutdown()


@pytest.fixture(scope="module", autouse=True)
def elastic_graphs(request: pytest.FixtureRequest, horovod: None) -> Iterator[None]:
    """Graphs as in an elastic job, in the module that GQ_TEST_ELASTIC names.

    Not before hvd.init(), which asks for the variable too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("GQ_TEST_ELASTIC") == request.module.__name__:
            patch.setenv("HOROVOD_ELASTIC", "1")
        yield


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of an operation: the same on every rank, another one in every test."""
    return re.sub(r"[^\w.-]", "_", request.node.name)


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
