"""Horovod's timeline shows the stages of a reduction under names that say what they are."""

from __future__ import annotations

import re
from pathlib import Path

from launcher import launch

SCRIPT = """
import time
import horovod.torch as hvd, torch
from gq_horovod.torch import GlobalQSGD, allreduce
hvd.init()
for levels in ("standard", "exponential", "two-hop"):
    allreduce(torch.ones(5000), f"layer.{levels}", compression=GlobalQSGD(levels=levels))
time.sleep(2)  # a thread of its own writes the file, and does not end with all of it written
hvd.shutdown()
"""


def test_names_of_the_stages(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    job = launch("mpirun", 2, ["-c", SCRIPT], 120, tmp_path, {"HOROVOD_TIMELINE": str(file)})
    assert job.status == 0, job.report()
    # Not parsed: Horovod leaves the list open when it ends.
    names = set(re.findall(r'"name": "([^"]*\bgq\.[^"]*)"', file.read_text()))
    stages = {"standard": ["norm", "codes.0"]}
    stages["exponential"] = stages["two-hop"] = ["norm", "codes.0", "mean.0"]
    for levels, expected in stages.items():
        found = {name.partition(f"gq.layer.{levels}.")[2] for name in names} - {""}
        assert found == set(expected), names
