"""How examples and benchmarks start their ranks: on the hosts of a testbed, or over loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .testbed import Testbed

PATIENCE = Path(__file__).with_name("patience.cpp")
LOOPBACK = "lo"  # the interface that ranks of one host use


def mpirun(bed: Testbed | None, ranks: int) -> list[str]:
    """Return the words that start the command after them in `ranks` ranks.

    On a testbed they are spread evenly over its hosts, as many on each. Raises SystemExit if there
    is no mpirun, ValueError for a number that is not a multiple of the hosts'.
    """
    found = _tool("mpirun")
    if bed:
        return bed.command(0, [found, *bed.mpirun_args(_slots(bed, ranks))])
    # Ranks that wait give their core to those that compute: here there are fewer cores than ranks.
    local = ["-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    local += ["--mca", "mpi_yield_when_idle", "1"]
    # Over TCP, as between hosts, and not through shared memory, so that the bytes can be counted.
    local += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    local += ["--mca", "btl_tcp_if_include", LOOPBACK]
    return [found, *local]


def horovodrun(bed: Testbed | None, ranks: int) -> list[str]:
    """Return the words that start the command after them in `ranks` ranks, over Gloo.

    As `mpirun`. Horovod's launcher puts `[rank]<stdout>:` before each line. With a testbed it has
    to be started with `bed.horovodrun_environment()` as well.
    """
    found = _tool("horovodrun")
    if bed:
        return bed.command(0, [found, *bed.horovodrun_args(_slots(bed, ranks))])
    return [found, "--gloo", "-np", str(ranks), "--network-interfaces", LOOPBACK]


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name  # a virtual environment that is not activated
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found; `make setup` installs it into .venv")
    return found


def _slots(bed: Testbed, ranks: int) -> int:
    """Ranks on each host."""
    if ranks % bed.hosts:
        raise ValueError(f"ranks must be a multiple of {bed.hosts} hosts, got {ranks}")
    return ranks // bed.hosts


def environment() -> dict[str, str]:
    """Return this process's environment, with what ranks that share few cores need."""
    # Other hosts find mpirun's daemon by PATH, also where the environment is not activated.
    tools = Path(sys.executable).parent
    variables = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",  # more ranks than cores already
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if os.geteuid() == 0:  # Open MPI wants to be told twice
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables


def patience(folder: Path, microseconds: int) -> dict[str, str]:
    """Return the variables with which ranks sleep so long, again and again, while they wait.

    They name a library that this makes in `folder`. Raises FileNotFoundError without a compiler,
    subprocess.CalledProcessError if it fails.
    """
    library = folder / "patience.so"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise FileNotFoundError(f"{PATIENCE.name}: expected the C++ compiler {compiler}; set CXX.")
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-DMICROSECONDS={microseconds}"]
    subprocess.run([compiler, *options, "-o", str(library), str(PATIENCE)], check=True)
    return {"LD_PRELOAD": str(library)}
