"""mpi_ops.allreduce in the ranks of a Horovod job, against the law of its closed form.

What needs no closed form is in test_mpi_allreduce.py, the operation in test_mpi_op.py.
"""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import CONFIGURATIONS, check_mean, check_replicas, compressor, gradients
from mpi_cases import COMM, check_same_bytes

from mpi_ops.reduction import allreduce, iallreduce

EVERY = pytest.mark.parametrize(("levels", "bits"), CONFIGURATIONS)


@pytest.fixture(autouse=True)
def ranks_are_mpi_processes() -> None:
    if COMM.size != hvd.size():
        pytest.skip("horovodrun --gloo starts its ranks without MPI")


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_mean_is_unbiased_with_the_variance_of_its_closed_form(
    levels: Any, bits: int | None, dtype: torch.dtype
) -> None:
    inputs = gradients(4097, tag=1, dtype=dtype)
    own = inputs[COMM.rank].numpy().copy()
    result = allreduce(own, COMM, levels=levels, bits=bits)
    assert np.array_equal(own, inputs[COMM.rank].numpy()), "the input was modified"
    check_mean(torch.from_numpy(result), inputs, compressor(levels, bits))
    check_replicas(torch.from_numpy(result))


@EVERY
def test_many_chunks_and_odd_sizes(levels: Any, bits: int | None) -> None:
    for count in (1, 31, 33, 1000, 90_007):  # the last makes six chunks
        inputs = gradients(count, tag=2)
        result = allreduce(inputs[COMM.rank].numpy(), COMM, levels=levels, bits=bits)
        check_mean(torch.from_numpy(result), inputs, compressor(levels, bits))
        check_same_bytes(result)


def test_sums_shapes_and_outputs() -> None:
    inputs = gradients((33, 17), tag=3)
    own = inputs[COMM.rank]
    total = allreduce(own.numpy(), COMM, levels="standard", average=False)
    check_mean(torch.from_numpy(total), inputs, compressor("standard"), factor=COMM.size)
    out = np.full((33, 17), 7, dtype=np.float32)
    assert allreduce(own, COMM, levels="standard", out=out) is out  # a torch tensor, by DLPack
    check_mean(torch.from_numpy(out), inputs, compressor("standard"))
    turned = allreduce(own.numpy().T, COMM, levels="standard")  # not contiguous
    check_mean(torch.from_numpy(turned), [x.T.contiguous() for x in inputs], compressor("standard"))
    assert allreduce(np.empty(0, np.float32), COMM).shape == (0,)


@pytest.mark.parametrize(
    "x",
    [torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000, requires_grad=True)],
    ids=["bfloat16", "requires_grad"],
)
def test_tensors_that_numpy_cannot_read(x: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"array must be one that NumPy can read.*got a Tensor"):
        allreduce(x, COMM)
    own = x.detach()
    if own.dtype == torch.bfloat16:
        result = allreduce(own.view(torch.int16).numpy().view(ml_dtypes.bfloat16), COMM)
    else:
        result = allreduce(own, COMM)
    assert np.array_equal(result.astype(np.float32), np.ones(1000, np.float32))


def test_several_in_flight_finish_in_any_order() -> None:
    inputs = [gradients(20_000 + i, tag=10 + i) for i in range(4)]
    requests = [iallreduce(x[COMM.rank].numpy(), COMM, levels="standard") for x in inputs]
    for i in [2, 0, 3, 1] if COMM.rank % 2 else [1, 3, 0, 2]:
        requests[i].wait()
    for x, request in zip(inputs, requests, strict=True):
        result = request.wait()
        check_mean(torch.from_numpy(result), x, compressor("standard"))
        check_same_bytes(result)
