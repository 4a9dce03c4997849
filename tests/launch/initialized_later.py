"""A program that starts and ends MPI itself: `initialized_later.py THREAD_LEVEL`, in every rank.

mpi4py starts nothing, so everything is imported, and refused, before MPI is there. The other cases
are those of a program that finalizes MPI long before it ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import mpi4py

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from mpi4py import MPI  # noqa: E402

from gq_horovod.path import mpi  # noqa: E402
from mpi_ops import allreduce, exponential_sum, iallreduce  # noqa: E402

X = np.full(300_000, 0.5, np.float32)  # several chunks


def refused(call: Callable[[], Any], reason: str) -> None:
    """Assert that a call raises RuntimeError, which says when MPI may be called, and the remedy."""
    with pytest.raises(RuntimeError, match=rf"{reason}.*; call MPI\."):
        call()


def everything_is_refused(reason: str) -> None:
    for call in (allreduce, iallreduce):
        refused(lambda call=call: call(X), reason)  # type: ignore[misc]
        refused(lambda call=call: call(X, MPI.COMM_SELF), reason)  # type: ignore[misc]
    for bits in (4, 8):
        refused(lambda bits=bits: exponential_sum(bits), reason)  # type: ignore[misc]
    assert reason in (mpi.problem(0, 1) or "")


everything_is_refused("not initialized")
level = getattr(MPI, f"THREAD_{sys.argv[1]}")
MPI.Init_thread(level)
assert MPI.Query_thread() >= level
world = MPI.COMM_WORLD
assert world.size > 1, "needs a second rank"
for comm in (world, MPI.COMM_SELF, world.Dup(), world.Split(world.rank)):
    for levels in ("standard", "exponential", "two-hop"):
        result = allreduce(X, comm, levels=levels)  # type: ignore[arg-type]
        assert np.array_equal(result, X), levels  # equal elements are at their norm
for bits in (4, 8):
    codes, total = np.zeros(64, np.uint8), np.ones(64, np.uint8)
    world.Allreduce(codes, total, op=exponential_sum(bits))
    assert not total.any()
reason = mpi.problem(world.rank, world.size)
assert (reason is None) == (MPI.Query_thread() == MPI.THREAD_MULTIPLE), reason
if reason is None:
    # What transport="mpi" makes first; it has to notice that MPI ends.
    mpi.Messages(list(range(world.size)))
finished = iallreduce(X)
finished.wait()
abandoned = iallreduce(X)
MPI.Finalize()
everything_is_refused("finalized already")
assert np.array_equal(finished.wait(), X)
refused(abandoned.wait, "finalized already")
assert mpi._mpi.ended == (reason is None)
print(f"rank {os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK'))} is through")
