"""`gq-horovod calibrate` on hosts with shaped links, and the advice that it leads to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from gq_horovod import calibrate, cli  # noqa: E402
from tools import testbed  # noqa: E402

LIMIT_SECONDS = 300
HOSTS = 2
RATE = "200mbit"


def test_calibrate_measures_the_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = testbed.unavailable()
    if reason is None and os.geteuid() != 0:
        reason = "not root"
    if reason is not None:
        pytest.skip(f"no hosts can be made here: {reason}")
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    path = tmp_path / "calibration.json"
    with testbed.Testbed(HOSTS, RATE, prefix="gqcal") as bed:
        mpirun = [str(tools / "mpirun"), *bed.mpirun_args(), sys.executable]
        done = subprocess.run(
            bed.command(0, [*mpirun, "-m", "gq_horovod", "calibrate", "--output", str(path)]),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    assert done.returncode == 0, done.stdout
    assert "bandwidth of a pair" in done.stdout
    cluster = calibrate.load(path)
    assert cluster.ranks == HOSTS
    assert cluster.ranks_per_host == 1
    # No faster than the link, whatever else the machine does. (The filter lets the first 256 kB
    # of 8 MB pass at once, which looks 3 % faster.)
    assert 0 < cluster.bandwidth < 1.05 * 200e6
    advise = ["advise", "--params", "16M", "--step-compute", "100ms", "--json"]
    assert cli.main([*advise, "--calibration", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"]["bandwidth"] == cluster.bandwidth
