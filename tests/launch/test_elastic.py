"""Horovod elastic over Gloo: a worker is killed, and the others go on from the last commit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from elastic import COMMIT_EVERY, KILL_AT, STEPS, undisturbed
from launcher import launch

# Some twenty seconds on idle cores; elastic.py itself ends a hang after 150.
LIMIT_SECONDS = 240
SCRIPT = Path(__file__).with_name("elastic.py")


def test_a_killed_worker(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Horovod never uses the host of a failed worker again, so that one has a host of its own."""
    discovery = tmp_path / "hosts.sh"
    discovery.write_text("#!/bin/sh\necho localhost:2\necho 127.0.0.1:1\n")
    discovery.chmod(0o755)
    job = launch("elastic", 3, [SCRIPT], LIMIT_SECONDS, tmp_path)
    text = job.output
    assert not job.timed_out, job.report()
    assert re.search(rf"KILLED {KILL_AT}\b", text), text
    steps = [
        (int(step), int(size), int(levels))
        for step, size, levels in re.findall(r"STEP (\d+) (\d+) (\d+) ", text)
    ]
    # Eight bits: floor(127 / 3) levels, and then floor(127 / 2).
    assert {(size, levels) for _, size, levels in steps} == {(3, 42), (2, 63)}
    commit = KILL_AT // COMMIT_EVERY * COMMIT_EVERY
    assert {step for step, size, _ in steps if size == 3} >= set(range(KILL_AT))
    assert {step for step, size, _ in steps if size == 2} == set(range(commit, STEPS))
    assert re.findall(r"LEFT (.*)", text) == ["0 0 1 0"] * 2
    losses = re.findall(r"DONE ([\d.e+-]+) (\w+)", text)
    assert len(losses) == 2, text
    assert losses[0] == losses[1]  # replicas equal bit for bit
    assert float(losses[0][0]) == pytest.approx(undisturbed(), rel=0.05)
    ratio = float(losses[0][0]) / undisturbed()
    record_property("job", f"elastic: from 3 workers to 2, final loss {ratio:.4f} of exact steps'")
