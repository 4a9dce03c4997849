"""The command of the job of all methods, run on this machine: two ranks, a small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checks import IN_IMAGE, K8S, ROOT, only, pods, render

pytest.importorskip("horovod")
pytest.importorskip("sklearn")
LIMIT_SECONDS = 300
STEPS = 3


def command(folder: Path, methods: str) -> list[str]:
    """What the launcher runs behind gq-launch, with paths of this machine."""
    documents = render(K8S / "overlays" / "local-cpu" / "wide-resnet" / "all")
    config = {**only(documents, "ConfigMap")["data"], "METHODS": methods}
    (launcher,) = pods(only(documents, "MPIJob"))["Launcher"]["spec"]["containers"]
    assert launcher["command"] == ["gq-launch"]
    words: list[str] = []
    for argument in launcher["args"]:
        word = re.sub(r"\$\((\w+)\)", lambda key: config[key[1]], argument)
        word = word.replace(IN_IMAGE, f"{ROOT}/").replace("=/results/", f"={folder}/")
        word = word.replace("=/data", f"={folder}/data").replace("=eth0", "=lo")
        words.append(word)
        if word == "mpirun":
            words += ["-np", "2", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]
    return [*words, f"--max-steps={STEPS}"]


def run(folder: Path, methods: str) -> subprocess.CompletedProcess[str]:
    here = Path(sys.executable).parent
    variables = {"OMP_NUM_THREADS": "1", "HOROVOD_CYCLE_TIME": "1", "LD_LIBRARY_PATH": ""}
    variables |= {"HOROVOD_CACHE_CAPACITY": "8192", "PYTHONPATH": str(ROOT)}
    variables |= {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    if os.geteuid() == 0:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        command(folder, methods),
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def test_all_methods_of_a_job(tmp_path: Path) -> None:
    done = run(tmp_path, "none nonsense two-hop-4")
    assert done.returncode == 1, done.stdout
    assert "invalid choice: 'nonsense'" in done.stdout
    assert re.search(r"(?m)^each_method: nonsense failed: status \d+$", done.stdout)
    runs = {}
    for method in ("none", "two-hop-4"):
        lines = (tmp_path / f"wide-resnet-{method}.jsonl").read_text().splitlines()
        runs[method] = [json.loads(line) for line in lines]
        final = runs[method][-1]
        assert (final["event"], final["steps"]) == ("final", STEPS)
        assert final["replicas_equal"]
        assert (tmp_path / "checkpoints" / f"wide-resnet-{method}" / "latest").exists()
    assert (runs["two-hop-4"][0]["compression"], runs["two-hop-4"][0]["bits"]) == ("two-hop", 4)
    report = (tmp_path / "report.txt").read_text()
    assert report in done.stdout
    assert re.search(r"(?m)^│ two-hop 4 bit +│ +1 │", report)

    # The launcher is started again: what has finished stays as it is.
    again = run(tmp_path, "none two-hop-4")
    assert again.returncode == 0, again.stdout
    for method in ("none", "two-hop-4"):
        assert f"each_method: {method}: has finished before" in again.stdout
        assert len((tmp_path / f"wide-resnet-{method}.jsonl").read_text().splitlines()) == len(
            runs[method]
        )
