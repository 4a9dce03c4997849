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


# What a third rank adds: process sets, sums that are rounded, and ranks that agree against one.
WITH_THREE = [
    *files("names"),
    *(
        f"{DIRECTORY}/test_tf_{own}"
        for own in (
            "allreduce.py::test_a_process_set_reduces_among_its_ranks",
            "allreduce.py::test_sum",
            "gradients.py::test_a_process_set_of_a_tape",
            "gradients.py::test_a_bad_value_of_one_rank_reaches_all",
            "gradients.py::test_gradients_on_the_levels_are_those_of_horovod",
            "gradients.py::test_gradients_that_are_reduced_together",
            "gradients.py::test_options_of_the_tape",
            "gradients.py::test_ranks_that_have_joined_bring_zeros",
            "gradients.py::test_ranks_whose_buckets_differ",
            "guards.py::test_a_process_set_compares_its_own",
            "refusals.py::test_another_process_set_than_the_callers",
            "refusals.py::test_ranks_with_different_options",
        )
    ),
]


@pytest.mark.parametrize(
    ("transport", "ranks", "paths"),
    [
        ("mpirun", 1, files("allreduce", "gradients")),
        ("mpirun", 2, [DIRECTORY]),
        ("mpirun", 3, WITH_THREE),
        # Over Gloo: how Horovod refuses and restarts, and the graphs of an elastic job. Where
        # TensorFlow and Keras meet Horovod, nothing knows of the launcher.
        ("horovodrun", 2, files("gradients", "refusals", "restart")),
    ],
)
def test_in_every_rank(
    transport: str,
    ranks: int,
    paths: list[str],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    graphs = {"GQ_TEST_ELASTIC": "test_tf_gradients"} if transport == "horovodrun" else {}
    job = launch(transport, ranks, [*COMMAND, *paths], LIMIT_SECONDS, tmp_path, KERAS_2 | graphs)
    check(job, ranks)
    record_property("job", f"TensorFlow, {transport}, {ranks} ranks: {summary(job)}")


@pytest.mark.parametrize("mode", ["graph", "eager disabled", "v1 behavior"])
def test_sessions_of_tensorflow_1(mode: str, tmp_path: Path) -> None:
    """One job for each mode, since TensorFlow cannot leave one again."""
    choices = ["standard", "two-hop", "auto"]
    command = (ROOT / "tests" / "launch" / "sessions_tf.py", mode, *choices)
    job = launch("mpirun", 2, command, LIMIT_SECONDS, tmp_path, KERAS_2)
    assert job.status == 0, job.report()
    line = re.compile(r"^levels (.*)$|^((?:mean|\{.*\}) \w+)$", re.M)
    said = [line.findall(text) for text in job.ranks.values()]
    assert said[0] == said[1]
    begins = [place for place, (levels, _) in enumerate(said[0]) if levels]
    assert [said[0][place][0] for place in begins] == choices
    for place, levels in zip(begins, choices, strict=True):
        lines = said[0][place + 1 :][:12]  # three trainings in two sessions, and a mean
        assert len(lines) == 12
        assert all(line for _, line in lines)
        if levels != "auto":  # which remembers what it has tried
            assert lines[0] == lines[2]  # a session begins anew


def test_keras_3(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    job = launch("mpirun", 2, [*COMMAND, *files("keras3")], LIMIT_SECONDS, tmp_path, KERAS_3)
    check(job, 2)
    record_property("job", f"Keras 3, mpirun, 2 ranks: {summary(job)}")
