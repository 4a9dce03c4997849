"""mpi_ops.allreduce: values that have an exact answer, communicators, and what it refuses.

Needs NumPy and an MPI library only; tests/launch/test_mpi_libraries.py runs it under several.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpi_cases import COMM, check_same_bytes, check_unbiased, rank_inputs

from mpi_ops import allreduce, lanes
from mpi_ops.scheme import ConfigMismatchError


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
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


@pytest.mark.parametrize(
    ("levels", "bits"),
    [
        *(("standard", 6), ("standard", None), ("exponential", 4), ("exponential", 8)),
        *(("two-hop", 4), ("two-hop", 8)),
    ],
)
def test_repeated_calls_round_anew_and_approach_the_mean(levels: Any, bits: int | None) -> None:
    inputs = rank_inputs(1000, tag=4)
    mean = np.mean(inputs, axis=0, dtype=np.float64)
    results = [
        allreduce(inputs[COMM.rank], COMM, levels=levels, bits=bits).astype(np.float64)
        for _ in range(64)
    ]
    spread = np.std(results, axis=0, ddof=1)
    off = np.abs(np.mean(results, axis=0) - mean)
    random = spread > 0
    assert random.any()
    check_unbiased(np.array(results), mean)
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


# ----------------------------------------------------------------------------------------- refusals


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


class Refuses:
    """What NumPy cannot read."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
        raise self._error


def read_only(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"array": np.ones(1000, np.int32)}, "array must have one of the dtypes"),
        ({"array": np.ones(1000, np.complex64)}, "array must have one of the dtypes"),
        ({"array": None}, "array must have one of the dtypes"),
        ({"array": "a string"}, "array must have one of the dtypes"),
        ({"array": [[1.0], [2.0, 3.0]]}, "inhomogeneous shape"),
        ({"array": Refuses(ValueError("of its own"))}, "of its own"),
        ({"array": Refuses(RuntimeError("of its own"))}, "of its own"),
        ({"array": np.ones(1000, ">f4")}, "in native byte order"),
        ({"out": np.ones(999, np.float32)}, "out must be a C-contiguous"),
        ({"out": np.ones(1000, np.float64)}, "out must be a C-contiguous"),
        ({"out": np.ones(2000, np.float32)[::2]}, "out must be a C-contiguous"),
        ({"out": read_only(np.ones(1000, np.float32))}, "read-only"),
        ({"out": [0.0] * 1000}, "out must be a numpy.ndarray, got a builtins.list"),
        ({"average": "yes"}, "average must be True or False"),
        ({"average": None}, "average must be True or False"),
        ({"bits": "8"}, "bits must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"block_size": 100}, "block_size must be a positive multiple of 32"),
        ({"levels": "linear"}, "levels must be 'standard', 'exponential' or 'two-hop'"),
        ({"norm": "l1"}, "norm must be 'max' or 'l2'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_rank_that_cannot_start_does_not_leave_the_others_waiting(
    wrong: dict[str, Any], named: str
) -> None:
    options = {"array": np.ones(1000, np.float32), **different(wrong, {})}
    expected = different((ValueError, TypeError, RuntimeError), ConfigMismatchError)
    with pytest.raises(expected, match=named):
        allreduce(options.pop("array"), COMM, **options)
    check_same_bytes(allreduce(np.ones(1000, np.float32), COMM))  # the communicator still works


@pytest.mark.parametrize("comm", [MPI.COMM_NULL, None, "world", MPI.GROUP_EMPTY], ids=repr)
def test_what_is_no_communicator(comm: Any) -> None:
    with pytest.raises(ValueError, match="communicator that is not freed"):
        allreduce(np.ones(100, np.float32), comm)


def test_a_freed_communicator() -> None:
    for used in (False, True):
        comm = COMM.Dup()
        if used:
            allreduce(np.ones(100, np.float32), comm)
        comm.Free()
        with pytest.raises(ValueError, match="communicator that is not freed"):
            allreduce(np.ones(100, np.float32), comm)


def test_arrays_that_are_not_contiguous_and_no_arrays() -> None:
    x = np.arange(600, dtype=np.float32)
    spread, backwards = x[::3], x[::-1]
    for strided in (spread, backwards):
        step = strided.max() / lanes.levels(16, COMM.size)
        result = allreduce(strided, COMM, levels="standard", bits=16)
        assert np.allclose(result, strided, atol=step)
    assert np.array_equal(x, np.arange(600)), "the input was modified"
    result = allreduce([1.0, 0.5], COMM)
    assert result.dtype == np.float64
    assert np.array_equal(result, [1.0, 0.5])
    assert allreduce(np.float32(3), COMM) == 3


@pytest.mark.parametrize("average", [True, False, np.True_, np.False_], ids=repr)
def test_the_result_may_replace_the_array(average: Any) -> None:
    x = np.random.default_rng(COMM.rank).standard_normal(50_000)
    expected = allreduce(x.copy(), COMM.Dup(), average=bool(average))
    assert allreduce(x, COMM.Dup(), average=average, out=x) is x
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_memory_beyond_the_arrays_is_bounded_by_the_compressed_size(levels: Any) -> None:
    count = 4_000_000
    x = np.random.default_rng(COMM.rank).standard_normal(count, dtype=np.float32)
    out = np.empty_like(x)
    allreduce(x, COMM, levels=levels, bits=8, out=out)
    tracemalloc.start()  # NumPy reports to it what its arrays take
    try:
        allreduce(x, COMM, levels=levels, bits=8, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count / 4 < peak < 1.5 * count, peak


def test_an_option_too_long_to_be_compared() -> None:
    if COMM.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(ConfigMismatchError, match=r"description is too long.*1000") as caught:
        allreduce(np.ones(1000, np.float32), COMM, seed=different(10**2000, 0))
    assert str(caught.value).isprintable()
    check_same_bytes(allreduce(np.ones(1000, np.float32), COMM))


def test_bad_arguments_everywhere() -> None:
    x = np.ones(1000, np.float32)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        allreduce(x, COMM, bits=5)
    with pytest.raises(ValueError, match="out must be a C-contiguous"):
        allreduce(x, COMM, out=np.ones(999, np.float32))
    overlapping = np.ones(1001, np.float32)
    with pytest.raises(ValueError, match="share no memory"):
        allreduce(overlapping[1:], COMM, out=overlapping[:-1])
    if COMM.size > 1:
        half = COMM.Split(int(COMM.rank == 0), COMM.rank)
        between = half.Create_intercomm(0, COMM, int(COMM.rank == 0))
        with pytest.raises(ValueError, match="intracommunicator"):
            allreduce(x, between)
        between.Free()
        half.Free()
