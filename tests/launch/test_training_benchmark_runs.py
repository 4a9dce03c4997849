"""benchmarks/training.py from end to end: two ranks over loopback, a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240

pytest.importorskip("sklearn")
pytest.importorskip("horovod")


def test_two_ranks(tmp_path: Path) -> None:
    methods = ["none", "fp16", "standard-8", "exponential-4-mpi"]
    command = [sys.executable, "benchmarks/training.py", "convnet", "--rates", "loopback"]
    command += ["--ranks", "2", "--rounds", "2", "--steps", "1", "--quality", "2"]
    command += ["--methods", ",".join(methods), "--output", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    job = json.loads((tmp_path / "training-convnet.json").read_text())["jobs"][0]
    assert (tmp_path / "training-convnet.png").stat().st_size > 0
    rows = job["rows"]
    assert list(rows) == ["compute alone", *methods]
    for name in methods:
        row = rows[name]
        assert row["step"] > 0
        assert row["alone"] > 0
        assert len(job["measured"][name]["steps"]) == 2
        assert 0 < row["quality"] < 5
        assert job["replicas_equal"][name]
    # Read from the interface: each rank sends its gradients, or fewer bytes.
    size = 4 * job["parameters"]
    assert size < rows["none"]["bytes"] < 1.2 * size
    assert 1.8 < rows["none"]["bytes"] / rows["fp16"]["bytes"] < 2.1
    assert 3.5 < rows["none"]["bytes"] / rows["standard-8"]["bytes"] < 4.1
    assert rows["none"]["bytes"] / rows["exponential-4-mpi"]["bytes"] > 6
    # Only the methods with codes run kernels.
    assert "kernel:quantize" not in rows["none"]["phases"]
    assert rows["fp16"]["phases"]["kernel:cast"] > 0
    assert rows["standard-8"]["phases"]["kernel:quantize"] > 0
    assert rows["exponential-4-mpi"]["phases"]["kernel:reduce"] > 0
