"""Ranks that do different things: the job ends, in bounded time, and every rank says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launcher import Job, launch
from seldom import rare

# Two ranks take some five seconds to start on idle cores; mistakes.py itself ends a hang after 60.
LIMIT_SECONDS = 180
SCRIPT = Path(__file__).with_name("mistakes.py")


def run(transport: str, cases: list[str], directory: Path) -> Job:
    job = launch(transport, 2, [SCRIPT, *cases], LIMIT_SECONDS, directory)
    assert not job.timed_out, job.report()
    return job


def said(job: Job, rank: int, case: str) -> str:
    """What a rank printed about a case."""
    found = re.search(rf"^{case}: (.*)$", job.ranks[rank], flags=re.MULTILINE)
    assert found, job.report()
    return found[1]


# ------------------------------------------------------------------- mistakes that can be survived

DISAGREE = (
    r"ConfigMismatchError: GlobalQSGD: the ranks disagree about tensor .*{case}.* "
    r"Every rank has to reduce a tensor of the same name, shape and dtype"
)
EXPLAINED = (
    r"HorovodInternalError: Mismatched data types.*tensor '.*{case}.*' has "
    r"(the shape \(5000,\) and the dtype float32, and is compressed|"
    r"the shape \((4|100),\) and the dtype float32, and is left)"
)
SURVIVED = {
    "different_sizes": DISAGREE,
    "different_sizes_with_as_many_blocks": DISAGREE,
    "different_shapes_of_as_many_elements": DISAGREE,
    "different_dtypes": DISAGREE,
    "different_sizes_among_others": DISAGREE,
    # Horovod's own error: one rank reduces the tensor itself, the other a token. And what of.
    "too_small_on_one_rank": EXPLAINED,
    "as_small_as_the_token_on_one_rank": EXPLAINED,
    "going_on_with_the_same_compression": "no error",
}


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return run("mpirun", list(SURVIVED), tmp_path_factory.mktemp("survived"))


@pytest.mark.parametrize("case", list(SURVIVED))
def test_every_rank_gets_an_error_and_others_reductions_work(case: str, survived: Job) -> None:
    for rank in survived.ranks:
        text = said(survived, rank, case)
        assert re.search(SURVIVED[case].replace("{case}", case), text), text
        if case != list(SURVIVED)[-1]:
            assert said(survived, rank, f"after {case}") == "no error"


# ------------------------------------------------------------------------ mistakes that end the job

SHUT_DOWN = "HorovodInternalError: Horovod has been shut down"


@pytest.mark.parametrize("transport", ["mpirun", rare("horovodrun")])
def test_one_rank_without_compression(transport: str, tmp_path: Path) -> None:
    """The rank without compression waits for its gradient, until the others give up."""
    case = "one_rank_without_compression"
    job = run(transport, [case], tmp_path)
    assert job.status != 0
    assert "not every rank has reported its configuration; pass compression=" in said(job, 0, case)
    assert SHUT_DOWN in said(job, 1, case)


def test_different_configurations(tmp_path: Path) -> None:
    job = run("mpirun", ["different_bits"], tmp_path)
    assert job.status != 0
    for rank in job.ranks:
        assert "bits is 8 on rank 0, 4 on rank 1. " in said(job, rank, "different_bits")


def test_a_killed_rank(tmp_path: Path) -> None:
    """Over Horovod; test_faults.py has the other transport, and Gloo."""
    job = run("mpirun", ["killed"], tmp_path)
    assert "killed now" in job.ranks[1], job.report()
    assert job.status != 0


# What the rank says that shuts Horovod down, while the other one goes on.
SHUTTING_DOWN = {
    "error_on_one_rank": "ZeroDivisionError: the user's own mistake",
    "one_rank_ends_early": "no error",
    # Horovod alone stands still then, with some versions of PyTorch.
    "shut_down_while_operations_begin": "no error",
}


@pytest.mark.parametrize("case", SHUTTING_DOWN)
def test_one_rank_shuts_down(case: str, tmp_path: Path) -> None:
    job = run("mpirun", [case], tmp_path)
    assert job.status != 0
    assert SHUT_DOWN in said(job, 0, case)
    assert said(job, 1, case) == SHUTTING_DOWN[case]


@pytest.mark.parametrize("transport", ["mpirun", rare("horovodrun")])
def test_operations_of_the_program_that_never_match(transport: str, tmp_path: Path) -> None:
    """Without a word they would wait for ever, and what is in flight beside them too."""
    case = "operations_of_the_program_that_do_not_match"
    job = run(transport, [case], tmp_path)
    assert job.status != 0
    found = [
        re.search(
            rf"rank {rank} on .*: the operation 'allreduce.{case}.{rank}' has not moved", text
        )
        for rank, text in job.ranks.items()
    ]
    assert any(found), job.report()
