"""Models and training steps that are saved by a job, and loaded by processes without Horovod."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
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


def loaded(
    directory: Path, keras: int, module: str, choices: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The outcomes of every choice's artifacts, in a process that has imported `module` only."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "load", directory, module, *choices],
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
    line = rf"^({'|'.join(choices)})/([^:\n]+): (.*)$"
    found = re.findall(line, done.stdout, re.MULTILINE)
    outcomes: dict[str, dict[str, str]] = {choice: {} for choice in choices}
    for choice, artifact, outcome in found:
        outcomes[choice][artifact] = outcome
    return outcomes


@pytest.mark.parametrize(
    ("keras", "levels"),
    [(2, "two-hop"), (3, "standard"), rare(2, "standard"), rare(3, "two-hop"), rare(2, "auto")],
)
def test_what_loads_without_compression_loads_with_it(
    keras: int, levels: str, tmp_path: Path
) -> None:
    """Saved by two ranks; loaded and run where Horovod is not initialized, or not even imported."""
    said = say(tmp_path / "save", keras, "save", tmp_path, "none", levels, ranks=2)
    assert said[0] == said[1]
    assert [line.startswith("weights") for line in said[0]].count(True) == 2
    # What was compressed goes first, into a process that has loaded nothing before.
    choices = (levels, "none")
    with ThreadPoolExecutor(os.cpu_count()) as processes:
        found_by = processes.map(lambda module: loaded(tmp_path, keras, module, choices), MODULES)
        outcomes = dict(zip(MODULES, found_by, strict=True))
    for module, choice in product(MODULES, reversed(choices)):
        found = outcomes[module][choice]
        step = found.pop("step", "")
        plain = outcomes[module]["none"]
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
