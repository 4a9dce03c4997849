"""Which combinations of parameters the default run of a test has.

Of kinds of faults it has one case each, and `-m seldom` has more. Of parameters that do not depend
on each other it has those in which every two values meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def in_pairs(
    rows: Sequence[object], columns: Sequence[object], others: Sequence[object]
) -> list[tuple[object, object, object]]:
    """Values of three parameters, such that any two values of different ones meet once or more.

    The three are handed over in the order of their lengths, the longest first.
    """
    assert len(rows) >= len(columns) >= len(others)
    return [
        (one, other, others[(row + column) % len(others)])
        for row, one in enumerate(rows)
        for column, other in enumerate(columns)
    ]
