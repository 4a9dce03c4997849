"""Parameters of tests of which the default run has one case of each kind: `-m seldom` has more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Record = Callable[[str, object], None]  # the fixture record_property

rarely = pytest.mark.seldom

MPIRUN = [("mpirun", "horovod"), ("mpirun", "mpi")]  # launcher and transport
EVERYWHERE = [*MPIRUN, ("horovodrun", "horovod")]


def rare(*values: object) -> object:
    """Values of a case that only runs when it is asked for."""
    return pytest.param(*values, marks=rarely)


def cases(often: set[tuple[str, ...]], all_of: list[tuple[str, ...]]) -> list[object]:
    """All combinations, of which some run only when they are asked for."""
    return [
        pytest.param(*case, id=" ".join(case), marks=() if case in often else (rarely,))
        for case in all_of
    ]
