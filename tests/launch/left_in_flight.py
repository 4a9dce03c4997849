"""Ends ranks while a reduction of mpi_ops is in flight, for test_mpi_libraries.py."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from mpi4py import MPI

from mpi_ops import codec, iallreduce

comm, how = MPI.COMM_WORLD, sys.argv[1]
request = iallreduce(np.ones(300_000, np.float32), comm)
if how == "an error on one" and comm.rank == 0:
    # Into a file: MPICH's launcher may end before it has read what an aborting rank wrote last.
    os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())

    def stop(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("of a test")

    codec.quantize_parcel = stop
if how != "nobody waits" and not (how == "one does not wait" and comm.rank == 0):
    request.wait()
print(f"rank {comm.rank} is through", flush=True)
