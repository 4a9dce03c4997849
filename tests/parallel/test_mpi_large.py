"""More than 2**31 elements, where a 32-bit count would wrap.

Opt-in, because it takes 10 GB and some minutes:

    python -m pytest tests/launch/test_mpi_libraries.py -m large

prints the peak memory of each rank.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
from mpi4py import MPI
from mpi_cases import COMM

from mpi_ops.op import exponential_sum
from mpi_ops.reduction import allreduce

pytestmark = pytest.mark.large

COUNT = 2**31 + 1000
# The ends, and where bytes or elements pass 2**31 and 2**32.
PLACES = [0, 2**30 - 200, 2**31 - 200, COUNT - 400]
# Powers of two are levels, and so are means of equal levels: every result is exact.
PATTERN = (-1.0) ** np.arange(400) * 2.0 ** -(np.arange(400) % 13)


def check_pattern(result: np.ndarray, pattern: np.ndarray) -> None:
    """Assert that `result` is the pattern at its places and zero everywhere else."""
    for place in PLACES:
        assert np.array_equal(result[place : place + pattern.size], pattern), f"at {place}"
    found = np.count_nonzero(result.view(f"u{result.itemsize}"))  # faster than of float16
    assert found == len(PLACES) * pattern.size, "something outside of the pattern"


@pytest.fixture(autouse=True)
def print_peak_memory(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(f"peak memory so far {peak:.1f} GiB")


def test_an_array_of_more_than_2_31_elements() -> None:
    x = np.zeros(COUNT, np.float16)  # pages that nobody writes take no memory
    for place in PLACES:
        x[place : place + PATTERN.size] = PATTERN
    check_pattern(allreduce(x, COMM), PATTERN.astype(np.float16))


@pytest.mark.parametrize("datatype", ["bytes", "rows"])
def test_the_operation_on_more_than_2_31_bytes(datatype: str) -> None:
    size = -(-COUNT // 4096) * 4096
    codes, total = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    pattern = 100 + np.arange(400, dtype=np.uint8) % 20
    for place in PLACES:
        codes[place : place + pattern.size] = total[place : place + pattern.size] = pattern
    rows = MPI.BYTE.Create_contiguous(4096).Commit()
    counted = {"bytes": [size, MPI.BYTE], "rows": [size // 4096, rows]}[datatype]
    # Counts of 64 bits came with MPI 4. Before, mpi4py refuses them, and rows are the way.
    refused = datatype == "bytes" and MPI.VERSION < 4
    with pytest.raises(MPI.Exception) if refused else nullcontext():
        exponential_sum(8).Reduce_local([codes, *counted], [total, *counted])
    rows.Free()
    if not refused:
        check_pattern(total, pattern + 1)  # twice a level is the next one
