"""hvd.join() with TensorFlow: a job for each case, see join_tf.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import ROOT, launch
from seldom import rare

LIMIT_SECONDS = 240
SHARES = ("two-hop", "exponential")  # whose Alltoall Horovod does not have for a rank that joined


@pytest.mark.parametrize(
    ("transport", "ranks", "mode", "levels", "steps"),
    [
        ("mpirun", 3, "graph", "standard", 0),
        ("mpirun", 3, "eager", "standard", 0),
        rare("mpirun", 2, "graph", "standard", 2),
        rare("horovodrun", 2, "graph", "standard", 0),
        rare("mpirun", 3, "graph", "two-hop", 2),
        ("mpirun", 2, "eager", "two-hop", 0),
        ("horovodrun", 2, "graph", "exponential", 2),
        rare("mpirun", 2, "eager", "exponential", 2),
        ("mpirun", 3, "graph", "auto", 5),
        rare("horovodrun", 2, "eager", "auto", 0),
    ],
)
def test_a_rank_joins_and_comes_back(
    transport: str, ranks: int, mode: str, levels: str, steps: int, tmp_path: Path
) -> None:
    command = (ROOT / "tests" / "launch" / "join_tf.py", mode, levels, steps)
    job = launch(transport, ranks, command, LIMIT_SECONDS, tmp_path, {"TF_USE_LEGACY_KERAS": "1"})
    assert job.status == 0, job.report()
    results = set()
    for rank, text in job.ranks.items():
        lines = text.splitlines()
        refused = [line for line in lines if line.startswith("refused")]
        assert len(refused) == (3 if levels in SHARES and rank < ranks - 1 else 0)
        for line in refused:
            assert "levels must be 'standard' where ranks call hvd.join()" in line
            assert repr(levels) in line
        differs = [line for line in lines if line.startswith("differs")]
        assert len(differs) == 1 + (steps == 0 and ranks > 2 and rank < ranks - 1)
        assert all("configured differently" in line for line in differs)
        results |= {line for line in lines if line.startswith("result")}
    assert len(results) == 1
