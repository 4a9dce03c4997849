"""Benchmarks of steps on ranks from end to end, small, with the cores for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_benchmarks_run import run

pytest.importorskip("sklearn")
pytest.importorskip("horovod")


def test_training(tmp_path: Path) -> None:
    methods = ["none", "fp16", "standard-8", "exponential-4-mpi"]
    options = ["--rates", "loopback", "--ranks", "2", "--rounds", "2", "--steps", "1"]
    options += ["--quality", "2", "--methods", ",".join(methods)]
    run("training.py", "convnet", *options, output=tmp_path)
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
    assert rows["none"]["bytes"] / rows["standard-8"]["bytes"] > 3.5
    # Of the gradients alone: none's bytes have the negotiation of few steps in them, as above.
    assert size / rows["standard-8"]["bytes"] < 4.1
    assert rows["none"]["bytes"] / rows["exponential-4-mpi"]["bytes"] > 6
    # Only the methods with codes run kernels.
    assert "kernel:quantize" not in rows["none"]["phases"]
    assert rows["fp16"]["phases"]["kernel:cast"] > 0
    assert rows["standard-8"]["phases"]["kernel:quantize"] > 0
    assert rows["exponential-4-mpi"]["phases"]["kernel:reduce"] > 0


def test_training_with_replayed_computation(tmp_path: Path) -> None:
    options = ["--rates", "loopback", "--ranks", "2", "--rounds", "2", "--steps", "1"]
    options += ["--methods", "none,two-hop-8", "--groups", "3"]
    options += ["--replay", "0.5", "--launcher", "horovodrun"]
    printed = run("training.py", "convnet", *options, output=tmp_path)
    assert "Computation replayed at 0.5 times its recorded duration" in printed
    document = json.loads((tmp_path / "training-convnet.json").read_text())
    assert (document["groups"], document["serial"]) == (3, False)
    job = document["jobs"][0]
    times = job["replayed"]
    names = [name for name in times if name not in ("forward", "rest", "update")]
    # The last layer's gradients come first.
    assert len(names) == 12
    assert {names[0], names[1]} == {"14.weight", "14.bias"}
    rows = job["rows"]
    slept = sum(times.values())
    assert slept <= rows["compute alone"]["step"]
    for name in ("none", "two-hop-8"):
        assert rows[name]["step"] >= slept
        assert rows[name]["bytes"] > 1e6  # its hooks ran
    size = 4 * job["parameters"]
    assert size < rows["none"]["bytes"] < 1.2 * size


def test_allreduce(tmp_path: Path) -> None:
    options = ["--rates", "loopback", "--ranks", "2", "--rounds", "2", "--elements", "100,5000"]
    printed = run("allreduce.py", *options, output=tmp_path)
    (job,) = json.loads((tmp_path / "allreduce.json").read_text())["jobs"]
    assert (tmp_path / "allreduce.png").stat().st_size > 0
    assert list(job["results"]) == ["100", "5000"]
    for rows in job["results"].values():
        assert rows["Horovod float32"]["speedup"] == 1
        for name, row in rows.items():
            assert row["milliseconds"] > 0
            assert row["rounds"] == 2
            assert row["bound"] is None  # nobody knows how fast loopback is
            assert name in printed
