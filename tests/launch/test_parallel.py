"""Runs tests/parallel inside the ranks of real jobs, over MPI and over Gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import launch

# Some ten times what they take on two idle cores.
LIMIT_SECONDS = 420
# A test that hangs prints where, in every rank, before the limit ends it.
TRACEBACK_SECONDS = 120

PYTEST = (
    *("-m", "pytest", "tests/parallel", "-q", "--color=no", "-p", "no:cacheprovider"),
    # What the libraries print goes straight to the rank's output, where an abort leaves it.
    *("--capture=sys", "-o", f"faulthandler_timeout={TRACEBACK_SECONDS}"),
)


def outcomes(text: str) -> dict[str, int]:
    """The numbers in pytest's last line: {"passed": 12, "skipped": 1}."""
    last = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", text, flags=re.MULTILINE)
    pairs = (part.split() for part in last[-1].split(", ")) if last else ()
    return {word: int(number) for number, word in pairs}


@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        *(("mpirun", ranks) for ranks in (1, 2, 3, 4)),
        *(("horovodrun", ranks) for ranks in (2, 3, 4)),
    ],
)
def test_in_every_rank(
    transport: str,
    ranks: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    job = launch(transport, ranks, PYTEST, LIMIT_SECONDS, tmp_path)
    assert not job.timed_out, job.report()
    assert job.status == 0, job.report()
    assert list(job.ranks) == list(range(ranks)), job.report()
    counts = [outcomes(text) for text in job.ranks.values()]
    assert counts[0].get("passed", 0) > 0, job.report()
    assert counts == [counts[0]] * ranks, f"the ranks ran different tests: {counts}"
    listed = ", ".join(f"{number} {word}" for word, number in counts[0].items())
    record_property("job", f"{transport}, {ranks} ranks: {listed} in {job.seconds:.0f} s")
