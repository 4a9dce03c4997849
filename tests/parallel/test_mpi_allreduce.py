"""mpi_ops.allreduce: values that have an exact answer, communicators, and what it refuses.

Needs NumPy and an MPI library only; tests/launch/test_mpi_libraries.py runs it under several.
"""

from __future__ import annotations

import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from mpi_cases import COMM, check_same_bytes, check_unbiased, rank_inputs

from mpi_ops import allreduce, chunks, codec, exponential_sum, iallreduce, lanes, reduction
from mpi_ops.nodes import ROUNDS_IN_FLIGHT
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


class Counted(MPI.Intracomm):
    """A communicator that counts messages; so do its duplicates."""

    receivers: list[int] = []  # noqa: RUF012

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
        self.receivers.append(dest)
        return super().Isend(buf, dest, tag)


@pytest.mark.skipif(chunks.columns(COMM.size) == COMM.size, reason="they have one row")
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_short_pieces_go_by_rows_and_columns(levels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes, with fewer messages; with long pieces in flight beside them."""
    counts = [3000, 1, 300_000, 300, 20_000, 0, 2000]

    def reduce() -> tuple[list[np.ndarray], list[int]]:
        comm, sent = Counted(COMM.Dup()), []
        for count in counts:  # one after the other: what each of them sends
            before = len(Counted.receivers)
            allreduce(rank_inputs(count)[COMM.rank], comm, levels=levels)
            sent.append(len(Counted.receivers) - before)
        requests = [
            iallreduce(rank_inputs(count)[COMM.rank], comm, levels=levels) for count in counts
        ]
        order = np.random.default_rng(COMM.rank).permutation(len(counts))
        for place in order:
            requests[place].wait()
        found = [request.wait() for request in requests]
        comm.Free()
        return found, sent

    expected, direct = reduce()
    monkeypatch.setattr(chunks, "FORWARDING_RANKS", 4)
    found, forwarded = reduce()
    for own, result in zip(expected, found, strict=True):
        np.testing.assert_array_equal(result, own)
        check_same_bytes(result)
    columns = chunks.columns(COMM.size)
    fewer = columns + COMM.size // columns - 2
    for count, sent, less in zip(counts, direct, forwarded, strict=True):
        if count in (300_000, 20_000):  # pieces of some thousand bytes
            assert sent == less
        else:
            assert (sent, less) == (2 * (COMM.size - 1) * (count > 0), 2 * fewer * (count > 0))


def test_parts_of_a_communicator_and_no_leak() -> None:
    for _ in range(200):  # Open MPI has some thousands of communicators; a leak shows in minutes
        part = COMM.Split(COMM.rank % 2, COMM.rank)
        x = np.full(64, part.rank + 1.0, np.float32)
        result = allreduce(x, part, levels="standard", bits=16)
        expected = (part.size + 1) / 2
        assert np.allclose(result, expected, atol=part.size / lanes.levels(16, part.size))
        part.Free()


DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("average", [True, False])
def test_no_setting_of_numpy_changes_a_result(dtype: Any, levels: Any, average: bool) -> None:
    """A sum that overflows is Inf, of which nobody is warned; nor of what is tiny, NaN or Inf."""
    limits = ml_dtypes.finfo(np.float32 if dtype == np.float64 else dtype)
    for value in (limits.max, -limits.max, limits.smallest_subnormal, np.nan, np.inf, 1.0):
        x = np.full(70, value, np.float64).astype(dtype)
        with np.errstate(all="ignore"):
            expected = x if average else x * np.asarray(COMM.size, np.float32).astype(dtype)
        if np.isinf(value):
            expected = np.full_like(x, np.nan)
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            result = allreduce(x, COMM, levels=levels, average=average)
        assert np.array_equal(result, expected, equal_nan=True), (value, result[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("ranks", [3, 257, 2049, 133_144])
def test_the_factor_of_a_sum_is_not_rounded(dtype: Any, ranks: int) -> None:
    """bfloat16 has no 257 and float16 no 2049: all sums would be too small by the same share."""
    x = np.linspace(0.001, 0.002, 50).astype(dtype)
    total = x.copy()
    reduction._scale(total, ranks)
    with np.errstate(all="ignore"):
        exact = (x.astype(np.float64) * ranks).astype(dtype)
    assert np.array_equal(total, exact)
    assert total.dtype == dtype


# ------------------------------------------------------------------------------------------- arrays


def unaligned(x: np.ndarray) -> np.ndarray:
    """The same values, one byte beside where they should be."""
    room = np.empty(x.nbytes + 1, np.uint8)
    moved = room[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    assert not moved.flags.aligned
    return moved


def mapped(x: np.ndarray, directory: Path, mode: Any) -> np.ndarray:
    path = directory / f"array.{COMM.rank}"
    x.tofile(path)
    return np.memmap(path, dtype=x.dtype, mode=mode, shape=x.shape)


LAYOUTS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "Fortran order": lambda x, directory: np.asfortranarray(x),
    "every second": lambda x, directory: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x, directory: x[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": lambda x, directory: read_only(x.copy()),
    "unaligned": lambda x, directory: unaligned(x),
    "matrix": lambda x, directory: x.view(np.matrix),
    "mapped": lambda x, directory: mapped(x, directory, "r+"),
    "mapped, read-only": lambda x, directory: mapped(x, directory, "r"),
    "list": lambda x, directory: x.tolist(),
    "memoryview": lambda x, directory: memoryview(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("average", [True, False])
def test_every_layout_gives_the_same_bytes(layout: str, average: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(COMM.rank).standard_normal((30, 41))
    expected = allreduce(x, COMM.Dup(), average=average)
    own = LAYOUTS[layout](x, tmp_path)
    result = allreduce(own, COMM.Dup(), average=average)
    assert type(result) is np.ndarray
    assert np.array_equal(result, expected)
    assert np.array_equal(own, x), "the input was modified"


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 7), (1, 1, 1)])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_arrays_of_few_elements(shape: tuple[int, ...], average: bool, levels: Any) -> None:
    x = np.full(shape, 2.0, np.float32)
    out = np.zeros_like(x)
    factor = 1 if average else COMM.size
    for target in (None, out, x):
        result = allreduce(x, COMM, average=average, levels=levels, out=target)
        assert target is None or result is target
        assert (result.shape, result.dtype) == (shape, x.dtype)
        assert (result == 2 * factor).all()


@pytest.mark.parametrize("layout", ["matrix", "mapped"])
@pytest.mark.parametrize("average", [True, False])
def test_results_go_into_every_layout_that_can_hold_them(
    layout: str, average: bool, tmp_path: Path
) -> None:
    x = np.random.default_rng(COMM.rank).standard_normal((30, 41))
    expected = allreduce(x, COMM.Dup(), average=average)
    out = LAYOUTS[layout](np.zeros_like(x), tmp_path)
    assert allreduce(x, COMM.Dup(), average=average, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("layout", ["Fortran order", "every second", "read-only", "unaligned"])
def test_results_go_nowhere_else(layout: str, tmp_path: Path) -> None:
    x = np.ones((30, 41))
    with pytest.raises(ValueError, match="out must be a C-contiguous, aligned, writeable array"):
        allreduce(x, COMM, out=LAYOUTS[layout](x, tmp_path))


# ----------------------------------------------------------------------------------------- requests


def test_threads_may_wait_for_different_requests() -> None:
    inputs = rank_inputs(150_000, tag=7)
    expected = allreduce(inputs[COMM.rank], COMM.Dup(), levels="two-hop")
    comm = COMM.Dup()
    requests = [iallreduce(inputs[COMM.rank], comm, levels="two-hop") for _ in range(6)]
    results: dict[int, Any] = {}

    def wait(index: int) -> None:
        try:
            results[index] = requests[index].wait()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=wait, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(len(requests)):
        assert isinstance(results[index], np.ndarray), results[index]
        check_same_bytes(results[index])
    assert np.array_equal(results[0], expected)  # of the first operation on a communicator


def test_each_thread_may_have_a_communicator() -> None:
    comms = [COMM.Dup() for _ in range(3)]
    inputs = rank_inputs(10_000, tag=8)
    expected = allreduce(inputs[COMM.rank], COMM.Dup())
    results: list[list[np.ndarray]] = [[] for _ in comms]

    def reduce(index: int) -> None:
        for _ in range(20):
            results[index].append(allreduce(inputs[COMM.rank], comms[index]))

    threads = [threading.Thread(target=reduce, args=(index,)) for index in range(len(comms))]
    for thread in threads[:: -1 if COMM.rank % 2 else 1]:
        thread.start()
    for thread in threads:
        thread.join()
    for own in results:
        assert len(own) == 20
        assert np.array_equal(own[0], expected)


def test_ranks_wait_in_another_order_on_several_communicators() -> None:
    x = rank_inputs(150_000, tag=10)[COMM.rank]
    requests = [iallreduce(x, COMM.Dup()) for _ in range(3)]
    end = time.monotonic() + 60
    for request in requests[:: -1 if COMM.rank % 2 else 1]:
        while not request.test():
            assert time.monotonic() < end, "each waits for what the other does not advance"
    for request in requests:
        assert np.array_equal(request.wait(), requests[0].wait())


def test_a_communicator_freed_with_reductions_in_flight() -> None:
    x = rank_inputs(150_000, tag=9)[COMM.rank]
    expected = allreduce(x, COMM.Dup())
    before = len(reduction._channels)
    for _ in range(20):  # new communicators take the handles of old ones
        comm = COMM.Dup()
        requests = [iallreduce(x, comm), iallreduce(x[:100], comm)]
        comm.Free()
        other = COMM.Dup()
        assert np.array_equal(allreduce(x, other), expected)
        other.Free()
        assert requests[1].wait().size == 100
        assert np.array_equal(requests[0].wait(), expected)
    assert len(reduction._channels) == before, "duplicates were not freed"


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["quantize_parcel", "reduce_share", "dequantize_parcel"])
def test_what_stops_a_reduction_halfway_stops_those_after_it(
    kind: type[BaseException], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not look complete, and none may wait for it for ever."""
    comm, x = COMM.Dup(), np.ones(1000, np.float32)

    def stop(*arguments: Any, **options: Any) -> Any:
        raise kind("of a test")

    monkeypatch.setattr(codec, stage, stop)
    requests, errors = [], []
    for _ in range(3):  # one rank alone is stopped before the request is returned
        try:
            requests.append(iallreduce(x, comm))
        except (kind, RuntimeError) as error:
            errors.append(error)
    for request in requests * 2:
        with pytest.raises((kind, RuntimeError), match="of a test") as raised:
            request.wait()
        errors.append(raised.value)
    monkeypatch.undo()
    assert kind in map(type, errors)
    for function in (allreduce, iallreduce):
        text = rf"stopped on this rank by {kind.__name__}: of a test.*comm\.Abort"
        with pytest.raises(RuntimeError, match=text):
            function(x, comm)
    check_same_bytes(allreduce(x, COMM))  # other communicators work
    # At its end this process would wait for these, and end the job.
    reduction._channels[:] = [own for own in reduction._channels if own.broken is None]


def test_what_fails_before_the_start_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    comm, x = COMM.Dup(), np.ones(1000, np.float32)
    if COMM.rank == COMM.size - 1:

        def fail(*arguments: Any) -> Any:
            raise MemoryError("of a test")

        monkeypatch.setattr(codec, "norms", fail)
    with pytest.raises(different(MemoryError, ConfigMismatchError), match="of a test"):
        allreduce(x, comm)
    monkeypatch.undo()
    check_same_bytes(allreduce(x, comm))


def test_an_interrupt_before_the_start_stops_those_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks may be in that call, which they would take the next one for."""
    comm, x = COMM.Dup(), np.ones(1000, np.float32)

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt("of a test")

    monkeypatch.setattr(codec, "norms", stop)
    with pytest.raises(KeyboardInterrupt, match="of a test"):
        allreduce(x, comm)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"stopped on this rank by KeyboardInterrupt: of a test"):
        allreduce(x, comm)
    check_same_bytes(allreduce(x, COMM))  # other communicators work


def test_an_operation_that_was_freed_is_made_again() -> None:
    codes, total = np.zeros(64, np.uint8), np.ones(64, np.uint8)
    for value in (8, np.int64(8)):
        operation = exponential_sum(value)  # type: ignore[arg-type]
        assert exponential_sum(8, seed=np.int32(0)) is operation  # type: ignore[arg-type]
        COMM.Allreduce(codes, total, op=operation)
        assert not total.any()
        operation.Free()


@pytest.mark.parametrize("wrong", [{"bits": 8.0}, {"seed": 1.0}, {"seed": "1"}, {"seed": None}])
def test_operations_are_made_of_integers(wrong: dict[str, Any]) -> None:
    """1.0 equals 1, so it would find the operation of another seed."""
    exponential_sum(8, seed=1)
    with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an integer, got .* pass an"):
        exponential_sum(**wrong)


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
        ({"array": np.ma.masked_less(np.ones(1000, np.float32), 2)}, "array without a mask"),
        ({"out": np.ma.zeros(1000, np.float32)}, "array without a mask"),
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
    result = allreduce([1.0, 0.5], COMM, levels="exponential")
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
        allreduce(x, COMM, levels="exponential", bits=5)
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


# -------------------------------------------------------------------------------------------- nodes


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """As if every second rank were on another node; the ranks of each."""
    monkeypatch.setattr(reduction, "_node", lambda comm: comm.Split(comm.rank % 2, comm.rank))
    return [own for own in (list(range(first, COMM.size, 2)) for first in (0, 1)) if own]


NODES = pytest.mark.skipif(
    COMM.size not in (4, 8),
    reason="needs two nodes whose ranks take means that floats have exactly",
)
PLANS = pytest.mark.parametrize(
    ("levels", "bits", "block_size"),
    [
        *(("standard", None, 256), ("standard", 16, 96), ("two-hop", 4, 256)),
        *(("exponential", 4, 96), ("exponential", 8, None), ("standard", 8, None)),
    ],
)


@NODES
@PLANS
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("count", [0, 1, 300, 50_000])
def test_by_nodes_it_is_a_flat_reduction_of_their_exact_means(
    two_nodes: list[list[int]],
    dtype: Any,
    count: int,
    levels: Any,
    bits: Any,
    block_size: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reduction, "chunk_elements", lambda ranks: 4096)  # several rounds
    options: dict[str, Any] = {"levels": levels, "bits": bits, "seed": 5}
    random = np.random.default_rng(3)
    # Sums of eighths, which float32 has exactly.
    xs = [(random.integers(-99, 99, count) / 8).astype(dtype) for _ in range(COMM.size)]
    result = allreduce(
        xs[COMM.rank], COMM.Dup(), hierarchical=True, block_size=block_size, **options
    )
    check_same_bytes(result)
    means = [np.mean([xs[rank] for rank in own], 0, dtype) for own in two_nodes]
    pair = COMM.Split(COMM.rank // 2, COMM.rank)  # the two ranks of the same place
    if block_size is None and count > 4096:
        exact = np.mean(xs, 0, np.float64)
        assert np.abs(result - exact).max() <= 12.4 * (1 if levels == "exponential" else 0.04)
    else:
        flat = allreduce(means[pair.rank], pair, block_size=block_size, **options)
        np.testing.assert_array_equal(result, flat)
    pair.Free()


@NODES
@pytest.mark.usefixtures("two_nodes")
def test_by_nodes_beside_others_and_in_place() -> None:
    """Whoever waits for what came before still gets it, while others split the communicator."""
    comm = COMM.Dup()
    own = [np.full(70_000, rank + 1.0, np.float32) for rank in range(COMM.size)][COMM.rank]
    first = iallreduce(own, comm, levels="standard")
    if COMM.rank % 3 == 0:
        first.wait()
    kept = own.copy()
    total = iallreduce(own, comm, hierarchical=True, average=False, levels="standard")
    other = iallreduce(kept, comm, levels="two-hop", hierarchical=True, out=kept)
    mean = (COMM.size + 1) / 2
    for request, expected in ((other, mean), (total, mean * COMM.size), (first, mean)):
        np.testing.assert_allclose(request.wait(), expected, rtol=0.2)
    assert (own == COMM.rank + 1.0).all()
    comm.Free()


@NODES
@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("hierarchical", [False, True], ids=["flat", "by nodes"])
def test_more_in_flight_than_there_are_tags(
    hierarchical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that find none free wait for the oldest, whoever of them is asked for first."""
    monkeypatch.setattr(reduction, "_TAG_SETS", 2 * ROUNDS_IN_FLIGHT if hierarchical else 2)
    comm = COMM.Dup()
    counts = [100_003 if number % 2 else 300 for number in range(12)]
    requests = [
        iallreduce(
            np.full(count, number + COMM.rank, np.float64),
            comm,
            levels="standard",
            bits=16,
            block_size=256,
            hierarchical=hierarchical,
        )
        for number, count in enumerate(counts)
    ]
    for number in range(12)[:: 1 if COMM.rank % 2 else -1]:
        mean = number + (COMM.size - 1) / 2
        result = requests[number].wait()
        assert result.size == counts[number]
        np.testing.assert_allclose(result, mean, rtol=1e-3, err_msg=f"request {number}")
    comm.Free()


@NODES
@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_by_nodes_special_values_reach_all(levels: Any) -> None:
    x = np.zeros(9000, np.float32)
    x[5000] = np.finfo(np.float32).max
    if COMM.rank == COMM.size - 1:
        x[300] = np.nan
    result = allreduce(x, COMM, levels=levels, block_size=256, hierarchical=True)
    assert np.isnan(result[256:512]).all()
    assert result[5000] == x[5000]
    assert not result[512:4864].any()


@NODES
def test_by_nodes_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones(1000, np.float32)
    monkeypatch.setattr(reduction, "_node", lambda comm: comm.Split(comm.rank > 0, comm.rank))
    comm = COMM.Dup()
    with pytest.raises(ValueError, match=f"nodes have 1, {COMM.size - 1} ranks"):
        allreduce(x, comm, hierarchical=True)
    np.testing.assert_array_equal(allreduce(x, comm, levels="standard"), x)
    with pytest.raises(ConfigMismatchError, match="hierarchical is"):
        allreduce(x, comm, hierarchical=COMM.rank == 0)
    with pytest.raises(TypeError, match="hierarchical must be True or False"):
        allreduce(x, comm, hierarchical=2)
    comm.Free()
    # All ranks on one node: levels for one.
    alone = COMM.Dup()
    monkeypatch.setattr(reduction, "_node", lambda comm: comm.Dup())
    np.testing.assert_array_equal(allreduce(x, alone, levels="standard", hierarchical=True), x)
    alone.Free()
