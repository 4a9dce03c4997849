"""The scripts of examples/quickstart in two ranks, as the tutorial starts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launcher import ROOT, Job, launch

# Less than a minute is what the tutorial says of them; cores that are shared take longer.
LIMIT_SECONDS = 180
FOLDER = ROOT / "examples" / "quickstart"


def run(name: str, directory: Path) -> Job:
    job = launch("mpirun", 2, [FOLDER / name], LIMIT_SECONDS, directory, {"GQ_HOROVOD_LOG": ""})
    assert not job.timed_out, job.report()
    assert job.status == 0, job.report()
    assert "gq_horovod" not in job.report()  # nothing is logged unless somebody asks for it
    return job


@pytest.mark.parametrize("name", ["train_pytorch.py", "train_keras.py"])
def test_training_ends_where_it_does_without_compression(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"train_pytorch.py": "torch", "train_keras.py": "keras"}[name])
    job = run(name, tmp_path)
    losses = dict(re.findall(r"^(\w+) +loss .*: ([0-9.]+)$", job.ranks[0], re.MULTILINE))
    assert set(losses) == {"NoneCompressor", "GlobalQSGD"}, job.report()
    none, ours = float(losses["NoneCompressor"]), float(losses["GlobalQSGD"])
    # log(2) = 0.69 is the loss of a network that has learned nothing. Four runs with other seeds of
    # the dither stay within 1 %.
    assert none < 0.4
    assert abs(ours / none - 1) < 0.05


def test_errors_of_repeated_means_cancel(tmp_path: Path) -> None:
    job = run("reduce_mpi.py", tmp_path)
    pattern = r"^(\S+) +(\d) bit: squared error (\S+) of one mean, (\S+) of 16 .* same=True$"
    lines = re.findall(pattern, job.ranks[0], re.MULTILINE)
    assert len(lines) == 4, job.report()
    for levels, bits, once, often in lines:
        # A million errors: without a bias the ratio is 16 but for some per mille; figures have
        # six digits, so that the smallest is rounded by 5 %.
        assert 14 < float(once) / float(often) < 18, (levels, bits)


def test_scripts_are_short() -> None:
    scripts = sorted(FOLDER.glob("*.py"))
    assert len(scripts) == 3
    for script in scripts:
        assert len(script.read_text().splitlines()) <= 30, script
