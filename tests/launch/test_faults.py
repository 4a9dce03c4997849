"""What a training does when a rank dies, stops, fails or runs out of memory: an error, and no hang.

The default run has one case of each kind; `-m "seldom or not seldom"` has all. The times from the
fault to the end of the job are printed at the end of the session.
"""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from launcher import Job, launch
from seldom import EVERYWHERE, MPIRUN, Record, cases, rarely

# A job of two ranks takes some six seconds on idle cores; faults.py itself ends a hang after 150.
LIMIT_SECONDS = 180
SCRIPT = Path(__file__).with_name("faults.py")
RANKS = 2

STAGES = ("norm", "codes", "decompress")


def run(
    launcher: str, transport: str, fault: str, stage: str, directory: Path, *more: object
) -> Job:
    command = [SCRIPT, fault, stage, "--transport", transport, *more]
    # Large pieces of memory are returned to the system and asked for anew, so they can fail.
    variables = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)} if fault == "memory" else {}
    job = launch(launcher, RANKS, command, LIMIT_SECONDS, directory, variables)
    assert not job.timed_out, job.report()
    return job


def seconds_from_fault(job: Job, end: float) -> float:
    """Until `end`, when the job was over."""
    found = re.search(r"^FAULT ([\d.]+)", "\n".join(job.ranks.values()), flags=re.MULTILINE)
    assert found, job.report()
    return end - float(found[1])


@cache
def undisturbed(launcher: str, transport: str) -> str:
    """What the ranks end with when nothing happens."""
    with TemporaryDirectory() as directory:
        return result(run(launcher, transport, "none", "user", Path(directory)))


def result(job: Job) -> str:
    """Digest of the parameters of all ranks."""
    assert job.status == 0, job.report()
    digests = [re.findall(r"^DONE (\w+)", text, flags=re.MULTILINE) for text in job.ranks.values()]
    assert digests == [digests[0]] * RANKS, job.report()
    return str(digests[0][0])


# ------------------------------------------------------------------------------ the end of the job


@pytest.mark.parametrize(
    ("launcher", "transport", "stage"),
    cases(
        {("mpirun", "mpi", "codes"), ("horovodrun", "horovod", "decompress")},
        [(*where, stage) for where in EVERYWHERE for stage in STAGES],
    ),
)
def test_a_killed_rank(
    launcher: str, transport: str, stage: str, tmp_path: Path, record_property: Record
) -> None:
    job = run(launcher, transport, "kill", stage, tmp_path)
    seconds = seconds_from_fault(job, time.time())
    assert job.status != 0, job.report()
    assert not re.search("^DONE", "\n".join(job.ranks.values()), flags=re.MULTILINE), job.report()
    record_property("job", f"{launcher}, {transport}, killed, {stage}: {seconds:.1f} s to the end")


@pytest.mark.parametrize(("launcher", "transport"), cases({("mpirun", "mpi")}, EVERYWHERE))
def test_an_exception_between_backward_and_step(
    launcher: str, transport: str, tmp_path: Path, record_property: Record
) -> None:
    job = run(launcher, transport, "fail", "user", tmp_path)
    seconds = seconds_from_fault(job, time.time())
    assert job.status != 0, job.report()
    assert "ZeroDivisionError: the user's own mistake" in job.ranks[1], job.report()
    assert "Segmentation" not in job.report() + job.output
    record_property("job", f"{launcher}, {transport}, exception: {seconds:.1f} s to the end")


@pytest.mark.parametrize(("launcher", "transport"), cases({("mpirun", "mpi")}, EVERYWHERE))
def test_no_memory_for_codes(
    launcher: str, transport: str, tmp_path: Path, record_property: Record
) -> None:
    job = run(launcher, transport, "memory", "memory", tmp_path, "--size", 4_000_000)
    seconds = seconds_from_fault(job, time.time())
    assert job.status != 0, job.report()
    assert re.search("^ERROR .*MemoryError: Unable to allocate", job.ranks[1], flags=re.MULTILINE)
    record_property("job", f"{launcher}, {transport}, no memory: {seconds:.1f} s to the end")


TIMEOUT_SECONDS = 4


@pytest.mark.parametrize(("launcher", "transport"), cases({("mpirun", "horovod")}, MPIRUN))
def test_a_rank_that_stays_stopped(
    launcher: str, transport: str, tmp_path: Path, record_property: Record
) -> None:
    """Horovod over MPI would wait for ever."""
    more = f"timeout={TIMEOUT_SECONDS}"
    job = run(launcher, transport, "freeze", "codes", tmp_path, more)
    seconds = seconds_from_fault(job, time.time())
    assert job.status != 0, job.report()
    expected = rf"rank 0 on .*: the operation '.*weight.*' has not moved for {TIMEOUT_SECONDS} s"
    assert re.search(expected, job.ranks[0]), job.report()
    assert "see its output" in job.ranks[0]
    text = f"{launcher}, {transport}, stopped for ever, timeout={TIMEOUT_SECONDS}"
    record_property("job", f"{text}: {seconds:.1f} s to the end")


@rarely
def test_a_rank_that_stays_stopped_under_gloo(tmp_path: Path, record_property: Record) -> None:
    """Gloo gives up after 30 s (HOROVOD_GLOO_TIMEOUT_SECONDS)."""
    job = run("horovodrun", "horovod", "freeze", "codes", tmp_path)
    seconds = seconds_from_fault(job, time.time())
    assert job.status != 0, job.report()
    record_property("job", f"horovodrun, stopped for ever: {seconds:.1f} s to the end")


# -------------------------------------------------------------------------------- going on after it


@pytest.mark.parametrize(
    ("launcher", "transport", "stage"),
    cases(
        {("mpirun", "mpi", "codes")},
        [(*where, stage) for where in EVERYWHERE for stage in STAGES],
    ),
)
def test_a_rank_stopped_for_seconds(
    launcher: str, transport: str, stage: str, tmp_path: Path, record_property: Record
) -> None:
    job = run(launcher, transport, "stop", stage, tmp_path, f"timeout={TIMEOUT_SECONDS * 15}")
    assert result(job) == undisturbed(launcher, transport)
    record_property("job", f"{launcher}, {transport}, stopped for 3 s in {stage}: same parameters")
