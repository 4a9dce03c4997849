"""Runs tests/parallel/test_nodes.py in two nodes of two ranks, over MPI and over Gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import launch
from seldom import rare
from test_parallel import LIMIT_SECONDS, PYTEST, check, summary

# Over Gloo Horovod sees two hosts, over MPI the tests say that there are.
BY_NODES = ["mpirun", "mpirun, transport='mpi'", "nodes"]
# What a flat reduction has to do as well.
ALSO = ["allreduce", "buckets", "gpu_tensors", "join", "optimizer", "state", "unnamed"]


@pytest.mark.parametrize(
    ("way", "files"),
    [*((way, ["nodes"]) for way in BY_NODES), *(rare(way, ALSO) for way in BY_NODES[:2])],
)
def test_by_nodes(
    way: str,
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    transport, *over = way.split(", ")
    if over:
        monkeypatch.setenv("GQ_TEST_TRANSPORT", "mpi")
    if transport == "mpirun":
        monkeypatch.setenv("GQ_TEST_RANKS_PER_NODE", "2")
    command = [*PYTEST, *(f"tests/parallel/test_{own}.py" for own in files)]
    job = launch(transport, 4, command, LIMIT_SECONDS, tmp_path)
    check(job, 4)
    record_property("job", f"{way}, 4 ranks on 2 nodes: {summary(job)}")
