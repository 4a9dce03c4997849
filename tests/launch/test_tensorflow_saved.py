"""Models and training steps that are saved by a job, and loaded by processes without Horovod."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from launcher import ROOT, launch
from seldom import rare

SCRIPT = ROOT / "tests" / "launch" / "saved_tf.py"
LIMIT_SECONDS = 240
MODULES = ("nothing", "horovod.tensorflow", "gq_horovod.tensorflow")  # that a process has imported


def say(directory: Path, keras: int, *command: object, ranks: int) -> dict[int, list[str]]:
    """What each rank of a job says."""
    directory.mkdir(parents=True)
    variables = {"TF_USE_LEGACY_KERAS": str(int(keras == 2))}
    job = launch("mpirun", ranks, [SCRIPT, *command], LIMIT_SECONDS, directory, variables)
    assert job.status == 0, job.report()
    starts = ("weights", "copy", "norms")
    return {
        rank: [line for line in text.splitlines() if line.startswith(starts)]
        for rank, text in job.ranks.items()
    }


def loaded(directory: Path, keras: int, module: str) -> dict[str, str]:
    """The outcome of every artifact in a process that has imported `module` only."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "load", directory, module],
        cwd=ROOT,
        env={
            **os.environ,
            "TF_USE_LEGACY_KERAS": str(int(keras == 2)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize(
    ("keras", "levels"),
    [(2, "two-hop"), (3, "standard"), rare(2, "standard"), rare(3, "two-hop"), rare(2, "auto")],
)
def test_what_loads_without_compression_loads_with_it(
    keras: int, levels: str, tmp_path: Path
) -> None:
    """Saved by two ranks; loaded and run where Horovod is not initialized, or not even imported."""
    for choice in ("none", levels):
        saved = tmp_path / choice
        said = say(tmp_path / f"job {choice}", keras, "save", saved, choice, ranks=2)
        assert said[0] == said[1]
        assert said[0][-1].startswith("weights")
    loads = list(product(("none", levels), MODULES))
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        found_by = processes.map(
            lambda load: loaded(tmp_path / load[0] / "1", keras, load[1]), loads
        )
        outcomes = dict(zip(loads, found_by, strict=True))
    for (choice, module), found in outcomes.items():
        step = found.pop("step", "")
        plain = outcomes["none", module]
        assert found == plain, (choice, module)
        assert list(found.values()).count("ok") >= (3 if module == "nothing" else len(found))
        if module == "gq_horovod.tensorflow" or (module != "nothing" and choice == "none"):
            assert "Horovod has not been initialized; use hvd.init()" in step
        elif module != "nothing":
            assert "gq_horovod.tensorflow (to be imported before" in step
    # A job of another process, with more ranks than have saved it, goes on with the loaded step.
    said = say(tmp_path / "train", keras, "train", tmp_path / levels / "0", ranks=3)
    assert said[0] == said[1] == said[2]
    assert all(float(norm) > 0 for norm in said[0][0].split()[1:])
