"""TensorFlow: ranks that stop, steps that fail, and runs that are killed and resumed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from guarded_tf import TIMEOUT_SECONDS
from launcher import ROOT, Job, launch
from seldom import Record, rare

SCRIPT = ROOT / "tests" / "launch" / "guarded_tf.py"
LIMIT_SECONDS = 120


def run(launcher: str, directory: Path, *arguments: object) -> Job:
    directory.mkdir(exist_ok=True)
    variables = {"TF_USE_LEGACY_KERAS": "1"}
    job = launch(launcher, 2, [SCRIPT, *arguments], LIMIT_SECONDS, directory, variables)
    assert not job.timed_out, job.report()
    return job


def done(job: Job) -> list[str]:
    """The digest with which all ranks ended each training."""
    found = [re.findall(r"^DONE (\w+)", text, re.MULTILINE) for text in job.ranks.values()]
    assert found == [found[0]] * len(found), job.report()
    return list(found[0])


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_a_rank_that_stays_stopped(mode: str, tmp_path: Path, record_property: Record) -> None:
    job = run("mpirun", tmp_path, "freeze", mode)
    ended = time.time()
    assert job.status != 0, job.report()
    name = "x" if mode == "eager" else r"gq\.DistributedGradientTape_\S*"
    expected = rf"rank 0 on .*: the operation '{name}' has not moved for {TIMEOUT_SECONDS:g} s"
    assert re.search(expected, job.ranks[0]), job.report()
    (began,) = re.findall(r"^FAULT ([\d.]+)", job.ranks[1], re.MULTILINE)
    text = f"TensorFlow, {mode}, stopped for ever, timeout={TIMEOUT_SECONDS:g}"
    record_property("job", f"{text}: {ended - float(began):.1f} s to the end")


def test_a_graph_in_which_the_others_leave_the_tensor_to_horovod(tmp_path: Path) -> None:
    """No token is sent there, of which Horovod could say that it is no such tensor."""
    job = run("mpirun", tmp_path, "left")
    assert job.status != 0, job.report()
    expected = rf"the operation 'gq\.left\.norm' has not moved for {TIMEOUT_SECONDS:g} s"
    assert re.search(expected, job.ranks[1]), job.report()


@pytest.mark.parametrize("mode", ["graph", rare("eager")])
def test_a_step_that_failed_is_not_waited_for(mode: str, tmp_path: Path) -> None:
    """The watchdog ends nobody who goes on with something else."""
    job = run("mpirun", tmp_path, "caught", mode)
    assert job.status == 0, job.report()
    assert len(done(job)) == 1
    assert all(re.search("^CAUGHT True$", text, re.MULTILINE) for text in job.ranks.values())


@pytest.mark.parametrize("launcher", ["mpirun", rare("horovodrun")])
def test_a_killed_run_goes_on_with_the_same_bits(launcher: str, tmp_path: Path) -> None:
    """Killed in its second training; the first one was left alone."""
    killed = run(launcher, tmp_path / "killed", "train", tmp_path, "", "go", "kill")
    assert killed.status != 0, killed.report()
    (whole,) = done(killed)
    # What one rank saved is loaded on all.
    (path,) = re.findall(r"^KILLED (\S+)", killed.ranks[0], re.MULTILINE)
    resumed = run(launcher, tmp_path / "resumed", "train", tmp_path, path, "go", "forget")
    assert resumed.status == 0, resumed.report()
    right, wrong = done(resumed)
    assert right == whole
    assert wrong != whole
