"""Runs tests/parallel_tf inside the ranks of real jobs, over MPI and over Gloo."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import ROOT, launch
from test_parallel import PYTEST, check, summary

# Several times what they take on two idle cores; another job may run beside them.
LIMIT_SECONDS = 720

DIRECTORY = "tests/parallel_tf"
# Keras 2 is the one that all of Horovod works with; TensorFlow has Keras 3 unless it is told.
KERAS_2 = {"TF_USE_LEGACY_KERAS": "1"}
KERAS_3 = {"TF_USE_LEGACY_KERAS": "0"}


# Every rank warns in its own way, which is not what check() shall compare.
COMMAND = (*PYTEST, "-p", "no:warnings")


def files(*parts: str) -> list[str]:
    return [f"{DIRECTORY}/test_tf_{part}.py" for part in parts]


@pytest.mark.parametrize(
    ("transport", "ranks", "paths"),
    [
        ("mpirun", 1, files("allreduce", "gradients")),
        ("mpirun", 2, [DIRECTORY]),
        ("mpirun", 3, files("gradients", "names", "refusals")),
        ("horovodrun", 2, files("gradients", "keras", "refusals", "restart")),
        ("horovodrun", 3, files("gradients")),
    ],
)
def test_in_every_rank(
    transport: str,
    ranks: int,
    paths: list[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    graphs = {"GQ_TEST_ELASTIC": "1"} if (transport, ranks) == ("horovodrun", 3) else {}
    job = launch(transport, ranks, [*COMMAND, *paths], LIMIT_SECONDS, tmp_path, KERAS_2 | graphs)
    check(job, ranks)
    record_property("job", f"TensorFlow, {transport}, {ranks} ranks: {summary(job)}")


@pytest.mark.parametrize("levels", ["standard", "two-hop", "auto"])
@pytest.mark.parametrize("mode", ["graph", "eager disabled", "v1 behavior"])
def test_sessions_of_tensorflow_1(mode: str, levels: str, tmp_path: Path) -> None:
    command = (ROOT / "tests" / "launch" / "sessions_tf.py", mode, levels)
    job = launch("mpirun", 2, command, LIMIT_SECONDS, tmp_path, KERAS_2)
    assert job.status == 0, job.report()
    said = [re.findall(r"^(?:mean|\{.*\}) \w+$", text, re.M) for text in job.ranks.values()]
    assert said[0] == said[1]
    assert len(said[0]) == 12  # three trainings in two sessions, and a mean
    if levels != "auto":  # which remembers what it has tried
        assert said[0][0] == said[0][2]  # a session begins anew


def test_keras_3(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    job = launch("mpirun", 2, [*COMMAND, *files("keras3")], LIMIT_SECONDS, tmp_path, KERAS_3)
    check(job, 2)
    record_property("job", f"Keras 3, mpirun, 2 ranks: {summary(job)}")
