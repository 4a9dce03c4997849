"""Ends ranks while a reduction of mpi_ops is in flight, for test_mpi_libraries.py."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from mpi4py import MPI

from mpi_ops import codec, iallreduce

comm, how = MPI.COMM_WORLD, sys.argv[1]
request = iallreduce(np.ones(300_000, np.float32), comm)
if how == "an error on one" and comm.rank == 0:

    def stop(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("of a test")

    codec.quantize_parcel = stop
if how != "nobody waits" and not (how == "one does not wait" and comm.rank == 0):
    request.wait()
print(f"rank {comm.rank} is through", flush=True)
