"""mpi_ops: the compressed allreduce and the MPI operation, where the ranks are MPI processes."""

from __future__ import annotations

import zlib
from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from helpers import CONFIGURATIONS, Z, check_mean, check_replicas, compressor, gradients
from mpi4py import MPI

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer
from mpi_ops.op import chain_headroom, exponential_sum
from mpi_ops.reduction import allreduce, iallreduce
from mpi_ops.scheme import ConfigMismatchError

COMM = MPI.COMM_WORLD

EVERY = pytest.mark.parametrize(("levels", "bits"), CONFIGURATIONS)


@pytest.fixture(autouse=True)
def ranks_are_mpi_processes() -> None:
    if COMM.size != hvd.size():
        pytest.skip("horovodrun --gloo starts its ranks without MPI")


def check_same_bytes(array: np.ndarray) -> None:
    checksums = COMM.allgather(zlib.crc32(array.tobytes()))
    assert len(set(checksums)) == 1, f"checksums by rank: {checksums}"


# ---------------------------------------------------------------------------------------- allreduce


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


@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_special_values(levels: Any) -> None:
    assert not allreduce(np.zeros(1000, np.float32), COMM, levels=levels).any()
    most = np.zeros(1000, np.float32)
    most[7] = np.finfo(np.float32).max
    assert np.array_equal(allreduce(most, COMM, levels=levels), most)
    for poison in (np.nan, np.inf):
        x = np.ones(1000, np.float32)
        if COMM.rank == COMM.size - 1:
            x[300] = poison
        result = allreduce(x, COMM, levels=levels, block_size=256)
        assert np.isnan(result[256:512]).all()
        assert np.isfinite(result[:256]).all()
        assert np.isfinite(result[512:]).all()


def test_several_in_flight_finish_in_any_order() -> None:
    inputs = [gradients(20_000 + i, tag=10 + i) for i in range(4)]
    requests = [iallreduce(x[COMM.rank].numpy(), COMM, levels="standard") for x in inputs]
    for i in [2, 0, 3, 1] if COMM.rank % 2 else [1, 3, 0, 2]:
        requests[i].wait()
    for x, request in zip(inputs, requests, strict=True):
        result = request.wait()
        check_mean(torch.from_numpy(result), x, compressor("standard"))
        check_same_bytes(result)


def test_repeated_calls_round_anew_and_approach_the_mean() -> None:
    inputs = gradients(1000, tag=4)
    mean = torch.stack(inputs).double().mean(dim=0).numpy()
    results = [
        allreduce(inputs[COMM.rank].numpy(), COMM, levels="exponential").astype(np.float64)
        for _ in range(64)
    ]
    spread = np.std(results, axis=0, ddof=1)
    off = np.abs(np.mean(results, axis=0) - mean)
    random = spread > 0
    assert random.any()
    # Student's t of 63 degrees of freedom is wider than the normal law: 8 in place of Z.
    assert (off[random] <= 8 * spread[random] / 8 + 1e-6).all()


def test_parts_of_a_communicator_and_no_leak() -> None:
    for _ in range(200):  # Open MPI has some thousands of communicators; a leak shows in minutes
        part = COMM.Split(COMM.rank % 2, COMM.rank)
        x = np.full(64, part.rank + 1.0, np.float32)
        result = allreduce(x, part, levels="standard", bits=16)
        expected = (part.size + 1) / 2
        assert np.allclose(result, expected, atol=part.size / lanes.levels(16, part.size))
        part.Free()


def different(rank_value: Any, value: Any) -> Any:
    return rank_value if COMM.rank == COMM.size - 1 else value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": (4, 8)}, "bits"),
        ({"levels": ("standard", "exponential")}, "levels"),
        ({"seed": (1, 2)}, "seed"),
        ({"block_size": (64, 128)}, "block_size"),
        ({"average": (True, False)}, "average"),
    ],
)
def test_different_options_are_named_on_every_rank(options: dict[str, Any], named: str) -> None:
    if COMM.size == 1:
        pytest.skip("one rank agrees with itself")
    own = {key: different(*values) for key, values in options.items()}
    with pytest.raises(ConfigMismatchError, match=f"{named} is .*rank"):
        allreduce(np.ones(1000, np.float32), COMM, **own)
    check_same_bytes(allreduce(np.ones(1000, np.float32), COMM))  # the communicator still works


def test_different_tensors_are_named_on_every_rank() -> None:
    if COMM.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(ConfigMismatchError, match="elements is"):
        allreduce(np.ones(different(999, 1000), np.float32), COMM)
    with pytest.raises(ConfigMismatchError, match="dtype is"):
        allreduce(np.ones(1000, different(np.float64, np.float32)), COMM)


def test_a_rank_that_cannot_start_does_not_leave_the_others_waiting() -> None:
    x = np.ones(1000, different(np.int32, np.float32))
    expected = TypeError if COMM.rank == COMM.size - 1 else ConfigMismatchError
    with pytest.raises(expected, match="array must have one of the dtypes"):
        allreduce(x, COMM)
    check_same_bytes(allreduce(np.ones(1000, np.float32), COMM))


def test_bad_arguments_everywhere() -> None:
    x = np.ones(1000, np.float32)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        allreduce(x, COMM, bits=5)
    with pytest.raises(ValueError, match="out must be a C-contiguous array"):
        allreduce(x, COMM, out=np.ones(999, np.float32))
    with pytest.raises(ValueError, match="must not share memory"):
        allreduce(x, COMM, out=x)
    with pytest.raises(ValueError, match="communicator that is not freed"):
        allreduce(x, MPI.COMM_NULL)
    if COMM.size > 1:
        half = COMM.Split(int(COMM.rank == 0), COMM.rank)
        between = half.Create_intercomm(0, COMM, int(COMM.rank == 0))
        with pytest.raises(ValueError, match="intracommunicator"):
            allreduce(x, between)
        between.Free()
        half.Free()


# ------------------------------------------------------------------------------------ the operation


def quantized(x: np.ndarray, norms: np.ndarray, bits: int, step: int) -> np.ndarray:
    return host.quantize_exponential(
        Buffer.of(x),
        norms,
        block_size=lanes.whole_tensor_block(x.size),
        bits=bits,
        headroom=chain_headroom(COMM.size, bits),
        dither=dither(step, "test", 0, COMM.rank, Stage.QUANTIZE),
    )


def decoded(codes: np.ndarray, norms: np.ndarray, bits: int, count: int) -> np.ndarray:
    result = np.empty(count, np.float32)
    host.dequantize_exponential(
        codes,
        norms,
        Buffer.of(result),
        block_size=lanes.whole_tensor_block(count),
        bits=bits,
        headroom=chain_headroom(COMM.size, bits),
    )
    return result


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operation_is_unbiased_and_the_same_on_every_rank(bits: int) -> None:
    count, repeats = 5003, 48
    inputs = [x.numpy() for x in gradients(count, tag=5)]
    own = inputs[COMM.rank]
    norms = host.absmax(Buffer.of(own), lanes.whole_tensor_block(count))
    COMM.Allreduce(MPI.IN_PLACE, norms, op=MPI.MAX)
    errors = np.zeros(count)
    squares = np.zeros(count)
    for step in range(repeats):
        codes = quantized(own, norms, bits, step)
        total = np.empty_like(codes)
        COMM.Allreduce(codes, total, op=exponential_sum(bits))
        check_same_bytes(total)
        error = decoded(total, norms, bits, count) - np.sum(inputs, axis=0, dtype=np.float64)
        errors += error
        squares += error**2
    # All elements and repetitions together: independent, with the variance that they show.
    sign = np.sign(np.sum(inputs, axis=0, dtype=np.float64))
    for direction in (np.ones(count), sign):
        assert abs((errors * direction).sum()) <= Z * np.sqrt(squares.sum())
    assert squares.sum() > 0


def test_every_collective_that_takes_an_operation() -> None:
    """One level on all ranks: two equal levels add up to the next one exactly."""
    op = exponential_sum(8)
    level = 100
    codes = np.full(COMM.size * 1000, level, np.uint8)
    lowest = level + (COMM.size > 1)  # where every further addition rounds down
    highest = level + COMM.size - 1  # where every addition of a chain rounds up

    def expected(result: np.ndarray) -> bool:
        return bool((lowest <= result).all() and (result <= highest).all())

    total = np.empty_like(codes)
    COMM.Allreduce(codes, total, op=op)
    assert expected(total)
    COMM.Iallreduce(codes, total, op=op).Wait()
    assert expected(total)
    COMM.Reduce(codes, total if COMM.rank == 0 else None, op=op, root=0)
    assert COMM.rank != 0 or expected(total)
    part = np.empty(1000, np.uint8)
    COMM.Reduce_scatter_block(codes, part, op=op)
    assert expected(part)
    COMM.Reduce_scatter(codes, part, recvcounts=[1000] * COMM.size, op=op)
    assert expected(part)
    COMM.Allreduce([codes, MPI.BYTE], [total, MPI.BYTE], op=op)
    assert expected(total)
    assert (codes == level).all(), "the input was modified"


def test_the_operation_is_made_once() -> None:
    assert exponential_sum(8) is exponential_sum(bits=8)
    assert exponential_sum(8).Is_commutative()
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        exponential_sum(5)
