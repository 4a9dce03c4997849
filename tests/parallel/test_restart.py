"""hvd.shutdown() and hvd.init() again in one process, as elastic training does."""

from __future__ import annotations

import os

import horovod.torch as hvd
import pytest
import torch
from helpers import check_mean, check_replicas, compressor, gradients
from rendezvous import restart

from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.torch import GlobalQSGD, allreduce

pytestmark = pytest.mark.skipif(
    os.environ.get("HOROVOD_CONTROLLER") != "gloo", reason="MPI can be started only once"
)


@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_an_instance_outlives_horovod(levels: str, name: str) -> None:
    compression = compressor(levels)
    inputs = gradients(1000, tag=18)
    for start in range(2):
        if start:
            restart(hvd)
        result = allreduce(inputs[hvd.rank()], name, compression=compression)
        check_mean(result, inputs, compression)
        check_replicas(result)


def test_no_dither_is_used_twice(name: str) -> None:
    """A rank that joins takes over the steps of those who were there, and so does a new tensor."""
    compression = GlobalQSGD(min_elements=0)
    simulated = SimulatedRanks(compression.config, hvd.size())
    inputs = gradients(1000, tag=19)
    for step in range(4):
        if step == 2:
            restart(hvd)
            if hvd.rank() == 0:
                compression = GlobalQSGD(min_elements=0)
        for tensor in (name, f"{name}.later") if step >= 2 else (name,):
            result = allreduce(inputs[hvd.rank()], tensor, compression=compression)
            if tensor == name:
                expected = simulated.average(name, [own.numpy() for own in inputs])
                assert torch.equal(result, torch.from_numpy(expected)), step
    (group,) = compression.state_dict()["process_sets"].values()
    assert group["first_step"] == 2
    assert group["steps"] == {name: 4, f"{name}.later": 4}


def test_auto_begins_its_trials_again(name: str) -> None:
    """With another number of ranks another way may be the fastest."""
    compression = GlobalQSGD(levels="auto", min_elements=0)
    inputs = gradients(1000, tag=20)
    for start in range(2):
        if start:
            restart(hvd)
        for _ in range(5):
            result = allreduce(inputs[hvd.rank()], name, compression=compression)
            check_replicas(result)
        (group,) = compression.state_dict()["process_sets"].values()
        assert sorted(group["trials"]["began"]) == [0, 1, 2, 3, 4]
