"""Runs tests/parallel inside the ranks of real jobs, over MPI and over Gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import Job, launch

# Several times what they take on two idle cores.
LIMIT_SECONDS = 720
# A test that hangs prints where, in every rank, before the limit ends it.
TRACEBACK_SECONDS = 120

PYTEST = (
    *("-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"),
    # What the libraries print goes straight to the rank's output, where an abort leaves it.
    *("--capture=sys", "-o", f"faulthandler_timeout={TRACEBACK_SECONDS}"),
)


def outcomes(text: str) -> dict[str, int]:
    """The numbers in pytest's last line: {"passed": 12, "skipped": 1}."""
    last = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", text, flags=re.MULTILINE)
    pairs = (part.split() for part in last[-1].split(", ")) if last else ()
    # Warnings may differ: ranks clean up the same directory for temporary files at the same time.
    return {word: int(number) for number, word in pairs if not word.startswith("warning")}


# Four ranks: what cuts tensors into one part for each rank, or depends on the algorithm of an MPI.
WITH_FOUR = [
    f"tests/parallel/test_{part}.py"
    for part in ("allreduce", "buckets", "mpi_ops", "process_sets", "simulation")
]
# Three over Gloo: what depends on its own operations, of which three ranks have other rings.
GLOO_WITH_THREE = [f"tests/parallel/test_{part}.py" for part in ("allreduce", "process_sets")]
FILES = {("mpirun", 4): WITH_FOUR, ("horovodrun", 3): GLOO_WITH_THREE}
# Some files take long for what another number of ranks would add to them.
NOT_EVERYWHERE = {
    "tests/parallel/test_baselines.py": [("mpirun", 3)],
    "tests/parallel/test_auto.py": [("mpirun", 3), ("horovodrun", 2)],
    "tests/parallel/test_check_replicas.py": [("mpirun", 3), ("horovodrun", 2)],
    "tests/parallel/test_error_feedback.py": [("mpirun", 2), ("horovodrun", 2)],
    "tests/parallel/test_gpu_tensors.py": [("mpirun", 2)],
    "tests/parallel/test_refusals.py": [("mpirun", 3), ("horovodrun", 2)],
    "tests/parallel/test_rules.py": [("mpirun", 3)],
    "tests/parallel/test_state.py": [("mpirun", 3), ("horovodrun", 2)],
    "tests/parallel/test_stats.py": [("mpirun", 2), ("mpirun", 3)],
    "tests/parallel/test_join.py": [("mpirun", 3), ("horovodrun", 2)],
    "tests/parallel/test_modes.py": [("mpirun", 2)],
    "tests/parallel/test_nodes.py": [],
    "tests/parallel/test_shared.py": [("mpirun", 2)],
    "tests/parallel/test_training.py": [("mpirun", 2), ("horovodrun", 2)],
    "tests/parallel/test_unnamed.py": [("mpirun", 2), ("horovodrun", 2)],
    "tests/parallel/test_workload_models.py": [("mpirun", 2)],
    # Curves are compared bit for bit, which Horovod's own sums of more than two ranks are not.
    "tests/parallel/test_workload_loop.py": [("mpirun", 2)],
}


@pytest.mark.parametrize(
    ("transport", "ranks"),
    [
        *(("mpirun", ranks) for ranks in (1, 2, 3, 4)),
        *(("horovodrun", ranks) for ranks in (2, 3)),
    ],
)
def test_in_every_rank(
    transport: str, ranks: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    left_out = [
        f"--ignore={path}"
        for path, jobs in NOT_EVERYWHERE.items()
        if (transport, ranks) not in jobs
    ]
    files = FILES.get((transport, ranks), ["tests/parallel"])
    command = [*PYTEST, *left_out, *files]
    job = launch(transport, ranks, command, LIMIT_SECONDS, tmp_path)
    check(job, ranks)
    record_property("job", f"{transport}, {ranks} ranks: {summary(job)}")


def test_ranks_that_wait_as_those_of_users_do(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """In the other jobs they sleep meanwhile (tools/patience.cpp), which leaves cores to others."""
    command = [*PYTEST, "tests/parallel/test_buckets.py"]
    job = launch("horovodrun", 2, command, LIMIT_SECONDS, tmp_path, patient=False)
    check(job, 2)
    record_property("job", f"horovodrun, 2 ranks that do not sleep: {summary(job)}")


# What depends on the option of that name. It has nothing to do with tests/launch's transports.
OVER_MPI = [f"tests/parallel/test_{part}.py" for part in ("allreduce", "optimizer", "join")]
# Those for which two ranks are enough.
OVER_MPI_WITH_TWO = [
    f"tests/parallel/test_{part}.py"
    for part in ("error_feedback", "gpu_tensors", "training", "rules", "shared", "unnamed")
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_with_transport_mpi(
    ranks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("GQ_TEST_TRANSPORT", "mpi")
    files = [*OVER_MPI, *(OVER_MPI_WITH_TWO if ranks == 2 else ())]
    job = launch("mpirun", ranks, [*PYTEST, *files], LIMIT_SECONDS, tmp_path)
    check(job, ranks)
    record_property("job", f"transport='mpi', {ranks} ranks: {summary(job)}")


def check(job: Job, ranks: int) -> None:
    """Assert that every rank ran the same tests, and that they passed."""
    assert not job.timed_out, job.report()
    assert job.status == 0, job.report()
    assert list(job.ranks) == list(range(ranks)), job.report()
    counts = [outcomes(text) for text in job.ranks.values()]
    assert counts[0].get("passed", 0) > 0, job.report()
    assert counts == [counts[0]] * ranks, f"the ranks ran different tests: {counts}"


def summary(job: Job) -> str:
    """What rank 0 counted, in words."""
    counts = outcomes(job.ranks[0])
    listed = ", ".join(f"{number} {word}" for word, number in counts.items())
    return f"{listed} in {job.seconds:.0f} s"
