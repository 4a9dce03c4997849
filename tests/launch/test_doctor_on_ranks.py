"""gq-horovod doctor under mpirun: ranks are compared, and the network between them measured."""

from __future__ import annotations

import json
from pathlib import Path

from launcher import launch

LIMIT_SECONDS = 180
DOCTOR = "import sys; from gq_horovod.cli import main; sys.exit(main(['doctor', '--json']))"
# One rank has another version of the package, as far as it knows.
DIFFERENT = (
    "import os; from gq_horovod.advisor import doctor\n"
    "doctor.__version__ = '9.' + os.environ['OMPI_COMM_WORLD_RANK']\n"
)


def test_all_is_well(tmp_path: Path) -> None:
    job = launch("mpirun", 2, ["-c", DOCTOR], LIMIT_SECONDS, tmp_path)
    assert (job.status, job.timed_out) == (0, False), job.report()
    output = job.ranks[0]
    printed = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    found = {finding["what"]: finding for finding in printed["findings"]}
    assert found["versions on all ranks"]["status"] == "ok"
    assert "Gbit/s between ranks 0 and 1; one host (loopback)" in found["network"]["found"]
    assert '"findings"' not in job.ranks[1]  # one rank speaks


def test_mpi4py_may_be_told_not_to_start_mpi(tmp_path: Path) -> None:
    """The command does it then, and ends it: Open MPI calls a rank that does not an error."""
    variables = {"MPI4PY_RC_INITIALIZE": "0"}
    job = launch("mpirun", 2, ["-c", DOCTOR], LIMIT_SECONDS, tmp_path, variables)
    assert (job.status, job.timed_out) == (0, False), job.report()
    assert "Gbit/s between ranks 0 and 1" in job.ranks[0], job.report()


def test_another_version_on_one_rank(tmp_path: Path) -> None:
    job = launch("mpirun", 2, ["-c", DIFFERENT + DOCTOR], LIMIT_SECONDS, tmp_path)
    assert (job.status, job.timed_out) == (1, False), job.report()
    assert "'9.0' on rank 0; '9.1' on rank 1" in job.ranks[0], job.report()
