"""The mean of the ranks' arrays, without Horovod: mpirun -np 2 python reduce_mpi.py"""

import numpy as np
from mpi4py import MPI

from mpi_ops import allreduce

comm = MPI.COMM_WORLD
own = np.random.default_rng(comm.rank).standard_normal(1_000_000, np.float32)
exact = np.empty_like(own)
comm.Allreduce(own, exact, op=MPI.SUM)
exact /= comm.size


def error(mean):
    return np.sum((mean - exact) ** 2) / np.sum(exact**2)


for levels, bits in (("standard", 8), ("exponential", 8), ("two-hop", 8), ("two-hop", 4)):
    means = [allreduce(own, comm, levels=levels, bits=bits) for _ in range(16)]
    same = len(set(comm.allgather(means[0].tobytes()))) == 1
    once, often = error(means[0]), error(np.mean(means, axis=0))
    if comm.rank == 0:
        print(f"{levels:11} {bits} bit: squared error {once:.6f} of one mean, ", end="")
        print(f"{often:.6f} of 16 averaged (no bias); {same=}")
