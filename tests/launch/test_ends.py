"""The end of a job that reduces by nodes: no node is shut down before it is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from launcher import launch
from seldom import rare

LIMIT_SECONDS = 120
SCRIPT = Path(__file__).with_name("ends_by_nodes.py")


@pytest.mark.parametrize("how", ["exit", rare("shutdown"), rare("error")])
def test_the_slower_node_gets_the_last_mean(how: str, tmp_path: Path) -> None:
    job = launch("nodes", 4, [SCRIPT, how], LIMIT_SECONDS, tmp_path)
    assert not job.timed_out, job.report()
    assert (job.status != 0) is (how == "error"), job.report()
    assert all("MEAN 1.5" in text for text in job.ranks.values()), job.report()
