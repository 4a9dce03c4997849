"""How many threads share the work of one kernel call on the CPU.

Results are the same bytes for any number. GQ_HOROVOD_THREADS in the environment sets it; otherwise
it is the number of cores that this process may use, divided by the ranks on this host.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

THREADS_VARIABLE = "GQ_HOROVOD_THREADS"
MOST_THREADS = 64
DEFAULT_MOST = 8  # more share the bandwidth of memory, and win nothing

# What tells the number of ranks on this host, by launcher.
LOCAL_SIZES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",  # Open MPI
    "MPI_LOCALNRANKS",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_SIZE",  # MVAPICH
    "PMI_LOCAL_SIZE",  # Cray's PALS and others
    "HOROVOD_LOCAL_SIZE",  # horovodrun over Gloo
)
SLURM_LOCAL_SIZES = "SLURM_STEP_TASKS_PER_NODE"  # srun, of each host: "8(x2),4"


def set_threads(count: int) -> None:
    """Let `count` threads share each kernel call on the CPU, from the next call on.

    Calls of less than 256 KiB stay on the caller's thread. The results are the same bytes for any
    number.

    Arguments:
        count: threads, the caller's among them; 1 to 64.

    Raises ValueError for another number, TypeError for what is no int.
    """
    from . import host

    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(
            f"set_threads: count must be an int, got {count!r}; pass the number of threads."
        )
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(
            f"set_threads: count must be between 1 and {MOST_THREADS}, got {count}; "
            "pass 1 to keep every kernel on the caller's thread."
        )
    host.set_threads(count)


def get_threads() -> int:
    """How many threads share a kernel call on the CPU, at most."""
    from . import host

    return host.threads()


def chosen_threads(environment: Mapping[str, str] = os.environ) -> int:
    """The number that the environment asks for, or the default.

    Raises ValueError for a value of GQ_HOROVOD_THREADS that is no number between 1 and 64.
    """
    text = environment.get(THREADS_VARIABLE, "").strip()
    if not text:
        return default_threads(environment)
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise ValueError(
            f"mpi_ops: {THREADS_VARIABLE} must be a number between 1 and {MOST_THREADS}, "
            f"got {text!r}; unset it for the default."
        )
    return int(text)


def default_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Cores that this process may use, for each rank on this host; 1 to 8."""
    cores = min(len(os.sched_getaffinity(0)), quota())
    return min(max(cores // local_ranks(environment), 1), DEFAULT_MOST)


def local_ranks(environment: Mapping[str, str]) -> int:
    """Ranks on this host, as the launcher tells; 1 where none does."""
    told = [environment.get(name, "") for name in LOCAL_SIZES]
    told += re.findall(r"(\d+)(?:\(x\d+\))?", environment.get(SLURM_LOCAL_SIZES, ""))
    return max([int(size) for size in told if size.isdecimal()] + [1])


def quota(root: Path = Path("/")) -> int:
    """Whole cores of the control groups' limits on CPU time, at least 1; many where none limits.

    Arguments:
        root: where `proc` and `sys` are.
    """
    limits = [1 << 20]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no control groups, or /proc is hidden: no limit is known
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":  # version 2
            top = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # A container sees its own group as the top, whatever its path is outside.
        folder = top / path.lstrip("/")
        limits.append(_limit(top))
        while folder != top:
            limits.append(_limit(folder))
            folder = folder.parent
    return max(min(limits), 1)


def _limit(folder: Path) -> int:
    """Cores of one control group's limit, rounded up; many where it has none."""
    many = 1 << 20
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
    except OSError:  # the top of all has no limit, and no such file
        return many
    if allowed in ("max", "-1"):
        return many
    return -(-int(allowed) // int(period))
