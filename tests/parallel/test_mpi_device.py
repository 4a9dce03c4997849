"""mpi_ops.allreduce of arrays on a GPU, which is emulated: see tests/single/fake_cupy.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import fake_cupy
import numpy as np
import pytest
from mpi4py import MPI

from mpi_ops import allreduce, layout

COMM = MPI.COMM_WORLD


@pytest.fixture(scope="module")
def cupy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("emulation") / str(COMM.rank)
    with fake_cupy.installed(directory, ["float32"]):
        yield sys.modules["cupy"]


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
@pytest.mark.parametrize("average", [True, False])
def test_the_same_bytes_as_in_host_memory(cupy: Any, levels: Any, average: bool) -> None:
    """Whichever rank has it where."""
    x = np.random.default_rng(COMM.rank).standard_normal((7, 5003), dtype=np.float32)
    expected = allreduce(x, COMM.Dup(), levels=levels, average=average)
    for on_gpu in (True, COMM.rank % 2 == 0):
        own = cupy.asarray(x) if on_gpu else x
        result = allreduce(own, COMM.Dup(), levels=levels, average=average)
        assert isinstance(result, cupy.ndarray if on_gpu else np.ndarray)
        values = result.get() if on_gpu else result
        np.testing.assert_array_equal(values, expected)
        before = own.get() if on_gpu else own
        np.testing.assert_array_equal(before, x)


def test_into_an_array(cupy: Any) -> None:
    x = np.random.default_rng(COMM.rank).standard_normal(3000, dtype=np.float32)
    expected = allreduce(x, COMM.Dup())
    own = cupy.asarray(x)
    assert allreduce(own, COMM.Dup(), out=own) is own
    np.testing.assert_array_equal(own.get(), expected)


def test_a_result_in_other_memory_is_refused(cupy: Any) -> None:
    x = np.ones(3000, dtype=np.float32)
    with pytest.raises(TypeError, match=r"out must be a cupy\.ndarray, got a numpy\.ndarray"):
        allreduce(cupy.asarray(x), COMM, out=x.copy())
    with pytest.raises(TypeError, match=r"out must be a numpy\.ndarray, got a fake_cupy\.ndarray"):
        allreduce(x, COMM, out=cupy.asarray(x))


def test_other_dtypes_are_refused(cupy: Any) -> None:
    with pytest.raises(TypeError, match="array must have one of the dtypes"):
        allreduce(cupy.asarray(np.ones(100, dtype=np.int32)), COMM)


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_norms_go_to_the_gpu_once(cupy: Any, levels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks there are, to quantize with and to decode with."""
    monkeypatch.setattr(layout, "message_elements", lambda count, ranks: 4096)
    own = cupy.asarray(np.random.default_rng(COMM.rank).standard_normal(40_000, dtype=np.float32))
    count = -(-40_000 // 256)
    fake_cupy.uploads.clear()
    allreduce(own, COMM.Dup(), levels=levels, block_size=256)
    of_norms = [size for size in fake_cupy.uploads if size // 4 in range(count, 2 * count)]
    quantized_and_decoded = 2
    assert len(of_norms) <= quantized_and_decoded, fake_cupy.uploads
    assert len(of_norms) >= 1
