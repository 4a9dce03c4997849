"""The jobs of `make check`: the path of a gradient in two ranks, in three ways.

The other jobs of this folder run all of it; so `make test` leaves these out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import launch
from test_parallel import PYTEST, check
from test_tensorflow import COMMAND, KERAS_2, files

LIMIT_SECONDS = 240

TORCH = ("allreduce", "optimizer", "join", "unnamed", "shared", "state", "training", "refusals")
JOBS = {
    "mpirun": [f"tests/parallel/test_{part}.py" for part in (*TORCH, "stats", "check_replicas")],
    "horovodrun": [f"tests/parallel/test_{part}.py" for part in ("optimizer", "join", "restart")],
    "tensorflow": files("allreduce", "and_torch"),
}


@pytest.mark.check
@pytest.mark.check_only
@pytest.mark.parametrize("job", JOBS)
def test_the_path_in_two_ranks(job: str, tmp_path: Path) -> None:
    if job == "tensorflow":
        command, launcher, variables = COMMAND, "mpirun", KERAS_2
    else:
        command, launcher, variables = PYTEST, job, {}
    check(launch(launcher, 2, [*command, *JOBS[job]], LIMIT_SECONDS, tmp_path, variables), 2)
