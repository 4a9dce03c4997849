"""Quantizers of Global-QSGD and the reductions that need no framework: arrays, kernels, MPI.

    from mpi_ops import allreduce, exponential_sum

Importing this package imports NumPy and nothing else: no MPI is started, no Horovod, torch or
TensorFlow is touched. Its names are looked up when they are asked for. Those of reductions import
mpi4py, which starts MPI unless the program has set mpi4py.rc.initialize = False. Then it starts MPI
itself before it calls one of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.threads import get_threads, set_threads
    from .op import chain_headroom, exponential_sum
    from .reduction import allreduce, iallreduce

__all__ = [
    "allreduce",
    "chain_headroom",
    "exponential_sum",
    "get_threads",
    "iallreduce",
    "set_threads",
]

_MODULES = {
    "allreduce": "reduction",
    "iallreduce": "reduction",
    "chain_headroom": "op",
    "exponential_sum": "op",
    "get_threads": "kernels.threads",
    "set_threads": "kernels.threads",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
