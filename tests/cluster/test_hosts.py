"""Ranks on several hosts: network namespaces with addresses of their own and slow links."""

from __future__ import annotations

import re
import sys

import pytest
from needs import needs_hosts, run

from tools import ranks, testbed

pytestmark = needs_hosts

HOSTS = 3


@pytest.fixture(scope="module")
def hosts() -> testbed.Testbed:
    with testbed.Testbed(HOSTS, "1gbit", prefix="gqtest") as bed:
        yield bed


def run_on(hosts: testbed.Testbed, *command: str) -> str:
    """Run a Python command in one rank on each host and return what all of them printed."""
    return run(*ranks.mpirun(hosts, HOSTS), "--tag-output", sys.executable, *command)


def test_training_and_mpi_operation_over_the_network(hosts: testbed.Testbed) -> None:
    tests = ["tests/parallel/test_training.py", "tests/parallel/test_mpi_ops.py"]
    selected = "training or closed_form or operation"
    options = ["-q", "--color=no", "-p", "no:cacheprovider", "-k", selected]
    output = run_on(hosts, "-m", "pytest", *tests, *options)
    passed = [line for line in output.splitlines() if " passed" in line]
    assert len(passed) == HOSTS, output


ALLREDUCES = """
import sys
import horovod.torch as hvd, torch
from gq_horovod.torch import GlobalQSGD, allreduce
from tools.testbed import interface_bytes
hvd.init()
torch.set_num_threads(1)
x = torch.randn(4_000_000, generator=torch.Generator().manual_seed(hvd.rank()))
for method in sys.argv[1:]:
    compression = {"none": hvd.Compression.none}.get(method) or GlobalQSGD(levels=method)
    allreduce(x, "warm", compression=compression)
    hvd.barrier()
    before = sum(interface_bytes())
    allreduce(x, "x", compression=compression)
    hvd.barrier()
    print(f"{method} BYTES {sum(interface_bytes()) - before} SENT", flush=True)
"""


def test_bytes_on_the_wire(hosts: testbed.Testbed) -> None:
    """As the interfaces count them, protocol headers and Horovod's own messages included."""
    methods = ("none", "standard", "exponential")
    output = run_on(hosts, "-c", ALLREDUCES, *methods)
    total = {}
    for method in methods:
        counts = [int(count) for count in re.findall(rf"{method} BYTES (\d+) SENT", output)]
        assert len(counts) == HOSTS, output
        total[method] = sum(counts)
    print(total)
    assert total["none"] / total["standard"] >= 3.9
    assert total["none"] / total["exponential"] >= 3.9
