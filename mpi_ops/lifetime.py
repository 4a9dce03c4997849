"""Whether MPI may be called now: a program may start and end it itself, after its imports.

Almost every MPI function ends the process when it is called too early or too late, so no module of
this package calls one while it is imported, and public functions ask here first. Importing this
module imports mpi4py.
"""

from __future__ import annotations

import sys

from mpi4py import MPI

# How long a rank that ends goes on with what other ranks need to complete theirs.
LEAVE_SECONDS = 10.0


def problem() -> str | None:
    """Why MPI cannot be called now, with the remedy, or None. MPI allows this question always."""
    if MPI.Is_finalized():
        return "MPI was finalized already; call MPI.Finalize() after the last use of MPI"
    if not MPI.Is_initialized():
        return (
            "MPI is not initialized yet; call MPI.Init() first, or leave mpi4py.rc.initialize "
            "True before mpi4py.MPI is imported"
        )
    return None


def require(function: str) -> None:
    """Raise RuntimeError in the name of a function unless MPI may be called."""
    found = problem()
    if found is not None:
        raise RuntimeError(
            f"{function}: MPI must be initialized and not finalized, but here {found}."
        )


def end_job(function: str) -> None:
    """End all ranks, where this one ends while others wait for what it cannot complete."""
    print(
        f"{function}: rank {MPI.COMM_WORLD.rank} ends while codes are on their way that other "
        "ranks wait for, so it ends the job; see its first error.",
        file=sys.stderr,
        flush=True,
    )
    MPI.COMM_WORLD.Abort(1)
