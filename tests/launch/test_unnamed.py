"""Operations without names keep the names that plain Horovod gives them, as its timeline shows."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from launcher import launch
from seldom import rare

LIMIT_SECONDS = 120
SCRIPT = Path(__file__).with_name("unnamed.py")


@cache
def names(launcher: str, ranks: int, *arguments: str) -> list[str]:
    """What Horovod called the operations without a name, in a job that ended well."""
    directory = Path(mkdtemp())
    timeline = directory / "timeline.json"
    variables = {"HOROVOD_TIMELINE": str(timeline)}
    job = launch(launcher, ranks, [SCRIPT, *arguments], LIMIT_SECONDS, directory, variables)
    assert job.status == 0, job.report()
    ends = {re.findall(r"^DONE (\w+)$", text, flags=re.MULTILINE)[0] for text in job.ranks.values()}
    assert len(ends) == 1, job.report()
    found = re.findall(r'"name": "(\w+\.noname\.\d+\w*)"', timeline.read_text())
    return sorted(set(found))


@pytest.mark.parametrize(
    ("launcher", "ranks", "arguments"),
    [
        ("mpirun", 2, ("standard",)),
        rare("mpirun", 2, ("exponential",)),
        rare("mpirun", 2, ("two-hop",)),
        ("mpirun", 3, ("two-hop",)),
        ("mpirun", 2, ("two-hop", "mpi")),
        ("horovodrun", 2, ("two-hop",)),
    ],
)
def test_names_are_those_without_compression(
    launcher: str, ranks: int, arguments: tuple[str, ...]
) -> None:
    plain = names("mpirun", 2, "none")  # the same of all ranks and launchers
    assert len(plain) > 40, plain
    assert names(launcher, ranks, *arguments) == plain
