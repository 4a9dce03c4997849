"""The MPI operation under the algorithms of the MPI library: same bytes, no bias, no saturation.

Needs NumPy and an MPI library only; tests/launch/test_mpi_libraries.py runs it under several.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from mpi_cases import COMM, check_same_bytes, check_unbiased, rank_inputs, settings

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer
from mpi_ops.op import chain_headroom, exponential_sum

OPEN_MPI = MPI.get_vendor()[0] == "Open MPI"
# Rows that 2, 3, 4, 5 and 8 ranks share evenly, with 4 bits too. The last elements are missing.
ROWS = 960
COUNT = ROWS * lanes.ROW - 5

# The algorithms of each library that run a user's operation, by the number that selects them.
if OPEN_MPI:
    # Linear, reduce and broadcast, recursive doubling, ring, segmented ring, Rabenseifner.
    ALLREDUCE = ("coll_tuned_allreduce_algorithm", [1, 2, 3, 4, 5, 6])
    SEGMENTS = {"coll_tuned_allreduce_algorithm_segmentsize": 1024}
    ALGORITHMS = {
        "Allreduce": ALLREDUCE,
        # Ring, binomial tree, Rabenseifner, recursive doubling.
        "Iallreduce": ("coll_libnbc_iallreduce_algorithm", [1, 2, 3, 4]),
        # Linear, chain, pipeline, binary, binomial, in-order binary, Rabenseifner.
        "Reduce": ("coll_tuned_reduce_algorithm", [1, 2, 3, 4, 5, 6, 7]),
        # Recursive halving, ring, butterfly (the first sends everything through one rank).
        "Reduce_scatter": ("coll_tuned_reduce_scatter_algorithm", [2, 3, 4]),
        # Recursive doubling, recursive halving, butterfly.
        "Reduce_scatter_block": ("coll_tuned_reduce_scatter_block_algorithm", [2, 3, 4]),
    }
else:
    # Hierarchical, recursive doubling, tree, ring, reduce-scatter and allgather.
    ALLREDUCE = ("MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM", [2, 3, 6, 8, 9])
    SEGMENTS = {}
    ALGORITHMS = {"Allreduce": ALLREDUCE}
CHOICES = [
    (collective, {variable: number})
    for collective, (variable, numbers) in ALGORITHMS.items()
    for number in numbers
]
COLLECTIVES = ["Allreduce", "Iallreduce", "Reduce", "Reduce_scatter", "Reduce_scatter_block"]
DEFAULTS = [(collective, {}) for collective in [*COLLECTIVES, "Ireduce", "Scan", "Exscan"]]
# The algorithms see bytes: one width is enough for those of the other functions.
CASES = [(*choice, 8) for choice in DEFAULTS + CHOICES]
CASES += [(*choice, 4) for choice in DEFAULTS + CHOICES if choice[0] == "Allreduce"]


def choice_name(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(str(number) for number in value.values()) or "default"
    return str(value)


# -------------------------------------------------------------------------------------------- sums

Collective = Callable[[np.ndarray, MPI.Op], np.ndarray]  # the sum of every rank's codes


def total(
    add: Collective, inputs: list[np.ndarray], bits: int, headroom: int | None = None
) -> np.ndarray:
    """What `add` makes of the ranks' codes, decoded."""
    if headroom is None:
        headroom = chain_headroom(COMM.size, bits)
    norms = np.array([np.abs(inputs).max()], np.float32).view(np.int32)
    block_size = lanes.whole_tensor_block(COUNT)
    random = dither(0, "test", 0, COMM.rank, Stage.QUANTIZE)
    options = {"block_size": block_size, "bits": bits, "headroom": headroom}
    codes = host.quantize_exponential(Buffer.of(inputs[COMM.rank]), norms, dither=random, **options)
    before = codes.copy()
    summed = add(codes, exponential_sum(bits))
    assert np.array_equal(codes, before), "the input was modified"
    result = np.empty(COUNT, np.float32)
    host.dequantize_exponential(summed, norms, Buffer.of(result), **options)
    return result


def collective_sum(comm: MPI.Intracomm, collective: str) -> Collective:
    """The sum by an MPI function, put together on every rank (by Scan and Exscan: this rank's)."""

    def add(codes: np.ndarray, op: MPI.Op) -> np.ndarray:
        summed = np.zeros_like(codes)
        root = comm.size - 1
        if collective.startswith("Reduce_scatter"):
            counts = [codes.size // comm.size] * comm.size
            if collective == "Reduce_scatter":  # shares of different sizes
                counts[0] -= 31
                counts[-1] += 31
                part = np.empty(counts[comm.rank], np.uint8)
                comm.Reduce_scatter(codes, part, recvcounts=counts, op=op)
            else:
                part = np.empty(counts[0], np.uint8)
                comm.Reduce_scatter_block(codes, part, op=op)
            comm.Allgatherv(part, [summed, counts])
            return summed
        call = getattr(comm, collective)
        if collective in ("Reduce", "Ireduce"):
            request = call(codes, summed if comm.rank == root else None, op=op, root=root)
        else:
            request = call(codes, summed, op=op)
        if collective.startswith("I"):
            request.Wait()
        if collective in ("Reduce", "Ireduce"):
            comm.Bcast(summed, root=root)
        return summed

    return add


# ------------------------------------------------------------------------- every algorithm, no bias


@pytest.mark.parametrize(("collective", "variables", "bits"), CASES, ids=choice_name)
def test_the_sum_is_unbiased_and_the_same_on_every_rank(
    collective: str, variables: dict[str, int], bits: int
) -> None:
    inputs = rank_inputs(COUNT)
    with settings(**variables) as comm:
        result = total(collective_sum(comm, collective), inputs, bits)
    if collective in ("Scan", "Exscan"):
        inputs = inputs[: COMM.rank + (collective == "Scan")]
    else:
        check_same_bytes(result)
    if inputs:  # the first rank of an Exscan receives nothing
        check_unbiased(result, np.sum(inputs, axis=0, dtype=np.float64))


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
@pytest.mark.parametrize("number", ALLREDUCE[1])
def test_the_largest_sum_does_not_saturate(number: int, bits: int) -> None:
    """All ranks but one have the norm; without headroom the same check fails."""
    position = np.arange(COUNT)
    inputs = [
        np.where(position % COMM.size == rank, 2.25, 3.0).astype(np.float32)
        for rank in range(COMM.size)
    ]
    expected = np.sum(inputs, axis=0, dtype=np.float64)
    with settings(**{ALLREDUCE[0]: number}) as comm:
        add = collective_sum(comm, "Allreduce")
        check_unbiased(total(add, inputs, bits), expected)
        if COMM.size > 1:
            with pytest.raises(AssertionError, match="biased"):
                check_unbiased(total(add, inputs, bits, headroom=0), expected)


def test_the_algorithms_that_were_asked_for_ran() -> None:
    """Each gives the operation other blocks, or gives them to other ranks."""
    if COMM.size < 4:
        pytest.skip("some algorithms are the same on fewer than 4 ranks")
    blocks: list[int] = []

    def add(source: Any, target: Any, datatype: MPI.Datatype) -> None:
        blocks.append(source.nbytes)
        np.frombuffer(target, np.uint8)[:] += np.frombuffer(source, np.uint8)

    op = MPI.Op.Create(add, commute=True)
    variable, numbers = ALLREDUCE
    ones = np.ones(ROWS * lanes.ROW, np.uint8)
    summed = np.empty_like(ones)
    traces = {}
    for number in numbers:
        blocks.clear()
        with settings(**{variable: number}, **SEGMENTS) as comm:
            comm.Allreduce(ones, summed, op=op)
        assert (summed == COMM.size).all()
        traces[number] = str(COMM.allgather(list(blocks)))
    op.Free()
    assert len(set(traces.values())) == len(numbers), traces


@pytest.mark.parametrize("number", ALLREDUCE[1])
def test_segments_change_nothing_but_the_rounding(number: int) -> None:
    inputs = rank_inputs(COUNT)
    with settings(**{ALLREDUCE[0]: number}, **SEGMENTS) as comm:
        result = total(collective_sum(comm, "Allreduce"), inputs, 8)
    check_same_bytes(result)
    check_unbiased(result, np.sum(inputs, axis=0, dtype=np.float64))


# ---------------------------------------------------------------------------------------- datatypes


@pytest.mark.parametrize("datatype", ["BYTE", "UNSIGNED_CHAR", "INT8_T", "contiguous", "in place"])
def test_every_datatype_of_whole_bytes(datatype: str) -> None:
    row = MPI.BYTE.Create_contiguous(lanes.ROW).Commit()

    def add(codes: np.ndarray, op: MPI.Op) -> np.ndarray:
        summed = np.empty_like(codes)
        if datatype == "contiguous":
            COMM.Allreduce([codes, codes.size // lanes.ROW, row], [summed, row], op=op)
        elif datatype == "in place":
            summed[:] = codes
            COMM.Allreduce(MPI.IN_PLACE, summed, op=op)
        else:
            named = getattr(MPI, datatype)
            COMM.Allreduce([codes, named], [summed, named], op=op)
        return summed

    inputs = rank_inputs(COUNT)
    result = total(add, inputs, 8)
    row.Free()
    check_same_bytes(result)
    check_unbiased(result, np.sum(inputs, axis=0, dtype=np.float64))


def test_an_empty_buffer() -> None:
    nothing = np.empty(0, np.uint8)
    COMM.Allreduce(nothing, nothing.copy(), op=exponential_sum(8))


# --------------------------------------------------------------------------------------- the object


def test_the_operation_is_made_once() -> None:
    assert exponential_sum(8) is exponential_sum(bits=8)
    assert exponential_sum(8).Is_commutative()
    assert exponential_sum(8, seed=1) is not exponential_sum(8)
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        exponential_sum(5)


def test_the_library_and_the_ranks_are_those_asked_for() -> None:
    """Under the mpiexec of another library, every rank would be alone and pass."""
    expected = os.environ.get("GQ_TEST_MPI")
    if expected is None:
        pytest.skip("started by hand")
    assert f"{MPI.get_vendor()[0]}, {COMM.size} ranks" == expected


def test_neither_horovod_nor_a_framework_is_needed() -> None:
    assert not {"horovod", "torch", "tensorflow", "gq_horovod"} & set(sys.modules)
