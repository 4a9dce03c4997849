"""`gq-horovod calibrate` on hosts with shaped links, and the advice that it leads to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from needs import needs_hosts, run

from gq_horovod import cli
from gq_horovod.advisor import calibrate, model
from tools import ranks, testbed

pytestmark = needs_hosts

HOSTS = 2
RATE = "500mbit"


def test_calibrate_measures_the_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calibration.json"
    with testbed.Testbed(HOSTS, RATE, prefix="gqcal") as bed:
        command = [sys.executable, "-m", "gq_horovod", "calibrate", "--output", str(path)]
        printed = run(*ranks.mpirun(bed, 2 * HOSTS), *command)
    assert "bandwidth of a pair" in printed
    cluster = calibrate.load(path)
    assert cluster.ranks == 2 * HOSTS
    assert cluster.ranks_per_host == 2
    # What stays in a host does not pass the link.
    assert cluster.inner_bandwidth > cluster.bandwidth
    assert cluster.inner_bandwidth != model.Cluster(2, 1e9).inner_bandwidth
    # No faster than the link, whatever else the machine does. (The filter lets the first of 8 MB
    # pass at once, which looks 1 % faster.)
    assert 0 < cluster.bandwidth < 1.05 * 500e6
    advise = ["advise", "--params", "16M", "--step-compute", "100ms", "--json"]
    assert cli.main([*advise, "--calibration", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"]["bandwidth"] == cluster.bandwidth


def test_predictions_are_compared_with_steps(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--rates", "1gbit", "--models", "small", "--rounds", "2"]
    run(sys.executable, "benchmarks/predictions.py", *options, "--output", str(tmp_path))
    assert (tmp_path / "predictions.png").stat().st_size > 0
    rows = json.loads((tmp_path / "predictions.json").read_text())["results"]
    assert [row["method"] for row in rows] == [method.name for method in model.METHODS]
    for row in rows:  # of a computation of 100 ms, which nothing shortens
        assert row["measured_seconds"] > 0.1
        assert row["predicted_seconds"] >= row["compute_seconds"] > 0.1
        assert row["error"] == row["predicted_seconds"] / row["measured_seconds"] - 1
