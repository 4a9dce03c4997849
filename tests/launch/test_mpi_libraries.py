"""Runs the tests of mpi_ops that need no Horovod under Open MPI and under MPICH."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launcher import MPICH, MPICH_PIN, Job, launch
from seldom import rare
from test_parallel import PYTEST, check, summary

# Some ten times what they take on two busy cores.
LIMIT_SECONDS = 240
# mpi4py.run ends the job when one rank fails; -x makes that the first failure.
COMMAND = ("-m", "mpi4py", *PYTEST, "-x", "--noconftest")
FILES = ("tests/parallel/test_mpi_op.py", "tests/parallel/test_mpi_allreduce.py")
VARIABLES = {
    # The tests choose among the library's algorithms.
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "MPIR_CVAR_DEVICE_COLLECTIVES": "none",
}


Record = Callable[[str, object], None]


def run(
    transport: str,
    library: str,
    ranks: int,
    directory: Path,
    record: Record,
    files: Sequence[str] = FILES,
) -> Job:
    title = f"{library}, {ranks} ranks"
    variables = {**VARIABLES, "GQ_TEST_MPI": title}
    job = launch(transport, ranks, [*COMMAND, *files], LIMIT_SECONDS, directory, variables)
    check(job, ranks)
    record("job", f"{title}, without Horovod: {summary(job)}")
    return job


# Four are two nodes of two ranks, and two rows of two. Six are no power of two, for which
# algorithms have other rounds, and have more columns than rows.
@pytest.mark.parametrize("ranks", [2, rare(3), 4, rare(5), 6, rare(8)])
def test_open_mpi(ranks: int, tmp_path: Path, record_property: Record) -> None:
    run("mpirun", "Open MPI", ranks, tmp_path, record_property)


@pytest.fixture(scope="session")
def mpich() -> None:
    """MPICH in a directory of its own, installed once."""
    if MPICH.exists():
        return
    MPICH.parent.mkdir(exist_ok=True)
    fresh = tempfile.mkdtemp(prefix=".mpich-", dir=MPICH.parent)
    # --target would leave out lib/, where the library is.
    pip = [sys.executable, "-m", "pip", "install", "--prefix", fresh, "--ignore-installed"]
    answer = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "-r", str(MPICH_PIN)],
        capture_output=True,
        text=True,
    )
    if answer.returncode != 0:
        shutil.rmtree(fresh)
        pytest.skip(f"MPICH cannot be installed: {answer.stderr.strip().splitlines()[-1]}")
    Path(fresh).rename(MPICH)  # complete, whoever looks


@pytest.mark.usefixtures("mpich")
@pytest.mark.parametrize("ranks", [rare(2), 3, rare(4)])
def test_mpich(ranks: int, tmp_path: Path, record_property: Record) -> None:
    run("mpich", "MPICH", ranks, tmp_path, record_property)


def check_all_are_through(job: Job) -> None:
    """The job has ended well, and all ranks have come to the end of their script."""
    assert (job.status, job.timed_out) == (0, False), job.report()
    for rank, text in job.ranks.items():
        assert f"rank {rank} is through" in text, job.report()


LATER = Path(__file__).with_name("initialized_later.py")


@pytest.mark.parametrize("threads", ["SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"])
@pytest.mark.parametrize("transport", ["mpirun", "mpich"])
@pytest.mark.usefixtures("mpich")
def test_the_program_starts_and_ends_mpi_itself(
    transport: str, threads: str, tmp_path: Path
) -> None:
    job = launch(transport, 2, [LATER, threads], LIMIT_SECONDS, tmp_path)
    check_all_are_through(job)


LEFT = Path(__file__).with_name("left_in_flight.py")


@pytest.mark.parametrize("transport", ["mpirun", "mpich"])
@pytest.mark.parametrize("how", ["nobody waits", "one does not wait"])
@pytest.mark.usefixtures("mpich")
def test_ranks_that_end_complete_what_is_in_flight(
    transport: str, how: str, tmp_path: Path
) -> None:
    job = launch(transport, 2, [LEFT, how], LIMIT_SECONDS, tmp_path)
    check_all_are_through(job)


@pytest.mark.parametrize("transport", ["mpirun", "mpich"])
@pytest.mark.usefixtures("mpich")
def test_a_rank_that_ends_with_an_error_ends_the_job(transport: str, tmp_path: Path) -> None:
    """The others would wait for it for ever."""
    errors = tmp_path / "errors.txt"
    job = launch(transport, 2, [LEFT, "an error on one", errors], LIMIT_SECONDS, tmp_path)
    assert job.status != 0, job.report()
    assert not job.timed_out, job.report()
    written = errors.read_text()
    assert "MemoryError: of a test" in written, job.report()
    assert "mpi_ops.allreduce: rank 0 ends while codes are on their way" in written, written


@pytest.mark.large
@pytest.mark.parametrize(("transport", "library"), [("mpirun", "Open MPI"), ("mpich", "MPICH")])
@pytest.mark.usefixtures("mpich")
def test_large(transport: str, library: str, tmp_path: Path, record_property: Record) -> None:
    job = run(
        transport,
        library,
        2,
        tmp_path,
        record_property,
        ["-m", "large", "tests/parallel/test_mpi_large.py"],
    )
    for rank, text in job.ranks.items():
        record_property("job", f"  rank {rank}: {re.findall('peak memory.*', text)}")
